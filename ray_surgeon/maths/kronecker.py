"""Kronecker factors of one linear's Fisher: sums over tokens, merged, balanced, damped, factorised.

Source: docs/method.md, sections 1 and 2 (KFAC, Martens & Grosse 2015; The LLM Surgeon, section
3.1).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_surgeon.maths.products import product

_PANEL = 256
"""Rows of one panel of a symmetric sum.

High enough for a fast GEMM, low enough to skip near half of it.
"""

_INVERSE_PANEL = 512
"""Columns of L^-1 that exist at once; above its diagonal L^-1 is zero, so later panels are smaller.
"""


class PackedSymmetric:
    """A symmetric sum of outer products [n, n].

    Only the blocks on and above the diagonal exist: half the memory, half the work.

    Panel after panel of rows lies in one flat tensor, so that a store or a reduce moves it as it
    is.
    """

    def __init__(self, n: int, flat: Tensor) -> None:
        """Take the entries of a sum of this size; see `size`."""
        assert len(flat) == self.size(n)
        self.n = n
        self.flat = flat

    @staticmethod
    def size(n: int) -> int:
        """Return how many entries a sum [n, n] keeps."""
        return sum((min(start + _PANEL, n) - start) * (n - start) for start in range(0, n, _PANEL))

    @staticmethod
    def zeros(
        n: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> PackedSymmetric:
        """Return an empty sum."""
        return PackedSymmetric(n, torch.zeros(PackedSymmetric.size(n), device=device, dtype=dtype))

    @staticmethod
    def of(matrix: Tensor) -> PackedSymmetric:
        """Return a symmetric matrix [n, n] as such a sum."""
        packed = PackedSymmetric.zeros(len(matrix), matrix.device, matrix.dtype)
        for start, panel in packed._panels():
            panel.copy_(matrix[start : start + len(panel), start:])
        return packed

    def _panels(self) -> Iterator[tuple[int, Tensor]]:
        """Yield a panel's first row, and a view [rows, n - start] of it.

        The number is that of its first column, too.
        """
        place = 0
        for start in range(0, self.n, _PANEL):
            rows = min(_PANEL, self.n - start)
            columns = self.n - start
            yield start, self.flat[place : place + rows * columns].view(rows, columns)
            place += rows * columns

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add ``x.T @ diag(weights) @ x``.

        Products of bfloat16 numbers are exact in float32. Where the hardware has such products with
        float32 sums, they are used: several times as fast, and different from float32's own only by
        the order of the sums.

        Args:
            x: [num_tokens, n].
            weights: [num_tokens], of either sign; 1 if None.
        """
        narrow = x.dtype == torch.bfloat16 and self.flat.dtype == torch.float32 and weights is None
        if narrow and x.is_cuda:
            for start, panel in self._panels():
                panel.add_(
                    torch.mm(
                        x[:, start : start + len(panel)].T, x[:, start:], out_dtype=torch.float32
                    )
                )
            return
        # parts of it have no gaps
        rows = x.T.to(self.flat.dtype, memory_format=torch.contiguous_format)
        weighted = rows if weights is None else rows * weights
        with _narrow_products if narrow else contextlib.nullcontext():
            for start, panel in self._panels():
                panel.add_(product(weighted[start : start + len(panel)], rows[start:].T))

    def copied(self) -> PackedSymmetric:
        """Return a copy."""
        return PackedSymmetric(self.n, self.flat.clone())

    def fill_diagonal(self, value: float) -> None:
        """Set the diagonal."""
        for _, panel in self._panels():
            panel.diagonal().fill_(value)

    def diagonal(self) -> Tensor:
        """Return a copy of the diagonal [n]."""
        return (
            torch.cat([panel.diagonal() for _, panel in self._panels()])
            if self.n
            else self.flat.clone()
        )

    def is_finite(self) -> bool:
        """Whether every entry is a number."""
        return bool(torch.isfinite(self.flat).all())

    def dense(self, device: torch.device | None = None) -> Tensor:
        """Return the whole matrix [n, n], a copy."""
        total = torch.empty(
            self.n, self.n, dtype=self.flat.dtype, device=device or self.flat.device
        )
        for start, panel in self._panels():
            stop = start + len(panel)
            total[start:stop, start:].copy_(panel)
            square = total[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)
            total[stop:, start:stop].copy_(total[start:stop, stop:].T)
        return total


