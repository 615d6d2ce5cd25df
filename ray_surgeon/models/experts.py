"""Mixtures of experts: the experts as linears, and routers that go around experts which are removed.

transformers keeps all experts of a layer in two tensors, where hooks on linears see nothing. Here every expert has linears of its own, by
the names they have in checkpoints. The family's own layer and router stay: they are called with fewer experts once some are removed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ray_surgeon.models.families import SparseLayer


class _Linear(nn.Linear):
    """Waits for its weights: there are ten thousands of these in a large model, and starting values would take most of the time."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


class Expert(nn.Module):
    """One expert: ``consumer(activation(gate(x)) * up(x))``."""

    def __init__(self, family: SparseLayer, width: int, hidden: int, activation: nn.Module, like: Tensor) -> None:
        super().__init__()
        self._activation, self._names = activation, (*family.producers, family.consumer)
        for name in family.producers:
            self.add_module(name, _Linear(hidden, width, bias=False, device=like.device, dtype=like.dtype))
        self.add_module(family.consumer, _Linear(width, hidden, bias=False, device=like.device, dtype=like.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[num_tokens, d] -> [num_tokens, d]."""
        gate, up, down = (self.get_submodule(name) for name in self._names)
        output: Tensor = down(self._activation(gate(x)) * up(x))
        return output

    def unseen(self, x: Tensor) -> Tensor:
        """Return the same without calling the linears, so that hooks on them notice nothing."""
        gate, up, down = (self.get_parameter(f"{name}.weight") for name in self._names)
        return linear(self._activation(linear(x, gate)) * linear(x, up), down)


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
    """Yield each expert that has tokens, with their numbers, ascending, and the expert's place among those of each token."""
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
        self.module, self.num_experts = module, int(module.num_experts)  # type: ignore[arg-type]
        self.kept = torch.ones(self.num_experts, dtype=torch.bool)
        module.forward = self

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [num_tokens, kept], weights [num_tokens, k] and numbers of experts [num_tokens, k]."""
        return self.among(hidden, self.kept)

    def among(self, hidden: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route among some experts only, [num_experts] bool: as the layer does in which there are no others."""
        whole: Any = type(self.module).forward
        if bool(kept.all()):
            logits, weights, numbers = whole(self.module, hidden)
            return logits, weights, numbers
        rows = kept.to(hidden.device).nonzero()[:, 0]
        narrow: Any = copy.copy(self.module)
        narrow._parameters = {name: nn.Parameter(p[rows], requires_grad=False) for name, p in self.module.named_parameters(recurse=False)}
        narrow._buffers = {name: b[rows] for name, b in self.module.named_buffers(recurse=False)}
        narrow.num_experts, narrow.top_k = len(rows), min(narrow.top_k, len(rows))
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
        found = self.experts[number]
        assert isinstance(found, Expert)
        return found

    @property
    def num_chosen(self) -> int:
        """Experts a token goes to."""
        return int(self.router.module.top_k)  # type: ignore[arg-type]


def split_experts(block: nn.Module, family: SparseLayer) -> bool:
    """Replace the experts of a block by linears. Returns whether it has any."""
    owner, _, name = family.experts.rpartition(".")
    layer = block.get_submodule(owner)
    whole: Any = getattr(layer, name, None)
    if whole is None:
        return False
    like, width = whole.down_proj, int(whole.intermediate_dim)
    experts = [Expert(family, width, int(whole.hidden_dim), whole.act_fn, like) for _ in range(int(whole.num_experts))]
    setattr(layer, name, ExpertLinears(experts))
    return True


def in_memory(family: SparseLayer, state: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return the weight of an expert's linear from a model in memory, whose experts lie in two tensors a layer; None if it is no such.

    Args:
        family: of the model.
        state: its ``state_dict``.
        name: e.g. ``model.layers.3.mlp.experts.5.gate_proj.weight``.
    """
    layer, inside, rest = name.partition(f".{family.experts}.")
    if not inside:
        return None
    number, linear, _ = rest.split(".")
    whole = f"{layer}{inside}" + ("down_proj" if linear == family.consumer else "gate_up_proj")
    weight = state[whole][int(number)]
    return weight if linear == family.consumer else weight.chunk(2)[family.producers.index(linear)]


def mixture_of(block: nn.Module, family: SparseLayer) -> Mixture | None:
    """Return the mixture of a block whose experts are linears; None if it has none. Once a block."""
    experts = dict(block.named_modules()).get(family.experts)
    if experts is None:
        return None
    assert isinstance(experts, ExpertLinears)
    return Mixture(block.get_submodule(family.layer), experts, Router(block.get_submodule(family.router)), family.has_softmax)


@dataclass(frozen=True)
class Removals:
    """What the removal of each expert would change in the output of a layer, for n = k times the tokens pairs of a token and an expert."""

    experts: Tensor  # [n] which is removed
    tokens: Tensor  # [n] that is routed to it
    changes: Tensor  # [n, d] float32
    norms: Tensor  # [n] float32 the expert's weight times the norm of its output
    output: Tensor  # [num_tokens, d] float32 of all experts together, as it is
    rises: Tensor | None  # [num_tokens, num_experts] by how much the output rises, relative, for tokens that are not routed to the expert


@torch.no_grad()
def removals(mixture: Mixture, hidden: Tensor, numbers: Tensor, weights: Tensor) -> Removals:
    """Return what the removal of each expert would change: the tokens that are routed to it go to the next experts.

    The router is asked anew without the expert, so weights are those it gives to the others.

    Args:
        mixture: of a block.
        hidden: [num_tokens, d] inputs.
        numbers: [num_tokens, k] of the experts they go to.
        weights: [num_tokens, k].
    """
    num_experts, num_tokens = len(mixture.experts), len(hidden)
    whole, every = list(routed(numbers, num_experts)), torch.arange(num_tokens, device=hidden.device)
    needed = torch.zeros(num_experts, num_tokens, dtype=torch.bool, device=hidden.device)
    needed[numbers.T, every] = True
    is_routed, others = needed.T.clone(), []
    for number, token, _ in whole:
        kept = mixture.router.kept.clone()
        kept[number] = False
        _, new_weights, new_numbers = mixture.router.among(hidden[token], kept)
        needed[new_numbers.T, token] = True
        others.append((new_numbers, new_weights))
    row = needed.flatten().cumsum(0).view(num_experts, num_tokens) - 1
    wanted = [(number, tokens) for number, tokens in enumerate(needed) if tokens.any()]
    of_experts = torch.cat([mixture.expert(number).unseen(hidden[tokens]).float() for number, tokens in wanted])

    def mixed(token: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("nk,nkd->nd", weights.float(), of_experts[row[numbers, token[:, None]]])

    before = mixed(every, numbers, weights)
    changes, norms = [], []
    for (number, token, place), (new_numbers, new_weights) in zip(whole, others, strict=True):
        changes.append(mixed(token, new_numbers, new_weights) - before[token])
        norms.append(of_experts[row[number, token]].norm(dim=1) * weights[token, place].float())
    experts = torch.cat([torch.full_like(token, number) for number, token, _ in whole])
    tokens = torch.cat([token for _, token, _ in whole])
    return Removals(experts, tokens, torch.cat(changes), torch.cat(norms), before, _rises(mixture, hidden, is_routed))


def _rises(mixture: Mixture, hidden: Tensor, is_routed: Tensor) -> Tensor | None:
    """Return p / (1 - p) of the experts a token is not routed to: by so much a softmax that is not normalised later rises without them."""
    if not mixture.has_softmax or getattr(mixture.router.module, "norm_topk_prob", True):
        return None
    logits, _, _ = mixture.router(hidden)
    kept, p = mixture.router.kept.to(hidden.device), logits.new_zeros(is_routed.shape, dtype=torch.float32)
    p[:, kept] = logits.float().softmax(dim=1)
    return (p / (1 - p)).masked_fill(is_routed, 0.0)
