"""Greedy selection of rows and columns: the cheapest few go, everything is updated as if they had gone, and again.

Source: method.md section 8. The costs are the exact ones after all earlier removals, not the sum of single costs. With U = G W and
H = W A kept beside W, a removal changes everything by a product of rank `few`:

* rows P: X = [G^-1]_:P ([G^-1]_PP)^-1; W -= X W_P; H -= X H_P; G^-1 -= X [G^-1]_P:; U keeps its other rows;
* columns Q: Y = ([A^-1]_QQ)^-1 [A^-1]_Q:; W -= W_Q Y; U -= U_Q Y; A^-1 -= [A^-1]_:Q Y; H keeps its other columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FEW = 1 / 128
"""Of the structures that are left, how many go in one step (at least one)."""


class GreedyCurve:
    """The increasing curve of marginal costs of one linear."""

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
        """Return the cost of each row now, [R]; of those that are gone, 0."""
        return 0.5 * ((self.W * self._H).sum(dim=1) / self._G_inverse.diagonal()).clamp(min=0) * self.rows

    def column_costs(self) -> Tensor:
        """Return the cost of each column now, [C]; of those that are gone, 0."""
        return 0.5 * ((self.W * self._U).sum(dim=0) / self._A_inverse.diagonal()).clamp(min=0) * self.columns

    def column_set_costs(self, columns: Tensor) -> Tensor:
        """Return the joint cost of each set of columns [num_sets, width] now: 1/2 tr(W_Q^T G W_Q ([A^-1]_QQ)^-1), [num_sets].

        For sets that are gone the value means nothing.
        """
        if columns.shape[1] == 1:
            return 0.5 * ((self.W * self._U).sum(dim=0) / self._A_inverse.diagonal()).clamp(min=0)[columns[:, 0]]
        costs = []
        for Q in columns:
            inner = self.W[:, Q].T @ self._U[:, Q]
            costs.append(0.5 * torch.linalg.solve(self._A_inverse[Q][:, Q], inner).diagonal().sum())
        return torch.stack(costs).clamp(min=0)

    def remove_rows(self, gone: Tensor) -> None:
        """Remove rows, given by their indices."""
        X = self._G_inverse[:, gone] @ torch.linalg.inv(self._G_inverse[gone][:, gone])
        self.W -= X @ self.W[gone]
        self._H -= X @ self._H[gone]
        self._G_inverse -= X @ self._G_inverse[gone]
        self._G_inverse[gone, gone] = 1.0  # nothing reads it but a division by the diagonal
        self.W[gone] = 0
        self.rows[gone] = False

    def remove_columns(self, gone: Tensor) -> None:
        """Remove columns, given by their indices."""
        Y = torch.linalg.inv(self._A_inverse[gone][:, gone]) @ self._A_inverse[gone]
        self._U -= self._U[:, gone] @ Y
        self.W -= self.W[:, gone] @ Y
        self._A_inverse -= self._A_inverse[:, gone] @ Y
        self._A_inverse[gone, gone] = 1.0
        self.W[:, gone] = 0
        self.columns[gone] = False


def greedy_costs(
    curve: GreedyCurve, rows_may_go: Tensor, columns_may_go: Tensor, *, per_parameter: bool, limit: float
) -> tuple[Tensor, Tensor]:
    """Remove greedily until the marginal cost passes a limit, and return the marginal cost at which each structure went.

    Args:
        curve: with everything alive.
        rows_may_go: [R] bool.
        columns_may_go: [C] bool.
        per_parameter: whether costs are divided by the entries that a structure still has when it goes.
        limit: no structure goes whose marginal cost is above it.

    Returns:
        [R] and [C]: the largest marginal cost up to and including the structure's own removal, so that a threshold cuts the curve at
        one height; infinite for what was not removed.
    """
    by_row, by_column = torch.full_like(curve.W[:, 0], torch.inf), torch.full_like(curve.W[0], torch.inf)
    height = 0.0
    while True:
        row_costs = torch.where(rows_may_go & curve.rows, curve.row_costs(), torch.inf)
        column_costs = torch.where(columns_may_go & curve.columns, curve.column_costs(), torch.inf)
        if per_parameter:
            row_costs, column_costs = row_costs / curve.columns.sum().clamp(min=1), column_costs / curve.rows.sum().clamp(min=1)
        together = torch.cat([row_costs, column_costs])
        left = int(torch.isfinite(together).sum())
        if left == 0:
            return by_row, by_column
        cheapest = together.topk(max(1, int(left * _FEW)), largest=False)
        heights = cheapest.values.clamp(min=height)
        going = heights <= limit
        if not going.any():
            return by_row, by_column
        height = float(heights[going].max())
        indices = cheapest.indices[going]
        is_row = indices < len(row_costs)
        gone_rows, gone_columns = indices[is_row], indices[~is_row] - len(row_costs)
        by_row[gone_rows], by_column[gone_columns] = heights[going][is_row], heights[going][~is_row]
        if len(gone_rows):
            curve.remove_rows(gone_rows)
        if len(gone_columns):
            curve.remove_columns(gone_columns)


def greedy_group_costs(
    curve: GreedyCurve, columns: Tensor, may_go: Tensor, least: int, *, limit: float = math.inf, needed: int = 0
) -> Tensor:
    """Remove groups of columns greedily until the marginal cost passes a limit, and return the cost at which each went.

    Args:
        curve: with everything alive.
        columns: [num_groups, width] the columns of each group.
        may_go: [num_groups] bool, the groups that are left.
        least: groups that stay.
        limit: no group goes whose marginal cost is above it,
        needed: but this many go whatever they cost.

    Returns:
        [num_groups] the largest marginal cost up to and including the group's own removal; infinite for those that stay or are gone.
    """
    heights, alive, height = torch.full((len(columns),), torch.inf, dtype=curve.W.dtype), may_go.clone(), 0.0
    while (left := int(alive.sum())) > least:
        costs = curve.column_set_costs(columns).cpu().masked_fill(~alive, torch.inf)
        cheapest = costs.topk(min(max(1, int(left * _FEW)), left - least), largest=False)
        num_gone = len(alive) - left - int((~may_go).sum())
        going = (cheapest.values <= limit) | (torch.arange(len(cheapest.values)) < needed - num_gone)
        if not going.any():
            break
        gone = cheapest.indices[going]
        heights[gone] = cheapest.values[going].clamp(min=height)
        height = float(heights[gone].max())
        curve.remove_columns(columns[gone.to(columns.device)].flatten())
        alive[gone] = False
    return heights
