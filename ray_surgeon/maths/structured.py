"""Rows, columns and coupled groups of one linear: what each costs, and what the rest becomes.

Groups have their costs on the consumer of their inputs, whose update is exact. The rows of the
producers feed only the pruned columns, so their removal costs nothing.

Source: docs/method.md, sections 3 to 6, and 8 for groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_surgeon.maths.curvature import Basis, Linear, LinearCurvature, Pair, Removal
from ray_surgeon.maths.downdated import Downdated
from ray_surgeon.maths.factorised import prune_columns
from ray_surgeon.maths.greedy import GreedyPath, Limits, greedy_costs
from ray_surgeon.maths.greedy_batch import GreedyBatch
from ray_surgeon.maths.kronecker import PackedFactors, column_removal_cost, quadratic_cost
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.threshold import check_costs

Pruned = tuple[Removal, StructuredMask]


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

    def prune(self, linear: Linear, mask: StructuredMask, threshold: float, update: str) -> Pruned:
        """Prune every candidate whose cost is at most the threshold and update what stays.

        Args:
            linear: as for `find_candidates`.
            mask: likewise.
            threshold: the global one.
            update: ``full``, ``single`` (see `LinearCurvature.prune`) or ``none``.
        """
        live = self.basis.part
        rows, columns = self.to_prune(threshold)
        new_mask = mask.without(rows, columns)
        curvature = self.basis.curvature(linear)
        to_prune = rows.to(linear.W.device)[live.rows], columns.to(linear.W.device)[live.columns]
        after, residual = curvature.prune(*to_prune, update)
        W = live.put(after, linear.W)
        new_mask.apply_(W)
        return Removal(W, curvature.quadratic_cost(after - curvature.W), residual), new_mask


def find_candidates(
    linear: Linear, mask: StructuredMask, structure: str, costs: str, limits: Limits
) -> Candidates:
    """Return which rows and columns may be pruned, and their costs.

    Args:
        linear: with the weights that earlier shots left.
        mask: what earlier shots kept.
        structure: ``rows``, ``columns`` or ``rows_columns``.
        costs: ``obs`` (with the optimal update of the others) or ``obd`` (without one), where there
            is no greedy path.
        limits: of the greedy path, on which only what is pruned is a candidate.

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
    if limits.limit is not None:
        may_prune = rows[live.rows], columns[live.columns]
        by_row[live.rows], by_column[live.columns] = _path_costs(curvature, may_prune, limits)
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
    return Candidates(by_row, by_column, curvature.basis)


def _path_costs(curvature: LinearCurvature, allowed: Pair, limits: Limits) -> Pair:
    """Return what `greedy_costs` does for rows and single columns.

    Args:
        curvature: of the part.
        allowed: rows [R] bool and columns [C] bool that may be pruned.
        limits: how far to go.
    """
    name = curvature.linear.name
    W = curvature.W
    if W.device.type == "cpu":
        return greedy_costs(GreedyPath(curvature, allowed), limits, name)
    sides = [side.cpu() for side in allowed]
    costs = [torch.full((len(side),), torch.inf, dtype=W.dtype, device=W.device) for side in sides]
    used = [number for number, side in enumerate(sides) if side.any()]
    if used:
        state = Downdated.of_linear(curvature, rows=0 in used, columns=1 in used)
        may_prune = torch.cat([sides[number] for number in used])[None]
        marginal = GreedyBatch(state, may_prune, [limits], [name]).follow()[0]
        parts = torch.split(marginal, [len(sides[number]) for number in used])
        for number, part in zip(used, parts, strict=True):
            costs[number] = part
    return costs[0], costs[1]


def alive_part(linear: Linear, mask: StructuredMask) -> StructuredMask:
    """Return the rows with a gradient and the columns that earlier shots kept."""
    return StructuredMask(linear.live.rows, mask.columns.to(linear.W.device))


