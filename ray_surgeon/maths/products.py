"""Matrix products: on the CPU by the faster of two libraries, elsewhere with the sum in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_WORTH_IT = 2**21
"""Multiplications from which on the call costs less than it saves."""

_has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _has_onednn else None
"""oneDNN's x W^T + b, which torch's compiler uses.

torch itself takes MKL for float32, which leaves half of the vector units of AMD's CPUs idle: 113
against 255 GFLOP/s a core on an EPYC with AVX-512, both with float32's full precision.
"""


def _fast(x: Tensor, y: Tensor) -> bool:
    is_float32 = x.device.type == "cpu" and x.dtype == y.dtype == torch.float32
    num_products = x.shape[0] * x.shape[1] * y.shape[1]
    return _linear is not None and is_float32 and num_products >= _WORTH_IT


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return x y.

    Args:
        x: [m, k], of any strides.
        y: [k, n], likewise.

    Returns:
        [m, n], without a gradient.
    """
    if not _fast(x, y):
        return x.detach() @ y.detach()
    assert _linear is not None
    result: Tensor = _linear(_dense(x.detach()), _dense(y.detach().T), None, "none", [], "")
    return result


def _dense(matrix: Tensor) -> Tensor:
    """Return a matrix that lies by rows or by columns without gaps.

    oneDNN multiplies others a thousand times as slowly.
    """
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


_adds_wide = torch.__version__ >= "2.10"
"""Whether torch adds products of narrow numbers to a float32 sum within the product."""


def add_product_(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x y to a sum on a device that is not the CPU, in one launch where torch has it.

    Args:
        total: [m, n], as wide as x and y, or float32.
        x: [m, k].
        y: [k, n] of the same dtype, such as bfloat16.
    """
    if x.dtype == total.dtype:
        total.addmm_(x, y)
    elif _adds_wide:
        torch.addmm(total, x, y, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(x, y, out_dtype=total.dtype))


class _Times(torch.autograd.Function):
    """x y; x waits for the backward pass only where y has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, y)
        return product(x, y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y = ctx.saved_tensors
        (g,) = gradients
        of_x, of_y = ctx.needs_input_grad
        # y is the transpose of a weight most often, whose gradient lies as it does
        return product(g, y.T) if of_x else None, product(g.T, x).T if of_y else None


def times(x: Tensor, y: Tensor) -> Tensor:
    """Return x y [..., n], with gradients for those of both that want one.

    A single row goes twice: MKL's product of a vector depends, on AMD's CPUs, on where in memory
    the matrix starts, and a matrix that is mapped from a file starts anywhere.

    Args:
        x: [..., k].
        y: [k, n].
    """
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) == 1:
        return (torch.cat([flat, flat]) @ y)[:1].view(*x.shape[:-1], y.shape[1])
    result: Tensor = _Times.apply(flat, y) if _fast(flat, y) else flat @ y  # type: ignore[no-untyped-call]
    return result.view(*x.shape[:-1], y.shape[1])
