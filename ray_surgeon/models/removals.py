"""What removals of single experts would change in the output of their layer.

Sums are taken while tokens and gradients pass.

Source: docs/method.md, section 10.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ray_surgeon.maths.experts import ExpertSums, add_changes, add_rises
from ray_surgeon.models.experts import Mixture, routed
from ray_surgeon.models.hooks import see_gradient


@dataclass(frozen=True)
class Removals:
    """What the removal of each expert would change in the output of a layer.

    There are n pairs of a token and one of its k experts.
    """

    experts: Tensor  # [n] which is removed
    tokens: Tensor  # [n] that is routed to it
    changes: Tensor  # [n, d] float32
    norms: Tensor  # [n] float32 the expert's weight times the norm of its output
    output: Tensor  # [num_tokens, d] float32 of all experts together, as it is
    # [num_tokens, num_experts] by how much the output rises, relative, for tokens that are not
    # routed to the expert
    rises: Tensor | None


@torch.no_grad()
def removals(mixture: Mixture, hidden: Tensor, numbers: Tensor, weights: Tensor) -> Removals:
    """Return what the removal of each expert would change.

    The tokens that are routed to it go to the next experts.

    The router is asked anew without the expert, so weights are those it gives to the others. Where
    it has no expert to spare, nothing changes.

    Args:
        mixture: of a block.
        hidden: [num_tokens, d] inputs.
        numbers: [num_tokens, k] of the experts they go to.
        weights: [num_tokens, k].
    """
    num_experts = len(mixture.experts)
    num_tokens = len(hidden)
    whole = list(routed(numbers, num_experts))
    without = list(_without_each(mixture, hidden, numbers, weights))
    every = torch.arange(num_tokens, device=hidden.device)
    needed = torch.zeros(num_experts, num_tokens, dtype=torch.bool, device=hidden.device)
    needed[numbers.T, every] = True
    is_routed = needed.T.clone()
    for (_, token, _), (new_numbers, _) in zip(whole, without, strict=True):
        needed[new_numbers.T, token] = True
    row = needed.flatten().cumsum(0).view(num_experts, num_tokens) - 1
    wanted = [(number, tokens) for number, tokens in enumerate(needed) if tokens.any()]
    of_experts = torch.cat(
        [mixture.expert(number).unseen(hidden[tokens]).float() for number, tokens in wanted]
    )

    def mixed(token: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("nk,nkd->nd", weights.float(), of_experts[row[numbers, token[:, None]]])

    before = mixed(every, numbers, weights)
    changes = []
    norms = []
    for (number, token, place), chosen in zip(whole, without, strict=True):
        changes.append(mixed(token, *chosen) - before[token])
        norms.append(of_experts[row[number, token]].norm(dim=1) * weights[token, place].float())
    return Removals(
        torch.cat([torch.full_like(token, number) for number, token, _ in whole]),
        torch.cat([token for _, token, _ in whole]),
        torch.cat(changes),
        torch.cat(norms),
        before,
        _rises(mixture, hidden, is_routed),
    )


def _without_each(
    mixture: Mixture, hidden: Tensor, numbers: Tensor, weights: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each expert that has tokens, where these go without it, and with what weights."""
    for number, token, _ in routed(numbers, len(mixture.experts)):
        if not mixture.can_spare_one:
            yield numbers[token], weights[token]
            continue
        kept = mixture.router.kept.clone()
        kept[number] = False
        _, new_weights, new_numbers = mixture.router.among(hidden[token], kept)
        yield new_numbers, new_weights


def _rises(mixture: Mixture, hidden: Tensor, is_routed: Tensor) -> Tensor | None:
    """Return p / (1 - p) of the experts that a token is not routed to.

    By so much a softmax that is not normalised later rises without them.
    """
    if not mixture.has_softmax or getattr(mixture.router.module, "norm_topk_prob", True):
        return None
    logits, _, _ = mixture.router(hidden)
    kept = mixture.router.kept.to(hidden.device)
    p = logits.new_zeros(is_routed.shape, dtype=torch.float32)
    p[:, kept] = logits.float().softmax(dim=1)
    return (p / (1 - p)).masked_fill(is_routed, 0.0)


def sum_removals(sums: ExpertSums, mixture: Mixture) -> list[RemovableHandle]:
    """Add what the removal of each expert would change to sums, while tokens and gradients pass.

    Returns the hooks.
    """
    waiting: list[Removals] = []

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        effects = removals(mixture, *(x.detach() for x in inputs))
        sums.add("tokens", effects.experts, torch.ones_like(effects.norms))
        sums.add("weighted_norms", effects.experts, effects.norms)
        waiting.append(effects)

    def leave(
        module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor | tuple[Tensor, ...]
    ) -> None:
        effects = waiting.pop()

        def add(g: Tensor) -> None:
            add_changes(sums, effects.experts, effects.changes, g[effects.tokens])
            if effects.rises is not None:
                add_rises(sums, effects.rises, effects.output, g)

        see_gradient(outputs[0] if isinstance(outputs, tuple) else outputs, add)

    return [
        mixture.experts.register_forward_pre_hook(enter),
        mixture.layer.register_forward_hook(leave),
    ]
