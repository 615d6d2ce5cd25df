"""Mixtures of experts: experts as linears, and routers that go around removed ones.

transformers keeps all experts of a layer in two tensors, where hooks on linears see nothing. Here
every expert has linears of its own, by the names they have in checkpoints. The family's own layer
and router stay: they are called with fewer experts once some are removed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ray_surgeon.models.families import Family, SparseLayer
from ray_surgeon.models.linears import as_linear


class _Linear(nn.Linear):
    """A linear without starting values, which waits for its weights.

    A large model has ten thousands of these, and starting values would take most of the time.
    """

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


Combine = Callable[[Tensor, Tensor], Tensor]
"""(gate, up) -> channels, all [num_tokens, width]."""


class Expert(nn.Module):
    """One expert: ``consumer(combine(gate(x), up(x)))``."""

    def __init__(
        self,
        family: SparseLayer,
        width: int,
        hidden: int,
        combine: Combine,
        like: Tensor,
        *,
        bias: bool,
    ) -> None:
        super().__init__()
        self._combine = combine
        self._names = (*family.producers, family.consumer)
        for name in family.producers:
            self.add_module(
                name, _Linear(hidden, width, bias=bias, device=like.device, dtype=like.dtype)
            )
        self.add_module(
            family.consumer, _Linear(width, hidden, bias=bias, device=like.device, dtype=like.dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[num_tokens, d] -> [num_tokens, d]."""
        gate, up, down = (self.get_submodule(name) for name in self._names)
        output: Tensor = down(self._combine(gate(x), up(x)))
        return output

    def unseen(self, x: Tensor) -> Tensor:
        """Return the same without calling the linears, so that hooks on them notice nothing."""
        if len(x) == 1:  # see `times_constant`
            return self.unseen(torch.cat([x, x]))[:1]
        gate, up, down = (as_linear(self.get_submodule(name)) for name in self._names)
        channels = self._combine(linear(x, gate.weight, gate.bias), linear(x, up.weight, up.bias))
        return linear(channels, down.weight, down.bias)


class ExpertLinears(nn.ModuleList):
    """All experts of a layer, in place of the family's own module."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the experts that every token goes to.

        Args:
            hidden_states: [num_tokens, d].
            top_k_index: [num_tokens, k] numbers of experts.
            top_k_weights: [num_tokens, k].

        Returns:
            [num_tokens, d].
        """
        total = torch.zeros_like(hidden_states)
        for number, token, place in routed(top_k_index, len(self)):
            output = self[number](hidden_states[token]) * top_k_weights[token, place, None]
            total = total.index_add(0, token, output.to(total.dtype))
        return total


def routed(top_k_index: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each expert that has tokens, with their numbers, ascending.

    The third item is the expert's place among those of each token.
    """
    numbers, order = top_k_index.flatten().sort(stable=True)
    counts = torch.bincount(numbers, minlength=num_experts).tolist()
    k = top_k_index.shape[1]
    for number, places in enumerate(torch.split(order, counts)):
        if len(places):
            yield number, places // k, places % k


class Router:
    """A family's router that may go around some experts: what its own code says of the others."""

    def __init__(self, module: nn.Module) -> None:
        """Take the router, whose calls come here from now on."""
        self.module = module
        self.num_experts = int(module.num_experts)  # type: ignore[arg-type]
        self.kept = torch.ones(self.num_experts, dtype=torch.bool)
        module.forward = self

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [num_tokens, kept], weights and experts [num_tokens, k]."""
        return self.among(hidden, self.kept)

    def among(self, hidden: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route among some experts only, [num_experts] bool.

        The layer computes as if there were no others.
        """
        whole: Any = type(self.module).forward
        if bool(kept.all()):
            logits, weights, numbers = whole(self.module, hidden)
            return logits, weights, numbers
        rows = kept.to(hidden.device).nonzero()[:, 0]
        narrow: Any = copy.copy(self.module)
        narrow._parameters = {
            name: nn.Parameter(p[rows], requires_grad=False)
            for name, p in self.module.named_parameters(recurse=False)
        }
        narrow._buffers = {name: b[rows] for name, b in self.module.named_buffers(recurse=False)}
        narrow.num_experts = len(rows)
        narrow.top_k = min(narrow.top_k, len(rows))
        logits, weights, numbers = whole(narrow, hidden)
        return logits, weights, rows[numbers]


@dataclass(frozen=True)
class Mixture:
    """The mixture of experts of one block."""

    layer: nn.Module  # the whole layer, whose output is added to the hidden states
    experts: ExpertLinears
    router: Router
    has_softmax: bool  # see `SparseLayer`

    def expert(self, number: int) -> Expert:
        """Return one of them."""
        expert = self.experts[number]
        assert isinstance(expert, Expert)
        return expert

    @property
    def num_chosen(self) -> int:
        """Experts a token goes to."""
        return int(self.router.module.top_k)  # type: ignore[arg-type]

    @property
    def can_spare_one(self) -> bool:
        """Whether a token finds as many experts when one more is removed."""
        return int(self.router.kept.sum()) > self.num_chosen


def split_experts(block: nn.Module, family: SparseLayer) -> bool:
    """Replace the experts of a block by linears. Returns whether it has any."""
    owner, _, name = family.experts.rpartition(".")
    layer = block.get_submodule(owner)
    whole: Any = getattr(layer, name, None)
    if whole is None:
        return False
    like = whole.down_proj
    combine = _combine(whole, family)
    bias = hasattr(whole, "down_proj_bias")
    num_experts, width, hidden = (
        like.shape if family.stacked else (like.shape[0], like.shape[2], like.shape[1])
    )
    experts = [Expert(family, width, hidden, combine, like, bias=bias) for _ in range(num_experts)]
    setattr(layer, name, ExpertLinears(experts))
    return True


def _combine(whole: nn.Module, family: SparseLayer) -> Combine:
    """Return what a family's own experts do with the outputs of gate and up."""
    if not family.stacked:
        activation: Any = whole.act_fn
        return lambda gate, up: activation(gate) * up
    settings: Any = copy.copy(whole)
    settings._parameters = {}
    return lambda gate, up: settings._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))


def in_memory(family: Family, state: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return the weight of an expert's linear from a model in memory.

    None if the model has it as checkpoints do.

    Args:
        family: of the model.
        state: its ``state_dict``.
        name: e.g. ``model.layers.3.mlp.experts.5.gate_proj.weight``.
    """
    sparse = family.sparse
    part = sparse.tensor_of(name) if sparse is not None and not sparse.stacked else None
    if sparse is None or part is None:
        return None
    if part.linear == sparse.consumer:
        return state[f"{part.experts}.down_proj"][part.number]
    return state[f"{part.experts}.gate_up_proj"][part.number].chunk(2)[
        sparse.producers.index(part.linear)
    ]


def mixture_of(block: nn.Module, family: SparseLayer) -> Mixture | None:
    """Return the mixture of a block whose experts are linears; None if it has none.

    Once a block.
    """
    experts = dict(block.named_modules()).get(family.experts)
    if experts is None:
        return None
    assert isinstance(experts, ExpertLinears)
    return Mixture(
        block.get_submodule(family.layer),
        experts,
        Router(block.get_submodule(family.router)),
        family.has_softmax,
    )
