"""SparseGPT and Wanda: linear after linear to the same sparsity.

Inputs are those of the model pruned so far.

Source: Frantar & Alistarh 2023 (arXiv 2301.00774), algorithm 1; Sun et al. 2023 (arXiv 2306.11695).
Written from their definitions. The curvature is A alone; the bias is left as it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ray_surgeon.maths.columns import replace_columns, upper_inverse
from ray_surgeon.maths.curvature import RaisedDamping

BLOCK_SIZE = 128
"""Columns whose mask SparseGPT chooses together."""


def _all_but_smallest(scores: Tensor, number: int) -> Tensor:
    """Return True for all scores [..., n] but so many smallest of each row."""
    smallest = scores.topk(number, dim=-1, largest=False).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, smallest, False)


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
    W: Tensor,
    A: Tensor,
    sparsity: float,
    n: int,
    m: int,
    *,
    before: Tensor,
    damping: float,
    max_damping: float,
    name: str,
    block_size: int = BLOCK_SIZE,
) -> tuple[Tensor, Tensor, RaisedDamping | None]:
    """Prune a linear column by column, each removal made up for by the columns to its right.

    With U the upper Cholesky factor of A^-1, the error of column c is (W_c - pruned W_c) / U_cc,
    and the columns after it get minus the error times U_c:. The mask of a block of columns is
    chosen by W_rc^2 / U_cc^2 when the block is reached, one threshold a block; N:M groups choose
    when their first column is reached.

    Args:
        W: [R, C] without bias.
        A: [C, C] mean of the inputs' second moment; inputs that are always zero have their column
            removed.
        sparsity: fraction to prune, if `m` is 1.
        n: elements that stay in each group.
        m: elements of a group; 1 for single elements.
        before: [R, C] bool, what earlier shots kept; what they pruned goes first, whatever it
            became in this one.
        damping: relative to the mean of the diagonal.
        max_damping: see `factorise`.
        name: the linear, for errors.
        block_size: columns of a block, rounded up to whole groups.

    Returns:
        [R, C] new weights, [R, C] what is kept, and the damping that A needed if that is more.
    """
    W = W.clone()
    W[:, A.diagonal() == 0] = 0
    kept = torch.ones_like(W, dtype=torch.bool)
    U, raised = upper_inverse(A, damping, max_damping, name)

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
    return W * kept, kept, raised


def prune_linear(
    W: Tensor,
    A: Tensor,
    sparsity: float,
    n: int,
    m: int,
    *,
    method: str,
    before: Tensor,
    damping: float,
    max_damping: float,
    name: str,
) -> tuple[Tensor, Tensor, RaisedDamping | None]:
    """Return the new weights, what is kept and the damping that was needed.

    Arguments are those of `sparsegpt` and `wanda`.
    """
    if method == "wanda":
        kept = wanda(W, A.diagonal(), sparsity, n, m, before=before)
        return W * kept, kept, None
    return sparsegpt(
        W, A, sparsity, n, m, before=before, damping=damping, max_damping=max_damping, name=name
    )


def _at_least(fraction: float, number: int) -> int:
    """Return so much of a number, rounded up, as other methods do to reach their target."""
    return min(number, math.ceil(fraction * number - 1e-6))
