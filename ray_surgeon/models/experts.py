"""Mixtures of experts: experts as linears, and routers that skip removed ones.

transformers keeps all experts of a layer in two tensors, so hooks on linears would not see them.
Here every expert has its own linears, under the names they have in checkpoints. The family's own
layer and router stay in charge: once experts are removed, they are called with those that are left.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Coupling:
    """Linears that lose rows when columns of the linear that reads their outputs are pruned."""

    consumer: str  # the linear whose columns decide, e.g. ``mlp.down_proj``
    # those of gate and up, or of queries, keys and values; they share their input
    producers: tuple[str, ...]
    num_parts: int = 1  # how many of these each producer holds, one after the other

    @property
    def parts(self) -> list[tuple[str, int]]:
        """The consumer's inputs, in order: a producer, and which part of its rows."""
        return list(itertools.product(self.producers, range(self.num_parts)))


_LINEARS = Coupling(consumer="down_proj", producers=("gate_proj", "up_proj"))
"""The linears of an expert, in every family."""


@dataclass(frozen=True)
class ExpertTensor:
    """The parsed name of a tensor of one expert."""

    experts: str  # all experts of the layer, e.g. ``model.layers.3.mlp.experts``
    expert: int  # its number
    linear: str  # e.g. ``gate_proj``
    kind: str  # ``weight`` or ``bias``

    @property
    def whole(self) -> str:
        """Name of the tensor that holds this one for all experts; gate and up are in one."""
        linear = "gate_up_proj"
        if self.linear == _LINEARS.consumer:
            linear = self.linear
        name = f"{self.experts}.{linear}"
        if self.kind == "weight":
            return name
        return f"{name}_{self.kind}"

    @property
    def every(self) -> slice:
        """Its outputs among those of an expert in a stacked tensor: gate and up alternate."""
        if self.linear == _LINEARS.consumer:
            return slice(None)
        return slice(_LINEARS.producers.index(self.linear), None, 2)

    def in_memory(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor from the ``state_dict`` of a model, where gate and up are halves."""
        whole = state[self.whole][self.expert]
        if self.linear == _LINEARS.consumer:
            return whole
        return whole.chunk(2)[_LINEARS.producers.index(self.linear)]


@dataclass(frozen=True)
class SparseLayer:
    """Where the mixture of experts of a block is, and how config.json names its sizes.

    The experts are linears here, ``{experts}.{number}.{linear}``, as they are in checkpoints. A
    family without mixtures has the defaults, which match no layer of any block.
    """

    # fields with the number of experts; programs read one or the other
    num_experts: tuple[str, ...] = ()
    width: str = ""  # field with the width of an expert
    layer: str = "mlp"  # the whole layer
    # module that chooses the experts of a token; its output is logits, weights, numbers
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    linears: Coupling = _LINEARS  # of one expert
    # a feed-forward layer beside the experts that every token passes, e.g.
    # ``mlp.shared_expert``
    shared: str | None = None
    # field with its width; None if the width is a multiple of an expert's
    shared_width: str | None = None
    # field with the number of groups of experts, if the router chooses some of the groups first
    num_groups: str | None = None
    # whether weights are a softmax over all experts, so that they rise if one is removed, unless
    # they are normalised later
    has_softmax: bool = True
    # producers that make a channel zero where their own output is zero
    zeroing: tuple[str, ...] = _LINEARS.producers
    # whether checkpoints keep all experts of a layer together, [num_experts, inputs, outputs], the
    # producers' outputs alternating
    stacked: bool = False

    def tensor_of(self, name: str) -> ExpertTensor | None:
        """Parse the name of a tensor of an expert; return None for all other names.

        An example is ``model.layers.3.mlp.experts.5.gate_proj.weight``.
        """
        layer, inside, rest = name.partition(f".{self.experts}.")
        if not inside:
            return None
        number, linear, kind = rest.split(".")
        return ExpertTensor(
            experts=layer + inside[:-1],
            expert=int(number),
            linear=linear,
            kind=kind,
        )

    def together(self, name: str) -> tuple[str, int | None]:
        """Return a name for a tensor of all experts together, and this expert's number.

        Other tensors keep their name, and have None as a number.
        """
        part = self.tensor_of(name)
        if part is None:
            return name, None
        return f"{part.experts}.{part.linear}.{part.kind}", part.expert

    def is_in(self, block: nn.Module) -> bool:
        """Whether a block has such a layer."""
        return self.experts in dict(block.named_modules())

    def split(self, block: nn.Module) -> None:
        """Replace the experts of a block, if it has any, by linears."""
        if not self.is_in(block):
            return
        whole: Any = block.get_submodule(self.experts)
        like = whole.down_proj
        num_experts, width, hidden = like.shape if self.stacked else like.mT.shape
        combine = _combine(whole, self)
        experts = list[Expert]()
        for _ in range(num_experts):
            expert = Expert(
                width=width,
                hidden=hidden,
                combine=combine,
                like=like,
                bias=hasattr(whole, "down_proj_bias"),
            )
            experts.append(expert)
        block.set_submodule(self.experts, ExpertLinears(experts))


class Routed:
    """Pairs of a token and one of its k places, sorted by place.

    Places are whatever a router sends tokens to, e.g. experts. Within one place tokens ascend.

    Attributes:
        places: [n] ascending.
        tokens: [n].
        order: [n] position of each pair in a flattened [num_tokens, k].
        counts: number of pairs of every place; the only values that the host reads.
    """

    def __init__(self, chosen: Tensor, num_places: int) -> None:
        """Sort the places [num_tokens, k] of all tokens."""
        self.places, self.order = chosen.flatten().sort(stable=True)
        self.tokens = self.order // chosen.shape[1]
        every = torch.arange(num_places, device=chosen.device)
        ends = torch.searchsorted(self.places, every, right=True).tolist()
        self.counts = [end - start for start, end in itertools.pairwise([0, *ends])]

    def of(self, values: Tensor) -> Tensor:
        """Return the values [n] of the pairs from values [num_tokens, k]."""
        return values.flatten().index_select(0, self.order)


class _Linear(nn.Linear):
    """A linear whose weights are not initialised, because they are loaded later.

    A large model has ten thousands of these, and initial values would take most of the time.
    """

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


Combine = Callable[[Tensor, Tensor], Tensor]
"""(gate, up) -> channels, all [num_tokens, width]."""


class Expert(nn.Module):
    """One expert: ``down_proj(combine(gate_proj(x), up_proj(x)))``."""

    def __init__(
        self,
        width: int,
        hidden: int,
        combine: Combine,
        like: Tensor,
        bias: bool,
    ) -> None:
        super().__init__()
        self.combine = combine

        def linear(num_inputs: int, num_outputs: int) -> _Linear:
            return _Linear(
                num_inputs,
                num_outputs,
                bias=bias,
                device=like.device,
                dtype=like.dtype,
            )

        self.gate_proj = linear(hidden, width)
        self.up_proj = linear(hidden, width)
        self.down_proj = linear(width, hidden)


class ExpertLinears(nn.ModuleList):
    """All experts of a layer; replaces the family's own module.

    The tokens of an expert are a segment of one buffer; only the matrix products run expert by
    expert.
    """

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """Return the weighted sum of the outputs of each token's experts.

        Args:
            hidden_states: [num_tokens, d].
            top_k_index: [num_tokens, k] numbers of experts.
            top_k_weights: [num_tokens, k].

        Returns:
            [num_tokens, d].
        """
        pairs = Routed(top_k_index, len(self))
        x = hidden_states.index_select(0, pairs.tokens)
        outputs = self._outputs(x, pairs.counts, _call)
        weighted = outputs * pairs.of(top_k_weights)[:, None]
        total = torch.zeros_like(hidden_states)
        return total.index_add_(0, pairs.tokens, weighted.to(total.dtype))

    def unseen(self, x: Tensor, counts: list[int]) -> Tensor:
        """Return the outputs of experts without running the hooks of their linears.

        Args:
            x: [n, d] inputs, sorted by expert.
            counts: number of inputs of each expert.

        Returns:
            [n, d].
        """
        return self._outputs(x, counts, _call_without_hooks)

    def _outputs(self, x: Tensor, counts: list[int], call: _CallLinear) -> Tensor:
        first: Any = self[0]
        gate = self._product("gate_proj", x, counts, call)
        up = self._product("up_proj", x, counts, call)
        return self._product("down_proj", first.combine(gate, up), counts, call)

    def _product(
        self,
        name: str,
        x: Tensor,
        counts: list[int],
        call: _CallLinear,
    ) -> Tensor:
        """Return the outputs of one linear of every expert.

        Each call splits x anew, so that the gradients of its parts are added in one sum.
        """
        outputs = list[Tensor]()
        for expert, part in zip(self, torch.split(x, counts), strict=True):
            if len(part):
                outputs.append(call(getattr(expert, name), part))
        return torch.cat(outputs)


_CallLinear = Callable[[nn.Linear, Tensor], Tensor]


def _call(linear: nn.Linear, x: Tensor) -> Tensor:
    y: Tensor = linear(x)
    return y


def _call_without_hooks(linear: nn.Linear, x: Tensor) -> Tensor:
    if len(x) == 1:  # see `times`
        return nn.Linear.forward(linear, torch.cat([x, x]))[:1]
    return nn.Linear.forward(linear, x)


class Mixture:
    """The mixture of experts of a block whose experts are linears; made once for each block.

    It replaces the router's `forward` by one that skips removed experts, and calls the family's own
    code for the others.

    Attributes:
        layer: the whole layer, whose output is added to the hidden states.
        experts: all of them.
        router: module that chooses among them.
        num_chosen: number of experts of a token.
        has_softmax: see `SparseLayer`.
    """

    def __init__(self, block: nn.Module, sparse: SparseLayer) -> None:
        self.layer = block.get_submodule(sparse.layer)
        self.experts: Any = block.get_submodule(sparse.experts)
        self.router: Any = block.get_submodule(sparse.router)
        self.router.forward = self.route
        num_experts = int(self.router.num_experts)  # type: ignore[arg-type]
        self.kept = torch.ones(num_experts, dtype=torch.bool)
        self.num_chosen = int(self.router.top_k)  # type: ignore[arg-type]
        self.has_softmax = sparse.has_softmax

    @property
    def kept(self) -> Tensor:
        """The experts that the router chooses among, [num_experts] bool."""
        return self._kept

    @kept.setter
    def kept(self, kept: Tensor) -> None:
        self._kept = kept.cpu()
        self._numbers: list[int] = self._kept.nonzero()[:, 0].tolist()
        self._rows: Tensor | None = None

    @property
    def can_spare_one(self) -> bool:
        """Whether a token still finds its number of experts when one more is removed."""
        return len(self._numbers) > self.num_chosen

    def rows(self, device: torch.device) -> Tensor:
        """Return the numbers of the kept experts, ascending, on a device."""
        if self._rows is None or self._rows.device != device:
            self._rows = torch.tensor(self._numbers, device=device)
        return self._rows

    def route(
        self,
        hidden: Tensor,
        without: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens as if only the kept experts existed.

        Args:
            hidden: [num_tokens, d] inputs.
            without: number of a kept expert that is left out, too.

        Returns:
            Logits [num_tokens, kept], weights [num_tokens, k] and experts [num_tokens, k].
        """
        rows = self.rows(hidden.device)
        if without is not None:
            place = self._numbers.index(without)
            rows = torch.cat([rows[:place], rows[place + 1 :]])
        router = self.router
        if len(rows) < len(self._kept):
            router = _smaller_router(router, rows)
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
        all_numbers = list[Tensor]()
        all_weights = list[Tensor]()
        for expert, part in enumerate(parts):
            if len(part):
                _, weights, numbers = self.route(part, without=expert)
                all_numbers.append(numbers)
                all_weights.append(weights)
        return torch.cat(all_numbers), torch.cat(all_weights)


def _smaller_router(router: Any, rows: Tensor) -> Any:
    """Return a copy of a router with the given rows of its parameters and buffers only."""
    smaller = copy.copy(router)
    smaller._parameters = _select_rows(router._parameters, rows)
    smaller._buffers = _select_rows(router._buffers, rows)
    smaller.num_experts = len(rows)
    smaller.top_k = min(router.top_k, len(rows))
    return smaller


def _select_rows(tensors: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: tensor.index_select(0, rows) for name, tensor in tensors.items()}


def _combine(whole: nn.Module, sparse: SparseLayer) -> Combine:
    """Return the function that a family's own experts apply to the outputs of gate and up."""
    if not sparse.stacked:
        activation: Any = whole.act_fn

        def combine(gate: Tensor, up: Tensor) -> Tensor:
            channels: Tensor = activation(gate) * up
            return channels

        return combine

    settings: Any = copy.copy(whole)
    settings._parameters = {}

    def combine_alternating(gate: Tensor, up: Tensor) -> Tensor:
        alternating = torch.stack([gate, up], dim=-1).flatten(-2)
        channels: Tensor = settings._apply_gate(alternating)
        return channels

    return combine_alternating
