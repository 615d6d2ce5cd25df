"""Extended KFAC: the Fisher of one linear as a sum of Kronecker products, F = sum_r kron(G_r, A_r).

Source: docs/method.md, sections 1 and 4; The LLM Surgeon, section 3.1 (RK > 1). The first term is
plain KFAC; every further term is the best Kronecker product for the difference between F and the
terms before it. It is found by the power method on the rearranged Fisher
R(F) = 1/N sum vec(g g^T) vec(a a^T)^T, which is never formed.

N: tokens; a [C], g [R]: input and output gradient of one token; all factors here are means over
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ray_surgeon.maths.kronecker import solve_lower

Term = tuple[Tensor, Tensor]
"""G_r [R, R] and A_r [C, C] of a Kronecker product."""
Terms = Sequence[Term]
"""A sum of Kronecker products."""

_LEAST = 0.1
"""Fraction of the first term that the sum of all terms keeps at least, in every direction.

So the sum is positive definite.
"""
TOLERANCE = 1e-4
"""Relative residual at which conjugate gradients with more than two terms stop."""
ITERATIONS = 50
"""Largest number of iterations of conjugate gradients with more than two terms."""


def quadratic_forms(x: Tensor, matrix: Tensor) -> Tensor:
    """Return x_i^T matrix x_i, [N], for every row x_i of x [N, n]."""
    return (x @ matrix * x).sum(dim=1)


def power_iteration(
    moment: Tensor,
    known: Sequence[Term],
    unit: Tensor,
) -> tuple[Tensor, float]:
    """Finish one iteration of the power method.

    The part that the known terms explain is subtracted, and the rest is normalised.

    Args:
        moment: 1/N sum (x^T unit x) y y^T, for the side y whose factor is computed.
        known: factors of the terms found so far, on this side and on the other.
        unit: the present unit factor of the new term on the other side.

    Returns:
        The unit factor on this side, and its norm before normalisation, which converges to the
        singular value.
    """
    rest = moment.clone()
    for factor, opposite in known:
        rest -= torch.sum(opposite * unit) * factor
    norm = float(torch.linalg.norm(rest))
    return rest / max(norm, torch.finfo(rest.dtype).tiny), norm


def _whitened(factor: Tensor, cholesky: Tensor) -> Tensor:
    """Return L^-1 factor L^-T."""
    whitened = solve_lower(cholesky, solve_lower(cholesky, factor).T)
    return (whitened + whitened.T) / 2


def clip_term(
    term: Term,
    G_root: Tensor,
    A_root: Tensor,
    share: float,
) -> tuple[Term, float]:
    """Clip the negative eigenvalues that would make the sum of terms indefinite.

    In units of the first term, whose Cholesky factors are given, the two factors have eigenvalues s
    and t, and the term is at least the smallest s_i t_j times the first term. That product is kept
    above ``-share (1 - 0.1)`` by raising negative s and t. Since kron(G, A) = kron(-G, -A), the
    factors can be clipped with either sign; the sign that changes the term less is used.

    Args:
        term: G_r and A_r, symmetric.
        G_root: [R, R] lower Cholesky factor of G_0.
        A_root: [C, C] lower Cholesky factor of A_0.
        share: share of the term in the allowed decrease of F, 1 / number of further terms.

    Returns:
        G_r and A_r after clipping; and the norm of the clipped part relative to the norm of the
        term, both measured in units of the first term.
    """
    if not len(G_root) or not len(A_root):
        return term, 0.0
    s, E = torch.linalg.eigh(_whitened(term[0], G_root))
    t, D = torch.linalg.eigh(_whitened(term[1], A_root))
    room = share * (1 - _LEAST)
    clipped = _clip_eigenvalues(s, t, room)
    negated = _clip_eigenvalues(-s, -t, room)
    if negated.change < clipped.change:
        clipped = negated
    if clipped.is_same:
        return term, 0.0
    G = G_root @ E
    A = A_root @ D
    G_clipped = (G * clipped.s) @ G.T
    A_clipped = (A * clipped.t) @ A.T
    return (G_clipped, A_clipped), clipped.change


class _ClippedEigenvalues(NamedTuple):
    s: Tensor  # [R] of G_r
    t: Tensor  # [C] of A_r
    change: float  # norm of the clipped part, relative to the norm of the term
    is_same: bool  # whether nothing was clipped


def _clip_eigenvalues(s: Tensor, t: Tensor, room: float) -> _ClippedEigenvalues:
    """Raise negative eigenvalues so that no product s_i t_j is below ``-room``."""
    low_s = s.clamp(min=-room / max(float(t.max()), 1e-30))
    low_t = t.clamp(min=-room / max(float(s.max()), 1e-30))
    size = s.norm() * t.norm()
    clipped_size_squared = low_s.norm() ** 2 * low_t.norm() ** 2
    square = size**2 + clipped_size_squared - 2 * (s @ low_s) * (t @ low_t)
    change = float(square.clamp(min=0).sqrt() / size.clamp(min=1e-30))
    is_same = torch.equal(low_s, s) and torch.equal(low_t, t)
    return _ClippedEigenvalues(s=low_s, t=low_t, change=change, is_same=is_same)


class TwoTermInverse:
    """Inverse of kron(G_0, A_0) + kron(G_1, A_1), G_0 and A_0 positive definite.

    With G_0 = L L^T, L^-1 G_1 L^-T = E diag(s) E^T and K1 = L^-T E, and with K2 and t computed from
    A in the same way, F^-1 = kron(K1, K2) diag(1 / (1 + s t^T)) kron(K1, K2)^T. (The published code
    has K1 = L^-1 E, which is a different matrix.)

    Attributes:
        K1: [R, R].
        K2: [C, C].
        S: [R, C] 1 + s t^T.
    """

    def __init__(self, G_cholesky: Tensor, A_cholesky: Tensor, term: Term) -> None:
        """Decompose the two terms.

        Args:
            G_cholesky: [R, R] lower Cholesky factor of G_0.
            A_cholesky: [C, C] lower Cholesky factor of A_0.
            term: G_1 and A_1, with which the sum is positive definite; see `clip_term`.
        """
        s, E = torch.linalg.eigh(_whitened(term[0], G_cholesky))
        t, D = torch.linalg.eigh(_whitened(term[1], A_cholesky))
        self.K1 = solve_lower(G_cholesky, E, transposed=True)
        self.K2 = solve_lower(A_cholesky, D, transposed=True)
        self._back1 = G_cholesky @ E
        self._back2 = A_cholesky @ D
        self.S = 1 + torch.outer(s, t)
        assert bool((self.S > 0).all()), "the sum of the two terms is indefinite"

    def solve(self, B: Tensor) -> Tensor:
        """Return X [R, C] with G_0 X A_0 + G_1 X A_1 = B."""
        return (self.K1 @ ((self.K1.T @ B @ self.K2) / self.S)).matmul(self.K2.T)

    def row_parts(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return Y = W K2^-T and Z with [F^-1]_rr = K2 diag(Z_r) K2^T, both [R, C].

        A row costs 1/2 sum_j Y_rj^2 / Z_rj with the optimal update of the other rows.
        """
        return W @ self._back2, self.K1.square() @ (1 / self.S)

    def column_parts(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return Y = K1^-1 W and Z with [F^-1]_cc = K1 diag(Z_:c) K1^T; see `row_parts`."""
        return self._back1.T @ W, (1 / self.S) @ self.K2.square().T

    def diagonal(self) -> Tensor:
        """Return the diagonal of F^-1 as [R, C]: an element's cost is 1/2 W_rc^2 over its entry."""
        return (self.K1.square() @ (1 / self.S)).matmul(self.K2.square().T)

    def row_blocks(self, left: Tensor, right: Tensor) -> Tensor:
        """Return [F^-1]_{(r, left_i), (r, right_i)}, [R, num_pairs].

        Args:
            left: [num_pairs] first column of each pair.
            right: [num_pairs] second column of each pair.
        """
        pairs = self.K2[left] * self.K2[right]
        return (self.K1.square() @ (1 / self.S)).matmul(pairs.T)

    def single_corrections(self, W: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the sum of the corrections for each removed row and column, [R, C].

        Each correction is computed as if its row or column were the only one removed.
        """
        Y, Z = self.row_parts(W)
        by_rows = self.K1[rows].T @ (Y / Z)[rows]
        Y, Z = self.column_parts(W)
        by_columns = (Y / Z)[:, columns] @ self.K2[columns]
        total = torch.zeros_like(W)
        for multipliers in (by_rows, by_columns):
            total -= self.K1 @ (multipliers / self.S) @ self.K2.T
        return total


def apply_terms(X: Tensor, terms: Terms) -> Tensor:
    """Return F X: sum_r G_r X A_r, [R, C]."""
    G, A = terms[0]
    product = G @ X @ A
    for G, A in terms[1:]:
        product = product + G @ X @ A
    return product


def minimise_kept(
    W: Tensor,
    terms: Terms,
    rows: Tensor,
    columns: Tensor,
) -> tuple[Tensor, float]:
    """Remove rows and columns and minimise the quadratic over the kept weights.

    Two terms are solved exactly by the generalised eigenvectors of their kept blocks. More terms
    are solved by conjugate gradients with the solution of the first two as the preconditioner.

    Args:
        W: [R, C].
        terms: two or more terms; the first and the sum of all are positive definite.
        rows: [R] bool, True = to prune.
        columns: [C] bool, True = to prune.

    Returns:
        [R, C] new weights, zero in every removed row and column, and the relative residual.
    """
    K = ~rows
    L = ~columns
    new = torch.zeros_like(W)
    if not K.any() or not L.any():
        return new, 0.0
    removed = W.clone()
    removed[torch.outer(K, L)] = 0
    right = apply_terms(removed, terms)[K][:, L]
    kept_terms = [(G[K][:, K], A[L][:, L]) for G, A in terms]
    X, residual = solve_terms(right, kept_terms)
    new[K.nonzero(), L.nonzero()[:, 0]] = W[K][:, L] + X
    return new, residual


def solve_terms(right: Tensor, terms: Terms) -> tuple[Tensor, float]:
    """Solve sum_r G_r X A_r = right for two or more terms; return X and the relative residual."""
    (G, A), second, *further = terms
    inverse = TwoTermInverse(torch.linalg.cholesky(G), torch.linalg.cholesky(A), second)
    X = inverse.solve(right)
    start = float(torch.linalg.norm(right))
    if not further or start == 0.0:
        return X, 0.0
    residual = right - apply_terms(X, terms)
    direction = torch.zeros_like(X)
    rz = X.new_tensor(torch.inf)
    for _ in range(ITERATIONS):
        if not float(torch.linalg.norm(residual)) > TOLERANCE * start:
            break
        z = inverse.solve(residual)
        previous = rz
        rz = torch.sum(residual * z)
        direction = z + rz / previous * direction
        product = apply_terms(direction, terms)
        step = rz / torch.sum(direction * product)
        X = X + step * direction
        residual = residual - step * product
    return X, float(torch.linalg.norm(right - apply_terms(X, terms))) / start
