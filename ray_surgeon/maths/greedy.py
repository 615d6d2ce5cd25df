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

import itertools
import math

import torch
from torch import Tensor

from ray_surgeon.maths.kronecker import DampedFactor, solve_lower
from ray_surgeon.maths.linear import Part
from ray_surgeon.maths.products import product
from ray_surgeon.maths.threshold import check_costs

_FEW = 1 / 128
"""Fraction of the structures left that is pruned in one step (at least one)."""

_ROWS = 128
"""Of two matrices that are multiplied entry by entry, as many rows at once."""


class DowndatedInverse:
    """The inverse M of a damped factor from which rows and columns are eliminated.

    M -= M_:Q (M_QQ)^-1 M_Q:, without M itself.

    Costs need only diagonal blocks of M, and an elimination only the columns it eliminates: both
    follow from the Cholesky factor and from the V with M = L^-T L^-1 - V^T V that the eliminations
    so far have left.
    """

    def __init__(self, factor: DampedFactor, sets: Tensor | None = None) -> None:
        """Start with nothing eliminated.

        Args:
            factor: [n, n].
            sets: [num_sets, w] indices of the diagonal blocks that are wanted; single entries if
                None.
        """
        self._factor = factor
        n = len(factor.cholesky)
        self._sets = (
            torch.arange(n, device=factor.cholesky.device)[:, None] if sets is None else sets
        )
        self.blocks = factor.inverse_blocks(self._sets)  # [num_sets, w, w]
        self._V = factor.cholesky.new_empty(0, n)
        self._k = 0
        self._is_gone = torch.zeros(n, dtype=torch.bool, device=factor.cholesky.device)

    def of_part(self, left: Tensor, sets: Tensor | None = None) -> DowndatedInverse:
        """Return the same for the indices that are left, [n] bool; `sets` count among them."""
        return DowndatedInverse(self._factor.part(left), sets)

    @property
    def diagonal(self) -> Tensor:
        """The entries [num_sets] of sets of one."""
        return self.blocks[:, 0, 0]

    def eliminate(self, Q: Tensor) -> Tensor:
        """Eliminate rows and columns [q], and return Y = (M_QQ)^-1 M_Q: [q, n].

        The block of a set that is gone becomes the identity.
        """
        V = self._V[: self._k]
        columns = self._factor.inverse_columns(Q).addmm_(V.T, V[:, Q], alpha=-1)
        K = _root(columns[Q])
        X = solve_lower(K, columns.T)
        self._remember(X)
        of_sets = X.T[self._sets]
        self.blocks -= (
            of_sets.square().sum(dim=2)[:, :, None]
            if self._sets.shape[1] == 1
            else of_sets @ of_sets.mT
        )
        gone = self._is_gone.index_fill_(0, Q, True)[self._sets].all(dim=1)
        self.blocks[gone] = torch.eye(self._sets.shape[1], dtype=X.dtype, device=X.device)
        return solve_lower(K, X, transposed=True)

    def _remember(self, X: Tensor) -> None:
        k = self._k + len(X)
        if k > len(self._V):
            longer = X.new_empty(min(max(k, 2 * self._k), X.shape[1]), X.shape[1])
            longer[: self._k] = self._V[: self._k]
            self._V = longer
        self._V[self._k : k] = X
        self._k = k


def _dots(x: Tensor, y: Tensor, *, dim: int) -> Tensor:
    """Return ``(x * y).sum(dim)`` of two matrices, a few rows at a time.

    Memory that is new in every step costs more than the products.
    """
    parts = [
        (a * b).sum(dim=dim)
        for a, b in zip(torch.split(x, _ROWS), torch.split(y, _ROWS), strict=True)
    ]
    return torch.cat(parts) if dim else torch.stack(parts).sum(dim=0)


def _root(block: Tensor) -> Tensor:
    """Return a lower L with L L^T = block, which rounding may have made indefinite."""
    L: Tensor
    L, failed = torch.linalg.cholesky_ex(block)
    if failed:
        values, vectors = torch.linalg.eigh(block.double())
        values = values.clamp(min=1e-7 * float(values[-1].clamp(min=1e-30)))
        L = torch.linalg.qr((vectors * values.sqrt()).T).R.T.to(block.dtype)
    return L


