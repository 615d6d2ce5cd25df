"""Greedy paths: prune the cheapest few structures, update everything as if they were pruned already, and repeat.

Source: docs/method.md, section 3 (rows, columns) and section 8 (groups). The costs are the exact ones after all earlier removals, not the
sum of single costs. With U = G W and H = W A kept beside W, a removal changes everything by a product of rank `few`:

* rows P: X = [G^-1]_:P ([G^-1]_PP)^-1; W -= X W_P; H -= X H_P; G^-1 -= X [G^-1]_P:; U keeps its other rows;
* columns Q: Y = ([A^-1]_QQ)^-1 [A^-1]_Q:; W -= W_Q Y; U -= U_Q Y; A^-1 -= [A^-1]_:Q Y; H keeps its other columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FEW = 1 / 128
"""Of the structures that are left, the fraction that is pruned in one step (at least one structure)."""


class GreedyPath:
    """The weights and costs of one linear along its greedy path."""

    def __init__(self, W: Tensor, A: Tensor, G: Tensor, A_inverse: Tensor, G_inverse: Tensor) -> None:
        """Start with everything alive.

        Args:
            W: [R, C] alive weights.
            A: [C, C] damped.
            G: [R, R] damped.
            A_inverse: [C, C].
            G_inverse: [R, R].
        """
        self.W, self._H, self._U = W.clone(), W @ A, G @ W
        self._A_inverse, self._G_inverse = A_inverse.clone(), G_inverse.clone()
        self.rows = torch.ones(len(W), dtype=torch.bool, device=W.device)
        self.columns = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)

    def row_costs(self) -> Tensor:
        """Return the cost of each row now, [R]; of pruned ones, 0."""
        return 0.5 * ((self.W * self._H).sum(dim=1) / self._G_inverse.diagonal()).clamp(min=0) * self.rows

    def column_costs(self) -> Tensor:
        """Return the cost of each column now, [C]; of pruned ones, 0."""
        return 0.5 * ((self.W * self._U).sum(dim=0) / self._A_inverse.diagonal()).clamp(min=0) * self.columns

    def column_set_costs(self, columns: Tensor) -> Tensor:
        """Return the joint cost of each set of columns [num_sets, width] now: 1/2 tr(W_Q^T G W_Q ([A^-1]_QQ)^-1), [num_sets].

        The value of pruned sets means nothing.
        """
        if columns.shape[1] == 1:
            return 0.5 * ((self.W * self._U).sum(dim=0) / self._A_inverse.diagonal()).clamp(min=0)[columns[:, 0]]
        costs = []
        for Q in columns:
            inner = self.W[:, Q].T @ self._U[:, Q]
            costs.append(0.5 * torch.linalg.solve(self._A_inverse[Q][:, Q], inner).diagonal().sum())
        return torch.stack(costs).clamp(min=0)

    def remove_rows(self, pruned: Tensor) -> None:
        """Remove rows, given by their indices."""
        X = self._G_inverse[:, pruned] @ torch.linalg.inv(self._G_inverse[pruned][:, pruned])
        self.W -= X @ self.W[pruned]
        self._H -= X @ self._H[pruned]
        self._G_inverse -= X @ self._G_inverse[pruned]
        self._G_inverse[pruned, pruned] = 1.0  # only a division by the diagonal reads it
        self.W[pruned] = 0
        self.rows[pruned] = False

    def remove_columns(self, pruned: Tensor) -> None:
        """Remove columns, given by their indices."""
        Y = torch.linalg.inv(self._A_inverse[pruned][:, pruned]) @ self._A_inverse[pruned]
        self._U -= self._U[:, pruned] @ Y
        self.W -= self.W[:, pruned] @ Y
        self._A_inverse -= self._A_inverse[:, pruned] @ Y
        self._A_inverse[pruned, pruned] = 1.0
        self.W[:, pruned] = 0
        self.columns[pruned] = False


def greedy_costs(
    path: GreedyPath, may_prune_rows: Tensor, may_prune_columns: Tensor, *, per_parameter: bool, limit: float
) -> tuple[Tensor, Tensor]:
    """Follow the greedy path up to a marginal cost, and return the marginal cost at which each structure is pruned.

    Args:
        path: with everything alive.
        may_prune_rows: [R] bool.
        may_prune_columns: [C] bool.
        per_parameter: whether costs are divided by the entries that a structure still has when it is pruned.
        limit: no structure is pruned whose marginal cost is above it.

    Returns:
        [R] and [C]: the largest marginal cost up to and including the structure's own removal, so that a threshold cuts the path at
        one place; infinite for what was not removed.
    """
    by_row, by_column = path.W.new_full((len(path.W),), torch.inf), path.W.new_full((path.W.shape[1],), torch.inf)
    highest = 0.0
    while True:
        row_costs = torch.where(may_prune_rows & path.rows, path.row_costs(), torch.inf)
        column_costs = torch.where(may_prune_columns & path.columns, path.column_costs(), torch.inf)
        if per_parameter:
            row_costs, column_costs = row_costs / path.columns.sum().clamp(min=1), column_costs / path.rows.sum().clamp(min=1)
        together = torch.cat([row_costs, column_costs])
        left = int(torch.isfinite(together).sum())
        if left == 0:
            return by_row, by_column
        cheapest = together.topk(max(1, int(left * _FEW)), largest=False)
        marginal = cheapest.values.clamp(min=highest)
        to_prune = marginal <= limit
        if not to_prune.any():
            return by_row, by_column
        highest = float(marginal[to_prune].max())
        indices = cheapest.indices[to_prune]
        is_row = indices < len(row_costs)
        pruned_rows, pruned_columns = indices[is_row], indices[~is_row] - len(row_costs)
        by_row[pruned_rows], by_column[pruned_columns] = marginal[to_prune][is_row], marginal[to_prune][~is_row]
        if len(pruned_rows):
            path.remove_rows(pruned_rows)
        if len(pruned_columns):
            path.remove_columns(pruned_columns)


def greedy_group_costs(path: GreedyPath, columns: Tensor, least: int, *, limit: float = math.inf, needed: int = 0) -> Tensor:
    """Follow the greedy path of groups of columns up to a marginal cost, and return the cost at which each is pruned.

    Args:
        path: with everything alive.
        columns: [num_groups, width] the columns of each group.
        least: groups that stay.
        limit: no group is pruned whose marginal cost is above it,
        needed: except that this many are pruned whatever they cost.

    Returns:
        [num_groups] the largest marginal cost up to and including the group's own removal; infinite for those that stay.
    """
    marginal, alive, highest = torch.full((len(columns),), torch.inf, dtype=path.W.dtype), torch.ones(len(columns), dtype=torch.bool), 0.0
    while (left := int(alive.sum())) > least:
        costs = path.column_set_costs(columns).cpu().masked_fill(~alive, torch.inf)
        cheapest = costs.topk(min(max(1, int(left * _FEW)), left - least), largest=False)
        num_pruned = len(alive) - left
        to_prune = (cheapest.values <= limit) | (torch.arange(len(cheapest.values)) < needed - num_pruned)
        if not to_prune.any():
            break
        pruned = cheapest.indices[to_prune]
        marginal[pruned] = cheapest.values[to_prune].clamp(min=highest)
        highest = float(marginal[pruned].max())
        path.remove_columns(columns[pruned.to(columns.device)].flatten())
        alive[pruned] = False
    return marginal
