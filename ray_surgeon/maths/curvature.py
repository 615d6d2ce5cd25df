"""The damped curvature of one linear, or of a part of it, and the costs and updates it gives.

Source: docs/method.md, sections 1 to 4. The curvature is one Kronecker product (KFAC). Everything
is a mean over tokens, so costs are in nats per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ray_surgeon.maths import factorised
from ray_surgeon.maths import kronecker as kron
from ray_surgeon.maths.factorised import DampedFactor, RaisedDamping, damp_, factorise
from ray_surgeon.maths.kronecker import Damping, PackedFactors, balance_
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.split_matrix import FisherProducts

Pair = tuple[Tensor, Tensor]
"""Two tensors that belong together, for example one for rows and one for columns."""


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
        G_diagonal = self.factors.G.diagonal().to(self.W.device)
        A_diagonal = self.factors.A.diagonal().to(self.W.device)
        return StructuredMask(rows=G_diagonal > 0, columns=A_diagonal > 0)

    @property
    def nonzero(self) -> StructuredMask:
        """Live rows and columns with a weight that is not zero; pruned ones have none."""
        nonzero = self.W != 0
        return self.live.without(~nonzero.any(dim=1), ~nonzero.any(dim=0))

    def curvature(self, part: StructuredMask) -> LinearCurvature:
        """Return the damped curvature of a part."""
        return LinearCurvature(self, part)


@dataclass(frozen=True)
class Removal:
    """The result of pruning one linear."""

    W: Tensor  # [R, C] new weights, zero in everything removed
    predicted: float  # loss increase by the quadratic model, in nats per token
    residual: float  # relative, of the update's equations; 0 for direct solutions


@dataclass(frozen=True)
class Clipping:
    """Clipping of a further Kronecker term that would have made the Fisher indefinite.

    For example ("...q_proj", 1, 0.12): clipping changed the term by 12 %.
    """

    linear: str
    term: int
    change: float


@dataclass(frozen=True)
class Basis:
    """The part and damping with which costs of a linear were computed, for its update."""

    part: StructuredMask  # rows and columns on which the curvature is not degenerate
    damping: Damping  # with which both factors of the part are positive definite
    # factorisations that needed more damping than was asked for
    raised_damping: tuple[RaisedDamping, ...]
    clipping: tuple[Clipping, ...]  # further terms that were clipped

    def curvature(self, linear: Linear) -> LinearCurvature:
        """Return the curvature of the linear, computed again."""
        return replace(linear, damping=self.damping).curvature(self.part)


class LinearCurvature:
    """A part of one linear with its damped curvature, F = kron(G, A).

    Factors are factorised when they are first needed. A subclass with another F overrides costs and
    updates.

    Attributes:
        linear: the whole linear.
        part: the rows and columns of the part.
        W: [R, C] weights of the part.
        first: damped G [R, R] and A [C, C].
    """

    def __init__(self, linear: Linear, part: StructuredMask) -> None:
        """Balance and damp the factors of the part."""
        self.linear = linear
        self.part = part
        self.W = part.of(linear.W)
        factors = linear.factors.restricted(part.rows, part.columns)
        A = factors.A.div_(factors.num_tokens)
        G = factors.G.div_(factors.num_tokens)
        balance_(A, G)
        dtype = linear.W.dtype
        A = A.to(dtype)
        G = G.to(dtype)
        self._diagonals = (G.diagonal().clone(), A.diagonal().clone())
        self.first = (damp_(G, linear.damping.g), damp_(A, linear.damping.a))

    @cached_property
    def A(self) -> DampedFactor:
        """Damped and factorised A."""
        matrix = self.first[1]
        matrix.diagonal().copy_(self._diagonals[1])
        damping = self.linear.damping
        return factorise(matrix, damping.a, damping.max, f"{self.linear.name} A")

    @cached_property
    def G(self) -> DampedFactor:
        """Damped and factorised G."""
        matrix = self.first[0]
        matrix.diagonal().copy_(self._diagonals[0])
        damping = self.linear.damping
        return factorise(matrix, damping.g, damping.max, f"{self.linear.name} G")

    @property
    def basis_of_columns(self) -> Basis:
        """Basis for an update of columns, which does not need a factorised G."""
        return Basis(
            part=self.part,
            damping=replace(self.linear.damping, a=self.A.damping),
            raised_damping=self.A.raised(self.linear.name, "A"),
            clipping=(),
        )

    @property
    def basis(self) -> Basis:
        """Basis for any update."""
        name = self.linear.name
        return Basis(
            part=self.part,
            damping=Damping(
                a=self.A.damping,
                g=self.G.damping,
                max=self.linear.damping.max,
            ),
            raised_damping=self.A.raised(name, "A") + self.G.raised(name, "G"),
            clipping=(),
        )

    # Costs

    def row_costs(self, kind: str) -> Tensor:
        """Return the cost of each row, [R].

        Args:
            kind: ``obs``, with the optimal update of the other rows, or ``obd``, without an update.
        """
        if kind == "obd":
            G, A = self.first
            return kron.row_costs(self.W, A) * G.diagonal()
        return kron.row_costs(self.W, self.A.matrix) / self.G.inverse_diagonal()

    def column_costs(self, kind: str) -> Tensor:
        """Return the cost of each column, [C]; see `row_costs`."""
        if kind == "obd":
            G, A = self.first
            return kron.column_costs(self.W, G) * A.diagonal()
        return kron.column_costs(self.W, self.first[0]) / self.A.inverse_diagonal()

    def element_scales(self, kind: str) -> Pair:
        """Return two factors whose product [R, C] times 1/2 W^2 is the cost of each element.

        They belong to the whole linear and are zero outside of the part. Their shapes are [R, 1]
        and [1, C]; those of a subclass may be [R, C] and [1, 1].

        Args:
            kind: ``obs`` or ``obd``, see `row_costs`.
        """
        by_row = _element_scale(self.G, kind)
        by_column = _element_scale(self.A, kind)
        by_row = _spread(by_row, self.part.rows)
        by_column = _spread(by_column, self.part.columns)
        return by_row[:, None], by_column[None]

    def inverse_blocks(self, places: Tensor) -> Pair:
        """Return the blocks of F^-1 for groups of columns of one row, as two factors.

        Args:
            places: [num_groups, m] columns of each group, or -1 for a column that is not alive,
                which gets a row of the identity.

        Returns:
            [R or 1, num_groups, m, m] blocks and [R] row factors: the block of row r and group i is
            the product of the block at (r, i) and the row factor at r.
        """
        absent = places < 0
        blocks, row_factor = self.alive_inverse_blocks(places.clamp(min=0))
        is_absent = absent[:, :, None] | absent[:, None, :]
        identity = torch.diag_embed(absent.to(blocks.dtype))
        return blocks.masked_fill(is_absent, 0.0) + identity, row_factor

    def alive_inverse_blocks(self, places: Tensor) -> Pair:
        """Return what `inverse_blocks` returns if all columns are alive."""
        return self.A.inverse_blocks(places)[None], self.G.inverse_diagonal()

    # Updates

    def prune(self, rows: Tensor, columns: Tensor, update: str) -> tuple[Tensor, float]:
        """Remove rows and columns and update the rest.

        Args:
            rows: [R] bool, True = to prune.
            columns: [C] bool, True = to prune.
            update: ``full``, the optimal update; ``single``, which corrects each removal as if it
                were the only one (OBS without correlations): row p adds
                -[G^-1]_:p / [G^-1]_pp W_p, column q adds -W_q [A^-1]_q: / [A^-1]_qq, all from the
                original weights; or ``none``.

        Returns:
            [R, C] new weights, zero in everything removed, and the relative residual of the
            equations.
        """
        after = self.W
        residual = 0.0
        if update == "single":
            after = self.corrected_singly(rows, columns)
        elif update == "full":
            after, residual = self.corrected_fully(rows, columns)
        return after * torch.outer(~rows, ~columns), residual

    def corrected_singly(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the weights [R, C] with the ``single`` update of `prune`, not yet masked."""
        W = self.W
        A = self.A.inverse()
        G = self.G.inverse()
        by_rows = G[:, rows] / G.diagonal()[rows] @ W[rows]
        by_columns = W[:, columns] / A.diagonal()[columns] @ A[columns]
        return W - by_rows - by_columns

    def corrected_fully(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, float]:
        """Return the weights [R, C] with the ``full`` update of `prune`, and the residual."""
        W = self.W
        G, A = self.first
        name = self.linear.name
        by_rows = factorised.prune_rows(W, G, rows, f"{name} G")
        by_columns = factorised.prune_columns(W, A, columns, f"{name} A")
        return by_rows + by_columns - W, 0.0

    def elements_corrected_singly(self, kept: Tensor) -> Tensor:
        """Return the weights after each removed element is corrected as if it were the only one.

        Args:
            kept: [R, C] bool.

        Returns:
            [R, C] weights, not yet masked.
        """
        A_inverse = self.A.inverse()
        G_inverse = self.G.inverse()
        inverse_diagonal = torch.outer(G_inverse.diagonal(), A_inverse.diagonal())
        multipliers = self.W * ~kept / inverse_diagonal
        return self.W - G_inverse @ multipliers @ A_inverse

    def products(self, narrow: torch.dtype) -> FisherProducts:
        """Return products of changes with F; see `FisherProducts`."""
        G, A = self.first
        return FisherProducts(G, A, narrow)

    def quadratic_cost(self, change: Tensor) -> float:
        """Return the predicted loss increase of a change [R, C] of the weights."""
        G, A = self.first
        return float(kron.quadratic_cost(change, A, G))


def _element_scale(factor: DampedFactor, kind: str) -> Tensor:
    if kind == "obd":
        return factor.matrix.diagonal()
    return 1 / factor.inverse_diagonal()


def _spread(scale: Tensor, alive: Tensor) -> Tensor:
    """Return a tensor with the entries of `scale` where `alive` [n] is True, and 0 elsewhere."""
    return scale.new_zeros(len(alive)).masked_scatter_(alive, scale)