class GreedyPath:
    """The weights and costs of one linear along its greedy path.

    Indices are those of the rows, columns and sets that are here still; `row_numbers` and the like
    say which they were at the start.
    """

    def __init__(
        self,
        W: Tensor,
        A: DampedFactor,
        G: DampedFactor,
        *,
        prunes_rows: bool = True,
        prunes_columns: bool = True,
        sets: Tensor | None = None,
    ) -> None:
        """Start with everything alive.

        Args:
            W: [R, C] alive weights.
            A: [C, C].
            G: [R, R].
            prunes_rows: whether rows are pruned and have costs; what only they need is left out
                otherwise.
            prunes_columns: likewise.
            sets: [num_sets, width] columns that are pruned together; single ones if None.
        """
        self.W = W.clone()
        self.prunes_rows = prunes_rows
        self.prunes_columns = prunes_columns
        self.rows = torch.ones(len(W), dtype=torch.bool, device=W.device)
        self.columns = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
        self.row_numbers, self.column_numbers = (torch.arange(n, device=W.device) for n in W.shape)
        self.sets = self.column_numbers[:, None] if sets is None else sets
        self.set_numbers = torch.arange(len(self.sets), device=W.device)
        if prunes_rows:
            self._H = product(W, A.matrix)
            self._by_row = DowndatedInverse(G)
        if prunes_columns:
            self._U = product(G.matrix, W)
            self._by_column = DowndatedInverse(A, self.sets)

    def row_costs(self) -> Tensor:
        """Return the cost of each row now, [R]; of pruned ones, 0."""
        return (
            0.5 * (_dots(self.W, self._H, dim=1) / self._by_row.diagonal).clamp(min=0) * self.rows
        )

    def column_costs(self) -> Tensor:
        """Return the cost of each column now, [C]; of pruned ones, 0."""
        return (
            0.5
            * (_dots(self.W, self._U, dim=0) / self._by_column.diagonal).clamp(min=0)
            * self.columns
        )

    def column_set_costs(self) -> Tensor:
        """Return the joint cost of each set of columns now, [num_sets]; of pruned sets 0.

        It is 1/2 tr(W_Q^T G W_Q ([A^-1]_QQ)^-1).
        """
        if self.sets.shape[1] == 1:
            return 0.5 * (
                _dots(self.W, self._U, dim=0)[self.sets[:, 0]] / self._by_column.diagonal
            ).clamp(min=0)
        inner = torch.einsum("rsi,rsj->sij", self.W[:, self.sets], self._U[:, self.sets])
        # not by LU: with several threads MKL factorises batches of matrices of 192 and more wrongly
        # (torch 2.13, MKL 2024.2)
        L, failed = torch.linalg.cholesky_ex(self._by_column.blocks)
        for number in failed.nonzero()[:, 0].tolist():
            L[number] = _root(self._by_column.blocks[number])
        solved = torch.cholesky_solve(inner, L)
        return 0.5 * solved.diagonal(dim1=1, dim2=2).sum(dim=1).clamp(min=0)

    def remove_rows(self, pruned: Tensor) -> None:
        """Remove rows, given by their indices."""
        X = self._by_row.eliminate(pruned).T
        self._H.addmm_(X, self._H[pruned], alpha=-1)
        self.W.addmm_(X, self.W[pruned], alpha=-1)
        self.W[pruned] = 0
        self.rows[pruned] = False

    def remove_columns(self, pruned: Tensor) -> None:
        """Remove columns, given by their indices."""
        Y = self._by_column.eliminate(pruned)
        self._U.addmm_(self._U[:, pruned], Y, alpha=-1)
        self.W.addmm_(self.W[:, pruned], Y, alpha=-1)
        self.W[:, pruned] = 0
        self.columns[pruned] = False

    def compact(self) -> None:
        """Leave out what is gone, if that is half of the rows or of the columns.

        A set is gone with all of its columns.
        """
        rows = self.rows
        columns = self.columns
        if 2 * int(rows.sum()) > len(rows) and 2 * int(columns.sum()) > len(columns):
            return
        part = Part(rows, columns)
        self.W = part.of(self.W)
        if self.prunes_rows:
            self._H = part.of(self._H)
            self._by_row = self._by_row.of_part(rows)
        if self.prunes_columns:
            left = columns[self.sets].any(dim=1)
            place = columns.cumsum(0) - 1
            self.sets = place[self.sets[left]]
            self.set_numbers = self.set_numbers[left]
            self._U = part.of(self._U)
            self._by_column = self._by_column.of_part(columns, self.sets)
        self.row_numbers = self.row_numbers[rows]
        self.column_numbers = self.column_numbers[columns]
        self.rows = rows[rows]
        self.columns = columns[columns]


