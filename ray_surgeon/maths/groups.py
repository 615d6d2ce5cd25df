"""Coupled groups: marginal costs on the consumer of a group's inputs, and its exact update.

Source: docs/method.md, section 8. The rows of the producers feed only the pruned columns, so their
removal costs nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ray_surgeon.maths.curvature import LinearCurvature
from ray_surgeon.maths.greedy import GreedyPath, greedy_costs
from ray_surgeon.maths.linear import Linear, Part, Removal
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.rows_columns import column_removal_cost, prune_columns
from ray_surgeon.maths.threshold import check_costs


def alive_part(linear: Linear, mask: StructuredMask) -> Part:
    """Return the rows with a gradient and the columns that earlier shots kept."""
    return Part(linear.live.rows, mask.columns.to(linear.W.device))


def group_costs(
    linear: Linear,
    alive: Part,
    curvature: LinearCurvature,
    columns: Tensor,
    least: int,
    limit: float | None,
    needed: int = 0,
    most: float = math.inf,
) -> Tensor:
    """Return the marginal cost at which each group is pruned, see `greedy_costs`.

    Groups whose inputs are always zero cost 0, if others' are not.

    Args:
        linear: the consumer.
        alive: its `alive_part`.
        curvature: of that part.
        columns: [num_groups, width] columns of each group.
        least: groups that stay.
        limit: no group is pruned whose marginal cost is above it; None for the cost of each group
            on its own.
        needed: groups that are pruned even if they cost more,
        most: up to this.

    Returns:
        [num_groups], infinite for groups that stay or are pruned already.

    Raises:
        FloatingPointError: a factor or a cost is not usable.
    """
    columns = columns.to(linear.W.device)
    left = alive.columns[columns].all(dim=1)
    place = alive.columns.cumsum(0) - 1
    costs = torch.full((len(columns),), torch.inf, dtype=linear.W.dtype)
    is_zero = (linear.factors.A.diagonal().to(left.device)[columns] == 0).all(dim=1)
    always_zero = (left & is_zero).nonzero()[:, 0][: max(0, int(left.sum()) - least)]
    costs[always_zero.cpu()] = 0.0
    left[always_zero] = False
    numbers = left.nonzero()[:, 0]
    if not len(numbers):
        return costs
    W = alive.of(linear.W)
    may_prune = W.new_zeros(len(W), dtype=torch.bool), left[numbers]
    path = GreedyPath(W, curvature.A, curvature.G, *may_prune, place[columns[numbers]])
    if limit is None:
        single, order = path.column_set_costs().cpu().sort(stable=True)
        check_costs(f"{linear.name} groups", single)
        num_pruned = max(0, len(numbers) - least)
        costs[numbers.cpu()[order[:num_pruned]]] = single[:num_pruned]
        return costs
    _, marginal = greedy_costs(
        path, name=linear.name, sets="groups", limit=limit, least=least, needed=needed, most=most
    )
    costs[numbers.cpu()] = marginal.cpu()
    return costs


def prune_groups(
    linear: Linear, mask: StructuredMask, alive: Part, curvature: LinearCurvature, to_prune: Tensor
) -> tuple[Removal, StructuredMask]:
    """Remove columns [C] bool of a consumer and update the others exactly.

    Arguments are those of `group_costs`.
    """
    before = alive.of(linear.W)
    (G, A) = curvature.first
    removed = to_prune.to(before.device)[alive.columns]
    after = prune_columns(before, A, removed, name=f"{linear.name} A")
    new_mask = mask.without(torch.zeros_like(mask.rows), to_prune.cpu())
    W = alive.put(after, linear.W)
    new_mask.apply_(W)
    return Removal(W, column_removal_cost(after - before, A, G, removed), 0.0), new_mask


def lowest(costs: Tensor, number: int) -> Tensor:
    """Return the indices of the `number` lowest costs, ties in order."""
    return costs.argsort(stable=True)[:number]
