"""Factors of experts that saw few tokens, and the cost of removing a whole expert.

Source: docs/method.md, section 10. Losses and costs are means over all tokens; an expert sees only
a share of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ray_surgeon.maths.kronecker import PackedFactors
from ray_surgeon.maths.products import PackedSymmetric, diagonals

PRIOR_TOKENS = 256.0
"""Number of tokens at which the mean of an expert counts as much as the mean of its layer.

Measured; see docs/results.md.
"""

_BATCH_BYTES = 2**25
"""Size of the factors that are copied to a device and added in one launch."""


class LayerMean(NamedTuple):
    """Mean factors of the experts of a layer, over all of their tokens."""

    A: PackedSymmetric  # [C, C]
    G: PackedSymmetric  # [R, R]
    num_tokens: float  # tokens that passed the layer, each through several experts


def mean_factor(
    totals: Iterable[tuple[PackedSymmetric, int]],
    *,
    has_basis: bool,
    has_bias: bool = False,
    device: torch.device | None = None,
) -> PackedSymmetric:
    """Return the mean of a factor over all tokens of all experts of a layer.

    Args:
        totals: the sum of every expert, and its number of tokens.
        has_basis: whether an entry has the same meaning in all experts, as in the hidden states.
            The channels of different experts are unrelated; the only mean that does not depend on
            their order is a multiple of the identity (and of a matrix of ones, which is left out).
            Channels that are always zero, such as pruned ones, do not count, because they say
            nothing about the others.
        has_bias: whether the last entry is the bias, which has the same meaning in all experts.
        device: device on which the mean is computed and returned; by default that of the sums.
    """
    sums = list[PackedSymmetric]()
    numbers = list[int]()
    for total, num_tokens in totals:
        sums.append(total)
        numbers.append(num_tokens)
    first = sums[0]
    device = device or first.flat.device
    divisor = max(1, sum(numbers))
    if has_basis:
        flat = _added([total.flat for total in sums], device)
        return replace(first, flat=flat.div_(divisor))
    num_channels = first.n - 1 if has_bias else first.n
    by_expert = _moved(diagonals(sums), device)
    channels = by_expert[:, :num_channels]
    diagonal = _added(list(by_expert), device).div_(divisor)
    level = diagonal[:num_channels]
    num_used = (channels != 0).sum(dim=1)
    if device.type == "cpu":
        num_entries = 0
        for num_tokens, num_used_channels in zip(numbers, num_used.tolist(), strict=True):
            num_entries += num_tokens * num_used_channels
        scale = sum(numbers) * num_channels / max(1, num_entries)
        level.fill_(float(level.mean()) * scale)
    else:
        num_used.mul_(_moved(torch.tensor(numbers), device))
        total_level = channels.sum(dtype=torch.float64)
        level.copy_(total_level.div_(num_used.sum().clamp_(min=1)))
    mean = replace(first, flat=torch.zeros_like(first.flat, device=device))
    mean.fill_diagonal(diagonal)
    return mean


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the host waits only for copies to the host."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def _added(parts: list[Tensor], device: torch.device) -> Tensor:
    """Return the sum of tensors of one shape [n], added one by one on the CPU, else in batches."""
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
    """Return the share of a layer's tokens that an expert sees, by Laplace's rule of succession.

    The share is positive even for an expert that has not been called, since it may be called later.
    """
    return (num_tokens + 1) / (mean.num_tokens + 2)


def shrunk_factors(
    own: PackedFactors,
    mean: LayerMean,
    k: float = PRIOR_TOKENS,
) -> PackedFactors:
    """Return the factors of one expert, shrunk towards the mean of its layer.

    The fewer tokens the expert saw, the more its factors are shrunk.

    The estimate is (sum + k mean) / (n + k): the posterior mean of a second moment under a
    conjugate (inverse Wishart) prior that is worth k tokens, which is the linear shrinkage of
    Ledoit and Wolf (2004) with a weight that depends on the number of tokens. G is also multiplied
    by the share of all tokens that the expert sees, (n + 1) / (N + 2); see `share_of_tokens`.

    Args:
        own: sums over the expert's tokens.
        mean: mean factors of the layer.
        k: number of tokens that the prior is worth.

    Returns:
        Means on the device of `mean`, with `num_tokens` 1.
    """
    n = own.num_tokens + k
    share = share_of_tokens(own.num_tokens, mean)
    device = mean.A.flat.device
    A = _moved(own.A.flat, device).add(mean.A.flat, alpha=k).div_(n)
    G = _moved(own.G.flat, device).add(mean.G.flat, alpha=k).mul_(share / n)
    return PackedFactors(
        A=PackedSymmetric(own.A.n, A),
        G=PackedSymmetric(own.G.n, G),
        num_tokens=1,
    )


def own_divisor(num_tokens: int, mean: LayerMean) -> float:
    """Return the divisor of an expert's own sum of g g^T (x) a a^T.

    It turns the sum into the Fisher that `shrunk_factors` estimates.
    """
    return (num_tokens + PRIOR_TOKENS) / share_of_tokens(num_tokens, mean)


SUMS = ("tokens", "weighted_norms", "gains", "squares")
"""Names of the sums over tokens in `ExpertSums`, one row each."""


class ExpertSums:
    """Sums over the tokens that are routed to each expert of a layer.

    Sums of micro-batches and replicas are merged by adding them.

    Attributes:
        total: [len(SUMS), num_experts] float64.
    """

    def __init__(self, num_experts: int, device: torch.device | None = None) -> None:
        """Start with sums of zero."""
        shape = (len(SUMS), num_experts)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, name: str, experts: Tensor, values: Tensor) -> None:
        """Add values [n] of tokens to the sum `name` of the experts [n] they are routed to."""
        self.total[SUMS.index(name)].index_add_(0, experts, values.double())

    def of(self, name: str) -> Tensor:
        """Return one of the sums, [num_experts] float64."""
        return self.total[SUMS.index(name)]

    def num_tokens(self, num_chosen: int) -> Tensor:
        """Return the number of tokens, at least 1, if each goes to `num_chosen` experts."""
        return (self.of("tokens").sum() / num_chosen).clamp(min=1)


def add_changes(
    sums: ExpertSums,
    experts: Tensor,
    changes: Tensor,
    gradients: Tensor,
) -> None:
    """Add the changes of the loss by removals of experts, for tokens routed to these experts.

    Args:
        sums: the sums to add to.
        experts: [n] the removed expert.
        changes: [n, d] change of the layer's output for a token that is routed to the expert.
        gradients: [n, d] gradients of the loss, summed over tokens, with respect to that output.
    """
    gains = (changes.float() * gradients.float()).sum(dim=1)
    sums.add("gains", experts, gains)
    sums.add("squares", experts, gains.double().square())


def add_rises(
    sums: ExpertSums,
    rises: Tensor,
    outputs: Tensor,
    gradients: Tensor,
) -> None:
    """Add the changes of the loss by removals of experts, for tokens not routed to these experts.

    Args:
        sums: the sums to add to.
        rises: [n, num_experts] relative increase of the layer's output.
        outputs: [n, d] outputs of the layer.
        gradients: [n, d] gradients of the loss, summed over tokens, with respect to the outputs.
    """
    gains = (outputs.float() * gradients.float()).sum(dim=1, keepdim=True) * rises
    sums.of("gains").add_(gains.double().sum(dim=0))
    sums.of("squares").add_(gains.double().square().sum(dim=0))


def rerouting_costs(
    sums: ExpertSums,
    num_chosen: int,
    *,
    first_order: bool = True,
) -> Tensor:
    """Return the predicted loss increase of each expert's removal, [num_experts] float64.

    It is in nats per token; the tokens of a removed expert are routed to the next experts.

    The increase is E[g^T dy] + 1/2 E[(g^T dy)^2], with the Fisher of the tokens themselves. The
    first order is not 0 where the model is not at a minimum for the text, for example after earlier
    shots. A removal that lowers the loss has a negative cost.

    Args:
        sums: sums over the tokens of a layer.
        num_chosen: number of experts a token is routed to.
        first_order: whether to add the first order. With labels drawn from the model it is noise
            with mean 0.
    """
    increase = 0.5 * sums.of("squares")
    if first_order:
        increase = sums.of("gains") + increase
    return increase / sums.num_tokens(num_chosen)
