"""Replacement of columns one by one, with the columns to the right compensating for each error.

SparseGPT prunes in this way, every linear to the same sparsity; it is the Surgeon's update with
G = I. Wanda prunes without an update. The curvature is A alone; the bias does not change.

Source: Frantar & Alistarh 2023 (arXiv 2301.00774), algorithm 1; Sun et al. 2023 (arXiv 2306.11695).
Written from their definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ray_surgeon.maths.kronecker import Raised, factorise

Replace = Callable[[int, int, Tensor], Tensor]
"""Maps the first column of a block, the number of a column in the block, and the present block
[R, width] to the new column [R]."""


def upper_inverse(
    A: Tensor,
    damping: float,
    largest: float,
    name: str,
) -> tuple[Tensor, Raised]:
    """Return U, the upper Cholesky factor of the inverse of the damped A.

    Inputs that are always zero are treated as independent and as strong as the mean of the others,
    so that they do not change the damping.

    Args:
        A: [C, C] mean of the inputs' second moment.
        damping: relative to the mean of the diagonal.
        largest: largest damping that may be tried, see `factorise`.
        name: name of the linear, for errors.

    Returns:
        [C, C] U, and a record of the damping if more was needed than was asked for.

    Raises:
        FloatingPointError: A cannot be factorised.
    """
    A = A.flip(0, 1)
    always_zero = A.diagonal() == 0
    if always_zero.all():
        A[always_zero, always_zero] = 1.0
    else:
        A[always_zero, always_zero] = A.diagonal()[~always_zero].mean()
    factor = factorise(A, damping, largest, name)
    # With reversed indices, A is L L^T, and U is the inverse of L with its indices reversed. The
    # inverse of A itself may not be positive definite in float32.
    return factor.inverse_cholesky().flip(0, 1), factor.raised(name, "A")


def replace_columns(W: Tensor, U: Tensor, width: int, replace: Replace) -> None:
    """Replace the columns of W [R, C] from left to right, in place.

    The error of column c is (W_c - new W_c) / U_cc; the error times U_c: is subtracted from the
    columns after it.

    Args:
        W: the matrix.
        U: [C, C] see `upper_inverse`.
        width: number of columns of a block; the columns to the right of a block are updated once
            the block is done.
        replace: see `Replace`.
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


def _all_but_smallest(scores: Tensor, number: int) -> Tensor:
    """Return True for all scores [..., n] except the `number` smallest of each row."""
    smallest = scores.topk(number, dim=-1, largest=False).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, smallest, False)


def _at_least(fraction: float, number: int) -> int:
    """Return a fraction of a number, rounded up as the other methods do to reach their target."""
    return min(number, math.ceil(fraction * number - 1e-6))


def wanda(
    W: Tensor, A_diagonal: Tensor, sparsity: float, n: int, m: int, *, before: Tensor
) -> Tensor:
    """Return the elements that Wanda keeps, [R, C] bool.

    They are the elements with the largest |W_rc| |X_c| of each row, or of each N:M group.

    Args:
        W: [R, C] without the bias.
        A_diagonal: [C] sum of squared inputs.
        sparsity: fraction of each row to prune, if `m` is 1.
        n: number of elements of each group that stay.
        m: number of elements of a group; 1 for single elements.
        before: [R, C] bool, elements that earlier shots kept. The other elements are pruned first,
            even before weights whose inputs are always zero.
    """
    scores = (W.abs() * A_diagonal.sqrt()).masked_fill(~before, -1.0)
    if m == 1:
        return _all_but_smallest(scores, _at_least(sparsity, W.shape[1]))
    groups = scores.reshape(len(W), -1, m)
    return _all_but_smallest(groups, m - n).view(W.shape)


def sparsegpt(
    W: Tensor,
    U: Tensor,
    sparsity: float,
    n: int,
    m: int,
    *,
    before: Tensor,
    block_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Prune a linear column by column; the columns to the right compensate for each removal.

    The pruned elements of a block of columns are chosen by W_rc^2 / U_cc^2 when the block is
    reached, with one threshold per block. Those of an N:M group are chosen when its first column is
    reached.

    Args:
        W: [R, C] without the bias, zero where inputs are always zero; it is overwritten.
        U: [C, C] see `upper_inverse`.
        sparsity: fraction to prune, if `m` is 1.
        n: number of elements of each group that stay.
        m: number of elements of a group; 1 for single elements.
        before: [R, C] bool, elements that earlier shots kept. Single elements that they pruned are
            pruned first, whatever their weights have become in this shot.
        block_size: number of columns of a block, rounded up to whole groups.

    Returns:
        [R, C] new weights, and [R, C] bool, the elements that are kept.
    """
    kept = torch.ones_like(W, dtype=torch.bool)

    def prune(start: int, c: int, part: Tensor) -> Tensor:
        stop = start + part.shape[1]
        scale = U.diagonal()[start:stop].square()
        if m == 1 and c == 0:
            scores = part.square() / scale
            scores = scores.masked_fill(~before[:, start:stop], -1.0).flatten()
            chosen = _all_but_smallest(scores, _at_least(sparsity, len(scores)))
            kept[:, start:stop] = chosen.view_as(part)
        if m > 1 and c % m == 0:
            scores = part[:, c : c + m].square() / scale[c : c + m]
            kept[:, start + c : start + c + m] = _all_but_smallest(scores, m - n)
        return part[:, c] * kept[:, start + c]

    width = math.ceil(block_size / m) * m
    replace_columns(W, U, width, prune)
    return W * kept, kept
