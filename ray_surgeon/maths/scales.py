"""Scales of the costs of blocks, from what their removals really change.

Source: docs/method.md, section 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEP = 0.7
"""How far scales go to what was measured, in logarithms.

The allocation that they give has other ratios.
"""

_SPREAD = 0.5
"""How far ratios of the blocks lie from their mean, over that, as was found on SmolLM2."""

_FARTHEST = 20.0
"""A ratio is at least the mean of all over this."""


def shrunk_ratios(changes: Tensor, costs: Tensor, kinds: Tensor) -> Tensor:
    """Return the ratios of measured to expected changes, over that of all together.

    Each is drawn towards the mean of its kind.

    Where little is removed, little changes, and most of what is measured is chance. The sequences
    tell the standard error e of a ratio r. It is drawn towards the ratio m of its kind as far as e
    says, r <- m + s^2 / (s^2 + e^2) (r - m), with s half of m: the posterior mean for ratios that
    lie around m with the standard deviation s.

    Args:
        changes: [num_units, num_sequences] how far the divergence of each sequence falls when the
            removals of one kind of groups in one block are undone; at least two sequences.
        costs: [num_units] what these removals were to cost, positive.
        kinds: [num_units] number of the kind.

    Returns:
        [num_units] float64, at least 0.05; 1 for all if the divergence does not fall.
    """
    changes = changes.double()
    costs = costs.double()
    change = changes.mean(dim=1)
    error = changes.std(dim=1) / changes.shape[1] ** 0.5 / costs
    common = change.sum() / costs.sum()
    if not common > 0:
        return torch.ones_like(costs)
    mean = torch.empty_like(costs)
    for kind in set(kinds.tolist()):
        own = kinds == kind
        of_kind = change[own].sum() / costs[own].sum()
        mean[own] = of_kind if of_kind > 0 else common
    prior = (_SPREAD * mean).square()
    shrunk: Tensor = mean + prior / (prior + error.square()) * (change / costs - mean)
    return (shrunk / common).clamp(min=1 / _FARTHEST)


def next_scales(before: Tensor, ratios: Tensor) -> Tensor:
    """Return the scales after a round, moved most of the way to the ratios.

    Both are [num_units].
    """
    return before.double().pow(1 - _STEP) * ratios.double().pow(_STEP)
