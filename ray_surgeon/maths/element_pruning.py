"""Single elements or N:M groups of one linear: costs, and the update.

Source: docs/method.md, sections 3 to 6; The LLM Surgeon, section 3.2 and appendix A.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from ray_surgeon.maths.conjugate import ElementUpdate, update_elements
from ray_surgeon.maths.curvature import Basis, Linear, LinearCurvature, Pair, Removal
from ray_surgeon.maths.masks import ElementMask
from ray_surgeon.maths.threshold import check_costs


@dataclass(frozen=True)
class ElementUnits:
    """What is pruned as one: single elements, or all but `n` of `m` inputs of a row."""

    n: int = 0  # elements of a group that stay; 0 for single elements
    m: int = 1  # elements of a group; 1 for single elements

    @property
    def num_removed(self) -> int:
        """Elements that are pruned with one unit."""
        return self.m - self.n


@dataclass(frozen=True)
class ElementCandidates:
    """What the costs of a linear's units follow from.

    With one Kronecker term, nothing as large as the weights is kept.
    """

    scales: Pair  # see `element_costs`; zero where an input or a gradient is always zero
    groups: Pair | None  # costs and best patterns, see `group_costs`; None for single elements
    units: ElementUnits  # what is pruned as one
    basis: Basis

    def costs(self, linear: Linear, mask: ElementMask) -> Tensor:
        """Return the costs [R, units a row] float32 of all units.

        Those that may not be pruned have infinity.

        Raises:
            FloatingPointError: a cost is not usable.
        """
        kept = mask.kept.to(linear.W.device)[:, : linear.num_inputs]
        if self.groups is None:
            costs = element_costs(linear, self.scales).float()
            excluded = ~kept
        else:
            costs = self.groups[0].float().clone()
            excluded = kept.reshape(len(kept), -1, self.units.m).sum(dim=2) <= self.units.n
        check_costs(linear.name, costs.masked_fill(excluded, 0.0))
        return costs.masked_fill_(excluded, torch.inf)

    def prune(
        self, linear: Linear, mask: ElementMask, threshold: float, update: ElementUpdate
    ) -> tuple[Removal, ElementMask]:
        """Prune every unit whose cost is at most the threshold and update what stays.

        Args:
            linear: as for `find_elements`.
            mask: what earlier shots kept.
            threshold: the global one, a float32 number like the costs.
            update: how.
        """
        chosen = self.costs(linear, mask) <= threshold
        if self.groups is not None:
            places = torch.arange(self.units.m, device=chosen.device)
            is_removed = self.groups[1][:, :, None] & (1 << places) != 0
            chosen = (is_removed & chosen[:, :, None]).flatten(1)
        kept = mask.kept.to(chosen.device, copy=True)
        kept[:, : linear.num_inputs] &= ~chosen
        live = self.basis.part
        removal = _updated(self.basis.curvature(linear), live.of(kept), update)
        return replace(removal, W=live.put(removal.W, linear.W * kept)), ElementMask(kept.cpu())


def find_elements(linear: Linear, units: ElementUnits, costs: str) -> ElementCandidates:
    """Return what the costs of all units follow from.

    Args:
        linear: groups start at column 0 and never reach the bias, which always stays.
        units: what is pruned as one.
        costs: ``obs`` (with the optimal update of the others; of a group, the exact joint cost of
            its best pattern), ``obs_sum`` (the sum of single costs) or ``obd`` (that sum without
            an update).

    Raises:
        FloatingPointError: a factor is not usable.
    """
    curvature = LinearCurvature(linear, linear.live)
    scales = curvature.element_scales(costs)
    groups = None
    if units.m > 1 and costs == "obs":
        groups = group_costs(curvature, units)
    elif units.m > 1:
        groups = summed_group_costs(element_costs(linear, scales), units)
    return ElementCandidates(scales, groups, units, curvature.basis)


def _updated(curvature: LinearCurvature, kept: Tensor, update: ElementUpdate) -> Removal:
    W = curvature.W
    if update.solver == "conjugate_gradients":
        return update_elements(W, curvature.terms, kept, update)
    if update.solver == "none":
        after = W * kept
    elif curvature.is_extended:
        inverse = curvature.inverse
        after = (W - inverse.solve(W * ~kept / inverse.diagonal())) * kept
    else:
        A_inverse = curvature.A.inverse()
        G_inverse = curvature.G.inverse()
        alone = W * ~kept / torch.outer(G_inverse.diagonal(), A_inverse.diagonal())
        after = (W - G_inverse @ alone @ A_inverse) * kept
    return Removal(after, curvature.quadratic_cost(after - W), 0.0)


def element_costs(linear: Linear, scales: Pair) -> Tensor:
    """Cost of each element but the bias's: 1/2 W_rc^2 times the product of the scales at (r, c).

    After the optimal update of all others (OBS) the product is 1 / [F^-1]_(r,c),(r,c) = 1 /
    ([G^-1]_rr [A^-1]_cc). Without any update (OBD) it is the diagonal of F, G_rr A_cc.

    Args:
        linear: whose weights they are.
        scales: see `LinearCurvature.element_scales`.

    Returns:
        [R, num_inputs] costs, in the loss's units.
    """
    by_row, by_column = scales
    return (0.5 * linear.W.square() * (by_row * by_column))[:, : linear.num_inputs]


def group_costs(curvature: LinearCurvature, units: ElementUnits) -> Pair:
    """Exact joint cost of the best pattern of every N:M group: 1/2 w_P ([F^-1]_PP)^-1 w_P^T.

    Groups are `m` consecutive inputs of one row, starting at column 0.

    Returns:
        [R, num_inputs / m] costs, and likewise the places in the group that the best pattern
        prunes, as the sum of 2^place; where nothing is alive, 0 and the first places.
    """
    linear = curvature.linear
    live = curvature.part
    alive = live.columns[: linear.num_inputs]
    columns = torch.where(alive, alive.cumsum(0) - 1, -1).view(-1, units.m)
    costs = linear.W.new_zeros(len(linear.W), len(columns))
    choice = torch.full_like(costs, (1 << units.num_removed) - 1, dtype=torch.int64)
    if not alive.any():
        return costs, choice
    inverse_blocks, row_factor = curvature.inverse_blocks(columns)
    weights = linear.W[live.rows][:, : linear.num_inputs] * alive
    groups = weights.view(len(weights), *columns.shape)
    best = groups.new_full(groups.shape[:2], torch.inf)
    best_pattern = choice[live.rows]
    for places in map(list, combinations(range(units.m), units.num_removed)):
        blocks = inverse_blocks[:, :, places][:, :, :, places]
        inner = torch.linalg.inv(blocks).expand(len(groups), -1, -1, -1)
        w = groups[:, :, places]
        cost = 0.5 * torch.einsum("rgi,rgij,rgj->rg", w, inner, w) / row_factor[:, None]
        best_pattern[cost < best] = sum(1 << place for place in places)
        best = torch.where(cost < best, cost, best)
    costs[live.rows] = best
    choice[live.rows] = best_pattern
    return costs, choice


def summed_group_costs(costs: Tensor, units: ElementUnits) -> Pair:
    """Cost of every N:M group: the sum of its ``m - n`` smallest single costs [R, num_inputs].

    This is the paper's choice. Returns what `group_costs` does.
    """
    groups = costs.view(len(costs), -1, units.m)
    smallest = groups.sort(dim=-1, stable=True).indices[:, :, : units.num_removed]
    places = smallest.sort(dim=-1).values
    return groups.gather(-1, places).sum(dim=-1), (1 << places).sum(dim=-1)
