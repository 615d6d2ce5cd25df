"""All correlations at once: the update for any set of removed elements, by preconditioned conjugate gradients.

Source: method.md section 4. With D the change of the weights, D = -W on removed elements, the kept entries of D minimise
``1/2 tr(D^T G D A)``, so (G D A) is zero on them. A product with the system's matrix is two GEMMs and a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_surgeon.surgery.extended import Term, apply_terms

_RANK = 48
"""Eigenvectors of A in the preconditioner; their small systems hold rank^2 numbers a row."""
_OVERSAMPLING = 8
_SUBSPACE_ITERATIONS = 2
_REFRESH = 6
"""Iterations with narrow products after which the residual is computed anew in full precision."""


@dataclass(frozen=True)
class Solution:
    """An update and how well it solves its equations.

    Attributes:
        W: [R, C] new weights, zero on removed elements.
        residual: norm of (G D A) on kept entries, relative to its norm for D = -W on removed and 0 on kept ones.
        num_iterations: made.
    """

    W: Tensor
    residual: float
    num_iterations: int


def dominant_part(A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Approximate A by ``diag(D) + U U^T``: its dominant eigenvectors, and the diagonal of what they leave.

    Subspace iteration from the columns with the largest diagonal, which are the outlier inputs of a language model.

    Args:
        A: [C, C] positive definite.
        rank: columns of U.

    Returns:
        U [C, rank] and D [C], positive.
    """
    C = len(A)
    start = A.diagonal().topk(min(C, rank + _OVERSAMPLING)).indices
    Q = torch.linalg.qr(A[:, start]).Q
    for _ in range(_SUBSPACE_ITERATIONS):
        Q = torch.linalg.qr(A @ Q).Q
    eigenvalues, vectors = torch.linalg.eigh(Q.T @ A @ Q)
    eigenvalues = eigenvalues[-rank:].clamp(min=0)
    U = Q @ vectors[:, -rank:] * eigenvalues.sqrt()
    rest = (A.diagonal().sum() - eigenvalues.sum()) / max(1, C - rank)
    return U, (A.diagonal() - U.square().sum(dim=1)).clamp(min=0.1 * float(rest))


class SplitMatrix:
    """A symmetric matrix as diag(D) + U U^T in its own dtype and a small rest in a narrower one, for fast products.

    Rounding a factor as it is to bfloat16 makes it indefinite, since its condition number is far above 256. What is rounded here is
    what the dominant eigenvectors and the diagonal leave.
    """

    def __init__(self, matrix: Tensor, rank: int, narrow: torch.dtype) -> None:
        """Split a matrix [n, n]; `narrow` is the dtype of the rest."""
        self.U, self.D = dominant_part(matrix, rank)
        self._rest = (matrix - self.U @ self.U.T - torch.diag(self.D)).to(narrow)

    def after(self, X: Tensor) -> Tensor:
        """Return X @ matrix, X being [m, n]."""
        return X * self.D + (X @ self.U) @ self.U.T + (X.to(self._rest.dtype) @ self._rest).to(X.dtype)


class MaskedPreconditioner:
    """Approximate inverse of the problem on kept entries: for every row, of G_rr (A restricted to the row's kept columns).

    With A near ``diag(D) + U U^T`` the restriction is inverted by Woodbury's formula with a small system a row. The inverse of the
    unconstrained problem, G^-1 X A^-1, is the nearer one where little is removed, but not at half: there this one needs a third of
    the iterations for the same cost.
    """

    def __init__(self, A: SplitMatrix, G_diagonal: Tensor, mask: Tensor) -> None:
        """Prepare one small inverse a row.

        Args:
            A: damped, of which the rest is left out.
            G_diagonal: [R] of damped G.
            mask: [R, C] 1 on kept entries, 0 elsewhere.
        """
        self._row_scale = 1 / G_diagonal[:, None]
        self._U, self._scale = A.U, mask / A.D
        C, k = self._U.shape
        pairs = (self._U[:, :, None] * self._U[:, None, :]).reshape(C, k * k)
        systems = (self._scale @ pairs).view(len(mask), k, k)
        systems.diagonal(dim1=1, dim2=2).add_(1)
        self._inverses = torch.cholesky_inverse(torch.linalg.cholesky(systems))

    def __call__(self, X: Tensor) -> Tensor:
        """Apply to X [R, C]."""
        scaled = X * self._scale
        inner = torch.bmm(self._inverses, (scaled @ self._U)[:, :, None])[:, :, 0]
        return (scaled - (inner @ self._U.T) * self._scale) * self._row_scale


def update_elements(
    W: Tensor,
    terms: Sequence[Term],
    kept: Tensor,
    *,
    gradient: Tensor | None = None,
    num_iterations: int,
    tolerance: float,
    product_dtype: torch.dtype | None = None,
) -> Solution:
    """Remove elements and update the kept ones of a linear, all correlations together.

    Products with A and G may be taken in a narrower dtype, which is several times faster (see `SplitMatrix`); the direction update
    (Polak-Ribiere) bears their rounding. Weights, preconditioner and residual have the dtype of W, and the residual told is computed
    anew in it.

    Args:
        W: [R, C]; entries that earlier shots removed are zero.
        terms: (G [R, R], A [C, C]) of every Kronecker product, the first damped, their sum positive definite.
        kept: [R, C] bool, False for everything that is or goes to zero.
        gradient: [R, C] of the loss, if its first-order part counts too: then (F D + gradient) is zero on kept elements.
        num_iterations: at most so many.
        tolerance: stop at this relative residual.
        product_dtype: of the products with A and G; that of W if None.

    Returns:
        The new weights and the residual that is left.
    """
    mask = kept.to(W.dtype)
    linear = torch.zeros_like(W) if gradient is None else gradient
    change = W * (mask - 1)
    residual = -mask * (apply_terms(change, terms) + linear)
    start = float(torch.linalg.norm(residual))
    if start == 0.0:
        return Solution(W * mask, 0.0, 0)
    narrow = product_dtype or W.dtype
    split = [tuple(SplitMatrix(x, min(_RANK, max(1, len(x) // 4)), narrow) for x in term) for term in terms]
    precondition = MaskedPreconditioner(split[0][1], terms[0][0].diagonal(), mask)
    z = precondition(residual)
    direction, rz = z, torch.sum(residual * z)
    left, iteration = 1.0, 0
    while iteration < num_iterations and left > tolerance:
        product = torch.zeros_like(W)
        for split_G, split_A in split:
            product += split_A.after(split_G.after(direction.T).T)
        product *= mask
        step = torch.sum(residual * direction) / torch.sum(direction * product)
        change += step * direction
        residual -= step * product
        iteration += 1
        if narrow != W.dtype and iteration % _REFRESH == 0:  # narrow products let the recurrence drift from the true residual
            residual = -mask * (apply_terms(change, terms) + linear)
        z = precondition(residual)
        direction = z - (step * torch.sum(product * z) / rz) * direction
        rz = torch.sum(residual * z)
        left = float(torch.linalg.norm(residual)) / start
    left = float(torch.linalg.norm(mask * (apply_terms(change, terms) + linear))) / start
    return Solution((W + change) * mask, left, iteration)
