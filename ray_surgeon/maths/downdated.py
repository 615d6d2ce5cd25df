"""Linears of one shape, with the whole inverses of their factors, as rows and columns go.

For a device that is not the CPU, on which a few large products are faster than many small ones. A
removal of columns Q and rows P is, with Y = ([A^-1]_QQ)^-1 [A^-1]_Q:, X = [G^-1]_:P ([G^-1]_PP)^-1,
U = G W and H = W A,

    [W; U; A^-1] -= [W; U; A^-1]_:Q Y,   then   W -= X W_P:   and   [G^-1, H] -= X [G^-1, H]_P:

What is one above the other or side by side there is one matrix here. Linears that lose fewer
structures than others take part with rows of zeros. Source: docs/method.md, sections 3 and 8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ray_surgeon.maths.curvature import LinearCurvature
from ray_surgeon.maths.factorised import root
from ray_surgeon.maths.products import product


class _Part(NamedTuple):
    """Rows, or columns, that are to go."""

    indices: Tensor  # [B, q w]; any where nothing goes
    entries: Tensor  # these rows of `wide`, or columns of `tall`; zero where nothing goes


class Elimination(NamedTuple):
    """What is needed to remove some structures of each linear."""

    rows: _Part | None
    columns: _Part | None
    inverse: Tensor  # [B, q w, R + C] rows of G^-1 and of A^-1
    root: Tensor  # [B, q w, q w] lower; of `inverse` at the same indices
    failed: Tensor  # [B], positive where rounding made that part indefinite


class Downdated:
    """The weights of B linears, and what their costs and updates are taken from.

    Structures are all rows, if rows may go, and then sets of columns. The columns of a set lie side
    by side, set after set; behind them are those that are in no set.

    Attributes:
        tall: [B, 2 R + C, C] W, U / 2 and A^-1, one above the other; W alone if no column may go.
        wide: [B, R, R + C] G^-1 and H / 2, side by side; None if no row may go.
        num_rows: R.
        first_set: number of structures that are rows.
        num_sets: of columns.
        width: columns of a set; one if rows may go, too.
    """

    def __init__(
        self, tall: Tensor, wide: Tensor | None, num_rows: int, num_sets: int, width: int
    ) -> None:
        """Start with everything alive; the matrices are changed in place."""
        assert wide is None or width == 1
        self.tall = tall
        self.wide = wide
        self.num_rows = num_rows
        self.first_set = 0 if wide is None else num_rows
        self.num_sets = num_sets
        self.width = width
        self._number_columns()

    def _number_columns(self) -> None:
        """Note the column of each structure, where they are rows and columns; of rows, any."""
        numbers = torch.arange(self.first_set + self.num_sets, device=self.tall.device)
        self._columns_of = (numbers - self.first_set).clamp_(min=0)

    @staticmethod
    def of_linear(curvature: LinearCurvature, *, rows: bool, columns: bool) -> Downdated:
        """Return one linear as a batch, of which rows, single columns or both may go."""
        W = curvature.W
        R, C = W.shape
        wide = W.new_empty(R, R + C) if rows else None
        tall = W.new_empty(2 * R + C if columns else R, C)
        tall[:R] = W
        # one inverse after the other: beside all else there is room for one of them
        if wide is not None:
            wide[:, :R] = curvature.G.inverse()
        if columns:
            tall[2 * R :] = curvature.A.inverse()
        G, A = curvature.first  # which a factorisation may have damped more
        if wide is not None:
            wide[:, R:] = product(W, A).mul_(0.5)
        if columns:
            tall[R : 2 * R] = product(G, W).mul_(0.5)
        sides = None if wide is None else wide[None]
        return Downdated(tall[None], sides, R, C if columns else 0, 1)

    @property
    def W(self) -> Tensor:
        """[B, R, C] the weights; what is gone is not exactly zero."""
        return self.tall[:, : self.num_rows]

    def row_costs(self) -> Tensor:
        """Return the cost of each row, [B, R]; of those that are gone, anything."""
        assert self.wide is not None
        R = self.num_rows
        diagonal = self.wide[:, :, :R].diagonal(dim1=1, dim2=2)
        return (self.W * self.wide[:, :, R:]).sum(dim=2) / diagonal

    def set_costs(self, penalty: Tensor, *, repair: bool) -> tuple[Tensor, Tensor | None]:
        """Return the joint cost of each set of columns, 1/2 tr(W_Q^T G W_Q ([A^-1]_QQ)^-1).

        Args:
            penalty: [B, num_sets], positive where costs may be anything.
            repair: whether to wait for the device, and repair what rounding made indefinite.

        Returns:
            [B, num_sets], and how many are to be repaired, [B]; None if none can be.
        """
        R = self.num_rows
        shape = self.num_sets, self.width
        inside = self.num_sets * self.width
        W, U = (self.tall[:, start : start + R, :inside] for start in (0, R))
        inverse = self.tall[:, 2 * R :][:, :inside, :inside]
        if self.width == 1:
            return (W * U).sum(dim=1) / inverse.diagonal(dim1=1, dim2=2), None
        blocks = torch.unflatten(torch.unflatten(inverse, 2, shape), 1, shape)
        blocks = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        L, failed = torch.linalg.cholesky_ex(blocks)
        is_failed = (failed > 0) & (penalty == 0)
        for linear, number in is_failed.nonzero().tolist() if repair else ():
            L[linear, number] = root(blocks[linear, number])
        W, U = (torch.unflatten(x, 2, shape) for x in (W, U))
        inner = torch.einsum("brsi,brsj->bsij", W, U)
        solved = torch.linalg.solve_triangular(L, inner, upper=False)
        solved = torch.linalg.solve_triangular(L.mT, solved, upper=True)
        return solved.diagonal(dim1=2, dim2=3).sum(dim=2), is_failed.sum(dim=1)

    def elimination(
        self, indices: Tensor, is_pruned: Tensor, sides: Tensor, *, repair: bool
    ) -> Elimination:
        """Return what is needed to remove structures.

        Args:
            indices: [B, q] of structures.
            is_pruned: [B, q] bool, for each linear some and then none.
            sides: [B, 1 or 2, q] bool: which of them are rows, if rows may go, and which are sets,
                if there are any.
            repair: see `set_costs`.
        """
        R = self.num_rows
        rows = None if self.wide is None else self._rows(indices, sides[:, 0])
        columns = self._columns(indices, sides[:, -1]) if self.num_sets else None
        if columns is None:
            assert rows is not None
            inverse = rows.entries[:, :, :R]
        elif rows is None:
            inverse = columns.entries[:, 2 * R :].mT
            indices = columns.indices
        else:
            inverse = torch.cat([rows.entries[:, :, :R], columns.entries[:, 2 * R :].mT], dim=2)
        # what does not go has a row of zeros, and of the identity here; it comes last, so that no
        # column of it is below the diagonal
        block = inverse.gather(2, indices[:, None].expand(-1, indices.shape[1], -1))
        diagonal = torch.unflatten(block.diagonal(dim1=1, dim2=2), 1, (-1, self.width))
        diagonal.add_(~is_pruned[:, :, None])
        L, failed = torch.linalg.cholesky_ex(block)
        for linear in failed.nonzero()[:, 0].tolist() if repair else ():
            L[linear] = root(block[linear].tril() + block[linear].tril(-1).T)
        return Elimination(rows, columns, inverse, L, failed)

    def _rows(self, indices: Tensor, is_pruned: Tensor) -> _Part:
        assert self.wide is not None
        rows = indices.clamp(max=self.num_rows - 1) if self.num_sets else indices
        entries = self.wide.gather(1, rows[:, :, None].expand(-1, -1, self.wide.shape[2]))
        return _Part(rows, entries.mul_(is_pruned[:, :, None]))

    def _columns(self, indices: Tensor, is_pruned: Tensor) -> _Part:
        columns = indices if self.wide is None else self._columns_of[indices]
        if self.width > 1:
            every = torch.arange(self.width, device=indices.device)
            columns = (columns[:, :, None] * self.width + every).flatten(1)
            is_pruned = is_pruned[:, :, None].expand(-1, -1, self.width).flatten(1)
        entries = self.tall.gather(2, columns[:, None].expand(-1, self.tall.shape[1], -1))
        return _Part(columns, entries.mul_(is_pruned[:, None]))

    def remove(self, elimination: Elimination) -> None:
        """Remove structures and update the others."""
        rows, columns, inverse, L, _ = elimination
        solved = torch.linalg.solve_triangular(L, inverse, upper=False)
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
        """Go on with some of the linears, given by their numbers."""
        self.tall = self.tall[linears]
        self.wide = None if self.wide is None else self.wide[linears]

    def restrict(self, rows: Tensor, sets: Tensor) -> None:
        """Go on with some of the structures of each linear, given by their numbers.

        Args:
            rows: [B, m]; of no meaning if no row may go.
            sets: [B, n].
        """
        R = self.num_rows
        every = torch.arange(max(self.tall.shape[1:]), device=sets.device)
        if self.wide is None:
            rows = every[:R].expand(len(sets), -1)
        inside = (sets[:, :, None] * self.width + every[: self.width]).flatten(1)
        outside = every[self.num_sets * self.width : self.tall.shape[2]]
        columns = torch.cat([inside, outside.expand(len(sets), -1)], dim=1)
        down = [rows] if self.tall.shape[1] == R else [rows, R + rows, 2 * R + columns]
        self.tall = _part(self.tall, torch.cat(down, dim=1), columns)
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
