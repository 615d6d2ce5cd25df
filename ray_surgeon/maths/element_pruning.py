"""Costs and updates of single elements or N:M groups of one linear.

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
    """The units of pruning: single elements, or all but `n` of `m` inputs of a row."""

    n: int = 0  # number of elements of a group that stay; 0 for single elements
    m: int = 1  # number of elements of a group; 1 for single elements

    @property
    def num_removed(self) -> int:
        """Number of elements that are pruned with one unit."""
        return self.m - self.n


@dataclass(frozen=True)
class ElementCandidates:
    """The data from which the costs of a linear's units are computed.

    For single elements, nothing as large as the weights is stored if F is one Kronecker product.
    """

    scales: Pair  # see `element_costs`; zero where an input or a gradient is always zero
    # costs and best patterns, see `group_costs`; None for single elements
    groups: Pair | None
    units: ElementUnits
    basis: Basis

    def costs(self, linear: Linear, mask: ElementMask) -> Tensor:
        """Return the costs [R, units per row] float32 of all units.

        The cost of units that may not be pruned is infinite.

        Args:
            linear: the linear that was passed to `find_elements`.
            mask: elements that earlier shots kept.

        Raises:
            FloatingPointError: a cost is NaN, infinite or negative.
        """
        kept = mask.kept.to(linear.W.device)[:, : linear.num_inputs]
        if self.groups is None:
            costs = element_costs(linear, self.scales).float()
            excluded = ~kept
        else:
            group_costs, _ = self.groups
            costs = group_costs.float().clone()
            num_kept = kept.reshape(len(kept), -1, self.units.m).sum(dim=2)
            excluded = num_kept <= self.units.n
        check_costs(linear.name, costs.masked_fill(excluded, 0.0))
        return costs.masked_fill_(excluded, torch.inf)

    def prune(
        self, linear: Linear, mask: ElementMask, threshold: float, update: ElementUpdate
    ) -> tuple[Removal, ElementMask]:
        """Prune every unit whose cost is at most the threshold and update the kept elements.

        Args:
            linear: the linear that was passed to `find_elements`.
            mask: elements that earlier shots kept.
            threshold: the global threshold, a float32 number like the costs.
            update: how the kept elements are updated.

        Returns:
            The result for the whole linear, and the new mask.
        """
        is_pruned = self.costs(linear, mask) <= threshold
        if self.groups is not None:
            _, patterns = self.groups
            bits = 1 << torch.arange(self.units.m, device=is_pruned.device)
            is_removed = patterns[:, :, None] & bits != 0
            is_pruned = (is_removed & is_pruned[:, :, None]).flatten(1)
        kept = mask.kept.to(is_pruned.device, copy=True)
        kept[:, : linear.num_inputs] &= ~is_pruned
        live = self.basis.part
        removal = _updated(self.basis.curvature(linear), live.of(kept), update)
        W = live.put(removal.W, linear.W * kept)
        return replace(removal, W=W), ElementMask(kept.cpu())


def find_elements(linear: Linear, units: ElementUnits, costs: str) -> ElementCandidates:
    """Return the candidates for pruning, from which the costs of all units are computed.

    Args:
        linear: the linear to prune. Groups start at column 0 and never include the bias, which
            always stays.
        units: the units of pruning.
        costs: ``obs`` (with the optimal update of the others; for a group, the exact joint cost of
            its best pattern), ``obs_sum`` (the sum of single costs) or ``obd`` (that sum without
            an update).

    Raises:
        FloatingPointError: a factor cannot be factorised.
    """
    curvature = linear.curvature(linear.live)
    scales = curvature.element_scales(costs)
    groups = None
    if units.m > 1 and costs == "obs":
        groups = group_costs(curvature, units)
    elif units.m > 1:
        groups = summed_group_costs(element_costs(linear, scales), units)
    return ElementCandidates(
        scales=scales,
        groups=groups,
        units=units,
        basis=curvature.basis,
    )


def _updated(curvature: LinearCurvature, kept: Tensor, update: ElementUpdate) -> Removal:
    W = curvature.W
    if update.solver == "conjugate_gradients":
        narrow: torch.dtype = getattr(torch, update.precision)
        return update_elements(W, curvature.products(narrow), kept, update)
    if update.solver == "none":
        after = W * kept
    else:
        after = curvature.elements_corrected_singly(kept) * kept
    predicted = curvature.quadratic_cost(after - W)
    return Removal(W=after, predicted=predicted, residual=0.0)


def element_costs(linear: Linear, scales: Pair) -> Tensor:
    """Return the cost of each element except those of the bias.

    It is 1/2 W_rc^2 times the product of the scales at (r, c). With the optimal update of all other
    elements (OBS) the product is 1 / [F^-1]_(r,c),(r,c) = 1 / ([G^-1]_rr [A^-1]_cc). Without an
    update (OBD) it is the diagonal of F, G_rr A_cc.

    Args:
        linear: the linear with the weights.
        scales: see `LinearCurvature.element_scales`.

    Returns:
        [R, num_inputs] costs, in the units of the loss.
    """
    by_row, by_column = scales
    costs = 0.5 * linear.W.square() * (by_row * by_column)
    return costs[:, : linear.num_inputs]


def group_costs(curvature: LinearCurvature, units: ElementUnits) -> Pair:
    """Return the exact joint cost of the best pattern of every N:M group, and the pattern.

    The cost is 1/2 w_P ([F^-1]_PP)^-1 w_P^T. Groups are `m` consecutive inputs of one row, starting
    at column 0.

    Returns:
        [R, num_inputs / m] costs, and [R, num_inputs / m] int64 patterns: the sum of 2^place over
        the places in the group that are pruned. Where nothing is alive, the cost is 0 and the
        pattern has the first places.
    """
    linear = curvature.linear
    live = curvature.part
    alive = live.columns[: linear.num_inputs]
    columns = torch.where(alive, alive.cumsum(0) - 1, -1).view(-1, units.m)
    costs = linear.W.new_zeros(len(linear.W), len(columns))
    first_places = (1 << units.num_removed) - 1
    patterns = torch.full_like(costs, first_places, dtype=torch.int64)
    if not alive.any():
        return costs, patterns
    inverse_blocks, row_factor = curvature.inverse_blocks(columns)
    weights = linear.W[live.rows][:, : linear.num_inputs] * alive
    groups = weights.view(len(weights), *columns.shape)
    best = groups.new_full(groups.shape[:2], torch.inf)
    best_pattern = patterns[live.rows]
    for pattern in combinations(range(units.m), units.num_removed):
        places = list(pattern)
        blocks = inverse_blocks[:, :, places][:, :, :, places]
        inner = torch.linalg.inv(blocks).expand(len(groups), -1, -1, -1)
        w = groups[:, :, places]
        cost = 0.5 * torch.einsum("rgi,rgij,rgj->rg", w, inner, w) / row_factor[:, None]
        is_better = cost < best
        best_pattern[is_better] = sum(1 << place for place in places)
        best = torch.where(is_better, cost, best)
    costs[live.rows] = best
    patterns[live.rows] = best_pattern
    return costs, patterns


def summed_group_costs(costs: Tensor, units: ElementUnits) -> Pair:
    """Return the sum of the ``m - n`` smallest single costs of every N:M group, and the pattern.

    This is the paper's choice.

    Args:
        costs: [R, num_inputs] costs of single elements.
        units: the units of pruning.

    Returns:
        [R, num_inputs / m] costs and patterns, as from `group_costs`.
    """
    groups = costs.view(len(costs), -1, units.m)
    smallest = groups.sort(dim=-1, stable=True).indices[:, :, : units.num_removed]
    places = smallest.sort(dim=-1).values
    return groups.gather(-1, places).sum(dim=-1), (1 << places).sum(dim=-1)
