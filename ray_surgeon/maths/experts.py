"""Experts: factors of experts that saw few tokens, and what the removal of a whole expert costs.

Source: docs/method.md, section 10. Losses and costs are means over all tokens, of which an expert
sees a share.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ray_surgeon.maths.kronecker import PackedFactors
from ray_surgeon.maths.packed import PackedSymmetric, diagonals

PRIOR_TOKENS = 256.0
"""Tokens with which an expert's own mean counts as much as its layer's.

Measured; see docs/results.md.
"""


_BATCH_BYTES = 2**25
"""Of factors that are copied to be added up in one launch."""


class LayerMean(NamedTuple):
    """What the experts of a layer have in common: means over all of their tokens."""

    A: PackedSymmetric  # [C, C]
    G: PackedSymmetric  # [R, R]
    num_tokens: float  # that passed the layer, each through several experts


def mean_factor(
    totals: Iterable[tuple[PackedSymmetric, int]],
    *,
    has_basis: bool,
    has_bias: bool = False,
    device: torch.device | None = None,
) -> PackedSymmetric:
    """Return the mean of a factor over all tokens of all experts of a layer.

    Args:
        totals: sum of every expert, and its number of tokens.
        has_basis: whether the same entry means the same in all experts, as in the hidden states.
            The channels of one expert have nothing to do with those of another, and what does not
            depend on their order is a multiple of the identity only (and of ones, left out).
            Channels that are always zero, as pruned ones are, say nothing of the others and do not
            count.
        has_bias: whether the last entry is the bias's, which means the same in all experts.
        device: of the mean, and where it is taken; that of the sums if not given.
    """
    totals = list(totals)
    sums = [total for total, _ in totals]
    numbers = [num_tokens for _, num_tokens in totals]
    first, *_ = sums
    device = device or first.flat.device
    divisor = max(1, sum(numbers))
    if has_basis:
        return replace(first, flat=_added([total.flat for total in sums], device).div_(divisor))
    own = _moved(diagonals(sums), device)
    channels = own[:, : first.n - has_bias]
    diagonal = _added(list(own), device).div_(divisor)
    level = diagonal[: first.n - has_bias]
    used = (channels != 0).sum(dim=1)
    if device.type == "cpu":
        num_used = sum(n * k for n, k in zip(numbers, used.tolist(), strict=True))
        level.fill_(float(level.mean()) * (sum(numbers) * len(level) / max(1, num_used)))
    else:
        used.mul_(_moved(torch.tensor(numbers), device))
        level.copy_(channels.sum(dtype=torch.float64).div_(used.sum().clamp_(min=1)))
    mean = replace(first, flat=torch.zeros_like(first.flat, device=device))
    mean.fill_diagonal(diagonal)
    return mean


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the host waits only for what comes to it."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def _added(parts: list[Tensor], device: torch.device) -> Tensor:
    """Return the sum of tensors of one shape [n]: one after the other on the CPU, else at once."""
    total = torch.zeros_like(parts[0], device=device)
    if device.type == "cpu":
        for part in parts:
            total.add_(part)
        return total
    size = max(1, _BATCH_BYTES // max(1, total.nbytes))
    for first in range(0, len(parts), size):
        batch = [_moved(part, device) for part in parts[first : first + size]]
        total.add_(torch.stack(batch).sum(dim=0))
    return total


def share_of_tokens(num_tokens: int, mean: LayerMean) -> float:
    """Return the share of a layer's tokens that an expert sees, by Laplace's rule.

    An expert that was not called may be called yet.
    """
    return (num_tokens + 1) / (mean.num_tokens + 2)


def shrunk_factors(own: PackedFactors, mean: LayerMean, k: float = PRIOR_TOKENS) -> PackedFactors:
    """Return the factors of one expert, shrunk towards the mean of its layer.

    The fewer tokens it saw, the more they are shrunk.

    The estimate is (sum + k mean) / (n + k): the posterior mean of a second moment under a
    conjugate (inverse Wishart) prior that is worth k tokens, the linear shrinkage of Ledoit and
    Wolf (2004) with a weight by the number of tokens. The share of all tokens that the expert sees,
    by which G is multiplied, is (n + 1) / (N + 2), Laplace's rule of succession: an expert that was
    not called may be called yet.

    Args:
        own: sums over the expert's tokens.
        mean: of the layer.
        k: tokens that the prior is worth.

    Returns:
        Means on the device of the layer's, with `num_tokens` 1.
    """
    n = own.num_tokens + k
    share = share_of_tokens(own.num_tokens, mean)
    device = mean.A.flat.device
    A = _moved(own.A.flat, device).add(mean.A.flat, alpha=k).div_(n)
    G = _moved(own.G.flat, device).add(mean.G.flat, alpha=k).mul_(share / n)
    return PackedFactors(PackedSymmetric(own.A.n, A), PackedSymmetric(own.G.n, G), 1, own.terms)


def own_divisor(num_tokens: int, mean: LayerMean) -> float:
    """Return the divisor of an expert's own sum of g g^T (x) a a^T.

    It makes of the sum the Fisher that `shrunk_factors` estimates.
    """
    return (num_tokens + PRIOR_TOKENS) / share_of_tokens(num_tokens, mean)


SUMS = ("tokens", "weighted_norms", "gains", "squares")
"""Rows of the sums over tokens of the experts of a layer, see `ExpertSums`."""


class ExpertSums:
    """Sums over the tokens that are routed to each expert of a layer.

    They merge over micro-batches and replicas.
    """

    def __init__(self, num_experts: int, device: torch.device | None = None) -> None:
        """Start with nothing."""
        self.total = torch.zeros(len(SUMS), num_experts, dtype=torch.float64, device=device)

    def add(self, name: str, experts: Tensor, values: Tensor) -> None:
        """Add values [n] of tokens to one of `SUMS`, for the experts [n] they are routed to."""
        self.total[SUMS.index(name)].index_add_(0, experts, values.double())

    def of(self, name: str) -> Tensor:
        """Return one of the sums, [num_experts] float64."""
        return self.total[SUMS.index(name)]


def add_changes(sums: ExpertSums, experts: Tensor, changes: Tensor, gradients: Tensor) -> None:
    """Add what removals change.

    Args:
        sums: to add to.
        experts: [n] which expert is removed.
        changes: [n, d] what its removal changes in the output of the layer for a token that is
            routed to it.
        gradients: [n, d] of the loss, summed over tokens, by that output.
    """
    gains = (changes.float() * gradients.float()).sum(dim=1)
    sums.add("gains", experts, gains)
    sums.add("squares", experts, gains.double().square())


def add_rises(sums: ExpertSums, rises: Tensor, outputs: Tensor, gradients: Tensor) -> None:
    """Add what removals change for tokens that are not routed to the expert.

    Args:
        sums: to add to.
        rises: [n, num_experts] by how much the output of the layer rises, relative.
        outputs: [n, d].
        gradients: [n, d] of the loss, summed over tokens, by the output.
    """
    gains = (outputs.float() * gradients.float()).sum(dim=1, keepdim=True) * rises
    sums.of("gains").add_(gains.double().sum(dim=0))
    sums.of("squares").add_(gains.double().square().sum(dim=0))


def rerouting_costs(sums: ExpertSums, num_chosen: int, *, first_order: bool = True) -> Tensor:
    """Return the predicted loss increase of each expert's removal, [num_experts] float64.

    It is in nats per token; the expert's tokens go to the next ones.

    E[g^T dy] + 1/2 E[(g^T dy)^2], the Fisher being that of the tokens themselves. The first order
    is not 0 where the model is not at a minimum for the text: after earlier shots, for example. A
    removal that lowers the loss has a negative cost.

    Args:
        sums: over the tokens of a layer.
        num_chosen: experts a token goes to.
        first_order: whether to add it. With labels drawn from the model it is noise: its mean is 0.
    """
    second = 0.5 * sums.of("squares")
    return (sums.of("gains") + second if first_order else second) / _num_tokens(sums, num_chosen)


def reap_costs(sums: ExpertSums) -> Tensor:
    """Return REAP's saliency: the mean of weight times norm of output (Lasby et al. 2025).

    The mean is over an expert's tokens.
    """
    return sums.of("weighted_norms") / sums.of("tokens").clamp(min=1)


def frequency_costs(sums: ExpertSums, num_chosen: int) -> Tensor:
    """Return the share of tokens that are routed to each expert."""
    return sums.of("tokens") / _num_tokens(sums, num_chosen)


def _num_tokens(sums: ExpertSums, num_chosen: int) -> Tensor:
    return (sums.of("tokens").sum() / num_chosen).clamp(min=1)


def random_costs(num_experts: int, seed: int) -> Tensor:
    """Return costs in (0, 1] that depend on a seed only."""
    generator = torch.Generator().manual_seed(seed)
    return 1 - torch.rand(num_experts, generator=generator, dtype=torch.float64)
