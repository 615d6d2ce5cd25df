"""The damped curvature of one linear, or of a part of it, and what costs and updates take from it.

Source: docs/method.md, sections 1 to 4. One Kronecker product (KFAC) or a sum of several (extended
KFAC). Everything is a mean over tokens, so costs are in nats per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ray_surgeon.maths import rows_columns as kron
from ray_surgeon.maths.extended.terms import TwoTermInverse, clip_term, minimise_kept
from ray_surgeon.maths.factorised import DampedFactor, RaisedDamping, damp_, factorise
from ray_surgeon.maths.kronecker import Damping, PackedFactors, Term, balance_

Pair = tuple[Tensor, Tensor]
"""Two tensors that belong together, such as one of rows and one of columns."""


@dataclass(frozen=True)
class Part:
    """Rows and columns of one linear on which factors are inverted.

    A pruned row makes G singular.
    """

    rows: Tensor  # [R] bool
    columns: Tensor  # [C] bool

    def of(self, whole: Tensor) -> Tensor:
        """Return this part of a matrix [R, C], itself if this is all of it."""
        is_all = self.rows.all() and self.columns.all()
        return whole if is_all else whole[self.rows][:, self.columns]

    def put(self, part: Tensor, into: Tensor) -> Tensor:
        """Return a copy of a matrix [R, C] in which this part is replaced."""
        result = into.clone()
        result[self.rows.nonzero(), self.columns.nonzero()[:, 0]] = part
        return result


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
    def live(self) -> Part:
        """Rows with a gradient and columns with an input that is not always zero."""
        factors = self.factors
        G, A = (factor.diagonal().to(self.W.device) for factor in (factors.G, factors.A))
        return Part(G > 0, A > 0)

    @property
    def nonzero(self) -> Part:
        """Those of the live rows and columns in which a weight is not zero, as in pruned ones."""
        live = self.live
        nonzero = self.W != 0
        return Part(live.rows & nonzero.any(dim=1), live.columns & nonzero.any(dim=0))


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

    part: Part  # rows and columns on which the curvature is not degenerate
    damping: Damping  # with which both factors of the part are positive definite
    raised_damping: tuple[RaisedDamping, ...]  # factorisations that needed more than asked for
    clipping: tuple[Clipping, ...]  # further terms that were clipped

    def curvature(self, linear: Linear) -> LinearCurvature:
        """Return the curvature of the linear once more."""
        return LinearCurvature(linear, self.part, self.damping)


class LinearCurvature:
    """A part of one linear with its damped curvature.

    Factorisations are made when something needs them.
    """

    def __init__(self, linear: Linear, part: Part, damping: Damping | None = None) -> None:
        """Balance the factors of a part; `damping` replaces that of the linear."""
        self.linear = linear
        self.part = part
        self.damping = damping or linear.damping
        factors = linear.factors.restricted(part.rows, part.columns)
        A = factors.A.div_(factors.num_tokens)
        G = factors.G.div_(factors.num_tokens)
        balance_(A, G)
        dtype = linear.W.dtype
        self._A = A.to(dtype)
        self._G = G.to(dtype)
        self._diagonals = self._A.diagonal().clone(), self._G.diagonal().clone()
        self.is_extended = bool(factors.terms)
        self._further = [(g.to(dtype), a.to(dtype)) for g, a in factors.terms]

    @cached_property
    def W(self) -> Tensor:
        """[R, C] weights of the part."""
        return self.part.of(self.linear.W)

    @cached_property
    def A(self) -> DampedFactor:
        """Damped and factorised A of the first term."""
        self._A.diagonal().copy_(self._diagonals[0])  # `first` may have damped it
        return factorise(self._A, self.damping.a, self.damping.max, f"{self.linear.name} A")

    @cached_property
    def G(self) -> DampedFactor:
        """Damped and factorised G of the first term."""
        self._G.diagonal().copy_(self._diagonals[1])
        return factorise(self._G, self.damping.g, self.damping.max, f"{self.linear.name} G")

    @cached_property
    def first(self) -> Term:
        """Damped G and A of the first term, without a factorisation if there has been none."""
        A = self.A.matrix if "A" in self.__dict__ else damp_(self._A, self.damping.a)
        G = self.G.matrix if "G" in self.__dict__ else damp_(self._G, self.damping.g)
        return G, A

    @cached_property
    def _clipped(self) -> list[tuple[Term, float]]:
        share = 1 / max(1, len(self._further))
        return [clip_term(term, self.G.cholesky, self.A.cholesky, share) for term in self._further]

    @property
    def terms(self) -> tuple[Term, ...]:
        """All terms, the first damped, the others clipped."""
        return (self.first, *(term for term, _ in self._clipped))

    @property
    def basis(self) -> Basis:
        """What the update needs to know."""
        name = self.linear.name
        used = Damping(self.A.damping, self.G.damping, self.damping.max)
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
            return self.inverse.row_costs(self.W)
        return kron.row_costs(self.W, self.A.matrix) / self.G.inverse_diagonal()

    def column_costs(self, kind: str) -> Tensor:
        """Return the cost of each column; see `row_costs`."""
        if kind == "obd":
            return self._over_terms(lambda G, A: kron.column_costs(self.W, G) * A.diagonal())
        if self.is_extended:
            return self.inverse.column_costs(self.W)
        return kron.column_costs(self.W, self.G.matrix) / self.A.inverse_diagonal()

    def element_scales(self, kind: str) -> tuple[Tensor, Tensor]:
        """Return factors whose product [R, C] times 1/2 W^2 is the cost of each element.

        They are [R, 1] and [1, C], or [R, C] and [1, 1].
        """
        unit = self._A.new_ones(1, 1)
        if self.is_extended and kind == "obd":
            return self._over_terms(lambda G, A: torch.outer(G.diagonal(), A.diagonal())), unit
        if self.is_extended:
            return 1 / self.inverse.diagonal(), unit
        if kind == "obd":
            return self.G.matrix.diagonal()[:, None], self.A.matrix.diagonal()[None]
        return 1 / self.G.inverse_diagonal()[:, None], 1 / self.A.inverse_diagonal()[None]

    def inverse_blocks(self, places: Tensor) -> tuple[Tensor, Tensor]:
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
            update: ``full``, ``single`` (see `prune_singly`) or ``none``.

        Returns:
            [R, C] new weights, zero in everything removed, and the relative residual of the
            equations.
        """
        W = self.W
        kept = torch.outer(~rows, ~columns)
        if update == "none":
            return W * kept, 0.0
        if update == "single" and self.is_extended:
            return (W + self.inverse.single_corrections(W, rows, columns)) * kept, 0.0
        if update == "single":
            return kron.prune_singly(W, self.A.inverse(), self.G.inverse(), rows, columns), 0.0
        if not self.is_extended:
            G, A = self.first
            return kron.prune_rows_and_columns(W, A, G, rows, columns, self.linear.name), 0.0
        by_rows, residual = minimise_kept(W, self.terms, rows, torch.zeros_like(columns))
        by_columns, other_residual = minimise_kept(W, self.terms, torch.zeros_like(rows), columns)
        return (by_rows + by_columns - W) * kept, max(residual, other_residual)

    def quadratic_cost(self, change: Tensor) -> float:
        """Return the predicted loss increase of a change [R, C] of the weights."""
        return sum(kron.quadratic_cost(change, A, G) for G, A in self.terms)
