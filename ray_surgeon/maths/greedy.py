"""Greedy paths: prune the cheapest few structures, update the rest, and repeat.

Source: docs/method.md, section 3 (rows, columns) and section 8 (groups). The costs are the exact
ones after all earlier removals, not the sum of single costs. With U = G W and H = W A kept beside
W, a removal changes everything by a product whose rank is the number of rows or columns that go:

* rows P: X = [G^-1]_:P ([G^-1]_PP)^-1; W -= X W_P; H -= X H_P; G^-1 -= X [G^-1]_P:; U keeps its
  other rows;
* columns Q: Y = ([A^-1]_QQ)^-1 [A^-1]_Q:; W -= W_Q Y; U -= U_Q Y; A^-1 -= [A^-1]_:Q Y; H keeps its
  other columns.

The inverses never exist whole: see `DowndatedInverse`. Where half of the rows or of the columns are
gone, the rest goes on as a smaller problem: the inverse of what is left is that of its part of the
factor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ray_surgeon.maths.curvature import LinearCurvature, Pair
from ray_surgeon.maths.factorised import DowndatedInverse, root
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.products import product
from ray_surgeon.maths.threshold import check_costs

_FEW = 1 / 128
"""Fraction of the structures left that is pruned in one step (at least one)."""

_ROWS = 128
"""Of two matrices that are multiplied entry by entry, as many rows at once."""


def _dots(x: Tensor, y: Tensor, *, dim: int) -> Tensor:
    """Return ``(x * y).sum(dim)`` of two matrices, a few rows at a time.

    Memory that is new in every step costs more than the products.
    """
    pairs = zip(torch.split(x, _ROWS), torch.split(y, _ROWS), strict=True)
    parts = [(a * b).sum(dim=dim) for a, b in pairs]
    return torch.cat(parts) if dim else torch.stack(parts).sum(dim=0)


class GreedyPath:
    """The weights and costs of one linear along its greedy path.

    Indices are those of the rows, columns and sets that are here still. Of those with costs
    `row_numbers` says which they were at the start, from 0, and `set_numbers`, from R.
    """

    def __init__(
        self, curvature: LinearCurvature, allowed: Pair, sets: Tensor | None = None
    ) -> None:
        """Start with everything alive.

        Args:
            curvature: of the alive part [R, C]. Only what is inverted is factorised.
            allowed: rows [R] bool and sets [num_sets] bool that may be pruned. If no row may be,
                rows have no costs, and what only these need is left out; sets likewise.
            sets: [num_sets, width] columns that are pruned together; single ones if None.
        """
        W = curvature.W
        self.W = W.clone()
        self.alive = StructuredMask(*(W.new_ones(n, dtype=torch.bool) for n in W.shape))
        every_row, every_column = (torch.arange(n, device=W.device)[:, None] for n in W.shape)
        self.sets = every_column if sets is None else sets
        self.may_prune = torch.cat(allowed).cpu()
        num_rows = len(W) if allowed[0].any() else 0
        num_sets = len(self.sets) if allowed[1].any() else 0
        self.row_numbers = torch.arange(num_rows, device=W.device)
        self.set_numbers = torch.arange(len(W), len(W) + num_sets, device=W.device)
        if num_rows:
            self._by_row = DowndatedInverse(curvature.G, every_row)
        if num_sets:
            self._by_column = DowndatedInverse(curvature.A, self.sets)
        G, A = curvature.first  # which a factorisation may have damped more
        if num_rows:
            self._H = product(W, A)
        if num_sets:
            self._U = product(G, W)

    def costs(self, *, per_parameter: bool) -> Tensor:
        """Return the costs now, those of `row_numbers` and then those of `set_numbers`.

        Args:
            per_parameter: whether they are divided by the entries that a row, or a column, has.
        """
        by_row = self.row_costs() if len(self.row_numbers) else self.W.new_empty(0)
        by_set = self.column_set_costs() if len(self.set_numbers) else self.W.new_empty(0)
        if per_parameter:
            by_row = by_row / self.alive.columns.sum().clamp(min=1)
            by_set = by_set / self.alive.rows.sum().clamp(min=1)
        return torch.cat([by_row, by_set])

    def row_costs(self) -> Tensor:
        """Return the cost of each row now, [R]; of pruned ones, 0."""
        by_row = _dots(self.W, self._H, dim=1)
        return 0.5 * (by_row / self._by_row.blocks[:, 0, 0]).clamp(min=0) * self.alive.rows

    def column_set_costs(self) -> Tensor:
        """Return the joint cost of each set of columns now, [num_sets]; of pruned sets 0.

        It is 1/2 tr(W_Q^T G W_Q ([A^-1]_QQ)^-1).
        """
        if self.sets.shape[1] == 1:
            by_column = _dots(self.W, self._U, dim=0)[self.sets[:, 0]]
            return 0.5 * (by_column / self._by_column.blocks[:, 0, 0]).clamp(min=0)
        inner = torch.einsum("rsi,rsj->sij", self.W[:, self.sets], self._U[:, self.sets])
        # not by LU: with several threads MKL factorises batches of matrices of 192 and more wrongly
        # (torch 2.13, MKL 2024.2)
        L, failed = torch.linalg.cholesky_ex(self._by_column.blocks)
        for number in failed.nonzero()[:, 0].tolist():
            L[number] = root(self._by_column.blocks[number])
        return 0.5 * torch.cholesky_solve(inner, L).diagonal(dim1=1, dim2=2).sum(dim=1).clamp(min=0)

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
        """Leave out what is gone, if that is half of the rows or of the columns.

        A set is gone with all of its columns.
        """
        alive = self.alive
        if all(2 * int(side.sum()) > len(side) for side in (alive.rows, alive.columns)):
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
        self.alive = StructuredMask(alive.rows[alive.rows], alive.columns[alive.columns])


class Limits(NamedTuple):
    """How far a greedy path is followed."""

    # nothing is pruned whose marginal cost is above it; None for costs of each structure on its own
    limit: float | None = math.inf
    needed: int = 0  # so many are pruned although they cost more,
    most: float = math.inf  # as long as none costs more than this
    least: int = 0  # so many of those that may be pruned stay
    # whether costs are divided by the entries that a row or column still has when it is pruned
    per_parameter: bool = False


def num_at_once(left: int, least: int) -> int:
    """Return how many of those that are left are pruned in one step, at most.

    Args:
        left: that may be pruned.
        least: so many of them stay.
    """
    return max(0, min(max(1, int(left * _FEW)), left - least))


def greedy_costs(path: GreedyPath, limits: Limits, name: str) -> Pair:
    """Follow the greedy path up to a marginal cost.

    Returns the marginal cost at which each row and each set of columns is pruned.

    Args:
        path: with everything alive.
        limits: how far to go.
        name: of what the costs belong to, for the error.

    Returns:
        [R] and [num_sets]: the largest marginal cost up to and including the structure's own
        removal, so that a threshold cuts the path at one place; infinite for what was not removed.

    Raises:
        FloatingPointError: a cost of the first step is not usable; the path would end there.
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
        is_needed = torch.arange(len(cheapest.values)) < limits.needed - num_pruned
        to_prune = cheapest.values <= limits.limit
        to_prune |= is_needed & (cheapest.values <= limits.most)
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
