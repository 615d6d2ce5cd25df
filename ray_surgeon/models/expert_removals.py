"""Effects of the removal of single experts on the output of their layer.

They are summed while tokens and gradients pass. Source: docs/method.md, section 10.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ray_surgeon.maths.experts import ExpertSums, add_changes, add_rises
from ray_surgeon.models.experts import Mixture, Routed
from ray_surgeon.models.hooks import see_gradient

_ENTRIES_MIXED = 2**25
"""Entries of expert outputs that are gathered at once for a weighted sum."""


class Removals(NamedTuple):
    """The changes in a layer's output if each of its experts were removed alone.

    There are n pairs of a token and one of its k experts.
    """

    experts: Tensor  # [n] the removed expert
    tokens: Tensor  # [n] the token that is routed to it
    changes: Tensor  # [n, d] float32
    norms: Tensor  # [n] float32 the expert's weight times the norm of its output
    output: Tensor  # [num_tokens, d] float32 output of all experts together, unchanged
    # [num_tokens, num_experts] relative increase of the output, for tokens that are not routed to
    # the expert
    rises: Tensor | None


@torch.no_grad()
def removals(
    mixture: Mixture,
    hidden: Tensor,
    numbers: Tensor,
    weights: Tensor,
) -> Removals:
    """Return the change in the output for the removal of each expert.

    The tokens that are routed to it go to the next experts. The router is run again without the
    expert, so weights are those it then gives to the others. Where it has no expert to spare,
    nothing changes.

    Args:
        mixture: mixture of a block.
        hidden: [num_tokens, d] inputs.
        numbers: [num_tokens, k] experts of each token.
        weights: [num_tokens, k] of these experts.
    """
    num_tokens = len(hidden)
    num_experts = len(mixture.experts)
    pairs = Routed(numbers, num_experts)
    every = torch.arange(num_tokens, device=hidden.device)
    needed = torch.zeros(num_experts, num_tokens, dtype=torch.bool, device=hidden.device)
    yes = torch.ones((), dtype=torch.bool, device=hidden.device)
    needed[numbers.T, every] = yes
    is_routed = needed.T.clone()
    rerouted = mixture.rerouted(hidden, pairs)
    if rerouted is not None:
        new_numbers, _ = rerouted
        needed[new_numbers.T, pairs.tokens] = yes

    outputs, row = _needed_outputs(mixture, hidden, needed)

    output = _weighted_sums(outputs, row, tokens=every, numbers=numbers, weights=weights)
    if rerouted is None:
        changes = torch.zeros_like(output).index_select(0, pairs.tokens)
    else:
        new_numbers, new_weights = rerouted
        new_output = _weighted_sums(
            outputs,
            row,
            tokens=pairs.tokens,
            numbers=new_numbers,
            weights=new_weights,
        )
        changes = new_output - output.index_select(0, pairs.tokens)
    norms = (
        outputs[row[pairs.places, pairs.tokens]].norm(dim=1) * pairs.of(weights).float()
    )
    return Removals(
        experts=pairs.places,
        tokens=pairs.tokens,
        changes=changes,
        norms=norms,
        output=output,
        rises=_rises(mixture, hidden, is_routed),
    )


def _needed_outputs(
    mixture: Mixture,
    hidden: Tensor,
    needed: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return outputs of experts for the tokens that need them.

    Args:
        mixture: mixture of a block.
        hidden: [num_tokens, d] inputs.
        needed: [num_experts, num_tokens] bool.

    Returns:
        [num_outputs, d] float32, and [num_experts, num_tokens] the row of each output in it.
    """
    num_tokens = len(hidden)
    row = needed.flatten().cumsum(0).view(needed.shape) - 1
    places = needed.flatten().nonzero()[:, 0]
    counts = needed.sum(dim=1).tolist()
    x = hidden.index_select(0, places % num_tokens)
    return mixture.experts.unseen(x, counts).float(), row


def _weighted_sums(
    outputs: Tensor,
    row: Tensor,
    *,
    tokens: Tensor,
    numbers: Tensor,
    weights: Tensor,
) -> Tensor:
    """Return the weighted sums of outputs of experts, [n, d].

    Args:
        outputs: [num_outputs, d].
        row: [num_experts, num_tokens] rows of `outputs`.
        tokens: [n].
        numbers: [n, k] experts of each token.
        weights: [n, k] of these experts.
    """
    size = max(1, _ENTRIES_MIXED // (numbers.shape[1] * outputs.shape[1]))
    sums = list[Tensor]()
    parts = zip(
        torch.split(tokens, size),
        torch.split(numbers, size),
        torch.split(weights, size),
        strict=True,
    )
    for token, number, weight in parts:
        own_outputs = outputs[row[number, token[:, None]]]
        sums.append(torch.einsum("nk,nkd->nd", weight.float(), own_outputs))
    return torch.cat(sums)


def _rises(mixture: Mixture, hidden: Tensor, is_routed: Tensor) -> Tensor | None:
    """Return p / (1 - p) for the experts that a token is not routed to.

    This is the relative increase of a softmax without the expert, if it is not normalised later.
    """
    if not mixture.has_softmax or getattr(mixture.router, "norm_topk_prob", True):
        return None
    logits, _, _ = mixture.route(hidden)
    p = logits.new_zeros(is_routed.shape, dtype=torch.float32)
    p.index_copy_(1, mixture.rows(p.device), logits.float().softmax(dim=1))
    return (p / (1 - p)).masked_fill(is_routed, 0.0)


def sum_removals(sums: ExpertSums, mixture: Mixture) -> list[RemovableHandle]:
    """Add the effect of the removal of each expert to sums, while tokens and gradients pass.

    Returns:
        The hooks.
    """
    waiting: list[Removals] = []

    def enter(module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, numbers, weights = inputs
        effects = removals(mixture, hidden.detach(), numbers.detach(), weights.detach())
        sums.add("tokens", effects.experts, torch.ones_like(effects.norms))
        sums.add("weighted_norms", effects.experts, effects.norms)
        waiting.append(effects)

    def leave(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Any) -> None:
        effects = waiting.pop()

        def add(g: Tensor) -> None:
            own_gradients = g.index_select(0, effects.tokens)
            add_changes(sums, effects.experts, effects.changes, own_gradients)
            if effects.rises is not None:
                add_rises(sums, effects.rises, effects.output, g)

        output = outputs[0] if isinstance(outputs, tuple) else outputs
        see_gradient(output, add)

    return [
        mixture.experts.register_forward_pre_hook(enter),
        mixture.layer.register_forward_hook(leave),
    ]
