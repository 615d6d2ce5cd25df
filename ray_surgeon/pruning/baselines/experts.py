"""Costs of whole experts by REAP and simpler scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ray_surgeon.maths.experts import ExpertSums


def score_experts(kind: str, sums: ExpertSums, num_chosen: int, seed: int) -> Tensor:
    """Return the score of each expert of a layer, [num_experts] float64.

    Args:
        kind: ``reap``, ``frequency`` or ``random``.
        sums: sums over the tokens of each expert.
        num_chosen: number of experts a token is routed to.
        seed: seed of random scores.
    """
    if kind == "reap":
        return reap_costs(sums)
    if kind == "frequency":
        return frequency_costs(sums, num_chosen)
    return random_costs(len(sums.of("tokens")), seed)


def reap_costs(sums: ExpertSums) -> Tensor:
    """Return REAP's saliency of each expert, [num_experts] float64 (Lasby et al. 2025).

    It is the mean, over the expert's tokens, of router weight times norm of the expert's output.
    """
    return sums.of("weighted_norms") / sums.of("tokens").clamp(min=1)


def frequency_costs(sums: ExpertSums, num_chosen: int) -> Tensor:
    """Return the share of tokens that are routed to each expert, [num_experts] float64."""
    return sums.of("tokens") / sums.num_tokens(num_chosen)


def random_costs(num_experts: int, seed: int) -> Tensor:
    """Return costs in (0, 1], [num_experts] float64, that depend only on a seed."""
    generator = torch.Generator().manual_seed(seed)
    return 1 - torch.rand(num_experts, generator=generator, dtype=torch.float64)
