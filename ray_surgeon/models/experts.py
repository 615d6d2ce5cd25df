"""Mixtures of experts: experts as linears, and routers that go around removed ones.

transformers keeps all experts of a layer in two tensors, where hooks on linears see nothing. Here
every expert has linears of its own, by the names they have in checkpoints. The family's own layer
and router stay: they are called with fewer experts once some are removed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ray_surgeon.models.routed import Routed


@dataclass(frozen=True)
class Coupling:
    """Linears that lose rows when columns of the linear that reads their outputs are pruned."""

    consumer: str  # the linear whose columns decide, e.g. ``mlp.down_proj``
    # those of gate and up, or of queries, keys and values; they share their input
    producers: tuple[str, ...]
    num_parts: int = 1  # how many of these lie one after the other in each producer

    @property
    def parts(self) -> list[tuple[str, int]]:
        """Of what the consumer reads: the linear, and which part of its rows."""
        return [(name, part) for name in self.producers for part in range(self.num_parts)]


_LINEARS = Coupling("down_proj", ("gate_proj", "up_proj"))
"""Of an expert, in every family."""


@dataclass(frozen=True)
class ExpertTensor:
    """What the name of a tensor of one expert says."""

    experts: str  # all experts of the layer, e.g. ``model.layers.3.mlp.experts``
    expert: int  # its number
    linear: str  # e.g. ``gate_proj``
    kind: str  # ``weight`` or ``bias``

    @property
    def whole(self) -> str:
        """Name of the tensor of all experts that has it, where one has those of gate and up."""
        linear = self.linear if self.linear == _LINEARS.consumer else "gate_up_proj"
        return f"{self.experts}.{linear}" + ("" if self.kind == "weight" else f"_{self.kind}")

    @property
    def every(self) -> slice:
        """Its outputs among those of an expert in a stacked tensor: gate and up take turns."""
        if self.linear == _LINEARS.consumer:
            return slice(None)
        return slice(_LINEARS.producers.index(self.linear), None, 2)

    def in_memory(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return it from the ``state_dict`` of a model, where gate and up follow each other."""
        whole = state[self.whole][self.expert]
        if self.linear == _LINEARS.consumer:
            return whole
        return whole.chunk(2)[_LINEARS.producers.index(self.linear)]


@dataclass(frozen=True)
class SparseLayer:
    """Where the mixture of experts of a block lies, and how config.json calls its sizes.

    The experts are linears here, ``{experts}.{number}.{linear}``, as they are in checkpoints. A
    family without says nothing, and no block has such a layer.
    """

    # fields with the number of experts; programs read one or the other
    num_experts: tuple[str, ...] = ()
    width: str = ""  # field with the width of an expert
    layer: str = "mlp"  # the whole layer
    # which experts a token goes to; its output is logits, weights, numbers
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    linears: Coupling = _LINEARS  # of one expert
    # a feed-forward layer beside the experts, through which every token goes, e.g.
    # ``mlp.shared_expert``
    shared: str | None = None
    # field with its width; None if the width is a multiple of an expert's
    shared_width: str | None = None
    # field with the number of groups of experts of which a router chooses some first
    num_groups: str | None = None
    # whether weights are a softmax over all experts, so that they rise if one is removed, if not
    # normalised later
    has_softmax: bool = True
    zeroing: tuple[str, ...] = _LINEARS.producers  # of which a channel is zero if one is
    # whether checkpoints keep all experts of a layer together, [num_experts, inputs, outputs],
    # producers in turns
    stacked: bool = False

    def tensor_of(self, name: str) -> ExpertTensor | None:
        """Take apart the name of a tensor of an expert, e.g.

        ``model.layers.3.mlp.experts.5.gate_proj.weight``; None for all others.
        """
        layer, inside, rest = name.partition(f".{self.experts}.")
        if not inside:
            return None
        number, linear, kind = rest.split(".")
        return ExpertTensor(layer + inside[:-1], int(number), linear, kind)

    def together(self, name: str) -> tuple[str, int | None]:
        """Return what all experts' tensor would be called, and the number of this one's, if any."""
        part = self.tensor_of(name)
        return (f"{part.experts}.{part.linear}.{part.kind}", part.expert) if part else (name, None)

    def is_in(self, block: nn.Module) -> bool:
        """Whether a block has such a layer."""
        return self.experts in dict(block.named_modules())

    def split(self, block: nn.Module) -> None:
        """Replace the experts of a block, if it has any, by linears."""
        if not self.is_in(block):
            return
        whole: Any = block.get_submodule(self.experts)
        like = whole.down_proj
        combine = _combine(whole, self)
        bias = hasattr(whole, "down_proj_bias")
        num_experts, width, hidden = like.shape if self.stacked else like.mT.shape
        experts = [Expert(width, hidden, combine, like, bias) for _ in range(num_experts)]
        block.set_submodule(self.experts, ExpertLinears(experts))


class _Linear(nn.Linear):
    """A linear without starting values, which waits for its weights.

    A large model has ten thousands of these, and starting values would take most of the time.
    """

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


Combine = Callable[[Tensor, Tensor], Tensor]
"""(gate, up) -> channels, all [num_tokens, width]."""


class Expert(nn.Module):
    """One expert: ``down_proj(combine(gate_proj(x), up_proj(x)))``."""

    def __init__(self, width: int, hidden: int, combine: Combine, like: Tensor, bias: bool) -> None:
        super().__init__()
        self.combine = combine
        make = functools.partial(_Linear, bias=bias, device=like.device, dtype=like.dtype)
        self.gate_proj = make(hidden, width)
        self.up_proj = make(hidden, width)
        self.down_proj = make(width, hidden)


