"""The damped curvature of one linear, or of a part of it, and the costs and updates it gives.

Source: docs/method.md, sections 1 to 4. The curvature is one Kronecker product (KFAC). Everything
is a mean over tokens, so costs are in nats per token. Conjugate gradients (section 4) multiply by F
in every iteration; `FisherProducts` does this in a narrow dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ray_surgeon.maths import kronecker as kron
from ray_surgeon.maths.kronecker import (
    DampedFactor,
    Damping,
    PackedFactors,
    RaisedDamping,
    balance_,
    damp_,
    factorise,
)
from ray_surgeon.maths.masks import StructuredMask

_RANK_A = 20
"""Eigenvectors of A in the preconditioner, which stores rank^2 numbers for each row of W."""
_RANK_G = 8
"""Eigenvectors of G that keep their dtype in products."""
_OVERSAMPLING = 8
_SUBSPACE_ITERATIONS = 2


def dominant_part(A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Approximate A by ``diag(s) + U U^T``.

    The columns of U are the dominant eigenvectors of A, scaled; s is the diagonal of A - U U^T.

    The eigenvectors are found by subspace iteration from the columns with the largest diagonal,
    which are the outlier inputs of a language model.

    Args:
        A: [C, C] positive definite.
        rank: number of columns of U.

    Returns:
        U [C, rank] and s [C], positive.
    """
    C = len(A)
    start = A.diagonal().topk(min(C, rank + _OVERSAMPLING)).indices
    Q = torch.linalg.qr(A[:, start]).Q
    for _ in range(_SUBSPACE_ITERATIONS):
        Q = torch.linalg.qr(A @ Q).Q
    eigenvalues, vectors = torch.linalg.eigh(Q.T @ A @ Q)
    first = len(eigenvalues) - rank
    eigenvalues = eigenvalues[first:].clamp(min=0)
    U = Q @ vectors[:, first:] * eigenvalues.sqrt()
    mean_rest = (A.diagonal().sum() - eigenvalues.sum()) / max(1, C - rank)
    s = A.diagonal() - U.square().sum(dim=1)
    return U, s.clamp(min=0.1 * float(mean_rest))


class SplitMatrix:
    """A symmetric matrix as diag(s) + U U^T plus a small rest in a narrower dtype.

    Products with it are fast. A whole factor rounded to bfloat16 would be indefinite, since its
    condition number is far above 256. Therefore only the rest is rounded, from which the dominant
    eigenvectors and the diagonal are subtracted.

    Attributes:
        U: [n, k] dominant eigenvectors, scaled; see `dominant_part`.
        s: [n] diagonal.
    """

    def __init__(self, matrix: Tensor, rank: int, narrow: torch.dtype) -> None:
        """Split a matrix.

        Args:
            matrix: [n, n] positive definite.
            rank: largest number of columns of U.
            narrow: dtype of the rest.
        """
        n = len(matrix)
        rank = min(rank, max(1, n // 4), n - 1)
        self.U, self.s = dominant_part(matrix, rank)
        self._rest = torch.addmm(matrix, self.U, self.U.T, alpha=-1)
        self._rest.diagonal().sub_(self.s)
        self._rest = self._rest.to(narrow)

    def after(self, X: Tensor) -> Tensor:
        """Return X @ matrix for X [m, n]."""
        product = (X.to(self._rest.dtype) @ self._rest).to(X.dtype)
        return product.addmm_(X @ self.U, self.U.T).addcmul_(X, self.s)

    def before(self, X: Tensor) -> Tensor:
        """Return matrix @ X for X [n, m]."""
        product = (self._rest @ X.to(self._rest.dtype)).to(X.dtype)
        return product.addmm_(self.U, self.U.T @ X).addcmul_(X, self.s[:, None])

    def preconditioner(
        self,
        G_diagonal: Tensor,
        mask: Tensor,
    ) -> Callable[[Tensor], Tensor]:
        """Return an approximate inverse of the problem with this A on kept entries, row by row.

        The inverse is a function of X [R, C], which is zero outside the mask. For each row it is
        the inverse of G_rr times the restriction of A to the kept columns of the row. The narrow
        rest of A is ignored.

        With A close to ``diag(s) + U U^T`` the restriction is inverted by Woodbury's formula with a
        small system for each row. The inverse of the unconstrained problem, G^-1 X A^-1, is the
        better approximation where few entries are removed, but not where half of them are: there
        the inverse by rows needs a third of the iterations for the same cost.

        Args:
            G_diagonal: [R] diagonal of the damped G.
            mask: [R, C] 1 on kept entries, 0 elsewhere.
        """
        U = self.U
        by_s = 1 / self.s
        C, k = U.shape
        U_by_s = U * by_s[:, None]
        scale = mask * by_s / G_diagonal[:, None]
        pairs = (U_by_s[:, :, None] * U[:, None, :]).reshape(C, k * k)
        systems = (mask @ pairs).view(len(mask), k, k)
        systems.diagonal(dim1=1, dim2=2).add_(1)
        inverses = torch.cholesky_inverse(torch.linalg.cholesky(systems))

        def apply(X: Tensor) -> Tensor:
            inner = torch.bmm(inverses, (X @ U_by_s)[:, :, None])[:, :, 0]
            return torch.addmm(X, inner, U.T, alpha=-1).mul_(scale)

        return apply


class FisherProducts:
    """Products of changes [R, C] of the weights with F = kron(G, A).

    A subclass with another F overrides `exact` and `narrow`.

    Attributes:
        narrow_dtype: dtype of the matrices in `narrow`.
    """

    def __init__(self, G: Tensor, A: Tensor, narrow_dtype: torch.dtype) -> None:
        """Take the factors; they are split when a narrow product is first needed.

        Args:
            G: [R, R] damped.
            A: [C, C] damped.
            narrow_dtype: dtype of narrow products, for example ``torch.bfloat16``.
        """
        self._G = G
        self._A = A
        self.narrow_dtype = narrow_dtype

    @cached_property
    def _split(self) -> tuple[SplitMatrix, SplitMatrix]:
        G = SplitMatrix(self._G, _RANK_G, self.narrow_dtype)
        A = SplitMatrix(self._A, _RANK_A, self.narrow_dtype)
        return G, A

    def exact(self, X: Tensor) -> Tensor:
        """Return F X = G X A, [R, C], in the dtype of the factors."""
        return self._G @ X @ self._A

    def narrow(self, X: Tensor) -> Tensor:
        """Return F X, [R, C], with the narrow parts of the factors; see `SplitMatrix`."""
        G, A = self._split
        return G.before(A.after(X))

    def preconditioner(self, mask: Tensor) -> Callable[[Tensor], Tensor]:
        """Return an approximate inverse on kept entries; see `SplitMatrix.preconditioner`.

        Args:
            mask: [R, C] 1 on kept entries, 0 elsewhere.
        """
        _, A = self._split
        return A.preconditioner(self._G.diagonal(), mask)


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
        by_rows = kron.prune_rows(W, G, rows, f"{name} G")
        by_columns = kron.prune_columns(W, A, columns, f"{name} A")
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
