"""Rounding of weights to few bits, column by column.

The columns to the right make up for each error.

Source: Frantar et al. 2023 (arXiv 2210.17323), GPTQ: the Surgeon's update with G = I, where a
column moves to a number that can be stored instead of to zero. Written from its definition. See
docs/method.md, section 9.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ray_surgeon.maths.columns import replace_columns, upper_inverse

BLOCK_SIZE = 128
"""Columns after which the columns to the right learn of the errors, rounded up to whole groups."""

FRACTIONS = tuple(1 - 0.05 * step for step in range(10))
"""Of the largest scale, which are tried."""


def scales_of(groups: Tensor, weight: Tensor, num_bits: int) -> Tensor:
    """Return the scale [R] of each row of `groups` [R, size].

    Of several it is the one with the smallest weighted squared error.

    With the largest, the largest number just fits in signed integers; smaller ones cut it off and
    are finer for all others.

    Args:
        groups: numbers that share a scale.
        weight: [size] of the error of each column.
        num_bits: of the signed integers.
    """
    limit = 2.0 ** (num_bits - 1)
    largest = (groups.abs().amax(dim=1) / (limit - 0.5)).clamp(min=torch.finfo(torch.float32).tiny)
    candidates = torch.stack([fraction * largest for fraction in FRACTIONS])  # [n, R]
    rounded = (nearest(groups, scale[:, None], num_bits) for scale in candidates)
    errors = [((groups - stored).square() * weight).sum(dim=1) for stored in rounded]
    return candidates.gather(0, torch.stack(errors).argmin(dim=0, keepdim=True))[0]


def nearest(x: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    """Return the numbers that can be stored, integer times scale, nearest to `x`.

    `scale` is broadcast.
    """
    limit = 2.0 ** (num_bits - 1)
    return (x / scale).round().clamp(-limit, limit - 1) * scale


def round_columns(
    W: Tensor,
    A: Tensor,
    group_size: int,
    num_bits: int,
    *,
    damping: float,
    max_damping: float,
    name: str,
) -> tuple[Tensor, Tensor]:
    """Round a matrix so that its outputs on the inputs behind A change least.

    That is as far as one pass over the columns can.

    See `replace_columns`. The scale of a group is chosen when its first column is reached.

    Args:
        W: [R, C] without bias.
        A: [C, C] mean of the inputs' second moment.
        group_size: columns that share a scale; it divides C.
        num_bits: of the signed integers.
        damping: relative to the mean of A's diagonal.
        max_damping: see `upper_inverse`.
        name: the linear, for errors.

    Returns:
        [R, C] numbers that can be stored, and [R, C / group_size] scales.
    """
    W = W.clone()
    U, _ = upper_inverse(A, damping, max_damping, name)
    # what an error of each column costs once those to its right answer it
    importance = U.diagonal().square().reciprocal()
    scales = W.new_empty(len(W), W.shape[1] // group_size)

    def round_(start: int, c: int, part: Tensor) -> Tensor:
        group = (start + c) // group_size
        if c % group_size == 0:
            weight = importance[start:][c : c + group_size]
            scales[:, group] = scales_of(part[:, c : c + group_size], weight, num_bits)
        return nearest(part[:, c], scales[:, group], num_bits)

    replace_columns(W, U, -(-BLOCK_SIZE // group_size) * group_size, round_)
    return W, scales
