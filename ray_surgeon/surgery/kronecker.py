"""Kronecker factors of one linear's Fisher: sums over tokens, merged, balanced, damped, factorised.

Source: docs/method.md, sections 1 and 2 (KFAC, Martens & Grosse 2015; The LLM Surgeon, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_PANEL = 256
"""Columns of one panel of the symmetric product: wide enough for a fast GEMM, narrow enough to skip near half of it."""

_INVERSE_PANEL = 512
"""Columns of L^-1 that exist at once; above its diagonal L^-1 is zero, so later panels are smaller."""


def add_second_moment(total: Tensor, x: Tensor, weights: Tensor | None = None) -> None:
    """Add ``x.T @ diag(weights) @ x`` to the upper block triangle of `total`, in place, at about half the work of the full product.

    Args:
        total: [n, n] float32 or float64; only blocks on and above the diagonal are written.
        x: [num_tokens, n] of the dtype of `total`.
        weights: [num_tokens], of either sign; 1 if None.
    """
    n = x.shape[1]
    weighted = x if weights is None else x * weights[:, None]
    for start in range(0, n, _PANEL):
        stop = min(start + _PANEL, n)
        total[start:stop, start:].addmm_(weighted[:, start:stop].T, x[:, start:])


def symmetrize(total: Tensor) -> None:
    """Mirror the upper triangle of `total` [n, n] into the lower one, in place."""
    for start in range(0, total.shape[0], _PANEL):
        stop = min(start + _PANEL, total.shape[0])
        panel = total[start:stop, start:stop]
        panel.copy_(panel.triu() + panel.triu(1).T)
        total[stop:, start:stop].copy_(total[start:stop, stop:].T)


def with_ones(x: Tensor) -> Tensor:
    """Append the input of the bias, a column of ones: [num_tokens, C - 1] -> [num_tokens, C]."""
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)


@dataclass(frozen=True)
class KroneckerFactors:
    """A and G of one linear as sums over tokens, so that micro-batches, replicas and resumed work all merge.

    Attributes:
        A: [C, C] sum of a a^T.
        G: [R, R] sum of g g^T.
        num_tokens: tokens in both sums.
        terms: further Kronecker products (G_r, A_r) of extended KFAC, as means over tokens; they do not merge.
    """

    A: Tensor
    G: Tensor
    num_tokens: int
    terms: tuple[tuple[Tensor, Tensor], ...] = ()

    def restricted(self, rows: Tensor, columns: Tensor) -> KroneckerFactors:
        """Return the factors of the alive rows [R] and columns [C] (bool masks) only."""
        if rows.all() and columns.all():
            return self
        terms = tuple((G[rows][:, rows], A[columns][:, columns]) for G, A in self.terms)
        return KroneckerFactors(self.A[columns][:, columns], self.G[rows][:, rows], self.num_tokens, terms)


def balanced(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """Scale A and G to equal Frobenius norms; kron(G, A) is unchanged. A zero factor is left alone."""
    norm_A, norm_G = torch.linalg.norm(A), torch.linalg.norm(G)
    if norm_A == 0 or norm_G == 0:
        return A, G
    ratio = torch.sqrt(norm_G / norm_A)
    return A * ratio, G / ratio


@dataclass(frozen=True)
class Damping:
    """Damping of the two factors, relative to the mean of their diagonals (docs/method.md, section 2)."""

    a: float  # of A
    g: float  # of G
    max: float  # the largest damping that may be tried when a factor is not positive definite


def damped(matrix: Tensor, damping: float) -> Tensor:
    """Return ``matrix + damping * mean(diag(matrix)) * I`` (docs/method.md, section 2)."""
    result = matrix.clone()
    if len(matrix):
        result.diagonal().add_(damping * matrix.diagonal().mean())
    return result


@dataclass(frozen=True)
class DampedFactor:
    """One damped factor and its Cholesky decomposition."""

    matrix: Tensor  # [n, n] the damped factor
    cholesky: Tensor  # [n, n] lower L with L L^T = matrix
    damping: float  # the damping that was needed, at least the one asked for
    float64_retry: bool  # whether the factorisation at the dtype of the input failed and float64 was used

    def inverse_diagonal(self) -> Tensor:
        """Return the diagonal [n] of the inverse: the squared column norms of L^-1, which is made a panel of columns at a time."""
        L, panels = self.cholesky, []
        for start in range(0, len(L), _INVERSE_PANEL):
            width = min(_INVERSE_PANEL, len(L) - start)
            unit = torch.eye(len(L) - start, width, dtype=L.dtype, device=L.device)
            columns = torch.linalg.solve_triangular(L[start:, start:], unit, upper=False)
            panels.append(columns.square().sum(dim=0))
        return torch.cat(panels) if panels else L.new_zeros(0)


def factorise(matrix: Tensor, damping: float, max_damping: float, name: str) -> DampedFactor:
    """Damp and factorise one factor by the policy of docs/method.md, section 2.

    A failed Cholesky is retried in float64; then the damping is raised tenfold up to `max_damping`.

    Args:
        matrix: [n, n] symmetric positive semi-definite.
        damping: relative to the mean of the diagonal.
        max_damping: the largest damping that may be tried.
        name: what the matrix is, for the error.

    Raises:
        FloatingPointError: the matrix is not finite, or no damping up to `max_damping` makes it positive definite.
    """
    if not torch.isfinite(matrix).all():
        raise FloatingPointError(f"{name}: the curvature factor of shape {tuple(matrix.shape)} has NaN or infinite entries")
    current = damping
    while True:
        candidate = damped(matrix, current)
        factor, failed = torch.linalg.cholesky_ex(candidate)
        if not failed:
            return DampedFactor(candidate, factor, current, float64_retry=False)
        candidate = damped(matrix.double(), current)
        factor, failed = torch.linalg.cholesky_ex(candidate)
        if not failed:
            return DampedFactor(candidate.to(matrix.dtype), factor.to(matrix.dtype), current, float64_retry=True)
        raised = max(current * 10.0, 1e-8)
        if raised > max_damping:
            raise FloatingPointError(
                f"{name}: the curvature factor of shape {tuple(matrix.shape)} is not positive definite with damping "
                f"{current:g} (asked for {damping:g}, cap {max_damping:g}); raise damping or "
                "max_damping of the job spec, or give more calibration tokens"
            )
        current = raised
