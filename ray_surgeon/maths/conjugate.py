"""The update for any set of removed elements, by preconditioned conjugate gradients.

Source: docs/method.md, section 4. With D the change of the weights, D = -W on removed elements, the
kept entries of D minimise ``1/2 tr(D^T G D A)``, so (G D A) is zero on them. A product with the
system's matrix is two GEMMs and a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ray_surgeon.maths.curvature import Removal
from ray_surgeon.maths.extended.terms import apply_terms
from ray_surgeon.maths.kronecker import Terms

_RANK_A = 20
"""Eigenvectors of A in the preconditioner; their small systems hold rank^2 numbers a row."""
_RANK_G = 8
"""Eigenvectors of G that keep their dtype in products."""
_OVERSAMPLING = 8
_SUBSPACE_ITERATIONS = 2
_REFRESH = 11
"""Iterations with narrow products after which the residual is computed anew in full precision."""


class ElementUpdate(NamedTuple):
    """How kept elements make up for pruned ones.

    Attributes:
        solver: ``conjugate_gradients`` (all correlations at once), ``single`` (the correction of
            every pruned element as if it were pruned alone) or ``none``.
        num_iterations: of conjugate gradients, at most.
        tolerance: relative residual at which they stop.
        precision: dtype of their products, e.g. ``bfloat16``.
    """

    solver: str
    num_iterations: int = 0
    tolerance: float = 0.0
    precision: str = "float32"


def dominant_part(A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Approximate A by ``diag(s) + U U^T``.

    U has its dominant eigenvectors, s the diagonal of what they leave.

    Subspace iteration from the columns with the largest diagonal, which are the outlier inputs of a
    language model.

    Args:
        A: [C, C] positive definite.
        rank: columns of U.

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
    rest = (A.diagonal().sum() - eigenvalues.sum()) / max(1, C - rank)
    return U, (A.diagonal() - U.square().sum(dim=1)).clamp(min=0.1 * float(rest))


class SplitMatrix:
    """A symmetric matrix as diag(s) + U U^T and a small rest, for fast products.

    The rest is in a narrower dtype.

    Rounding a factor as it is to bfloat16 makes it indefinite, since its condition number is far
    above 256. What is rounded here is what the dominant eigenvectors and the diagonal leave.
    """

    def __init__(self, matrix: Tensor, rank: int, narrow: torch.dtype) -> None:
        """Split a matrix [n, n], with at most so many columns of U; `narrow` is of the rest."""
        n = len(matrix)
        self.U, self.s = dominant_part(matrix, min(rank, max(1, n // 4), n - 1))
        self._rest = torch.addmm(matrix, self.U, self.U.T, alpha=-1)
        self._rest.diagonal().sub_(self.s)
        self._rest = self._rest.to(narrow)

    def after(self, X: Tensor) -> Tensor:
        """Return X @ matrix, X being [m, n]."""
        product = (X.to(self._rest.dtype) @ self._rest).to(X.dtype)
        return product.addmm_(X @ self.U, self.U.T).addcmul_(X, self.s)

    def before(self, X: Tensor) -> Tensor:
        """Return matrix @ X, X being [n, m]."""
        product = (self._rest @ X.to(self._rest.dtype)).to(X.dtype)
        return product.addmm_(self.U, self.U.T @ X).addcmul_(X, self.s[:, None])

    def preconditioner(self, G_diagonal: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
        """Return an approximate inverse of the problem with this A on kept entries, row by row.

        It takes X [R, C], zero outside the mask, and leaves the rest of A out. Of each row it is
        the inverse of G_rr (A restricted to the row's kept columns).

        With A near ``diag(s) + U U^T`` the restriction is inverted by Woodbury's formula with a
        small system a row. The inverse of the unconstrained problem, G^-1 X A^-1, is the nearer one
        where little is removed, but not at half: there this one needs a third of the iterations for
        the same cost.

        Args:
            G_diagonal: [R] of damped G.
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


def _dot(X: Tensor, Y: Tensor) -> Tensor:
    return torch.dot(X.view(-1), Y.view(-1))


def update_elements(W: Tensor, terms: Terms, kept: Tensor, update: ElementUpdate) -> Removal:
    """Remove elements and update the kept ones of a linear, all correlations together.

    Products with A and G may be taken in a narrower dtype, which is several times faster (see
    `SplitMatrix`); the direction update (Polak-Ribiere) tolerates their rounding. Weights,
    preconditioner and residual have the dtype of W. The reported residual is computed anew in that
    dtype.

    Args:
        W: [R, C]; entries that earlier shots removed are zero.
        terms: (G [R, R], A [C, C]) of every Kronecker product, the first damped, their sum positive
            definite.
        kept: [R, C] bool, False for everything that is pruned or to be pruned.
        update: how many iterations, to which residual, and the dtype of products with A and G.

    Returns:
        The new weights and the residual that is left.
    """
    mask = kept.to(W.dtype)
    change = W * (mask - 1)
    residual = _residual(change, terms, mask)
    start = float(torch.linalg.norm(residual))
    if start == 0.0:
        return Removal(W * mask, 0.5 * float(_dot(change, apply_terms(change, terms))), 0.0)
    narrow = getattr(torch, update.precision)
    split = [(SplitMatrix(G, _RANK_G, narrow), SplitMatrix(A, _RANK_A, narrow)) for G, A in terms]
    precondition = split[0][1].preconditioner(terms[0][0].diagonal(), mask)
    z = precondition(residual)
    direction = z.clone()
    rz = _dot(residual, z)
    for iteration in range(1, update.num_iterations + 1):
        product = reduce(torch.add, (G.before(A.after(direction)) for G, A in split)).mul_(mask)
        curved = _dot(direction, product)
        if not (rz > 0 and curved > 0):  # the dtype has nothing more to give
            break
        step = _dot(residual, direction) / curved
        change.addcmul_(direction, step)
        residual.addcmul_(product, step, value=-1)
        if narrow != W.dtype and iteration % _REFRESH == 0 and iteration < update.num_iterations:
            # narrow products let the recurrence drift from it
            residual = _residual(change, terms, mask)
        z = precondition(residual)
        direction.mul_(-step * _dot(product, z) / rz).add_(z)
        rz = _dot(residual, z)
        if not float(torch.linalg.norm(residual)) / start > update.tolerance:
            break
    product = apply_terms(change, terms)
    predicted = 0.5 * float(_dot(change, product))
    left = float(torch.linalg.norm(product.mul_(mask))) / start
    return Removal((W + change) * mask, predicted, left)


def _residual(change: Tensor, terms: Terms, mask: Tensor) -> Tensor:
    """Return minus (F D) on kept elements, [R, C]."""
    return apply_terms(change, terms).mul_(mask).neg_()
