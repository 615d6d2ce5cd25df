"""Rows, columns and coupled groups of one linear: what each costs, and what the rest becomes.

Groups have their costs on the consumer of their inputs, whose update is exact. The rows of the
producers feed only the pruned columns, so their removal costs nothing.

Source: docs/method.md, sections 3 to 6, and 8 for groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_surgeon.maths.curvature import Basis, Linear, LinearCurvature, Pair, Part, Removal
from ray_surgeon.maths.greedy import GreedyPath, Limits, greedy_costs
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.rows_columns import column_removal_cost, prune_columns
from ray_surgeon.maths.threshold import check_costs


@dataclass(frozen=True)
class Candidates:
    """Rows and columns of one linear that may be pruned.

    Costs, by which the threshold ranks, are 0 for what is zero, and infinite for what stays or is
    pruned already.
    """

    rows: Tensor  # [R] costs
    columns: Tensor  # [C] costs, infinite for the bias
    basis: Basis

    def to_prune(self, threshold: float) -> Pair:
        """Return which rows [R] and columns [C] cost at most the threshold, on the CPU."""
        return (self.rows.double() <= threshold).cpu(), (self.columns.double() <= threshold).cpu()

    def prune(
        self, linear: Linear, mask: StructuredMask, threshold: float, update: str
    ) -> tuple[Removal, StructuredMask]:
        """Prune every candidate whose cost is at most the threshold and update what stays.

        Args:
            linear: as for `find_candidates`.
            mask: likewise.
            threshold: the global one.
            update: ``full``, ``single`` (see `prune_singly`) or ``none``.
        """
        live = self.basis.part
        rows, columns = self.to_prune(threshold)
        new_mask = mask.without(rows, columns)
        curvature = self.basis.curvature(linear)
        device = linear.W.device
        to_prune = rows.to(device)[live.rows], columns.to(device)[live.columns]
        after, residual = curvature.prune(*to_prune, update)
        W = live.put(after, linear.W)
        new_mask.apply_(W)
        return Removal(W, curvature.quadratic_cost(after - curvature.W), residual), new_mask


def find_candidates(
    linear: Linear,
    mask: StructuredMask,
    structure: str,
    costs: str,
    *,
    per_parameter: bool,
    limit: float | None = None,
) -> Candidates:
    """Return which rows and columns may be pruned, and their costs.

    Args:
        linear: with the weights that earlier shots left.
        mask: what earlier shots kept.
        structure: ``rows``, ``columns`` or ``rows_columns``.
        costs: ``obs`` (with the optimal update of the others) or ``obd`` (without one).
        per_parameter: whether costs are divided by the entries that the structure still has.
        limit: if given, costs are the marginal ones of the greedy path, and only what is pruned up
            to this cost is a candidate.

    Raises:
        FloatingPointError: a factor or a cost is not usable.
    """
    W = linear.W
    mask = StructuredMask(mask.rows.to(W.device), mask.columns.to(W.device))
    live = linear.nonzero
    rows = mask.rows & (structure != "columns")
    columns = mask.columns & (structure != "rows")
    if linear.has_bias:
        live.columns[-1] = mask.columns[-1]
        columns[-1] = False
    curvature = LinearCurvature(linear, live)
    by_row = W.new_zeros(len(W))
    by_column = W.new_zeros(W.shape[1])
    if limit is not None:
        may_prune = rows[live.rows], columns[live.columns]
        path = GreedyPath(curvature.W, curvature.A, curvature.G, may_prune)
        by_row[live.rows], by_column[live.columns] = greedy_costs(
            path, Limits(limit), linear.name, "columns", per_parameter=per_parameter
        )
        rows &= torch.isfinite(by_row)
        columns &= torch.isfinite(by_column)
    else:
        by_row[live.rows] = curvature.row_costs(costs)
        by_column[live.columns] = curvature.column_costs(costs)
        if per_parameter:
            by_row = by_row / mask.columns.sum().clamp(min=1)
            by_column = by_column / mask.rows.sum().clamp(min=1)
    check_costs(f"{linear.name} rows", by_row[rows])
    check_costs(f"{linear.name} columns", by_column[columns])
    by_row.masked_fill_(~rows, torch.inf)
    by_column.masked_fill_(~columns, torch.inf)
    return Candidates(by_row, by_column, curvature.basis)


def alive_part(linear: Linear, mask: StructuredMask) -> Part:
    """Return the rows with a gradient and the columns that earlier shots kept."""
    return Part(linear.live.rows, mask.columns.to(linear.W.device))


def group_costs(
    curvature: LinearCurvature, columns: Tensor, limits: Limits, *, singly: bool = False
) -> Tensor:
    """Return the marginal cost at which each group is pruned, see `greedy_costs`.

    Groups whose inputs are always zero cost 0, if others' are not.

    Args:
        curvature: of the consumer's `alive_part`.
        columns: [num_groups, width] columns of each group.
        limits: how far the greedy path is followed.
        singly: whether costs are those of each group on its own.

    Returns:
        [num_groups], infinite for groups that stay or are pruned already.

    Raises:
        FloatingPointError: a factor or a cost is not usable.
    """
    linear = curvature.linear
    alive = curvature.part
    columns = columns.to(linear.W.device)
    left = alive.columns[columns].all(dim=1)
    place = alive.columns.cumsum(0) - 1
    costs = torch.full((len(columns),), torch.inf, dtype=linear.W.dtype)
    is_zero = (linear.factors.A.diagonal().to(left.device)[columns] == 0).all(dim=1)
    always_zero = (left & is_zero).nonzero()[:, 0][: max(0, int(left.sum()) - limits.least)]
    costs[always_zero.cpu()] = 0.0
    left[always_zero] = False
    numbers = left.nonzero()[:, 0]
    if not len(numbers):
        return costs
    W = curvature.W
    may_prune = W.new_zeros(len(W), dtype=torch.bool), left[numbers]
    path = GreedyPath(W, curvature.A, curvature.G, may_prune, place[columns[numbers]])
    if singly:
        single, order = path.column_set_costs().cpu().sort(stable=True)
        check_costs(f"{linear.name} groups", single)
        num_pruned = max(0, len(numbers) - limits.least)
        costs[numbers.cpu()[order[:num_pruned]]] = single[:num_pruned]
        return costs
    _, marginal = greedy_costs(path, limits, linear.name, "groups")
    costs[numbers.cpu()] = marginal.cpu()
    return costs


def prune_groups(
    curvature: LinearCurvature, mask: StructuredMask, to_prune: Tensor
) -> tuple[Removal, StructuredMask]:
    """Remove columns [C] bool of a consumer and update the others exactly.

    Arguments are those of `group_costs`.
    """
    linear = curvature.linear
    before = curvature.W
    G, A = curvature.first
    removed = to_prune.to(before.device)[curvature.part.columns]
    after = prune_columns(before, A, removed, name=f"{linear.name} A")
    new_mask = mask.without(torch.zeros_like(mask.rows), to_prune.cpu())
    W = curvature.part.put(after, linear.W)
    new_mask.apply_(W)
    return Removal(W, column_removal_cost(after - before, A, G, removed), 0.0), new_mask


def lowest(costs: Tensor, number: int) -> Tensor:
    """Return the indices of the `number` lowest costs, ties in order."""
    return costs.argsort(stable=True)[:number]
