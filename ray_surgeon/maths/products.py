"""Matrix products, and symmetric sums of outer products, of which only one half is stored.

On the CPU, products use the faster of two libraries; other devices add to a sum within the product.
Source of the sums: docs/method.md, section 1.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

WORTH_IT = 2**21
"""Least number of multiplications for which oneDNN saves more time than its call costs."""

_has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_linear = None
"""oneDNN's x W^T + b, which torch's compiler uses.

torch itself uses MKL for float32, which leaves half of the vector units of AMD's CPUs idle: 113
instead of 255 GFLOP/s per core on an EPYC with AVX-512, both with the full precision of float32.
"""
if _has_onednn:
    _linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _is_for_onednn(x: Tensor, y: Tensor) -> bool:
    if _linear is None or x.device.type != "cpu":
        return False
    if x.dtype != torch.float32 or y.dtype != torch.float32:
        return False
    return x.shape[0] * x.shape[1] * y.shape[1] >= WORTH_IT


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return x y.

    Args:
        x: [m, k], of any strides.
        y: [k, n], of any strides.

    Returns:
        [m, n], without a gradient.
    """
    x = x.detach()
    y = y.detach()
    if not _is_for_onednn(x, y):
        return x @ y
    assert _linear is not None
    result: Tensor = _linear(_dense(x), _dense(y.T), None, "none", [], "")
    return result


def _dense(matrix: Tensor) -> Tensor:
    """Return a matrix that is contiguous by rows or by columns.

    oneDNN is a thousand times slower with other matrices.
    """
    if matrix.is_contiguous() or matrix.T.is_contiguous():
        return matrix
    return matrix.contiguous()


adds_wide = torch.__version__ >= "2.10"
"""Whether torch can add a product of narrow matrices to a float32 sum in one call."""


def add_product_(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x y to a sum on a device that is not the CPU, in one launch if torch supports that.

    Args:
        total: [m, n], of the dtype of x and y, or float32.
        x: [m, k].
        y: [k, n] of the same dtype, such as bfloat16.
    """
    if x.dtype == total.dtype:
        total.addmm_(x, y)
    elif adds_wide:
        torch.addmm(total, x, y, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(x, y, out_dtype=total.dtype))


class _Times(torch.autograd.Function):
    """Product x y; x is kept for the backward pass only if y needs a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        y_needs_grad = ctx.needs_input_grad[1]
        ctx.save_for_backward(x if y_needs_grad else None, y)
        return product(x, y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y = ctx.saved_tensors
        (grad_output,) = gradients
        x_needs_grad, y_needs_grad = ctx.needs_input_grad
        grad_x = None
        grad_y = None
        if x_needs_grad:
            grad_x = product(grad_output, y.T)
        if y_needs_grad:
            # y is mostly the transpose of a weight: its gradient gets the same strides
            grad_y = product(grad_output.T, x).T
        return grad_x, grad_y


def times(x: Tensor, y: Tensor) -> Tensor:
    """Return x y [..., n], with gradients for x and y if they need them.

    A single row is multiplied twice: on AMD's CPUs, MKL's product of a vector depends on the
    address at which the matrix starts, and a matrix that is mapped from a file starts anywhere.

    Args:
        x: [..., k].
        y: [k, n].
    """
    flat = x.reshape(-1, x.shape[-1])
    result: Tensor
    if len(flat) == 1:
        result = (torch.cat([flat, flat]) @ y)[:1]
    elif _is_for_onednn(flat, y):
        result = _Times.apply(flat, y)  # type: ignore[no-untyped-call]
    else:
        result = flat @ y
    return result.view(*x.shape[:-1], y.shape[1])


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
