"""Kronecker factors of one linear's Fisher: sums over tokens, damping and Cholesky decomposition.

Source: docs/method.md, section 1 (KFAC, Martens & Grosse 2015; The LLM Surgeon, section 3.1), and
sections 2, 3 and 8 for the decomposition and the elimination of rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ray_surgeon.maths.masks import places
from ray_surgeon.maths.products import PackedSymmetric, product


@dataclass(frozen=True)
class KroneckerFactors:
    """A and G of one linear as sums over tokens.

    Sums of micro-batches, of replicas and of resumed work can be added up.

    Attributes:
        A: [C, C] sum of a a^T.
        G: [R, R] sum of g g^T.
        num_tokens: tokens in both sums.
    """

    A: Tensor
    G: Tensor
    num_tokens: int


@dataclass(frozen=True)
class PackedFactors:
    """The factors of one linear as they are gathered: half of each symmetric matrix.

    They may be in the memory of the host or on disk.
    """

    A: PackedSymmetric  # [C, C]
    G: PackedSymmetric  # [R, R]
    num_tokens: int  # in both sums

    def dense(self, device: torch.device | None = None) -> KroneckerFactors:
        """Return the factors as whole matrices, which are copies."""
        return KroneckerFactors(
            A=self.A.dense(device),
            G=self.G.dense(device),
            num_tokens=self.num_tokens,
        )

    def restricted(self, rows: Tensor, columns: Tensor) -> KroneckerFactors:
        """Return the factors of the alive rows [R] and columns [C] (bool masks).

        A and G are copies on the device of the masks.
        """
        alive_rows, alive_columns = places(rows, columns)
        return KroneckerFactors(
            A=_part(self.A.dense(columns.device), alive_columns),
            G=_part(self.G.dense(rows.device), alive_rows),
            num_tokens=self.num_tokens,
        )


def _part(matrix: Tensor, alive: Tensor | None) -> Tensor:
    if alive is None:
        return matrix
    return matrix[alive][:, alive]


def balance_(A: Tensor, G: Tensor) -> None:
    """Scale A and G in place to equal Frobenius norms; kron(G, A) does not change.

    If one of them is zero, neither is scaled.

    Args:
        A: [..., C, C].
        G: [..., R, R].
    """
    norm_A = torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True)
    norm_G = torch.linalg.vector_norm(G, dim=(-2, -1), keepdim=True)
    ratio = torch.sqrt(norm_G / norm_A)
    ratio.masked_fill_((norm_A == 0) | (norm_G == 0), 1.0)
    A.mul_(ratio)
    G.div_(ratio)


@dataclass(frozen=True)
class Damping:
    """Damping of the factors, relative to their mean diagonals (docs/method.md, section 2)."""

    a: float  # of A
    g: float  # of G
    max: float  # the largest damping that may be tried when a factor is not positive definite


# Costs: the loss increase predicted by the quadratic model with F = kron(G, A), in nats per token
# if the factors are means over tokens. Source: docs/method.md, section 3


def row_costs(W: Tensor, A: Tensor) -> Tensor:
    """Return 1/2 W_r A W_r^T of each row [R], in the loss's units.

    The cost of a row is this divided by [G^-1]_rr if the other rows get the optimal update, and
    this times G_rr if they do not change (OBD).
    """
    return 0.5 * (product(W, A) * W).sum(dim=1)


def column_costs(W: Tensor, G: Tensor) -> Tensor:
    """Return 1/2 W_c^T G W_c of each column [C].

    The cost of a column is this divided by [A^-1]_cc, or times A_cc, as for `row_costs`.
    """
    return 0.5 * (W * product(G, W)).sum(dim=0)


def column_removal_cost(change: Tensor, A: Tensor, G: Tensor, removed: Tensor) -> Tensor:
    """Return the predicted loss increase of removing columns with the optimal update, a scalar.

    After that update D A is zero in all other columns.

    Args:
        change: [R, C] new weights minus old weights, D.
        A: [C, C].
        G: [R, R].
        removed: [C] bool.
    """
    columns = removed.nonzero()[:, 0]
    return 0.5 * (product(G, change[:, columns]) * product(change, A[:, columns])).sum()


def quadratic_cost(change: Tensor, A: Tensor, G: Tensor) -> Tensor:
    """Return the predicted loss increase of any change D of the weights, a scalar.

    It is 1/2 tr(D^T G D A) = 1/2 vec(D)^T kron(G, A) vec(D).

    Args:
        change: [R, C] new weights minus old weights.
        A: [C, C].
        G: [R, R].
    """
    return 0.5 * (product(G, change) * product(change, A)).sum()


_INVERSE_PANEL = 512
"""Columns of L^-1 that exist at once.

