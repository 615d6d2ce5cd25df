"""Single elements or N:M groups of one linear: costs, and the update.

Source: docs/method.md, sections 3 to 6; The LLM Surgeon, section 3.2 and appendix A.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from ray_surgeon.maths.conjugate import ElementUpdate, update_elements
from ray_surgeon.maths.curvature import Basis, Linear, LinearCurvature, Pair, Part, Removal
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

    row_scale: Tensor  # [R, 1] or [R, C] and
    # [1, C] or [1, 1]: see `element_costs`; zero where an input or a gradient is always zero
    column_scale: Tensor
    group_costs: Tensor  # [R, C / m] float32 costs of groups; empty for single elements
    choice: Tensor  # [R, C / m] best pattern of every group; empty for single elements
    units: ElementUnits  # what is pruned as one
    basis: Basis

    def costs(self, linear: Linear, mask: ElementMask) -> Tensor:
        """Return the costs [R, units a row] float32 of all units.

        Those that may not be pruned have infinity.

        Raises:
            FloatingPointError: a cost is not usable.
        """
        kept = mask.kept.to(linear.W.device)[:, : linear.num_inputs]
        if self.units.m == 1:
            costs = element_costs(linear.W, self.row_scale, self.column_scale)
            costs = costs[:, : linear.num_inputs].float()
            excluded = ~kept
        else:
            costs = self.group_costs.float().clone()
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
        if self.units.m > 1:
            chosen = pattern_removals(chosen, self.choice, self.units.n, self.units.m)
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
    live = linear.live
    curvature = LinearCurvature(linear, live)
    rows, columns = _scales(linear, live, *curvature.element_scales(costs))
    choice = linear.W.new_zeros(0, dtype=torch.int64)
    by_group = linear.W.new_zeros(0)
    if units.m > 1 and costs == "obs":
        alive = live.columns[: linear.num_inputs]
        places = torch.where(alive, alive.cumsum(0) - 1, -1).view(-1, units.m)
        by_group = linear.W.new_zeros(len(linear.W), len(places))
        choice = torch.zeros_like(by_group, dtype=torch.int64)
        if alive.any():
            W = linear.W[live.rows][:, : linear.num_inputs] * alive
            best = group_costs(W, *curvature.inverse_blocks(places), units.n, units.m)
            by_group[live.rows], choice[live.rows] = best
    elif units.m > 1:
        single = element_costs(linear.W, rows, columns)[:, : linear.num_inputs]
        by_group, choice = summed_group_costs(single, units.n, units.m)
    return ElementCandidates(rows, columns, by_group, choice, units, curvature.basis)


def _scales(linear: Linear, live: Part, row_scale: Tensor, column_scale: Tensor) -> Pair:
    """Put scales of the live part into those of the whole linear, with zeros for the rest."""
    if row_scale.shape[1] != 1:
        scale = live.put(row_scale * column_scale, torch.zeros_like(linear.W))
        return scale, column_scale.new_ones(1, 1)
    rows = linear.W.new_zeros(len(live.rows), 1)
    columns = linear.W.new_zeros(1, len(live.columns))
    rows[live.rows] = row_scale
    columns[:, live.columns] = column_scale
    return rows, columns


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


def element_costs(W: Tensor, row_scale: Tensor, column_scale: Tensor) -> Tensor:
    """Cost of each element: 1/2 W_rc^2 times the product of the scales at (r, c).

    After the optimal update of all others (OBS) the product is 1 / [F^-1]_(r,c),(r,c) = 1 /
    ([G^-1]_rr [A^-1]_cc). Without any update (OBD) it is the diagonal of F, G_rr A_cc.

    Args:
        W: [R, C].
        row_scale: [R, 1], or [R, C] if the product is in it already.
        column_scale: [1, C] or [1, 1].

    Returns:
        [R, C] costs, in the loss's units.
    """
    return 0.5 * W.square() * (row_scale * column_scale)


def group_patterns(n: int, m: int) -> Tensor:
    """Return every choice of the ``m - n`` of `m` places to prune, [num_patterns, m - n]."""
    return torch.tensor(list(combinations(range(m), m - n)))


def group_costs(W: Tensor, inverse_blocks: Tensor, row_factor: Tensor, n: int, m: int) -> Pair:
    """Exact joint cost of the best pattern of every N:M group: 1/2 w_P ([F^-1]_PP)^-1 w_P^T.

    Args:
        W: [R, C], C a multiple of `m`; groups are `m` consecutive inputs of one row, starting at
            column 0.
        inverse_blocks: [R or 1, C / m, m, m] and
        row_factor: [R]: their product is the block of F^-1 of each group.
        n: elements that stay in each group.
        m: elements of a group.

    Returns:
        [R, C / m] costs and [R, C / m] the index into `group_patterns` of the best pattern.
    """
    R, C = W.shape
    groups = W.view(R, C // m, m)
    best = torch.full((R, C // m), torch.inf, dtype=W.dtype, device=W.device)
    choice = torch.zeros(R, C // m, dtype=torch.int64, device=W.device)
    for number, pattern in enumerate(group_patterns(n, m).to(W.device)):
        blocks = inverse_blocks[:, :, pattern][:, :, :, pattern]
        inner = torch.linalg.inv(blocks).expand(R, -1, -1, -1)
        w = groups[:, :, pattern]
        cost = 0.5 * torch.einsum("rgi,rgij,rgj->rg", w, inner, w) / row_factor[:, None]
        better = cost < best
        best = torch.where(better, cost, best)
        choice = torch.where(better, number, choice)
    return best, choice


def summed_group_costs(costs: Tensor, n: int, m: int) -> Pair:
    """Cost of every N:M group: the sum of its ``m - n`` smallest single costs.

    This is the paper's choice.

    Args:
        costs: [R, C] single costs.
        n: elements that stay in each group.
        m: elements of a group.

    Returns:
        [R, C / m] costs and [R, C / m] the index into `group_patterns` of the pattern.
    """
    R, C = costs.shape
    groups = costs.view(R, C // m, m)
    patterns = group_patterns(n, m).to(costs.device)
    # by the places, each a bit
    number_of = torch.zeros(1 << m, dtype=torch.int64, device=costs.device)
    number_of[(1 << patterns).sum(dim=-1)] = torch.arange(len(patterns), device=costs.device)
    places = groups.sort(dim=-1, stable=True).indices[:, :, : m - n].sort(dim=-1).values
    return groups.gather(-1, places).sum(dim=-1), number_of[(1 << places).sum(dim=-1)]


def pattern_removals(chosen: Tensor, choice: Tensor, n: int, m: int) -> Tensor:
    """Return which elements to prune [R, C] bool.

    They are those of the pattern `choice` [R, C / m] in every group `chosen` [R, C / m] bool.
    """
    patterns = group_patterns(n, m).to(choice.device)
    places = torch.zeros(len(patterns), m, dtype=torch.bool, device=choice.device)
    places.scatter_(1, patterns, True)
    return (places[choice] & chosen[:, :, None]).reshape(choice.shape[0], -1)
