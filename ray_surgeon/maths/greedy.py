"""Greedy paths: prune the few cheapest structures, update the rest, and repeat.

Source: docs/method.md, section 3 (rows, columns) and section 8 (groups). The costs are the exact
ones after all earlier removals, not the sum of single costs. U = G W and H = W A are stored beside
W, so that a removal changes every matrix by a product whose rank is the number of removed rows or
columns:

* rows P: X = [G^-1]_:P ([G^-1]_PP)^-1; W -= X W_P; H -= X H_P; G^-1 -= X [G^-1]_P:; U keeps its
  other rows;
* columns Q: Y = ([A^-1]_QQ)^-1 [A^-1]_Q:; W -= W_Q Y; U -= U_Q Y; A^-1 -= [A^-1]_:Q Y; H keeps its
  other columns.

The inverses are never formed as a whole: see `DowndatedInverse`. When half of the rows or of the
columns are removed, the others become a smaller problem, whose inverses are those of the remaining
parts of the factors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ray_surgeon.maths.curvature import LinearCurvature, Pair
from ray_surgeon.maths.kronecker import DowndatedInverse, root
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.products import product
from ray_surgeon.maths.threshold import check_costs

_FEW = 1 / 128
"""Fraction of the remaining structures that is pruned in one step (at least one structure)."""

_ROWS = 128
"""Number of rows that are multiplied entry by entry at once."""


def _dots(x: Tensor, y: Tensor, *, dim: int) -> Tensor:
    """Return ``(x * y).sum(dim)`` of two matrices, computed a few rows at a time.

    Allocating a whole matrix in every step would take longer than the products.
    """
    parts = list[Tensor]()
    for a, b in zip(torch.split(x, _ROWS), torch.split(y, _ROWS), strict=True):
        parts.append((a * b).sum(dim=dim))
    if dim == 0:
        return torch.stack(parts).sum(dim=0)
    return torch.cat(parts)


class GreedyPath:
    """The weights and costs of one linear along its greedy path.

    Rows, columns and sets are indexed among those that remain.

    Attributes:
        W: [rows, columns] the present weights, zero where rows or columns are removed.
        alive: the remaining rows and columns of `W`.
        sets: [num_sets, width] columns that are pruned together.
        may_prune: [R + num_sets] bool at the start, on the CPU: the rows and sets that may be
            pruned.
        row_numbers: the original numbers, from 0, of the rows with costs.
        set_numbers: the original numbers, from R, of the sets with costs.
    """

    def __init__(
        self, curvature: LinearCurvature, allowed: Pair, sets: Tensor | None = None
    ) -> None:
        """Start with everything alive.

        Args:
            curvature: of the alive part [R, C]. A factor is factorised only if its inverse is
                needed.
            allowed: rows [R] bool and sets [num_sets] bool that may be pruned. If no row may be
                pruned, rows have no costs, and nothing is computed for them; the same holds for
                sets.
            sets: [num_sets, width] columns that are pruned together; single columns if None.
        """
        W = curvature.W
        R, C = W.shape
        allowed_rows, allowed_sets = allowed
        if sets is None:
            sets = torch.arange(C, device=W.device)[:, None]
        self.W = W.clone()
        self.alive = StructuredMask(
            rows=W.new_ones(R, dtype=torch.bool),
            columns=W.new_ones(C, dtype=torch.bool),
        )
        self.sets = sets
        self.may_prune = torch.cat([allowed_rows, allowed_sets]).cpu()
        num_rows = R if allowed_rows.any() else 0
        num_sets = len(sets) if allowed_sets.any() else 0
        self.row_numbers = torch.arange(num_rows, device=W.device)
        self.set_numbers = torch.arange(R, R + num_sets, device=W.device)
        if num_rows:
            every_row = torch.arange(R, device=W.device)[:, None]
            self._by_row = DowndatedInverse(curvature.G, every_row)
        if num_sets:
            self._by_column = DowndatedInverse(curvature.A, sets)
        # read after the factorisations, which may have raised the damping
        G, A = curvature.first
        if num_rows:
            self._H = product(W, A)
        if num_sets:
            self._U = product(G, W)

    def costs(self, *, per_parameter: bool) -> Tensor:
        """Return the present costs, those of `row_numbers` followed by those of `set_numbers`.

        Args:
            per_parameter: whether to divide the cost of a row by its number of entries, and the
                cost of a set by the number of entries of a column.
        """
        by_row = self.W.new_empty(0)
        by_set = self.W.new_empty(0)
        if len(self.row_numbers):
            by_row = self.row_costs()
        if len(self.set_numbers):
            by_set = self.column_set_costs()
        if per_parameter:
            by_row = by_row / self.alive.columns.sum().clamp(min=1)
            by_set = by_set / self.alive.rows.sum().clamp(min=1)
        return torch.cat([by_row, by_set])

    def row_costs(self) -> Tensor:
        """Return the present cost of each row, [R]; 0 for pruned rows."""
        by_row = _dots(self.W, self._H, dim=1)
        inverse_diagonal = self._by_row.blocks[:, 0, 0]
        return 0.5 * (by_row / inverse_diagonal).clamp(min=0) * self.alive.rows

    def column_set_costs(self) -> Tensor:
        """Return the present joint cost of each set of columns, [num_sets]; 0 for pruned sets.

        It is 1/2 tr(W_Q^T G W_Q ([A^-1]_QQ)^-1).
        """
        blocks = self._by_column.blocks
        if self.sets.shape[1] == 1:
            by_column = _dots(self.W, self._U, dim=0)[self.sets[:, 0]]
            return 0.5 * (by_column / blocks[:, 0, 0]).clamp(min=0)
        W_sets = self.W[:, self.sets]
        U_sets = self._U[:, self.sets]
        inner = torch.einsum("rsi,rsj->sij", W_sets, U_sets)
        # not by LU: with several threads MKL factorises batches of matrices of 192 and more wrongly
        # (torch 2.13, MKL 2024.2)
        L, failed = torch.linalg.cholesky_ex(blocks)
        for number in failed.nonzero()[:, 0].tolist():
            L[number] = root(blocks[number])
        solved = torch.cholesky_solve(inner, L)
        return 0.5 * solved.diagonal(dim1=1, dim2=2).sum(dim=1).clamp(min=0)

    def remove(self, indices: Tensor) -> None:
        """Remove rows and sets, given by their indices among the costs."""
        num_rows = len(self.row_numbers)
        rows = indices[indices < num_rows]
        sets = indices[indices >= num_rows] - num_rows
        if len(rows):
            self.remove_rows(rows)
        if len(sets):
            self.remove_columns(self.sets[sets].flatten())
        self._compact()

    def remove_rows(self, pruned: Tensor) -> None:
        """Remove rows, given by their indices."""
        X = self._by_row.eliminate(pruned).T
        self._H.addmm_(X, self._H[pruned], alpha=-1)
        self.W.addmm_(X, self.W[pruned], alpha=-1)
        self.W[pruned] = 0
        self.alive.rows[pruned] = False

    def remove_columns(self, pruned: Tensor) -> None:
        """Remove columns, given by their indices."""
        Y = self._by_column.eliminate(pruned)
        self._U.addmm_(self._U[:, pruned], Y, alpha=-1)
        self.W.addmm_(self.W[:, pruned], Y, alpha=-1)
        self.W[:, pruned] = 0
        self.alive.columns[pruned] = False

    def _compact(self) -> None:
        """Drop the removed rows and columns if they are half of the rows or of the columns.

        A set is dropped when all of its columns are removed.
        """
        alive = self.alive
        num_rows = int(alive.rows.sum())
        num_columns = int(alive.columns.sum())
        if 2 * num_rows > len(alive.rows) and 2 * num_columns > len(alive.columns):
            return
        self.W = alive.of(self.W)
        if len(self.row_numbers):
            self._H = alive.of(self._H)
            every = torch.arange(len(self.W), device=self.W.device)[:, None]
            self._by_row = self._by_row.of_part(alive.rows, every)
            self.row_numbers = self.row_numbers[alive.rows]
        if len(self.set_numbers):
            is_left = alive.columns[self.sets].any(dim=1)
            self.sets = (alive.columns.cumsum(0) - 1)[self.sets[is_left]]
            self.set_numbers = self.set_numbers[is_left]
            self._U = alive.of(self._U)
            self._by_column = self._by_column.of_part(alive.columns, self.sets)
        self.alive = StructuredMask(
            rows=alive.rows[alive.rows],
            columns=alive.columns[alive.columns],
        )


class Limits(NamedTuple):
    """How far a greedy path is followed."""

    # largest marginal cost of a pruned structure; None for the cost of each structure on its own
    limit: float | None = math.inf
    # number of structures that are pruned even if they cost more than `limit`
    needed: int = 0
    # largest cost of the structures that are pruned because of `needed`
    most: float = math.inf
    least: int = 0  # number of the structures that may be pruned but stay
    # whether costs are divided by the entries that a row or column still has when it is pruned
    per_parameter: bool = False


def num_at_once(left: int, least: int) -> int:
    """Return the largest number of structures that are pruned in one step.

    Args:
        left: number of remaining structures that may be pruned.
        least: number of these structures that stay.
    """
    few = max(1, int(left * _FEW))
    return max(0, min(few, left - least))


def greedy_costs(path: GreedyPath, limits: Limits, name: str) -> Pair:
    """Follow the greedy path and return the marginal cost at which each structure is pruned.

    Args:
        path: a path at its start, with everything alive.
        limits: how far to follow the path.
        name: name that error messages give the costs.

    Returns:
        [R] and [num_sets] costs of rows and sets of columns: the largest marginal cost up to and
        including the removal of the structure, so that a threshold cuts the path at one place;
        infinite for structures that were not removed.

    Raises:
        FloatingPointError: a cost of the first step is NaN, infinite or negative, which would end
            the path.
    """
    assert limits.limit is not None, "there is no path"
    num_rows = len(path.W)
    may_prune = path.may_prune.clone()
    marginal = torch.full((len(may_prune),), torch.inf, dtype=path.W.dtype)
    highest = 0.0
    num_pruned = 0
    while int(may_prune.sum()) > limits.least:
        numbers = torch.cat([path.row_numbers, path.set_numbers]).cpu()
        costs = path.costs(per_parameter=limits.per_parameter).cpu()
        candidates = may_prune[numbers]
        if num_pruned == 0:
            check_costs(name, costs[candidates])
        costs.masked_fill_(~candidates, torch.inf)
        left = int(torch.isfinite(costs).sum())
        cheapest = costs.topk(num_at_once(left, limits.least), largest=False)
        is_cheap = cheapest.values <= limits.limit
        is_needed = torch.arange(len(cheapest.values)) < limits.needed - num_pruned
        is_needed &= cheapest.values <= limits.most
        to_prune = is_cheap | is_needed
        if not to_prune.any():
            break
        pruned = cheapest.indices[to_prune]
        now = cheapest.values[to_prune].clamp(min=highest)
        highest = float(now.max())
        marginal[numbers[pruned]] = now
        may_prune[numbers[pruned]] = False
        num_pruned += len(pruned)
        path.remove(pruned.to(path.W.device))
    marginal = marginal.to(path.W.device)
    return marginal[:num_rows], marginal[num_rows:]