L^-1 is zero above its diagonal, so later panels are smaller.
"""


def damp_(matrix: Tensor, damping: float) -> Tensor:
    """Add ``damping * mean(diag(matrix)) * I`` to a matrix in place, and return it.

    Source: docs/method.md, section 2.
    """
    matrix.diagonal().add_(damping * matrix.diagonal().mean())
    return matrix


def solve_lower(L: Tensor, right: Tensor, *, transposed: bool = False) -> Tensor:
    """Return L^-1 right, or L^-T right, for a lower triangular L [n, n]."""
    left = L.T if transposed else L
    X: Tensor = torch.linalg.solve_triangular(left, right, upper=transposed)
    return X


def squares(X: Tensor) -> Tensor:
    """Return X X^T [num_sets, w, w] of each of several matrices X [num_sets, w, n]."""
    if X.shape[1] == 1:
        return X.square().sum(dim=2, keepdim=True)
    return X @ X.mT


@dataclass(frozen=True)
class RaisedDamping:
    """A factorisation that needed more damping than requested, or float64.

    For example ("...q_proj", "A", asked 0.01, used 0.1, True).
    """

    linear: str
    factor: str
    asked: float
    used: float
    float64_retry: bool


Raised = tuple[RaisedDamping, ...]


@dataclass(frozen=True)
class DampedFactor:
    """One damped factor with its Cholesky decomposition, and parts of its inverse.

    The inverse is computed by triangular solves and products of panels without the zeros above the
    diagonal. LAPACK's own inverse takes five times as long.
    """

    matrix: Tensor  # [n, n] the damped factor
    cholesky: Tensor  # [n, n] lower L with L L^T = matrix
    asked: float  # the requested damping
    damping: float  # the damping that was needed
    # whether the factorisation in the dtype of the input failed and float64 was used
    float64_retry: bool
    # the sets of the last call of `known_blocks`, and their blocks
    known: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    def raised(self, linear: str, factor: str) -> Raised:
        """Return a record if the factor needed more damping than requested, or float64.

        Args:
            linear: name of the linear.
            factor: "A" or "G".

        Returns:
            One record or none.
        """
        if self.damping == self.asked and not self.float64_retry:
            return ()
        record = RaisedDamping(
            linear=linear,
            factor=factor,
            asked=self.asked,
            used=self.damping,
            float64_retry=self.float64_retry,
        )
        return (record,)

    def _solved(self, indices: Tensor, start: int) -> Tensor:
        """Return rows from `start` on of some columns of L^-1.

        Args:
            indices: [k] of the columns, none smaller than `start`.
            start: the first row.

        Returns:
            [n - start, k].
        """
        unit = self.cholesky.new_zeros(len(self.cholesky) - start, len(indices))
        unit[indices - start, torch.arange(len(indices), device=unit.device)] = 1
        return solve_lower(self.cholesky[start:, start:], unit)

    def inverse_columns(self, indices: Tensor) -> Tensor:
        """Return columns [n, k] of the inverse, given by their indices [k]."""
        return solve_lower(self.cholesky, self._solved(indices, 0), transposed=True)

    def inverse_blocks(self, sets: Tensor) -> Tensor:
        """Return the blocks [num_sets, w, w] of the inverse at sets of indices [num_sets, w]."""
        num_sets, width = sets.shape
        if not num_sets:
            return self.cholesky.new_zeros(0, width, width)
        sets_per_panel = max(1, _INVERSE_PANEL // width)
        blocks = []
        for part in torch.split(sets, sets_per_panel):
            X = self._solved(part.flatten(), int(part.min()))
            X = X.view(-1, len(part), width).permute(1, 2, 0)
            blocks.append(squares(X))
        return torch.cat(blocks)

    def known_blocks(self, sets: Tensor) -> Tensor:
        """Return `inverse_blocks`, as a copy of the last result if the sets are the same."""
        if not self.known or not torch.equal(self.known[0], sets):
            self.known[:] = [sets, self.inverse_blocks(sets)]
        return self.known[1].clone()

    def inverse_diagonal(self) -> Tensor:
        """Return the diagonal [n] of the inverse."""
        every = torch.arange(len(self.cholesky), device=self.cholesky.device)
        return self.inverse_blocks(every[:, None])[:, 0, 0]

    def inverse_cholesky(self) -> Tensor:
        """Return L^-1 [n, n]."""
        n = len(self.cholesky)
        X = torch.zeros_like(self.cholesky, memory_format=torch.contiguous_format)
        for start in range(0, n, _INVERSE_PANEL):
            stop = min(start + _INVERSE_PANEL, n)
            indices = torch.arange(start, stop, device=X.device)
            X[start:, start:stop] = self._solved(indices, start)
        return X

    def inverse(self) -> Tensor:
        """Return the inverse [n, n]."""
        X = self.inverse_cholesky()
        # rows of L^-1 that no later product reads make room for the lower half of the inverse
        for start in range(0, len(X), _INVERSE_PANEL):
            stop = start + _INVERSE_PANEL
            X[start:stop, :stop] = product(X[start:, start:stop].T, X[start:, :stop])
            X[:start, start:stop] = X[start:stop, :start].T
        return X


def factorise(
    matrix: Tensor, damping: float, max_damping: float, name: str
) -> DampedFactor:
    """Damp and factorise one factor by the policy of docs/method.md, section 2.

    A failed Cholesky is retried in float64; then the damping is raised tenfold up to `max_damping`.

    Args:
        matrix: [n, n] symmetric positive semi-definite. Damped in place, as it may be large.
        damping: relative to the mean of the diagonal.
        max_damping: the largest damping that may be tried.
        name: name of the matrix, for the error.

    Raises:
        FloatingPointError: the matrix is not finite, or no damping up to `max_damping` makes it
            positive definite.
    """
    # aminmax is NaN if an entry is; unlike isfinite, it needs no second matrix of the same size
    if matrix.numel() and not all(map(torch.isfinite, torch.aminmax(matrix))):
        raise FloatingPointError(
            f"{name}: the curvature factor has NaN or infinite entries"
        )
    diagonal = matrix.diagonal().clone()
    if len(diagonal) and not diagonal.any():
        raise FloatingPointError(
            f"{name}: the curvature factor is zero; check the weights"
        )
    current = damping
    while True:
        for is_retry in (False, True):
            matrix.diagonal().copy_(diagonal)
            factor = _damped_cholesky(matrix, current, in_float64=is_retry)
            if factor is not None:
                return DampedFactor(
                    matrix=matrix,
                    cholesky=factor,
                    asked=damping,
                    damping=current,
                    float64_retry=is_retry,
                )
        raised = max(current * 10.0, 1e-8)
        if raised > max_damping:
            raise FloatingPointError(
                f"{name}: the curvature factor {tuple(matrix.shape)} is not positive definite with "
                f"damping {current:g} (cap {max_damping:g}); raise max_damping, or give more tokens"
            )
        current = raised


def _damped_cholesky(
    matrix: Tensor, damping: float, *, in_float64: bool
) -> Tensor | None:
    """Damp a matrix in place and return its Cholesky factor, None if there is none."""
    wide = None
    if in_float64:
        wide = damp_(matrix.to(torch.float64, copy=True), damping)
    damp_(matrix, damping)
    factor, failed = torch.linalg.cholesky_ex(matrix if wide is None else wide)
    del wide  # a large matrix leaves no room for it beside the factor
    return None if failed else factor.to(matrix.dtype)


class DowndatedInverse:
    """The inverse M of a damped factor, with elimination of rows and columns.

    An elimination is M -= M_:Q (M_QQ)^-1 M_Q:, but M itself is never formed. Costs need only
    diagonal blocks of M, and an elimination needs only the columns that it eliminates. Both follow
    from the Cholesky factor L and from the matrix V with M = L^-T L^-1 - V^T V, to which every
    elimination adds rows.
    """

    def __init__(self, factor: DampedFactor, sets: Tensor) -> None:
        """Start with nothing eliminated.

        Args:
            factor: [n, n].
            sets: [num_sets, w] indices of the diagonal blocks to keep track of.
        """
        self._factor = factor
        self._sets = sets
        self.blocks = factor.known_blocks(sets)  # [num_sets, w, w]
        self._V = factor.cholesky.new_empty(0, len(factor.cholesky))
        self._k = 0
        self._is_gone = factor.cholesky.new_zeros(len(factor.cholesky), dtype=torch.bool)

    def of_part(self, left: Tensor, sets: Tensor) -> DowndatedInverse:
        """Return the inverse of the part of the factor that is left.

        Args:
            left: [n] bool.
            sets: [num_sets, w] indices of the diagonal blocks within the part.
        """
        part = self._factor.matrix[left][:, left]  # already damped
        factor = factorise(part, 0.0, 1.0, "part of a damped factor")
        return DowndatedInverse(factor, sets)

    def eliminate(self, Q: Tensor) -> Tensor:
        """Eliminate rows and columns [q], and return Y = (M_QQ)^-1 M_Q: [q, n].

        The block of a set that is eliminated completely becomes the identity.
        """
        V = self._V[: self._k]
        columns = self._factor.inverse_columns(Q).addmm_(V.T, V[:, Q], alpha=-1)
        K = root(columns[Q])
        X = solve_lower(K, columns.T)
        k = self._k + len(X)
        if k > len(self._V):
            n = X.shape[1]
            longer = X.new_empty(min(max(k, 2 * self._k), n), n)
            longer[: self._k] = self._V[: self._k]
            self._V = longer
        self._V[self._k : k] = X
        self._k = k
        self.blocks -= squares(X.T[self._sets])
        is_gone = self._is_gone.index_fill_(0, Q, True)
        width = self._sets.shape[1]
        identity = torch.eye(width, dtype=X.dtype, device=X.device)
        self.blocks[is_gone[self._sets].all(dim=1)] = identity
        return solve_lower(K, X, transposed=True)


def root(block: Tensor) -> Tensor:
    """Return a lower L with L L^T = block, also if rounding made the block indefinite."""
    L: Tensor
    L, failed = torch.linalg.cholesky_ex(block)
    if failed:
        values, vectors = torch.linalg.eigh(block.double())
        largest = float(values[-1].clamp(min=1e-30))
        values = values.clamp(min=1e-7 * largest)
        L = torch.linalg.qr((vectors * values.sqrt()).T).R.T.to(block.dtype)
    return L


# Updates solve ``min 1/2 vec(D)^T kron(G, A) vec(D)`` subject to the pruned entries of W + D
# being zero. Source: docs/method.md, section 4; The LLM Surgeon, section 3.2 to 3.4


def _correlation(matrix: Tensor, to_prune: Tensor, name: str) -> Tensor:
    """Return M = matrix_KK^-1 matrix_KP, [kept, pruned].

    A part of a damped matrix is positive definite without further damping.
    """
    kept = (~to_prune).nonzero()
    pruned = to_prune.nonzero()[:, 0]
    part = f"{name} (kept part, damped already)"
    L = factorise(matrix[kept, kept[:, 0]], 0.0, 0.0, part).cholesky
    return solve_lower(L, solve_lower(L, matrix[kept, pruned]), transposed=True)


def prune_rows(W: Tensor, G: Tensor, to_prune: Tensor, name: str) -> Tensor:
    """Set the pruned rows to zero and add G_KK^-1 G_KP W_P to the kept ones (A cancels).

    Args:
        W: [R, C].
        G: [R, R] damped.
        to_prune: [R] bool.
        name: name of G, for errors.

    Returns:
        [R, C] the new weights.
    """
    new = torch.zeros_like(W)
    if not to_prune.any():
        return W.clone()
    if not to_prune.all():
        correction = product(_correlation(G, to_prune, name), W[to_prune])
        new[~to_prune] = W[~to_prune] + correction
    return new


def prune_columns(W: Tensor, A: Tensor, to_prune: Tensor, name: str) -> Tensor:
    """Set the pruned columns to zero and add W_Q A_QL A_LL^-1 to the kept ones (G cancels).

    Args:
        W: [R, C].
        A: [C, C] damped.
        to_prune: [C] bool.
        name: name of A, for errors.

    Returns:
        [R, C] the new weights.
    """
    return prune_rows(W.T, A, to_prune, name).T.contiguous()
