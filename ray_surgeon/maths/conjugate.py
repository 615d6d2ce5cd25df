"""The update for any set of removed elements, by preconditioned conjugate gradients.

Source: docs/method.md, section 4. D is the change of the weights, with D = -W on removed elements.
The kept entries of D minimise ``1/2 tr(D^T G D A)``, so (G D A) is zero on them. A product with the
matrix of this system is two GEMMs and a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ray_surgeon.maths.curvature import Removal
from ray_surgeon.maths.extended.terms import apply_terms
from ray_surgeon.maths.kronecker import Terms

_RANK_A = 20
"""Eigenvectors of A in the preconditioner, which stores rank^2 numbers for each row of W."""
_RANK_G = 8
"""Eigenvectors of G that keep their dtype in products."""
_OVERSAMPLING = 8
_SUBSPACE_ITERATIONS = 2
_REFRESH = 11
"""Iterations with narrow products after which the residual is recomputed in full precision."""


class ElementUpdate(NamedTuple):
    """How kept elements are updated to compensate for pruned ones.

    Attributes:
        solver: ``conjugate_gradients`` (all correlations at once), ``single`` (the correction of
            every pruned element as if it were the only one) or ``none``.
        num_iterations: largest number of iterations of conjugate gradients.
        tolerance: relative residual at which conjugate gradients stop.
        precision: dtype of the products in conjugate gradients, for example ``bfloat16``.
    """

    solver: str
    num_iterations: int = 0
    tolerance: float = 0.0
    precision: str = "float32"


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


def _dot(X: Tensor, Y: Tensor) -> Tensor:
    return torch.dot(X.view(-1), Y.view(-1))


def update_elements(
    W: Tensor,
    terms: Terms,
    kept: Tensor,
    update: ElementUpdate,
) -> Removal:
    """Remove elements and update the kept ones of a linear, with all correlations.

    Products with A and G may be computed in a narrower dtype, which is several times faster (see
    `SplitMatrix`); the direction update (Polak-Ribiere) tolerates their rounding. Weights,
    preconditioner and residual have the dtype of W. The reported residual is recomputed in that
    dtype.

    Args:
        W: [R, C]; entries that earlier shots removed are zero.
        terms: (G [R, R], A [C, C]) of every Kronecker product, the first damped, their sum positive
            definite.
        kept: [R, C] bool, False for every entry that is removed, now or by earlier shots.
        update: largest number of iterations, tolerance, and dtype of products with A and G.

    Returns:
        The new weights and the final residual.
    """
    mask = kept.to(W.dtype)
    change = W * (mask - 1)
    residual = _residual(change, terms, mask)
    start = float(torch.linalg.norm(residual))
    if start == 0.0:
        predicted = 0.5 * float(_dot(change, apply_terms(change, terms)))
        return Removal(W=W * mask, predicted=predicted, residual=0.0)
    _conjugate_gradients(
        change=change,
        residual=residual,
        terms=terms,
        mask=mask,
        update=update,
    )
    product = apply_terms(change, terms)
    predicted = 0.5 * float(_dot(change, product))
    left = float(torch.linalg.norm(product.mul_(mask))) / start
    return Removal(W=(W + change) * mask, predicted=predicted, residual=left)


def _conjugate_gradients(
    change: Tensor,
    residual: Tensor,
    terms: Terms,
    mask: Tensor,
    update: ElementUpdate,
) -> None:
    """Improve the kept entries of a change [R, C] in place, given its residual."""
    start = float(torch.linalg.norm(residual))
    narrow: torch.dtype = getattr(torch, update.precision)
    split = list[tuple[SplitMatrix, SplitMatrix]]()
    for G, A in terms:
        split.append((SplitMatrix(G, _RANK_G, narrow), SplitMatrix(A, _RANK_A, narrow)))
    first_G, _ = terms[0]
    _, first_A = split[0]
    precondition = first_A.preconditioner(first_G.diagonal(), mask)
    z = precondition(residual)
    direction = z.clone()
    rz = _dot(residual, z)
    for iteration in range(1, update.num_iterations + 1):
        product = _split_product(direction, split).mul_(mask)
        curved = _dot(direction, product)
        if not (rz > 0 and curved > 0):  # no further progress is possible in this dtype
            break
        step = _dot(residual, direction) / curved
        change.addcmul_(direction, step)
        residual.addcmul_(product, step, value=-1)
        is_last = iteration == update.num_iterations
        if narrow != change.dtype and iteration % _REFRESH == 0 and not is_last:
            # narrow products let the recurrence drift from the true residual
            residual = _residual(change, terms, mask)
        z = precondition(residual)
        direction.mul_(-step * _dot(product, z) / rz).add_(z)
        rz = _dot(residual, z)
        if not float(torch.linalg.norm(residual)) / start > update.tolerance:
            break


def _split_product(X: Tensor, split: Sequence[tuple[SplitMatrix, SplitMatrix]]) -> Tensor:
    """Return F X: the sum of G X A over all terms, [R, C]."""
    G, A = split[0]
    product = G.before(A.after(X))
    for G, A in split[1:]:
        product = product + G.before(A.after(X))
    return product


def _residual(change: Tensor, terms: Terms, mask: Tensor) -> Tensor:
    """Return minus (F D) on kept elements, [R, C]."""
    return apply_terms(change, terms).mul_(mask).neg_()
