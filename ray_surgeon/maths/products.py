"""Matrix products.

The CPU uses the faster of two libraries; other devices add to a sum within the product.
"""

from __future__ import annotations

from typing import Any

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
