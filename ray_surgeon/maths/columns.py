"""Columns replaced one after the other, those to the right making up for each error.

SparseGPT prunes so, linear after linear to the same sparsity: the Surgeon's update with G = I.
Wanda prunes without an update. The curvature is A alone; the bias is left as it is.

Source: Frantar & Alistarh 2023 (arXiv 2301.00774), algorithm 1; Sun et al. 2023 (arXiv 2306.11695).
Written from their definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ray_surgeon.maths.factorised import Raised, factorise

Replace = Callable[[int, int, Tensor], Tensor]
"""First column of a block, number of the column in it, the block [R, width] as it is now -> the new
column [R]."""


def upper_inverse(A: Tensor, damping: float, largest: float, name: str) -> tuple[Tensor, Raised]:
    """Return U, the upper Cholesky factor of the inverse of the damped A [C, C].

    The second item is what it needed of damping beside what was asked.

    Inputs that are always zero count as independent, and as strong as the others are in the mean:
    so damping stays what is asked.

    Args:
        A: mean of the inputs' second moment.
        damping: relative to the mean of the diagonal.
        largest: damping that may be tried, see `factorise`.
        name: the linear, for errors.
    """
    A = A.flip(0, 1)
    always_zero = A.diagonal() == 0
    A[always_zero, always_zero] = 1.0 if always_zero.all() else A.diagonal()[~always_zero].mean()
    factor = factorise(A, damping, largest, name)
    # With the indices reversed A is L L^T, and U is the inverse of L reversed. A's own inverse may
    # not be positive definite in float32.
    return factor.inverse_cholesky().flip(0, 1), factor.raised(name, "A")


def replace_columns(W: Tensor, U: Tensor, width: int, replace: Replace) -> None:
    """Replace the columns of W [R, C] from left to right, in place.

    The error of column c is (W_c - new W_c) / U_cc, and the columns after it get minus the error
    times U_c:.

    Args:
        W: the matrix.
        U: see `upper_inverse`.
        width: columns of a block, after which those to its right learn of its errors.
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
    """Return True for all scores [..., n] but so many smallest of each row."""
    smallest = scores.topk(number, dim=-1, largest=False).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, smallest, False)


def _at_least(fraction: float, number: int) -> int:
    """Return so much of a number, rounded up, as other methods do to reach their target."""
    return min(number, math.ceil(fraction * number - 1e-6))


def wanda(
    W: Tensor, A_diagonal: Tensor, sparsity: float, n: int, m: int, *, before: Tensor
) -> Tensor:
    """Return what Wanda keeps, [R, C] bool.

    It is the largest |W_rc| |X_c| of each row, or of each N:M group.

    Args:
        W: [R, C] without bias.
        A_diagonal: [C] sum of squared inputs.
        sparsity: fraction of each row to prune, if `m` is 1.
        n: elements that stay in each group.
        m: elements of a group; 1 for single elements.
        before: [R, C] bool, what earlier shots kept; what they pruned goes first, also beside
            weights whose inputs are always zero.
    """
    scores = (W.abs() * A_diagonal.sqrt()).masked_fill(~before, -1.0)
    if m > 1:
        return _all_but_smallest(scores.reshape(len(W), -1, m), m - n).view(W.shape)
    return _all_but_smallest(scores, _at_least(sparsity, W.shape[1]))


def sparsegpt(
    W: Tensor, U: Tensor, sparsity: float, n: int, m: int, *, before: Tensor, block_size: int = 128
) -> tuple[Tensor, Tensor]:
    """Prune a linear column by column, each removal made up for by the columns to its right.

    The mask of a block of columns is chosen by W_rc^2 / U_cc^2 when the block is reached, one
    threshold a block; N:M groups choose when their first column is reached.

    Args:
        W: [R, C] without bias, zero where inputs are always zero; it is overwritten.
        U: see `upper_inverse`.
        sparsity: fraction to prune, if `m` is 1.
        n: elements that stay in each group.
        m: elements of a group; 1 for single elements.
        before: [R, C] bool, what earlier shots kept; what they pruned goes first, whatever it
            became in this one.
        block_size: columns of a block, rounded up to whole groups.

    Returns:
        [R, C] new weights, and [R, C] what is kept.
    """
    kept = torch.ones_like(W, dtype=torch.bool)

    def prune(start: int, c: int, part: Tensor) -> Tensor:
        stop = start + part.shape[1]
        scale = U.diagonal()[start:stop].square()
        if m == 1 and c == 0:
            scores = (part.square() / scale).masked_fill(~before[:, start:stop], -1.0).flatten()
            chosen = _all_but_smallest(scores, _at_least(sparsity, len(scores)))
            kept[:, start:stop] = chosen.view_as(part)
        if m > 1 and c % m == 0:
            scores = part[:, c : c + m].square() / scale[c : c + m]
            kept[:, start + c : start + c + m] = _all_but_smallest(scores, m - n)
        return part[:, c] * kept[:, start + c]

    replace_columns(W, U, -(-block_size // m) * m, prune)
    return W * kept, kept