def group_costs(curvature: LinearCurvature, columns: Tensor, limits: Limits) -> Tensor:
    """Return the marginal cost at which each group is pruned, see `greedy_costs`.

    Groups whose inputs are always zero cost 0, if others' are not.

    Args:
        curvature: of the consumer's `alive_part`.
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


def prune_groups(curvature: LinearCurvature, mask: StructuredMask, to_prune: Tensor) -> Pruned:
    """Remove columns [C] bool of a consumer and update the others exactly.

    Arguments are those of `group_costs`.
    """
    linear = curvature.linear
    G, A = curvature.first
    removed = to_prune.to(A.device)[curvature.part.columns]
    after = prune_columns(curvature.W, A, removed, f"{linear.name} A")
    new_mask = mask.without(torch.zeros_like(mask.rows), to_prune.cpu())
    W = curvature.part.put(after, linear.W)
    new_mask.apply_(W)
    predicted = float(column_removal_cost(after - curvature.W, A, G, removed))
    return Removal(W, predicted, 0.0), new_mask


def lowest(costs: Tensor, number: int) -> Tensor:
    """Return the indices of the `number` lowest costs, ties in order."""
    return costs.argsort(stable=True)[:number]


# The choice of damping, asked of tokens that the factors were not gathered from. Factors of few
# tokens are noisy: an update that trusts them fits the noise, and one that is damped too much does
# without what they know. Source: docs/method.md, section 2

A_CHOICES = (1e-3, 1e-2, 1e-1, 1.0)
"""Damping of A, relative to its mean diagonal."""
G_CHOICES = (0.01, 0.03, 0.1, 0.3)
"""Damping of G, likewise."""


def cost_held_aside(linear: Linear, held: PackedFactors, share: float, prunes_rows: bool) -> float:
    """Remove the cheapest columns of a linear, and return the cost on other tokens.

    The update is by the linear's own factors, the cost by factors of other tokens.

    Args:
        linear: with its factors and their damping.
        held: factors of tokens held aside, sums likewise; they are not damped.
        share: of the columns, and of the rows, that are removed.
        prunes_rows: whether the cheapest rows go, too.

    Returns:
        Predicted loss increase, in nats per token.

    Raises:
        FloatingPointError: a factor is not usable.
    """
    part = linear.nonzero
    curvature = LinearCurvature(linear, part)
    W = curvature.W
    # first those of rows, for which G may be damped more
    row_costs = curvature.row_costs("obs") if prunes_rows else W.new_zeros(len(W))
    column_costs = curvature.column_costs("obs")
    if linear.has_bias and bool(part.columns[-1]):
        column_costs[-1] = torch.inf
    gone_columns = _cheapest(column_costs, share)
    gone_rows = _cheapest(row_costs, share if prunes_rows else 0.0)
    after, _ = curvature.prune(gone_rows, gone_columns, "full")
    factors = held.restricted(part.rows, part.columns)
    A, G = ((x / held.num_tokens).to(W.dtype) for x in (factors.A, factors.G))
    return float(quadratic_cost(after - W, A, G))


def _cheapest(costs: Tensor, share: float) -> Tensor:
    """Return which entries [n] bool are the cheapest share, fewer than all."""
    gone = torch.zeros(len(costs), dtype=torch.bool, device=costs.device)
    gone[costs.argsort(stable=True)[: min(int(share * len(costs)), len(costs) - 1)]] = True
    return gone


def choose_damping(
    cost_of: Callable[[float, float], Sequence[float]], of_A: Sequence[float], of_G: Sequence[float]
) -> tuple[float, float, list[tuple[float, float, float]]]:
    """Choose the damping of A, then that of G with it.

    Args:
        cost_of: damping of A and of G -> costs held aside of several linears.
        of_A: choices for A.
        of_G: choices for G; the one after the middle goes with all for A.

    Returns:
        The damping of A, that of G, and for everything that was tried both with the mean of the
        costs, relative to the smallest of each linear. Costs that are no number count as infinite.
    """
    middle = of_G[len(of_G) // 2]
    costs = dict[tuple[float, float], Sequence[float]]()
    means = dict[tuple[float, float], float]()

    def best_of(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
        costs.update({pair: cost_of(*pair) for pair in pairs if pair not in costs})
        means.update(zip(costs, _relative_means(list(costs.values())), strict=True))
        return min(pairs, key=lambda pair: means[pair])

    best_a, _ = best_of([(a, middle) for a in of_A])
    _, best_g = best_of([(best_a, g) for g in of_G])
    return best_a, best_g, [(a, g, mean) for (a, g), mean in means.items()]


def _relative_means(costs: Sequence[Sequence[float]]) -> list[float]:
    """Return the means of the costs of every choice, relative to the smallest of each linear."""
    by_choice = torch.tensor(costs, dtype=torch.float64).nan_to_num(nan=torch.inf, posinf=torch.inf)
    if not by_choice.numel():
        return [1.0] * len(costs)
    ratios = by_choice / by_choice.min(dim=0).values.clamp(min=1e-300)
    return ratios.nan_to_num(nan=torch.inf).mean(dim=1).tolist()
