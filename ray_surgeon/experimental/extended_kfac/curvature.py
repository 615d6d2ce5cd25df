"""The curvature of a linear as a sum of Kronecker products, and its costs and updates.

Source: docs/method.md, sections 3 and 4. Everything is a mean over tokens, so costs are in nats per
token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ray_surgeon.experimental.extended_kfac.terms import (
    Term,
    Terms,
    TwoTermInverse,
    clip_term,
    minimise_kept,
)
from ray_surgeon.maths import kronecker as kron
from ray_surgeon.maths.curvature import (
    Basis,
    Clipping,
    FisherProducts,
    Linear,
    LinearCurvature,
    Pair,
)
from ray_surgeon.maths.masks import StructuredMask, places


@dataclass(frozen=True)
class ExtendedLinear(Linear):
    """A linear with further Kronecker terms."""

    # one or more (G_r [R, R], A_r [C, C]) as means over tokens; these cannot be added up
    further: tuple[Term, ...]

    def curvature(self, part: StructuredMask) -> ExtendedCurvature:
        """Return the damped curvature of a part."""
        return ExtendedCurvature(self, part)


class ExtendedCurvature(LinearCurvature):
    """A part of one linear with F = sum_r kron(G_r, A_r), the first term being KFAC's.

    Costs ``obd`` and the full updates use all terms. Costs ``obs`` and single updates use the first
    two.
    """

    def __init__(self, linear: ExtendedLinear, part: StructuredMask) -> None:
        """Balance and damp the factors of the part."""
        super().__init__(linear, part)
        dtype = linear.W.dtype
        rows, columns = places(part.rows, part.columns)
        self._further = list[Term]()
        for G, A in linear.further:
            G_part = _part(G, rows).to(dtype)
            A_part = _part(A, columns).to(dtype)
            self._further.append((G_part, A_part))

    @cached_property
    def _clipped(self) -> list[tuple[Term, float]]:
        """Further terms after clipping, and the relative change of each."""
        share = 1 / len(self._further)
        clipped = list[tuple[Term, float]]()
        for term in self._further:
            clipped.append(clip_term(term, self.G.cholesky, self.A.cholesky, share))
        return clipped

    @property
    def terms(self) -> tuple[Term, ...]:
        """G [R, R] and A [C, C] of all terms, the first damped, the others clipped."""
        return (self.first, *(term for term, _ in self._clipped))

    @property
    def basis(self) -> Basis:
        """Basis for any update."""
        name = self.linear.name
        clipping = list[Clipping]()
        for number, (_, change) in enumerate(self._clipped, 1):
            if change:
                clipping.append(Clipping(linear=name, term=number, change=change))
        return replace(super().basis, clipping=tuple(clipping))

    @cached_property
    def inverse(self) -> TwoTermInverse:
        """Inverse of the first two terms, which also gives the costs with more terms."""
        second, _ = self._clipped[0]
        return TwoTermInverse(self.G.cholesky, self.A.cholesky, second)

    # Costs

    def _over_terms(self, cost: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the sum over all terms of a cost of G and A."""
        return torch.stack([cost(G, A) for G, A in self.terms]).sum(dim=0)

    def row_costs(self, kind: str) -> Tensor:
        """Return the cost of each row, [R]; see `LinearCurvature.row_costs`."""
        if kind == "obd":
            return self._over_terms(
                lambda G, A: kron.row_costs(self.W, A) * G.diagonal(),
            )
        Y, Z = self.inverse.row_parts(self.W)
        return 0.5 * (Y.square() / Z).sum(dim=1)

    def column_costs(self, kind: str) -> Tensor:
        """Return the cost of each column, [C]; see `LinearCurvature.row_costs`."""
        if kind == "obd":
            return self._over_terms(
                lambda G, A: kron.column_costs(self.W, G) * A.diagonal(),
            )
        Y, Z = self.inverse.column_parts(self.W)
        return 0.5 * (Y.square() / Z).sum(dim=0)

    def element_scales(self, kind: str) -> Pair:
        """Return the scales of `LinearCurvature.element_scales`, as [R, C] and [1, 1]."""
        if kind == "obd":
            by_element = self._over_terms(
                lambda G, A: torch.outer(G.diagonal(), A.diagonal()),
            )
        else:
            by_element = 1 / self.inverse.diagonal()
        by_element = self.part.put(by_element, torch.zeros_like(self.linear.W))
        return by_element, by_element.new_ones(1, 1)

    def alive_inverse_blocks(self, places: Tensor) -> Pair:
        """Return what `LinearCurvature.inverse_blocks` returns if all columns are alive."""
        m = places.shape[1]
        left = places.repeat_interleave(m)
        right = places.repeat(1, m).flatten()
        blocks = self.inverse.row_blocks(left, right).view(-1, *places.shape, m)
        return blocks, blocks.new_ones(len(blocks))

    # Updates

    def corrected_singly(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the weights [R, C] with the ``single`` update, not yet masked."""
        return self.W + self.inverse.single_corrections(self.W, rows, columns)

    def corrected_fully(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, float]:
        """Return the weights [R, C] with the ``full`` update, and the residual."""
        W = self.W
        no_row = torch.zeros_like(rows)
        no_column = torch.zeros_like(columns)
        by_rows, row_residual = minimise_kept(W, self.terms, rows, no_column)
        by_columns, column_residual = minimise_kept(W, self.terms, no_row, columns)
        return by_rows + by_columns - W, max(row_residual, column_residual)

    def elements_corrected_singly(self, kept: Tensor) -> Tensor:
        """Return the weights [R, C] after single corrections of elements, not yet masked."""
        multipliers = self.W * ~kept / self.inverse.diagonal()
        return self.W - self.inverse.solve(multipliers)

    def products(self, narrow_dtype: torch.dtype) -> FisherProducts:
        """Return products of changes with the sum of all terms."""
        return SummedProducts(self.terms, narrow_dtype)

    def quadratic_cost(self, change: Tensor) -> float:
        """Return the predicted loss increase of a change [R, C] of the weights."""
        return sum(float(kron.quadratic_cost(change, A, G)) for G, A in self.terms)


class SummedProducts(FisherProducts):
    """Products of changes [R, C] with a sum of Kronecker products."""

    def __init__(self, terms: Terms, narrow_dtype: torch.dtype) -> None:
        """Take the terms.

        Args:
            terms: (G [R, R], A [C, C]) of every term; the first is damped, and the sum of all is
                positive definite.
            narrow_dtype: see `FisherProducts`.
        """
        (G, A), *further = terms
        super().__init__(G, A, narrow_dtype)
        self._further: Sequence[FisherProducts] = [
            FisherProducts(G_r, A_r, narrow_dtype) for G_r, A_r in further
        ]

    def exact(self, X: Tensor) -> Tensor:
        """Return F X = sum_r G_r X A_r, [R, C], in the dtype of the factors."""
        product = super().exact(X)
        for term in self._further:
            product = product + term.exact(X)
        return product

    def narrow(self, X: Tensor) -> Tensor:
        """Return F X, [R, C], with the narrow parts of the factors."""
        product = super().narrow(X)
        for term in self._further:
            product = product + term.narrow(X)
        return product


def _part(matrix: Tensor, alive: Tensor | None) -> Tensor:
    """Return the rows and columns of a square matrix at `alive`, or the matrix if it is None."""
    if alive is None:
        return matrix
    return matrix[alive][:, alive]
