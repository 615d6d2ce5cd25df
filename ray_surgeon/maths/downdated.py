"""Linears of one shape and the inverses of their factors, updated as rows and columns are removed.

For devices other than the CPU, on which a few large products are faster than many small ones. The
removal of columns Q and rows P is, with Y = ([A^-1]_QQ)^-1 [A^-1]_Q:, X = [G^-1]_:P ([G^-1]_PP)^-1,
U = G W and H = W A,

    [W; U; A^-1] -= [W; U; A^-1]_:Q Y,   then   W -= X W_P:   and   [G^-1, H] -= X [G^-1, H]_P:

Matrices that are written one above the other or side by side are stored as one matrix. A linear
that loses fewer structures than others takes part with rows of zeros. Source: docs/method.md,
sections 3 and 8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ray_surgeon.maths.curvature import LinearCurvature
from ray_surgeon.maths.kronecker import root
from ray_surgeon.maths.products import product


class _Part(NamedTuple):
    """Rows, or columns, that are to be removed."""

    indices: Tensor  # [B, q w]; arbitrary where nothing is removed
    entries: Tensor  # rows of `wide`, or columns of `tall`; zero where nothing is removed


class Elimination(NamedTuple):
    """The matrices with which some structures of each linear are removed."""

    rows: _Part | None
    columns: _Part | None
    inverse: Tensor  # [B, q w, R + C] rows of G^-1 and of A^-1
    root: Tensor  # [B, q w, q w] lower Cholesky factor of `inverse` at the same indices
    failed: Tensor  # [B], positive where rounding made that part of `inverse` indefinite


class Downdated:
    """The weights of B linears and the matrices that give their costs and updates.

    The structures are all rows, if rows may be removed, followed by the sets of columns. The
    columns of a set are adjacent, set after set; the columns that are in no set come last.

    Attributes:
        tall: [B, 2 R + C, C] W, U / 2 and A^-1, one above the other; only W if no column may be
            removed.
        wide: [B, R, R + C] G^-1 and H / 2, side by side; None if no row may be removed.
        num_rows: R.
        first_set: number of structures that are rows.
        num_sets: number of sets of columns.
        width: number of columns of a set; 1 if rows may be removed, too.
    """

    def __init__(
        self, tall: Tensor, wide: Tensor | None, num_rows: int, num_sets: int, width: int
    ) -> None:
        """Start with everything alive; the matrices are changed in place."""
        assert wide is None or width == 1
        self.tall = tall
        self.wide = wide
        self.num_rows = num_rows
        self.first_set = num_rows if wide is not None else 0
        self.num_sets = num_sets
        self.width = width
        self._number_columns()

    def _number_columns(self) -> None:
        """Store the column of each structure, for sets of one column; it is arbitrary for rows."""
        numbers = torch.arange(self.first_set + self.num_sets, device=self.tall.device)
        self._columns_of = (numbers - self.first_set).clamp_(min=0)

    @staticmethod
    def of_linear(curvature: LinearCurvature, *, rows: bool, columns: bool) -> Downdated:
        """Return a batch of one linear, of which rows, single columns or both may be removed."""
        W = curvature.W
        R, C = W.shape
        wide = None
        if rows:
            wide = W.new_empty(R, R + C)
        height = 2 * R + C if columns else R
        tall = W.new_empty(height, C)
        tall[:R] = W
        # one inverse after the other: there is memory for only one more matrix
        if wide is not None:
            wide[:, :R] = curvature.G.inverse()
        if columns:
            tall[2 * R :] = curvature.A.inverse()
        # read after the factorisations, which may have raised the damping
        G, A = curvature.first
        if wide is not None:
            wide[:, R:] = product(W, A).mul_(0.5)
            wide = wide[None]
        if columns:
            tall[R : 2 * R] = product(G, W).mul_(0.5)
        num_sets = C if columns else 0
        return Downdated(tall[None], wide, num_rows=R, num_sets=num_sets, width=1)

    @property
    def W(self) -> Tensor:
        """[B, R, C] the weights; removed entries are not exactly zero."""
        return self.tall[:, : self.num_rows]

    def row_costs(self) -> Tensor:
        """Return the cost of each row, [B, R]; it is arbitrary for removed rows."""
        assert self.wide is not None
        R = self.num_rows
        diagonal = self.wide[:, :, :R].diagonal(dim1=1, dim2=2)
        return (self.W * self.wide[:, :, R:]).sum(dim=2) / diagonal

    def set_costs(self, penalty: Tensor, *, repair: bool) -> tuple[Tensor, Tensor | None]:
        """Return the joint cost of each set of columns, 1/2 tr(W_Q^T G W_Q ([A^-1]_QQ)^-1).

        Args:
            penalty: [B, num_sets], positive where costs may be arbitrary.
            repair: whether to wait for the device and repair blocks that rounding made indefinite.

        Returns:
            [B, num_sets] costs, and [B] the number of blocks that need a repair; None if no block
            can need one.
        """
        R = self.num_rows
        inside = self.num_sets * self.width
        W = self.tall[:, :R, :inside]
        U = self.tall[:, R : 2 * R, :inside]
        inverse = self.tall[:, 2 * R :][:, :inside, :inside]
        if self.width == 1:
            return (W * U).sum(dim=1) / inverse.diagonal(dim1=1, dim2=2), None
        shape = (self.num_sets, self.width)
        blocks = torch.unflatten(torch.unflatten(inverse, 2, shape), 1, shape)
        blocks = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        L, failed = torch.linalg.cholesky_ex(blocks)
        is_failed = (failed > 0) & (penalty == 0)
        if repair:
            for linear, number in is_failed.nonzero().tolist():
                L[linear, number] = root(blocks[linear, number])
        W_sets = torch.unflatten(W, 2, shape)
        U_sets = torch.unflatten(U, 2, shape)
        inner = torch.einsum("brsi,brsj->bsij", W_sets, U_sets)
        solved = torch.linalg.solve_triangular(L, inner, upper=False)
        solved = torch.linalg.solve_triangular(L.mT, solved, upper=True)
        return solved.diagonal(dim1=2, dim2=3).sum(dim=2), is_failed.sum(dim=1)

    def elimination(
        self, indices: Tensor, is_pruned: Tensor, sides: Tensor, *, repair: bool
    ) -> Elimination:
        """Return the matrices with which structures are removed.

        Args:
            indices: [B, q] of structures.
            is_pruned: [B, q] bool; the structures of a linear that are pruned come first.
            sides: [B, 1 or 2, q] bool: which of them are pruned rows, if rows may be removed, and
                which are pruned sets, if there are any sets.
            repair: see `set_costs`.
        """
        R = self.num_rows
        rows = None
        columns = None
        inverses = list[Tensor]()
        if self.wide is not None:
            rows = self._rows(indices, sides[:, 0])
            inverses.append(rows.entries[:, :, :R])
        if self.num_sets:
            columns = self._columns(indices, sides[:, -1])
            inverses.append(columns.entries[:, 2 * R :].mT)
            if rows is None:
                indices = columns.indices
        inverse = inverses[0] if len(inverses) == 1 else torch.cat(inverses, dim=2)
        # structures that stay have a row of zeros in `inverse` and a row of the identity in
        # `block`; they come last, so that their columns have no entry below the diagonal
        block = inverse.gather(2, indices[:, None].expand(-1, indices.shape[1], -1))
        diagonal = torch.unflatten(block.diagonal(dim1=1, dim2=2), 1, (-1, self.width))
        diagonal.add_(~is_pruned[:, :, None])
        L, failed = torch.linalg.cholesky_ex(block)
        if repair:
            for linear in failed.nonzero()[:, 0].tolist():
                L[linear] = root(block[linear].tril() + block[linear].tril(-1).T)
        return Elimination(
            rows=rows,
            columns=columns,
            inverse=inverse,
            root=L,
            failed=failed,
        )

    def _rows(self, indices: Tensor, is_pruned: Tensor) -> _Part:
        assert self.wide is not None
        rows = indices
        if self.num_sets:
            rows = indices.clamp(max=self.num_rows - 1)
        entries = self.wide.gather(1, rows[:, :, None].expand(-1, -1, self.wide.shape[2]))
        return _Part(rows, entries.mul_(is_pruned[:, :, None]))

    def _columns(self, indices: Tensor, is_pruned: Tensor) -> _Part:
        columns = indices
        if self.wide is not None:
            columns = self._columns_of[indices]
        if self.width > 1:
            every = torch.arange(self.width, device=indices.device)
            columns = (columns[:, :, None] * self.width + every).flatten(1)
            is_pruned = is_pruned[:, :, None].expand(-1, -1, self.width).flatten(1)
        entries = self.tall.gather(2, columns[:, None].expand(-1, self.tall.shape[1], -1))
        return _Part(columns, entries.mul_(is_pruned[:, None]))

    def remove(self, elimination: Elimination) -> None:
        """Remove structures and update the others."""
        rows = elimination.rows
        columns = elimination.columns
        L = elimination.root
        solved = torch.linalg.solve_triangular(L, elimination.inverse, upper=False)
        Y = torch.linalg.solve_triangular(L.mT, solved, upper=True)
        if columns is not None:
            self.tall.baddbmm_(columns.entries, Y[:, :, self.first_set :], alpha=-1)
        if rows is not None:
            assert self.wide is not None
            X = Y[:, :, : self.num_rows].mT
            places = rows.indices[:, :, None].expand(-1, -1, self.tall.shape[2])
            self.W.baddbmm_(X, self.W.gather(1, places), alpha=-1)
            self.wide.baddbmm_(X, rows.entries, alpha=-1)

    def select(self, linears: Tensor) -> None:
        """Keep some of the linears, given by their numbers."""
        self.tall = self.tall[linears]
        if self.wide is not None:
            self.wide = self.wide[linears]

    def restrict(self, rows: Tensor, sets: Tensor) -> None:
        """Keep some of the structures of each linear, given by their numbers.

        Args:
            rows: [B, m]; ignored if no row may be removed.
            sets: [B, n].
        """
        R = self.num_rows
        every = torch.arange(max(self.tall.shape[1:]), device=sets.device)
        if self.wide is None:
            rows = every[:R].expand(len(sets), -1)
        inside = (sets[:, :, None] * self.width + every[: self.width]).flatten(1)
        outside = every[self.num_sets * self.width : self.tall.shape[2]]
        columns = torch.cat([inside, outside.expand(len(sets), -1)], dim=1)
        tall_rows = rows
        if self.tall.shape[1] != R:
            tall_rows = torch.cat([rows, R + rows, 2 * R + columns], dim=1)
        self.tall = _part(self.tall, tall_rows, columns)
        self.num_rows = rows.shape[1]
        self.num_sets = sets.shape[1]
        if self.wide is not None:
            self.wide = _part(self.wide, rows, torch.cat([rows, R + columns], dim=1))
            self.first_set = self.num_rows
        self._number_columns()


def _part(matrices: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows [B, m] and columns [B, n] of matrices [B, M, N]."""
    part = matrices.gather(1, rows[:, :, None].expand(-1, -1, matrices.shape[2]))
    return part.gather(2, columns[:, None].expand(-1, rows.shape[1], -1))
