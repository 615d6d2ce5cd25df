"""The damped curvature of one linear, or of a part of it, and what costs and updates take from it.

Source: docs/method.md, sections 1 to 4. One Kronecker product (KFAC) or a sum of several (extended
KFAC). Everything is a mean over tokens, so costs are in nats per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ray_surgeon.maths import factorised
from ray_surgeon.maths import kronecker as kron
from ray_surgeon.maths.extended.terms import TwoTermInverse, clip_term, minimise_kept
from ray_surgeon.maths.factorised import DampedFactor, RaisedDamping, damp_, factorise
from ray_surgeon.maths.kronecker import Damping, PackedFactors, Term, balance_
from ray_surgeon.maths.masks import StructuredMask

Pair = tuple[Tensor, Tensor]
"""Two tensors that belong together, such as one of rows and one of columns."""


@dataclass(frozen=True)
class Linear:
    """One linear in one shot."""

    name: str  # for errors
    W: Tensor  # [R, C] float32 or float64, the bias as the last column
    factors: PackedFactors  # sums over the calibration tokens
    has_bias: bool  # whether the last column is a bias
    damping: Damping  # of the factors

    @property
    def num_inputs(self) -> int:
        """C without the bias."""
        return self.W.shape[1] - self.has_bias

    @property
    def live(self) -> StructuredMask:
        """Rows with a gradient and columns with an input that is not always zero."""
        factors = self.factors
        G, A = (factor.diagonal().to(self.W.device) for factor in (factors.G, factors.A))
        return StructuredMask(G > 0, A > 0)

    @property
    def nonzero(self) -> StructuredMask:
        """Those of the live rows and columns in which a weight is not zero, as in pruned ones."""
        nonzero = self.W != 0
        return self.live.without(~nonzero.any(dim=1), ~nonzero.any(dim=0))


@dataclass(frozen=True)
class Removal:
    """What became of one linear."""

    W: Tensor  # [R, C] new weights, zero in everything removed
    predicted: float  # loss increase by the quadratic model, in nats per token
    residual: float  # of the update's equations, relative; 0 where they are solved directly


@dataclass(frozen=True)
class Clipping:
    """A further Kronecker term that would have made the Fisher indefinite.

    For example ("...q_proj", 1, 0.12): clipping changed it by 12 %.
    """

    linear: str
    term: int
    change: float


@dataclass(frozen=True)
class Basis:
    """What costs of a linear were taken on; its update needs the same."""

    part: StructuredMask  # rows and columns on which the curvature is not degenerate
    damping: Damping  # with which both factors of the part are positive definite
    raised_damping: tuple[RaisedDamping, ...]  # factorisations that needed more than asked for
    clipping: tuple[Clipping, ...]  # further terms that were clipped

    def curvature(self, linear: Linear) -> LinearCurvature:
        """Return the curvature of the linear once more."""
        return LinearCurvature(replace(linear, damping=self.damping), self.part)


class LinearCurvature:
    """A part of one linear with its damped curvature.

    Factorisations are made when something needs them.
    """

    def __init__(self, linear: Linear, part: StructuredMask) -> None:
        """Balance and damp the factors of a part."""
        self.linear = linear
        self.part = part
        self.W = part.of(linear.W)
        """[R, C] weights of the part."""
        factors = linear.factors.restricted(part.rows, part.columns)
        A = factors.A.div_(factors.num_tokens)
        G = factors.G.div_(factors.num_tokens)
        balance_(A, G)
        dtype = linear.W.dtype
        (G, A), *further = [(g.to(dtype), a.to(dtype)) for g, a in ((G, A), *factors.terms)]
        self._diagonals = G.diagonal().clone(), A.diagonal().clone()
        self.first = damp_(G, linear.damping.g), damp_(A, linear.damping.a)
        """G and A of the first term."""
        self._further = further
        self.is_extended = bool(further)

    @cached_property
    def A(self) -> DampedFactor:
        """Damped and factorised A of the first term."""
        return self._factorised(1, self.linear.damping.a, "A")

    @cached_property
    def G(self) -> DampedFactor:
        """Damped and factorised G of the first term."""
        return self._factorised(0, self.linear.damping.g, "G")

    def _factorised(self, side: int, damping: float, factor: str) -> DampedFactor:
        matrix = self.first[side]
        matrix.diagonal().copy_(self._diagonals[side])
        return factorise(matrix, damping, self.linear.damping.max, f"{self.linear.name} {factor}")

    @cached_property
    def _clipped(self) -> list[tuple[Term, float]]:
        share = 1 / max(1, len(self._further))
        return [clip_term(term, self.G.cholesky, self.A.cholesky, share) for term in self._further]

    @property
    def terms(self) -> tuple[Term, ...]:
        """All terms, the first damped, the others clipped."""
        return (self.first, *(term for term, _ in self._clipped))

    @property
    def basis_of_columns(self) -> Basis:
        """What an update of columns needs to know, for which G is not factorised."""
        used = replace(self.linear.damping, a=self.A.damping)
        return Basis(self.part, used, self.A.raised(self.linear.name, "A"), ())

    @property
    def basis(self) -> Basis:
        """What the update needs to know."""
        name = self.linear.name
        used = Damping(self.A.damping, self.G.damping, self.linear.damping.max)
        raised = (*self.A.raised(name, "A"), *self.G.raised(name, "G"))
        numbered = enumerate(self._clipped, 1)
        clipped = tuple(Clipping(name, n, change) for n, (_, change) in numbered if change)
        return Basis(self.part, used, raised, clipped)

    @cached_property
    def inverse(self) -> TwoTermInverse:
        """Inverse of the first two terms, from which costs with more terms are taken, too."""
        return TwoTermInverse(self.G.cholesky, self.A.cholesky, self._clipped[0][0])

    # Costs

    def _over_terms(self, cost: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the sum over all terms of a cost of G and A."""
        return torch.stack([cost(G, A) for G, A in self.terms]).sum(dim=0)

    def row_costs(self, kind: str) -> Tensor:
        """Return the cost of each row.

        ``obs`` is with the optimal update of the others, ``obd`` without one.
        """
        if kind == "obd":
            return self._over_terms(lambda G, A: kron.row_costs(self.W, A) * G.diagonal())
        if self.is_extended:
            Y, Z = self.inverse.row_parts(self.W)
            return 0.5 * (Y.square() / Z).sum(dim=1)
        return kron.row_costs(self.W, self.A.matrix) / self.G.inverse_diagonal()

    def column_costs(self, kind: str) -> Tensor:
        """Return the cost of each column; see `row_costs`."""
        if kind == "obd":
            return self._over_terms(lambda G, A: kron.column_costs(self.W, G) * A.diagonal())
        if self.is_extended:
            Y, Z = self.inverse.column_parts(self.W)
            return 0.5 * (Y.square() / Z).sum(dim=0)
        return kron.column_costs(self.W, self.first[0]) / self.A.inverse_diagonal()

    def element_scales(self, kind: str) -> Pair:
        """Return factors whose product [R, C] times 1/2 W^2 is the cost of each element.

        They are [R, 1] and [1, C], or [R, C] and [1, 1], of the whole linear; zero outside of the
        part.
        """
        if self.is_extended and kind == "obd":
            by_element = self._over_terms(lambda G, A: torch.outer(G.diagonal(), A.diagonal()))
        elif self.is_extended:
            by_element = 1 / self.inverse.diagonal()
        else:
            scales = []
            for factor, alive in ((self.G, self.part.rows), (self.A, self.part.columns)):
                scale = factor.matrix.diagonal() if kind == "obd" else 1 / factor.inverse_diagonal()
                scales.append(scale.new_zeros(len(alive)).masked_scatter_(alive, scale))
            return scales[0][:, None], scales[1][None]
        by_element = self.part.put(by_element, torch.zeros_like(self.linear.W))
        return by_element, by_element.new_ones(1, 1)

    def inverse_blocks(self, places: Tensor) -> Pair:
        """Return the blocks of F^-1 of groups of columns of one row, as two factors.

        Args:
            places: [num_groups, m] columns of each group, -1 for one that is not alive and gets a
                row of the identity.

        Returns:
            [R or 1, num_groups, m, m] and [R]: the block of row r and group i is the first at (r,
            i) times the second at r.
        """
        absent = places < 0
        inside = places.clamp(min=0)
        if self.is_extended:
            m = places.shape[1]
            pairs = inside.repeat_interleave(m), inside.repeat(1, m).flatten()
            blocks = self.inverse.row_blocks(*pairs).view(-1, *inside.shape, m)
            row_factor = blocks.new_ones(len(blocks))
        else:
            blocks = self.A.inverse_blocks(inside)[None]
            row_factor = self.G.inverse_diagonal()
        blocks = blocks.masked_fill(absent[:, :, None] | absent[:, None, :], 0.0)
        return blocks + torch.diag_embed(absent.to(blocks.dtype)), row_factor

    # Updates

    def prune(self, rows: Tensor, columns: Tensor, update: str) -> tuple[Tensor, float]:
        """Remove rows and columns and update the rest.

        Args:
            rows: [R] bool, True = to prune.
            columns: [C] bool, likewise.
            update: ``full``; ``single``, which corrects each as if it were pruned alone (OBS
                without correlations): row p adds -[G^-1]_:p / [G^-1]_pp W_p, column q adds
                -W_q [A^-1]_q: / [A^-1]_qq, all from the original weights; or ``none``.

        Returns:
            [R, C] new weights, zero in everything removed, and the relative residual of the
            equations.
        """
        W = self.W
        after = W
        residual = 0.0
        if update == "single" and self.is_extended:
            after = W + self.inverse.single_corrections(W, rows, columns)
        elif update == "single":
            A = self.A.inverse()
            G = self.G.inverse()
            by_rows = G[:, rows] / G.diagonal()[rows] @ W[rows]
            by_columns = W[:, columns] / A.diagonal()[columns] @ A[columns]
            after = W - by_rows - by_columns
        elif update == "full" and self.is_extended:
            by_rows, of_rows = minimise_kept(W, self.terms, rows, torch.zeros_like(columns))
            by_columns, of_columns = minimise_kept(W, self.terms, torch.zeros_like(rows), columns)
            after = by_rows + by_columns - W
            residual = max(of_rows, of_columns)
        elif update == "full":
            G, A = self.first
            by_rows = factorised.prune_rows(W, G, rows, f"{self.linear.name} G")
            after = by_rows + factorised.prune_columns(W, A, columns, f"{self.linear.name} A") - W
        return after * torch.outer(~rows, ~columns), residual

    def quadratic_cost(self, change: Tensor) -> float:
        """Return the predicted loss increase of a change [R, C] of the weights."""
        return sum(float(kron.quadratic_cost(change, A, G)) for G, A in self.terms)
