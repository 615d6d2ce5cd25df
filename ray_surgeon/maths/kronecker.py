"""Kronecker factors of one linear's Fisher: sums over tokens, merged and balanced.

Source: docs/method.md, section 1 (KFAC, Martens & Grosse 2015; The LLM Surgeon, section 3.1).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_surgeon.maths.products import product

_PANEL = 256
"""Rows of one panel of a symmetric sum.

High enough for a fast GEMM, low enough to skip near half of it.
"""


@dataclass(frozen=True)
class PackedSymmetric:
    """A symmetric sum of outer products [n, n].

    Only the blocks on and above the diagonal exist: half the memory, half the work.

    Panel after panel of rows lies in one flat tensor, so that a store or a reduce moves it as it
    is.
    """

    n: int
    flat: Tensor  # [size(n)]

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
                left = x[:, start : start + len(panel)].T
                panel.add_(torch.mm(left, x[:, start:], out_dtype=torch.float32))
            return
        # parts of it have no gaps
        rows = x.T.to(self.flat.dtype, memory_format=torch.contiguous_format)
        weighted = rows if weights is None else rows * weights
        with _narrow_products() if narrow else contextlib.nullcontext():
            for start, panel in self._panels():
                panel.add_(product(weighted[start : start + len(panel)], rows[start:].T))

    def fill_diagonal(self, value: float) -> None:
        """Set the diagonal."""
        for _, panel in self._panels():
            panel.diagonal().fill_(value)

    def diagonal(self) -> Tensor:
        """Return a copy of the diagonal [n]."""
        return torch.cat([self.flat[:0], *(panel.diagonal() for _, panel in self._panels())])

    def dense(self, device: torch.device | None = None) -> Tensor:
        """Return the whole matrix [n, n], a copy."""
        total = self.flat.new_empty(self.n, self.n, device=device)
        for start, panel in self._panels():
            stop = start + len(panel)
            total[start:stop, start:].copy_(panel)
            square = total[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)
            total[stop:, start:stop].copy_(total[start:stop, stop:].T)
        return total


_narrow_lock = threading.Lock()
_precisions: list[str] = []
"""Of float32 products, before each of the threads in `_narrow_products` entered."""


@contextlib.contextmanager
def _narrow_products() -> Iterator[None]:
    """Let float32 products on the CPU round their inputs to bfloat16.

    That is for all threads of the process, until the last one leaves.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _narrow_lock:
        _precisions.append(settings.fp32_precision)
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        with _narrow_lock:
            settings.fp32_precision = _precisions.pop()


def with_ones(x: Tensor) -> Tensor:
    """Append the input of the bias, a column of ones: [num_tokens, C - 1] -> [num_tokens, C]."""
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)


Term = tuple[Tensor, Tensor]
"""G_r [R, R] and A_r [C, C] of a Kronecker product."""
Terms = Sequence[Term]
"""A sum of them."""


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
        A, G = (factor.dense(device) for factor in (self.A, self.G))
        return KroneckerFactors(A, G, self.num_tokens, self.terms)

    def restricted(self, rows: Tensor, columns: Tensor) -> KroneckerFactors:
        """Return the factors of the alive rows [R] and columns [C] (bool masks).

        They are copies on the device of the masks.
        """
        terms = tuple((_part(G, rows), _part(A, columns)) for G, A in self.terms)
        A = _part(self.A.dense(columns.device), columns)
        G = _part(self.G.dense(rows.device), rows)
        return KroneckerFactors(A, G, self.num_tokens, terms)


def _part(matrix: Tensor, alive: Tensor) -> Tensor:
    return matrix if alive.all() else matrix[alive][:, alive]


def balance_(A: Tensor, G: Tensor) -> None:
    """Scale A and G to equal Frobenius norms, in place; kron(G, A) is unchanged.

    A zero factor is left alone.
    """
    norm_A = torch.linalg.norm(A)
    norm_G = torch.linalg.norm(G)
    if norm_A != 0 and norm_G != 0:
        ratio = torch.sqrt(norm_G / norm_A)
        A.mul_(ratio)
        G.div_(ratio)


@dataclass(frozen=True)
class Damping:
    """Damping of the factors, relative to their mean diagonals (docs/method.md, section 2)."""

    a: float  # of A
    g: float  # of G
    max: float  # the largest damping that may be tried when a factor is not positive definite


# Costs: the loss increase that the quadratic model with F = kron(G, A) predicts, in nats per token
# where factors are means over tokens. Source: docs/method.md, section 3


def row_costs(W: Tensor, A: Tensor) -> Tensor:
    """Return 1/2 W_r A W_r^T of each row [R], in the loss's units.

    The cost of a row after the optimal update of the others is this over [G^-1]_rr; if they stay as
    they are (OBD), it is this times G_rr.
    """
    return 0.5 * (product(W, A) * W).sum(dim=1)


def column_costs(W: Tensor, G: Tensor) -> Tensor:
    """Return 1/2 W_c^T G W_c of each column [C]; the cost is this over [A^-1]_cc, or times A_cc."""
    return 0.5 * (W * product(G, W)).sum(dim=0)


def column_removal_cost(change: Tensor, A: Tensor, G: Tensor, removed: Tensor) -> float:
    """Predicted loss increase of the removal of columns with the optimal update.

    With it, D A is zero in the other columns.

    Args:
        change: [R, C] new weights minus old weights, D.
        A: [C, C].
        G: [R, R].
        removed: [C] bool.
    """
    costs = product(G, change[:, removed]) * product(change, A[:, removed])
    return 0.5 * float(costs.sum(dtype=change.dtype))


def quadratic_cost(change: Tensor, A: Tensor, G: Tensor) -> float:
    """Predicted loss increase of any change D of the weights: 1/2 tr(D^T G D A).

    That is 1/2 vec(D)^T kron(G, A) vec(D).

    Args:
        change: [R, C] new weights minus old weights.
        A: [C, C].
        G: [R, R].
    """
    return 0.5 * float((product(G, change) * product(change, A)).sum(dtype=change.dtype))
