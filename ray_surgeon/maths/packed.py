"""Symmetric sums of outer products, of which half exists.

Source: docs/method.md, section 1.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_surgeon.maths.products import add_product_, product

_PANEL = 256
"""Rows of one panel of a symmetric sum on the CPU.

High enough for a fast GEMM, low enough to skip near half of it.
"""
_TALL_PANEL = 1024
"""The least number of rows on any other device, where fewer leave most of it idle."""
_ALIGNMENT = 8
"""Entries at whose multiples rows start there: GEMMs read 16 bytes at a time."""
_NARROW = (torch.bfloat16, torch.float16)
"""Products of two such numbers are exact in float32."""


def _round_up(number: int) -> int:
    return -(-number // _ALIGNMENT) * _ALIGNMENT


@functools.cache
def _layout(n: int, *, is_tall: bool) -> tuple[tuple[int, int, int, int], ...]:
    """Return the panels of a sum [n, n].

    Of each: its first row, the row after its last, its place among the entries, and from there how
    many entries its rows are apart.
    """
    height = _round_up(-(-n // max(1, n // _TALL_PANEL))) if is_tall else _PANEL
    place = 0
    panels = []
    for start in range(0, n, max(1, height)):
        stop = min(start + height, n)
        stride = _round_up(n - start) if is_tall else n - start
        panels.append((start, stop, place, stride))
        place += (stop - start) * stride
    return tuple(panels)


@dataclass(frozen=True)
class PackedSymmetric:
    """A symmetric sum of outer products [n, n].

    Only the blocks on and above the diagonal exist: half the memory, half the work.

    Panel after panel of rows lies in one flat tensor, so that a store or a reduce moves it as it
    is. It is laid out for the device where it is summed, and lies so wherever it goes: the layout
    of the CPU has fewer entries than the other, or is the same. Entries between rows are zero.
    """

    n: int
    flat: Tensor  # [size(n, type of the device where it is summed)]

    @staticmethod
    def size(n: int, device_type: str = "cpu") -> int:
        """Return how many entries a sum [n, n] keeps that is summed on a type of device."""
        panels = _layout(n, is_tall=device_type != "cpu")
        return sum((stop - start) * stride for start, stop, _, stride in panels)

    @staticmethod
    def num_panels(n: int, device_type: str = "cpu") -> int:
        """Return how many panels such a sum has, each of which an addition makes in one product."""
        return len(_layout(n, is_tall=device_type != "cpu"))

    @staticmethod
    def zeros(
        n: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> PackedSymmetric:
        """Return an empty sum."""
        size = PackedSymmetric.size(n, "cpu" if device is None else device.type)
        return PackedSymmetric(n, torch.zeros(size, device=device, dtype=dtype))

    def _panels(self, device: torch.device | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield a panel's first row, and a view [rows, n - start] of it, a copy on another device.

        The number is that of its first column, too.
        """
        is_tall = len(self.flat) != PackedSymmetric.size(self.n)
        for start, stop, place, stride in _layout(self.n, is_tall=is_tall):
            rows = self.flat[place : place + (stop - start) * stride]
            if device is not None:
                rows = rows.to(device, non_blocking=device.type != "cpu")
            yield start, rows.view(stop - start, stride)[:, : self.n - start]

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add ``x.T @ diag(weights) @ x``.

        Products of bfloat16 numbers are exact in float32. Where the hardware has such products with
        float32 sums, they are used: several times as fast, and different from float32's own only by
        the order of the sums. So are those of float16 numbers, but for the CPU's.

        Args:
            x: [num_tokens, n]; the products are fast if its rows start at multiples of 16 bytes.
            weights: [num_tokens], of either sign; 1 if None.
        """
        if not len(x):  # of tokens there may be none
            return
        dtype = self.flat.dtype
        narrow = x.dtype in _NARROW and dtype == torch.float32 and weights is None
        if self.flat.device.type != "cpu":
            x = x if narrow else x.to(dtype)
            left = (x if weights is None else x * weights[:, None]).T
            for start, panel in self._panels():
                add_product_(panel, left[start : start + len(panel)], x[:, start:])
            return
        rows = x.T
        if rows.dtype != dtype or not rows.is_contiguous():  # so that parts of it have no gaps
            rows = rows.to(dtype, copy=True, memory_format=torch.contiguous_format)
        weighted = rows if weights is None else rows * weights
        is_bfloat16 = narrow and x.dtype == torch.bfloat16
        with _narrow_products() if is_bfloat16 else contextlib.nullcontext():
            for start, panel in self._panels():
                panel.add_(product(weighted[start : start + len(panel)], rows[start:].T))

    def fill_diagonal(self, value: float | Tensor) -> None:
        """Set the diagonal to a number, or to entries [n]."""
        for start, panel in self._panels():
            diagonal = panel.diagonal()
            if isinstance(value, Tensor):
                diagonal.copy_(value[start : start + len(panel)])
            else:
                diagonal.fill_(value)

    def diagonal(self) -> Tensor:
        """Return a copy of the diagonal [n]."""
        return torch.cat([self.flat[:0], *(panel.diagonal() for _, panel in self._panels())])

    def dense(self, device: torch.device | None = None) -> Tensor:
        """Return the whole matrix [n, n], a copy."""
        device = device or self.flat.device
        total = self.flat.new_empty(self.n, self.n, device=device)
        if device.type != "cpu":
            for start, panel in self._panels(device):
                total[start : start + len(panel), start:] = panel
            total.triu_()
            return total.add_(total.triu(1).T)
        for start, panel in self._panels():
            stop = start + len(panel)
            total[start:stop, start:].copy_(panel)
            square = total[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)
            total[stop:, start:stop].copy_(total[start:stop, stop:].T)
        return total


def diagonals(sums: Sequence[PackedSymmetric]) -> Tensor:
    """Return the diagonals [num_sums, n] of sums of one size, in few launches."""
    panels = zip(*(total._panels() for total in sums), strict=True)
    return torch.cat([torch.stack([p.diagonal() for _, p in of_all]) for of_all in panels], dim=1)


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
    """Append the input of the bias, a column of ones: [num_tokens, C - 1] -> [num_tokens, C].

    It lies by columns on the CPU, as `PackedSymmetric.add` takes it without a copy. On any other
    device its rows are apart by a multiple of 16 bytes.
    """
    num_tokens, num_inputs = x.shape
    if x.device.type == "cpu":
        columns = x.new_empty(num_inputs + 1, num_tokens)
        columns[:num_inputs] = x.T
        columns[num_inputs].fill_(1)
        return columns.T
    wide = x.new_empty(num_tokens, _round_up(num_inputs + 1))
    wide[:, :num_inputs] = x
    wide[:, num_inputs].fill_(1)
    return wide[:, : num_inputs + 1]
