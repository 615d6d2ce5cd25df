"""Scales of the costs of blocks, from what their removals really change. Source: docs/method.md, section 8."""

from __future__ import annotations

import torch
from torch import Tensor

_STEP = 0.7
"""How far, in logarithms, scales go to what was measured: the allocation that they give has other ratios."""

_FARTHEST = 20.0
"""A ratio is at least the mean of all over this."""


def shrunk_ratios(changes: Tensor, costs: Tensor) -> Tensor:
    """Return the ratios of measured to expected changes, over that of all together; by empirical Bayes.

    A block that loses little changes little, and most of what is measured is chance. So its ratio r is drawn towards the common one m by
    its standard error e, which the sequences tell: r <- m + s^2 / (s^2 + e^2) (r - m). The variance s^2 of true ratios is that of the
    measured ones without their errors, blocks weighted by the squares of their costs.

    Args:
        changes: [num_blocks, num_sequences] how far the divergence of each sequence falls when a block's removals are undone; at least
            two sequences.
        costs: [num_blocks] what the removals were to cost, positive.

    Returns:
        [num_blocks] float64, positive; 1 for all if undoing does not lower the divergence.
    """
    changes, costs = changes.double(), costs.double()
    change, error = changes.mean(dim=1), changes.std(dim=1) / changes.shape[1] ** 0.5
    common = change.sum() / costs.sum()
    if not common > 0:
        return torch.ones_like(costs)
    variance = (((change - common * costs).square() - error.square()).sum() / costs.square().sum()).clamp(min=0)
    if not variance > 0:
        return torch.ones_like(costs)
    weight = variance / (variance + (error / costs).square())
    shrunk: Tensor = 1 + weight * (change / costs / common - 1)
    return shrunk.clamp(min=1 / _FARTHEST)


def next_scales(before: Tensor, ratios: Tensor) -> Tensor:
    """Return the scales after a round: those before [num_blocks], moved most of the way to the ratios [num_blocks]."""
    return before.double().pow(1 - _STEP) * ratios.double().pow(_STEP)