def greedy_costs(
    path: GreedyPath,
    may_prune_rows: Tensor,
    may_prune_columns: Tensor,
    *,
    name: str,
    per_parameter: bool,
    limit: float,
) -> tuple[Tensor, Tensor]:
    """Follow the greedy path up to a marginal cost.

    Returns the marginal cost at which each structure is pruned.

    Args:
        path: with everything alive.
        may_prune_rows: [R] bool.
        may_prune_columns: [C] bool.
        name: of the linear, for the error.
        per_parameter: whether costs are divided by the entries that a structure still has when it
            is pruned.
        limit: no structure is pruned whose marginal cost is above it.

    Returns:
        [R] and [C]: the largest marginal cost up to and including the structure's own removal, so
        that a threshold cuts the path at one place; infinite for what was not removed.

    Raises:
        FloatingPointError: a cost of the first step is not usable; the path would end there.
    """
    by_row = path.W.new_full((len(path.W),), torch.inf)
    by_column = path.W.new_full((path.W.shape[1],), torch.inf)
    highest = 0.0
    for step in itertools.count():
        row_costs = path.W.new_full((len(path.rows),), torch.inf)
        column_costs = path.W.new_full((len(path.columns),), torch.inf)
        if path.prunes_rows:
            row_costs = torch.where(
                may_prune_rows[path.row_numbers] & path.rows, path.row_costs(), torch.inf
            )
            if step == 0:
                check_costs(f"{name} rows", row_costs[may_prune_rows])
        if path.prunes_columns:
            column_costs = torch.where(
                may_prune_columns[path.column_numbers] & path.columns,
                path.column_costs(),
                torch.inf,
            )
            if step == 0:
                check_costs(f"{name} columns", column_costs[may_prune_columns])
        if per_parameter:
            row_costs = row_costs / path.columns.sum().clamp(min=1)
            column_costs = column_costs / path.rows.sum().clamp(min=1)
        together = torch.cat([row_costs, column_costs])
        left = int(torch.isfinite(together).sum())
        if left == 0:
            break
        cheapest = together.topk(max(1, int(left * _FEW)), largest=False)
        marginal = cheapest.values.clamp(min=highest)
        to_prune = marginal <= limit
        if not to_prune.any():
            break
        highest = float(marginal[to_prune].max())
        indices = cheapest.indices[to_prune]
        is_row = indices < len(row_costs)
        pruned_rows = indices[is_row]
        pruned_columns = indices[~is_row] - len(row_costs)
        by_row[path.row_numbers[pruned_rows]] = marginal[to_prune][is_row]
        by_column[path.column_numbers[pruned_columns]] = marginal[to_prune][~is_row]
        if len(pruned_rows):
            path.remove_rows(pruned_rows)
        if len(pruned_columns):
            path.remove_columns(pruned_columns)
        path.compact()
    return by_row, by_column


def greedy_set_costs(
    path: GreedyPath,
    least: int,
    *,
    name: str,
    limit: float = math.inf,
    needed: int = 0,
    most: float = math.inf,
) -> Tensor:
    """Follow the greedy path of sets of columns up to a marginal cost.

    Returns the cost at which each is pruned.

    Args:
        path: with all of its sets alive.
        least: sets that stay.
        name: of the sets, for the error.
        limit: no set is pruned whose marginal cost is above it,
        needed: except that this many are pruned,
        most: as long as none costs more than this.

    Returns:
        [num_sets] the largest marginal cost up to and including the set's own removal; infinite for
        those that stay.

    Raises:
        FloatingPointError: a cost of the first step is not usable; the path would end there.
    """
    num_sets = len(path.sets)
    device = path.W.device
    marginal = torch.full((num_sets,), torch.inf, dtype=path.W.dtype)
    alive = torch.ones(num_sets, dtype=torch.bool)
    highest = 0.0
    while (left := int(alive.sum())) > least:
        numbers = path.set_numbers.cpu()
        costs = path.column_set_costs().cpu()
        if left == num_sets:
            check_costs(name, costs)
        costs.masked_fill_(~alive[numbers], torch.inf)
        cheapest = costs.topk(min(max(1, int(left * _FEW)), left - least), largest=False)
        num_pruned = num_sets - left
        to_prune = (cheapest.values <= limit) | (
            (torch.arange(len(cheapest.values)) < needed - num_pruned) & (cheapest.values <= most)
        )
        if not to_prune.any():
            break
        pruned = cheapest.indices[to_prune]
        marginal[numbers[pruned]] = cheapest.values[to_prune].clamp(min=highest)
        highest = float(marginal[numbers[pruned]].max())
        alive[numbers[pruned]] = False
        path.remove_columns(path.sets[pruned.to(device)].flatten())
        path.compact()
    return marginal
