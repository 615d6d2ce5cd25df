"""Symmetric sums of outer products, of which only one half is stored.

Source: docs/method.md, section 1.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ray_surgeon.maths.products import add_product_, product

_PANEL = 256
"""Rows of one panel of a symmetric sum on the CPU.

High enough for a fast GEMM, low enough to skip almost half of it.
"""
_TALL_PANEL = 1024
"""Least number of rows of a panel on any other device, which smaller panels would leave idle."""
ALIGNMENT = 8
"""On other devices rows start at multiples of this many entries: GEMMs read 16 bytes at a time."""
_NARROW = (torch.bfloat16, torch.float16)
"""Dtypes whose products are exact in float32."""


def _round_up(number: int) -> int:
    return -(-number // ALIGNMENT) * ALIGNMENT


class Panel(NamedTuple):
    """A panel of a packed sum: some of its rows, from the diagonal on."""

    start: int  # first row
    stop: int  # row after the last
    place: int  # of the first entry among all entries
    stride: int  # entries from one row to the next


@functools.cache
def panel_layout(n: int, *, is_tall: bool) -> tuple[Panel, ...]:
    """Return the panels of a sum [n, n]."""
    height = _PANEL
    if is_tall:
        num_panels = max(1, n // _TALL_PANEL)
        height = max(1, _round_up(-(-n // num_panels)))
    place = 0
    panels = []
    for start in range(0, n, height):
        stop = min(start + height, n)
        stride = n - start
        if is_tall:
            stride = _round_up(stride)
        panels.append(Panel(start=start, stop=stop, place=place, stride=stride))
        place += (stop - start) * stride
    return tuple(panels)


@dataclass(frozen=True)
class PackedSymmetric:
    """A symmetric sum of outer products [n, n].

    Only the blocks on and above the diagonal are stored: half the memory, half the work.

    One flat tensor holds the panels of rows one after the other, so a store or a reduce moves it
    without a copy. The layout is that of the device where the sum is computed, and stays the same
    on other devices. The CPU's layout has fewer entries than the other one, or is the same. Entries
    between rows are zero.
    """

    n: int
    flat: Tensor  # [size(n, type of the device where the sum is computed)]

    @staticmethod
    def size(n: int, device_type: str = "cpu") -> int:
        """Return the number of stored entries of a sum [n, n] computed on a type of device."""
        size = 0
        for panel in panel_layout(n, is_tall=device_type != "cpu"):
            size += (panel.stop - panel.start) * panel.stride
        return size

    @staticmethod
    def num_panels(n: int, device_type: str = "cpu") -> int:
        """Return the number of panels of such a sum; `add` computes each as one product."""
        return len(panel_layout(n, is_tall=device_type != "cpu"))

    @staticmethod
    def zeros(
        n: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> PackedSymmetric:
        """Return an empty sum."""
        device_type = "cpu" if device is None else device.type
        size = PackedSymmetric.size(n, device_type)
        return PackedSymmetric(n, torch.zeros(size, device=device, dtype=dtype))

    def panels(self, device: torch.device | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row of each panel and the panel [rows, n - start] itself.

        The first row is also the first column. The panel is a view, or a copy on another device.
        """
        is_tall = len(self.flat) != PackedSymmetric.size(self.n)
        for start, stop, place, stride in panel_layout(self.n, is_tall=is_tall):
            rows = self.flat[place : place + (stop - start) * stride]
            if device is not None:
                rows = rows.to(device, non_blocking=device.type != "cpu")
            yield start, rows.view(stop - start, stride)[:, : self.n - start]

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add ``x.T @ diag(weights) @ x``.

        Products of bfloat16 numbers are exact in float32. If the hardware can add such products in
        float32, that is used: it is several times as fast as a float32 product, and differs from it
        only in the order of the sums. The same holds for float16, except on the CPU.

        Args:
            x: [num_tokens, n]; fast if its rows start at multiples of 16 bytes.
            weights: [num_tokens], of either sign; 1 if None.
        """
        if not len(x):
            return
        is_summed_in_float32 = self.flat.dtype == torch.float32
        is_narrow = x.dtype in _NARROW and is_summed_in_float32 and weights is None
        if self.flat.device.type == "cpu":
            is_bfloat16 = is_narrow and x.dtype == torch.bfloat16
            self._add_on_cpu(x, weights, is_bfloat16=is_bfloat16)
            return
        if not is_narrow:
            x = x.to(self.flat.dtype)
        left = x.T
        if weights is not None:
            left = (x * weights[:, None]).T
        for start, panel in self.panels():
            add_product_(panel, left[start : start + len(panel)], x[:, start:])

    def _add_on_cpu(
        self, x: Tensor, weights: Tensor | None, *, is_bfloat16: bool
    ) -> None:
        dtype = self.flat.dtype
        rows = x.T
        if rows.dtype != dtype or not rows.is_contiguous():  # its parts must have no gaps
            rows = rows.to(dtype, copy=True, memory_format=torch.contiguous_format)
        weighted = rows if weights is None else rows * weights
        with _narrow_products() if is_bfloat16 else contextlib.nullcontext():
            for start, panel in self.panels():
                panel.add_(product(weighted[start : start + len(panel)], rows[start:].T))

    def fill_diagonal(self, value: float | Tensor) -> None:
        """Set the diagonal to a number, or to entries [n]."""
        for start, panel in self.panels():
            diagonal = panel.diagonal()
            if isinstance(value, Tensor):
                diagonal.copy_(value[start : start + len(panel)])
            else:
                diagonal.fill_(value)

    def diagonal(self) -> Tensor:
        """Return a copy of the diagonal [n]."""
        parts = [self.flat[:0]]
        for _, panel in self.panels():
            parts.append(panel.diagonal())
        return torch.cat(parts)

    def dense(self, device: torch.device | None = None) -> Tensor:
        """Return the whole matrix [n, n], a copy."""
        device = device or self.flat.device
        total = self.flat.new_empty(self.n, self.n, device=device)
        if device.type != "cpu":
            for start, panel in self.panels(device):
                total[start : start + len(panel), start:] = panel
            total.triu_()
            return total.add_(total.triu(1).T)
        for start, panel in self.panels():
            stop = start + len(panel)
            total[start:stop, start:].copy_(panel)
            square = total[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)
            total[stop:, start:stop].copy_(total[start:stop, stop:].T)
        return total


def diagonals(sums: Sequence[PackedSymmetric]) -> Tensor:
    """Return the diagonals [num_sums, n] of sums of one size, in few launches."""
    panels_of_each = [total.panels() for total in sums]
    parts = []
    for panels in zip(*panels_of_each, strict=True):
        parts.append(torch.stack([panel.diagonal() for _, panel in panels]))
    return torch.cat(parts, dim=1)


_narrow_lock = threading.Lock()
_precisions: list[str] = []
"""Precision of float32 products before each of the threads in `_narrow_products` entered."""


@contextlib.contextmanager
def _narrow_products() -> Iterator[None]:
    """Let float32 products on the CPU round their inputs to bfloat16.

    This affects all threads of the process until the last one leaves.
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

    On the CPU the result is stored by columns, so that `PackedSymmetric.add` needs no copy. On any
    other device its rows start at multiples of 16 bytes.
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
