"""Columns replaced one after the other, as SparseGPT and GPTQ do.

The columns to the right make up for each error.

Source: Frantar & Alistarh 2023 (arXiv 2301.00774), Frantar et al. 2023 (arXiv 2210.17323). Written
from their definitions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ray_surgeon.maths.curvature import RaisedDamping, raised_damping
from ray_surgeon.maths.factorised import factorise


def upper_inverse(
    A: Tensor, damping: float, max_damping: float, name: str
) -> tuple[Tensor, RaisedDamping | None]:
    """Return U, the upper Cholesky factor of the inverse of the damped A [C, C].

    The second item is whether it needed more damping.

    Inputs that are always zero count as independent, and as strong as the others are in the mean:
    so damping stays what is asked.

    Args:
        A: mean of the inputs' second moment.
        damping: relative to the mean of the diagonal.
        max_damping: see `factorise`.
        name: the linear, for errors.
    """
    A = A.flip(0, 1)
    always_zero = A.diagonal() == 0
    A[always_zero, always_zero] = 1.0 if always_zero.all() else A.diagonal()[~always_zero].mean()
    factor = factorise(A, damping, max_damping, name)
    # With the indices reversed A is L L^T, and U is the inverse of L reversed. A's own inverse may
    # not be positive definite in float32.
    return factor.inverse_cholesky().flip(0, 1), raised_damping(name, "A", damping, factor)


def replace_columns(
    W: Tensor, U: Tensor, width: int, replace: Callable[[int, int, Tensor], Tensor]
) -> None:
    """Replace the columns of W [R, C] from left to right, in place.

    The error of column c is (W_c - new W_c) / U_cc, and the columns after it get minus the error
    times U_c:.

    Args:
        W: the matrix.
        U: see `upper_inverse`.
        width: columns of a block, after which those to its right learn of its errors.
        replace: (first column of the block, number of the column in it, the block [R, width] as it
            is now) -> the new column [R].
    """
    for start in range(0, W.shape[1], width):
        stop = min(start + width, W.shape[1])
        part = W[:, start:stop]
        inner = U[start:stop, start:stop]
        errors = torch.zeros_like(part)
        for c in range(stop - start):
            new = replace(start, c, part)
            errors[:, c] = (part[:, c] - new) / inner[c, c]
            part[:, c + 1 :] -= torch.outer(errors[:, c], inner[c, c + 1 :])
            part[:, c] = new
        W[:, stop:] -= errors @ U[start:stop, stop:]
