"""Products with the factors of a linear in a narrow dtype, and their approximate inverse.

Source: docs/method.md, section 4. Conjugate gradients multiply by F in every iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

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