class _NarrowProducts:
    """Lets float32 products on the CPU round their inputs to bfloat16.

    That is for all threads of the process, until the last one leaves.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._before = ""

    def __enter__(self) -> None:
        settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        with self._lock:
            if not self._num_inside:
                self._before = settings.fp32_precision
                settings.fp32_precision = "bf16"
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside:
                torch.backends.mkldnn.matmul.fp32_precision = self._before  # type: ignore[attr-defined]


_narrow_products = _NarrowProducts()


def with_ones(x: Tensor) -> Tensor:
    """Append the input of the bias, a column of ones: [num_tokens, C - 1] -> [num_tokens, C]."""
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)


Term = tuple[Tensor, Tensor]
"""G_r [R, R] and A_r [C, C] of a Kronecker product."""


@dataclass(frozen=True)
class KroneckerFactors:
    """A and G of one linear as sums over tokens.

    So micro-batches, replicas and resumed work all merge.

    Attributes:
        A: [C, C] sum of a a^T.
        G: [R, R] sum of g g^T.
        num_tokens: tokens in both sums.
        terms: further Kronecker products (G_r, A_r) of extended KFAC, as means over tokens; they do
            not merge.
    """

    A: Tensor
    G: Tensor
    num_tokens: int
    terms: tuple[Term, ...] = ()

    def packed(self) -> PackedFactors:
        """Return the same, packed."""
        return PackedFactors(
            PackedSymmetric.of(self.A), PackedSymmetric.of(self.G), self.num_tokens, self.terms
        )


@dataclass(frozen=True)
class PackedFactors:
    """The factors of one linear as they are gathered: half of each.

    They may lie in the memory of the host or on disk.
    """

    A: PackedSymmetric  # [C, C]
    G: PackedSymmetric  # [R, R]
    num_tokens: int  # in both sums
    terms: tuple[Term, ...] = ()  # see `KroneckerFactors`

    def dense(self, device: torch.device | None = None) -> KroneckerFactors:
        """Return whole matrices, copies."""
        return KroneckerFactors(
            self.A.dense(device), self.G.dense(device), self.num_tokens, self.terms
        )

    def restricted(self, rows: Tensor, columns: Tensor) -> KroneckerFactors:
        """Return the factors of the alive rows [R] and columns [C] (bool masks).

        They are copies on the device of the masks.
        """
        terms = tuple((_part(G, rows), _part(A, columns)) for G, A in self.terms)
        return KroneckerFactors(
            _part(self.A.dense(columns.device), columns),
            _part(self.G.dense(rows.device), rows),
            self.num_tokens,
            terms,
        )


def _part(matrix: Tensor, alive: Tensor) -> Tensor:
    return matrix if alive.all() else matrix[alive][:, alive]


def balance_(A: Tensor, G: Tensor) -> None:
    """Scale A and G to equal Frobenius norms, in place; kron(G, A) is unchanged.

    A zero factor is left alone.
    """
    norm_A = torch.linalg.norm(A)
    norm_G = torch.linalg.norm(G)
    if norm_A == 0 or norm_G == 0:
        return
    ratio = torch.sqrt(norm_G / norm_A)
    A.mul_(ratio)
    G.div_(ratio)


@dataclass(frozen=True)
class Damping:
    """Damping of the factors, relative to their mean diagonals (docs/method.md, section 2)."""

    a: float  # of A
    g: float  # of G
    max: float  # the largest damping that may be tried when a factor is not positive definite


def damp_(matrix: Tensor, damping: float) -> Tensor:
    """Add ``damping * mean(diag(matrix)) * I`` to a matrix in place, and return it.

    Source: docs/method.md, section 2.
    """
    if len(matrix):
        matrix.diagonal().add_(damping * matrix.diagonal().mean())
    return matrix


def solve_lower(L: Tensor, right: Tensor, *, transposed: bool = False) -> Tensor:
    """Return L^-1 right, or L^-T right, for a lower triangular L [n, n]."""
    matrix = L.T if transposed else L
    solved: Tensor = torch.linalg.solve_triangular(matrix, right, upper=transposed)
    return solved


@dataclass(frozen=True)
class DampedFactor:
    """One damped factor and its Cholesky decomposition, and what follows from its inverse.

    The inverse is made by triangular solves and products, of panels that leave out what is zero:
    LAPACK's own takes five times as long.
    """

    matrix: Tensor  # [n, n] the damped factor
    cholesky: Tensor  # [n, n] lower L with L L^T = matrix
    damping: float  # the damping that was needed, at least the one asked for
    float64_retry: (
        bool  # whether the factorisation at the dtype of the input failed and float64 was used
    )

    def part(self, left: Tensor) -> DampedFactor:
        """Return the factor of the indices that are left, [n] bool, with the damping it has."""
        return factorise(self.matrix[left][:, left], 0.0, 1.0, "part of a damped factor")

    def _solved(self, indices: Tensor, start: int) -> Tensor:
        """Return rows `start` and below of some columns of L^-1.

        None of their indices is smaller than `start`.
        """
        unit = self.cholesky.new_zeros(len(self.cholesky) - start, len(indices))
        unit[indices - start, torch.arange(len(indices), device=unit.device)] = 1
        return solve_lower(self.cholesky[start:, start:], unit)

    def inverse_columns(self, indices: Tensor) -> Tensor:
        """Return columns [n, k] of the inverse, given by their indices [k]."""
        return solve_lower(self.cholesky, self._solved(indices, 0), transposed=True)

    def inverse_blocks(self, sets: Tensor) -> Tensor:
        """Return the blocks [num_sets, w, w] of the inverse of sets of indices [num_sets, w]."""
        width = sets.shape[1]
        blocks = []
        for part in torch.split(sets, max(1, _INVERSE_PANEL // width)) if len(sets) else ():
            X = self._solved(part.flatten(), int(part.min())).view(-1, *part.shape).permute(1, 2, 0)
            blocks.append(X.square().sum(dim=2)[:, :, None] if width == 1 else X @ X.mT)
        return torch.cat(blocks) if blocks else self.cholesky.new_zeros(0, width, width)

    def inverse_diagonal(self) -> Tensor:
        """Return the diagonal [n] of the inverse."""
        return self.inverse_blocks(
            torch.arange(len(self.cholesky), device=self.cholesky.device)[:, None]
        )[:, 0, 0]

    def inverse_cholesky(self) -> Tensor:
        """Return L^-1 [n, n]."""
        n = len(self.cholesky)
        X = torch.zeros_like(self.cholesky, memory_format=torch.contiguous_format)
        for start in range(0, n, _INVERSE_PANEL):
            stop = min(start + _INVERSE_PANEL, n)
            X[start:, start:stop] = self._solved(torch.arange(start, stop, device=X.device), start)
        return X

    def inverse(self) -> Tensor:
        """Return the inverse [n, n]."""
        n = len(self.cholesky)
        X = self.inverse_cholesky()
        # rows of L^-1 that no later product reads become rows of the lower half of the inverse
        for start in range(0, n, _INVERSE_PANEL):
            stop = min(start + _INVERSE_PANEL, n)
            X[start:stop, :stop] = product(X[start:, start:stop].T, X[start:, :stop])
            X[:start, start:stop] = X[start:stop, :start].T
        return X


def factorise(matrix: Tensor, damping: float, max_damping: float, name: str) -> DampedFactor:
    """Damp and factorise one factor by the policy of docs/method.md, section 2.

    A failed Cholesky is retried in float64; then the damping is raised tenfold up to `max_damping`.

    Args:
        matrix: [n, n] symmetric positive semi-definite. It is damped in place, for it may be large.
        damping: relative to the mean of the diagonal.
        max_damping: the largest damping that may be tried.
        name: what the matrix is, for the error.

    Raises:
        FloatingPointError: the matrix is not finite, or no damping up to `max_damping` makes it
            positive definite.
    """
    # NaN if anything is; needs no second matrix as large
    if matrix.numel() and not all(map(torch.isfinite, torch.aminmax(matrix))):
        raise FloatingPointError(
            f"{name}: the curvature factor of shape {tuple(matrix.shape)} has NaN or infinite "
            "entries"
        )
    diagonal = matrix.diagonal().clone()
    if len(diagonal) and not diagonal.any():
        raise FloatingPointError(
            f"{name}: the curvature factor is zero, so the linear reads or changes nothing; check "
            "the model's weights"
        )
    current = damping
    while True:
        factor, failed = torch.linalg.cholesky_ex(damp_(matrix, current))
        if not failed:
            return DampedFactor(matrix, factor, current, float64_retry=False)
        matrix.diagonal().copy_(diagonal)
        del factor  # of a large matrix a float64 one has no room beside it
        factor, failed = torch.linalg.cholesky_ex(damp_(matrix.double(), current))
        if not failed:
            return DampedFactor(
                damp_(matrix, current), factor.to(matrix.dtype), current, float64_retry=True
            )
        raised = max(current * 10.0, 1e-8)
        if raised > max_damping:
            raise FloatingPointError(
                f"{name}: the curvature factor of shape {tuple(matrix.shape)} is not positive "
                f"definite with damping {current:g} (asked for {damping:g}, cap {max_damping:g}); "
                "raise damping or max_damping of the job spec, or give more calibration tokens"
            )
        current = raised
