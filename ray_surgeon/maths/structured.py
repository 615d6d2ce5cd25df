"""Costs of rows, columns and coupled groups of one linear, and updates of the remaining weights.

The costs of groups are computed on the consumer of their inputs, whose update is exact. The rows of
the producers feed only the pruned columns, so their removal costs nothing.

Source: docs/method.md, sections 3 to 6, and 8 for groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_surgeon.maths.curvature import Basis, Linear, LinearCurvature, Pair, Removal
from ray_surgeon.maths.downdated import Downdated
from ray_surgeon.maths.greedy import GreedyPath, Limits, greedy_costs
from ray_surgeon.maths.greedy_batch import GreedyBatch
from ray_surgeon.maths.kronecker import (
    PackedFactors,
    column_removal_cost,
    prune_columns,
    quadratic_cost,
)
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.threshold import check_costs

RemovalAndMask = tuple[Removal, StructuredMask]
"""New weights with their predicted cost, and the new mask."""


@dataclass(frozen=True)
class Candidates:
    """Rows and columns of one linear that may be pruned.

    Costs are compared with the threshold. They are 0 for rows and columns of zeros, and infinite
    for those that stay or are pruned already.
    """

    rows: Tensor  # [R] costs
    columns: Tensor  # [C] costs, infinite for the bias
    basis: Basis

    def to_prune(self, threshold: float) -> Pair:
        """Return which rows [R] and columns [C] cost at most the threshold, on the CPU."""
        rows = self.rows.double() <= threshold
        columns = self.columns.double() <= threshold
        return rows.cpu(), columns.cpu()

    def prune(
        self,
        linear: Linear,
        mask: StructuredMask,
        threshold: float,
        update: str,
    ) -> RemovalAndMask:
        """Prune every candidate whose cost is at most the threshold and update what stays.

        Args:
            linear: see `find_candidates`.
            mask: see `find_candidates`.
            threshold: the global one.
            update: ``full``, ``single`` (see `LinearCurvature.prune`) or ``none``.
        """
        device = linear.W.device
        live = self.basis.part
        rows, columns = self.to_prune(threshold)
        new_mask = mask.without(rows, columns)
        curvature = self.basis.curvature(linear)
        live_rows = rows.to(device)[live.rows]
        live_columns = columns.to(device)[live.columns]
        after, residual = curvature.prune(live_rows, live_columns, update)
        W = live.put(after, linear.W)
        new_mask.apply_(W)
        predicted = curvature.quadratic_cost(after - curvature.W)
        return Removal(W=W, predicted=predicted, residual=residual), new_mask


def find_candidates(
    linear: Linear, mask: StructuredMask, structure: str, costs: str, limits: Limits
) -> Candidates:
    """Return which rows and columns may be pruned, and their costs.

    Args:
        linear: linear with the weights that earlier shots left.
        mask: rows and columns that earlier shots kept.
        structure: ``rows``, ``columns`` or ``rows_columns``.
        costs: ``obs`` (with the optimal update of the others) or ``obd`` (without one), where there
            is no greedy path.
        limits: limits of the greedy path; only rows and columns that it prunes are candidates.

    Raises:
        FloatingPointError: a factor or a cost is not usable.
    """
    W = linear.W
    mask = StructuredMask(mask.rows.to(W.device), mask.columns.to(W.device))
    live = linear.nonzero
    rows = _if_allowed(mask.rows, structure != "columns")
    columns = _if_allowed(mask.columns, structure != "rows")
    if linear.has_bias:
        live.columns[-1] = mask.columns[-1]
        columns[-1] = False
    curvature = linear.curvature(live)
    by_row = W.new_zeros(len(W))
    by_column = W.new_zeros(W.shape[1])
    if limits.limit is not None:
        may_prune = rows[live.rows], columns[live.columns]
        row_costs, column_costs = _path_costs(curvature, may_prune, limits)
        by_row[live.rows] = row_costs
        by_column[live.columns] = column_costs
    else:
        by_row[live.rows] = curvature.row_costs(costs)
        by_column[live.columns] = curvature.column_costs(costs)
        if limits.per_parameter:
            by_row = by_row / mask.columns.sum().clamp(min=1)
            by_column = by_column / mask.rows.sum().clamp(min=1)
        check_costs(f"{linear.name} rows", by_row[rows])
        check_costs(f"{linear.name} columns", by_column[columns])
    by_row.masked_fill_(~rows, torch.inf)
    by_column.masked_fill_(~columns, torch.inf)
    return Candidates(rows=by_row, columns=by_column, basis=curvature.basis)


def _if_allowed(kept: Tensor, is_allowed: bool) -> Tensor:
    """Return a copy of a mask, or a mask of nothing if its side is not allowed."""
    if is_allowed:
        return kept.clone()
    return torch.zeros_like(kept)


def _path_costs(curvature: LinearCurvature, allowed: Pair, limits: Limits) -> Pair:
    """Return the `greedy_costs` of rows and single columns.

    Args:
        curvature: curvature of the part.
        allowed: rows [R] bool and columns [C] bool that may be pruned.
        limits: how far the greedy path is followed.
    """
    name = curvature.linear.name
    W = curvature.W
    if W.device.type == "cpu":
        return greedy_costs(GreedyPath(curvature, allowed), limits, name)
    rows, columns = allowed
    by_row = torch.full((len(rows),), torch.inf, dtype=W.dtype, device=W.device)
    by_column = torch.full((len(columns),), torch.inf, dtype=W.dtype, device=W.device)
    rows = rows.cpu()
    columns = columns.cpu()
    has_rows = bool(rows.any())
    has_columns = bool(columns.any())
    if not (has_rows or has_columns):
        return by_row, by_column
    state = Downdated.of_linear(curvature, rows=has_rows, columns=has_columns)
    sides = []
    if has_rows:
        sides.append(rows)
    if has_columns:
        sides.append(columns)
    marginal = GreedyBatch(state, torch.cat(sides)[None], [limits], [name]).follow()[0]
    if has_rows:
        by_row = marginal[: len(rows)]
    if has_columns:
        by_column = marginal[len(marginal) - len(columns) :]
    return by_row, by_column


def alive_part(linear: Linear, mask: StructuredMask) -> StructuredMask:
    """Return the rows with a gradient and the columns that earlier shots kept."""
    return StructuredMask(linear.live.rows, mask.columns.to(linear.W.device))


def group_costs(curvature: LinearCurvature, columns: Tensor, limits: Limits) -> Tensor:
    """Return the marginal cost at which each group is pruned, see `greedy_costs`.

    Groups whose inputs are always zero cost 0, except for those that `limits.least` lets stay.

    Args:
        curvature: curvature of the consumer's `alive_part`.
        columns: [num_groups, width] columns of each group.
        limits: how far the greedy path is followed.

    Returns:
        [num_groups], infinite for groups that stay or are pruned already.

    Raises:
        FloatingPointError: a factor or a cost is not usable.
    """
    linear = curvature.linear
    alive = curvature.part
    columns = columns.to(linear.W.device)
    is_left = alive.columns[columns].all(dim=1)
    place = alive.columns.cumsum(0) - 1
    costs = torch.full((len(columns),), torch.inf, dtype=linear.W.dtype)
    diagonal = linear.factors.A.diagonal().to(is_left.device)
    is_zero = (diagonal[columns] == 0).all(dim=1)
    num_removable = max(0, int(is_left.sum()) - limits.least)
    free = (is_left & is_zero).nonzero()[:, 0][:num_removable]
    costs[free.cpu()] = 0.0
    is_left[free] = False
    numbers = is_left.nonzero()[:, 0]
    if not len(numbers):
        return costs
    W = curvature.W
    may_prune = W.new_zeros(len(W), dtype=torch.bool), is_left[numbers]
    path = GreedyPath(curvature, may_prune, place[columns[numbers]])
    if limits.limit is None:
        marginal = path.column_set_costs()
        check_costs(f"{linear.name} groups", marginal)
        stay = marginal.argsort(stable=True)[max(0, len(numbers) - limits.least) :]
        marginal[stay] = torch.inf
    else:
        _, marginal = greedy_costs(path, limits, f"{linear.name} groups")
    costs[numbers.cpu()] = marginal.cpu()
    return costs


def prune_groups(
    curvature: LinearCurvature,
    mask: StructuredMask,
    to_prune: Tensor,
) -> RemovalAndMask:
    """Remove columns of a consumer and update the others exactly.

    Args:
        curvature: curvature of the consumer's `alive_part`.
        mask: rows and columns that earlier shots kept.
        to_prune: [C] bool.
    """
    linear = curvature.linear
    G, A = curvature.first
    removed = to_prune.to(A.device)[curvature.part.columns]
    after = prune_columns(curvature.W, A, removed, f"{linear.name} A")
    new_mask = mask.without(torch.zeros_like(mask.rows), to_prune.cpu())
    W = curvature.part.put(after, linear.W)
    new_mask.apply_(W)
    predicted = float(column_removal_cost(after - curvature.W, A, G, removed))
    return Removal(W=W, predicted=predicted, residual=0.0), new_mask


def lowest(costs: Tensor, number: int) -> Tensor:
    """Return the indices of the `number` lowest costs, ties in order."""
    return costs.argsort(stable=True)[:number]


# The choice of damping by tokens that are not in the factors. Factors of few tokens are noisy: with
# too little damping an update fits the noise, with too much it ignores the factors. Source:
# docs/method.md, section 2

A_CHOICES = (1e-3, 1e-2, 1e-1, 1.0)
"""Damping of A, relative to its mean diagonal."""
G_CHOICES = (0.01, 0.03, 0.1, 0.3)
"""Damping of G, relative to its mean diagonal."""


def cost_held_aside(
    linear: Linear,
    held: PackedFactors,
    share: float,
    prunes_rows: bool,
) -> float:
    """Remove the cheapest columns of a linear, and return the cost on other tokens.

    The update is by the linear's own factors, the cost by factors of other tokens.

    Args:
        linear: linear with its factors and their damping.
        held: factors of tokens held aside, as sums over them, not damped.
        share: fraction of the columns, and of the rows, that is removed.
        prunes_rows: whether the cheapest rows are removed, too.

    Returns:
        Predicted loss increase, in nats per token.

    Raises:
        FloatingPointError: a factor is not usable.
    """
    part = linear.nonzero
    curvature = linear.curvature(part)
    W = curvature.W
    # costs of rows come first, because they may raise the damping of G
    if prunes_rows:
        row_costs = curvature.row_costs("obs")
        share_of_rows = share
    else:
        row_costs = W.new_zeros(len(W))
        share_of_rows = 0.0
    column_costs = curvature.column_costs("obs")
    if linear.has_bias and bool(part.columns[-1]):
        column_costs[-1] = torch.inf
    pruned_columns = _cheapest(column_costs, share)
    pruned_rows = _cheapest(row_costs, share_of_rows)
    after, _ = curvature.prune(pruned_rows, pruned_columns, "full")
    factors = held.restricted(part.rows, part.columns)
    A = (factors.A / held.num_tokens).to(W.dtype)
    G = (factors.G / held.num_tokens).to(W.dtype)
    return float(quadratic_cost(after - W, A, G))


def _cheapest(costs: Tensor, share: float) -> Tensor:
    """Return a mask [n] bool of the cheapest share of the entries, at most all but one."""
    number = min(int(share * len(costs)), len(costs) - 1)
    is_cheap = torch.zeros(len(costs), dtype=torch.bool, device=costs.device)
    is_cheap[costs.argsort(stable=True)[:number]] = True
    return is_cheap


def choose_damping(
    cost_of: Callable[[float, float], Sequence[float]],
    of_A: Sequence[float],
    of_G: Sequence[float],
) -> tuple[float, float, list[tuple[float, float, float]]]:
    """Choose the damping of A, then that of G with it.

    Args:
        cost_of: maps the damping of A and of G to costs held aside of several linears.
        of_A: choices for A.
        of_G: choices for G; the one after the middle is tried with all choices for A.

    Returns:
        The damping of A, the damping of G, and all pairs that were tried, each with the mean of the
        costs relative to the smallest of each linear. Costs that are NaN count as infinite.
    """
    middle = of_G[len(of_G) // 2]
    costs: dict[tuple[float, float], Sequence[float]] = {}
    means: dict[tuple[float, float], float] = {}

    def best_of(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
        for a, g in pairs:
            if (a, g) not in costs:
                costs[a, g] = cost_of(a, g)
        means.update(zip(costs, _relative_means(list(costs.values())), strict=True))
        return min(pairs, key=lambda pair: means[pair])

    best_a, _ = best_of([(a, middle) for a in of_A])
    _, best_g = best_of([(best_a, g) for g in of_G])
    tried = [(a, g, mean) for (a, g), mean in means.items()]
    return best_a, best_g, tried


def _relative_means(costs: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean cost of each choice, relative to the smallest cost of each linear."""
    by_choice = torch.tensor(costs, dtype=torch.float64)
    by_choice = by_choice.nan_to_num(nan=torch.inf, posinf=torch.inf)
    if not by_choice.numel():
        return [1.0] * len(costs)
    ratios = by_choice / by_choice.min(dim=0).values.clamp(min=1e-300)
    return ratios.nan_to_num(nan=torch.inf).mean(dim=1).tolist()