class ExpertLinears(nn.ModuleList):
    """All experts of a layer, in place of the family's own module.

    The tokens of an expert are a segment of one buffer, and only products go expert by expert.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the experts that every token goes to.

        Args:
            hidden_states: [num_tokens, d].
            top_k_index: [num_tokens, k] numbers of experts.
            top_k_weights: [num_tokens, k].

        Returns:
            [num_tokens, d].
        """
        pairs = Routed(top_k_index, len(self))
        x = hidden_states.index_select(0, pairs.tokens)
        outputs = self._outputs(x, pairs.counts, lambda linear, part: linear(part))
        weighted = outputs * pairs.of(top_k_weights)[:, None]
        total = torch.zeros_like(hidden_states)
        return total.index_add_(0, pairs.tokens, weighted.to(total.dtype))

    def unseen(self, x: Tensor, counts: list[int]) -> Tensor:
        """Return the outputs [n, d] of experts for inputs [n, d], so many of each expert.

        The linears are not called, so that hooks on them notice nothing.
        """
        return self._outputs(x, counts, _unseen)

    def _outputs(self, x: Tensor, counts: list[int], run: Callable[..., Tensor]) -> Tensor:
        def by_segment(name: str, x: Tensor) -> Tensor:
            # parts of its own for each reader, so that their gradients are added in one sum
            parts = zip(self, torch.split(x, counts), strict=True)
            return torch.cat([run(getattr(each, name), part) for each, part in parts if len(part)])

        gate, up = (by_segment(name, x) for name in _LINEARS.producers)
        first: Any = self[0]
        return by_segment(_LINEARS.consumer, first.combine(gate, up))


def _unseen(linear: nn.Linear, x: Tensor) -> Tensor:
    if len(x) == 1:  # see `times`
        return nn.Linear.forward(linear, torch.cat([x, x]))[:1]
    return nn.Linear.forward(linear, x)


class Mixture:
    """The mixture of experts of a block whose experts are linears; once a block.

    Its router goes around removed experts: what the family's own code says of the others.

    Attributes:
        layer: the whole layer, whose output is added to the hidden states.
        experts: all of them.
        router: that chooses among them.
        num_chosen: experts a token goes to.
        has_softmax: see `SparseLayer`.
    """

    def __init__(self, block: nn.Module, sparse: SparseLayer) -> None:
        self.layer = block.get_submodule(sparse.layer)
        self.experts: Any = block.get_submodule(sparse.experts)
        self.router: Any = block.get_submodule(sparse.router)
        self.router.forward = self.route
        self.kept = torch.ones(int(self.router.num_experts), dtype=torch.bool)  # type: ignore[arg-type]
        self.num_chosen = int(self.router.top_k)  # type: ignore[arg-type]
        self.has_softmax = sparse.has_softmax

    @property
    def kept(self) -> Tensor:
        """Which experts the router chooses among, [num_experts] bool."""
        return self._kept

    @kept.setter
    def kept(self, kept: Tensor) -> None:
        self._kept = kept.cpu()
        self._numbers: list[int] = self._kept.nonzero()[:, 0].tolist()
        self._rows: Tensor | None = None

    @property
    def can_spare_one(self) -> bool:
        """Whether a token finds as many experts when one more is removed."""
        return len(self._numbers) > self.num_chosen

    def rows(self, device: torch.device) -> Tensor:
        """Return the numbers of the kept experts, ascending, on a device."""
        if self._rows is None or self._rows.device != device:
            self._rows = torch.tensor(self._numbers, device=device)
        return self._rows

    def route(self, hidden: Tensor, without: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [num_tokens, kept], weights and experts [num_tokens, k].

        The router computes as if there were no others than the kept ones, of which one more may be
        left out.
        """
        rows = self.rows(hidden.device)
        if without is not None:
            place = self._numbers.index(without)
            rows = torch.cat([rows[:place], rows[place + 1 :]])
        router = self.router
        if len(rows) < len(self._kept):
            router = copy.copy(router)
            router._parameters = {n: p.index_select(0, rows) for n, p in router._parameters.items()}
            router._buffers = {n: b.index_select(0, rows) for n, b in router._buffers.items()}
            router.num_experts = len(rows)
            router.top_k = min(router.top_k, len(rows))
        logits, weights, numbers = type(router).forward(router, hidden)
        return logits, weights, rows[numbers]

    def rerouted(self, hidden: Tensor, pairs: Routed) -> tuple[Tensor, Tensor] | None:
        """Return where the token of each pair goes without the pair's expert.

        Args:
            hidden: [num_tokens, d] inputs.
            pairs: of tokens and experts.

        Returns:
            Experts [n, k] and their weights [n, k]; None if there is no expert to spare.
        """
        if not self.can_spare_one:
            return None
        parts = torch.split(hidden.index_select(0, pairs.tokens), pairs.counts)
        routes = [self.route(part, number) for number, part in enumerate(parts) if len(part)]
        _, weights, numbers = map(torch.cat, zip(*routes, strict=True))
        return numbers, weights


def _combine(whole: nn.Module, sparse: SparseLayer) -> Combine:
    """Return what a family's own experts do with the outputs of gate and up."""
    if not sparse.stacked:
        activation: Any = whole.act_fn
        return lambda gate, up: activation(gate) * up
    settings: Any = copy.copy(whole)
    settings._parameters = {}
    return lambda gate, up: settings._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))
