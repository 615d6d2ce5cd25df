"""Hooks that see what passes linears and experts, and sum what the method needs of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ray_surgeon.maths.experts import ExpertSums, add_changes, add_rises
from ray_surgeon.maths.packed import PackedSymmetric, with_ones
from ray_surgeon.memory.transfers import transfers
from ray_surgeon.models.build import LinearModule, as_linear, num_inputs
from ray_surgeon.models.experts import Mixture, Routed

if TYPE_CHECKING:
    from ray_surgeon.models.layout import LinearShape
    from ray_surgeon.models.shard import ModelShard


def inputs_of(module: LinearModule, inputs: Tensor) -> Tensor:
    """Return the inputs a [num_tokens, C] of a linear, with the bias's ones."""
    a = inputs.detach().flatten(0, -2)
    return a if module.bias is None else with_ones(a)


def see_gradient(output: Tensor, see: Callable[[Tensor], None]) -> None:
    """Call ``see(g)`` with the gradient g [N, d] at an output, if it has one."""
    if output.requires_grad:
        output.register_hook(lambda g: see(g.detach().flatten(0, -2)))  # type: ignore[no-untyped-call]


def watch_gradients(module: nn.Module, see: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``see(g)`` with the gradients g [N, d] at the outputs of a module."""
    return module.register_forward_hook(lambda _, inputs, output: see_gradient(output, see))


def watch_pairs(module: LinearModule, see: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
    """Call ``see(a, g)`` in the backward pass of a linear, float32.

    a [N, C] are its inputs, g [N, R] the gradients at its outputs.

    The inputs of micro-batches in flight are kept until then.
    """

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        see_gradient(output, lambda g: see(inputs_of(module, inputs[0]).float(), g.float()))

    return module.register_forward_hook(hook)


class SharedInput:
    """Linears that read the same input, and so share one A.

    Attributes:
        linears: by their global names.
        place: of their block in the shard.
        names: of the linears.
        roles: of the linears, see `LinearShape`.
        key_of_A: under which their A is stored.
        keys_of_G: name of each -> under which its G is stored.
        sizes: under which their A, then every G, is stored -> the number of its rows.
        num_tokens: tokens in the sums.
    """

    def __init__(self, shard: ModelShard, shapes: Sequence[LinearShape]) -> None:
        """Take the linears of a block that have these shapes."""
        first, *_ = shapes
        self.place = first.block - shard.blocks.first
        slots = shard.weights.slot_of
        self.linears = {s.name: as_linear(slots[f"{s.name}.weight"].module) for s in shapes}
        self.names = tuple(self.linears)
        self.roles = {shape.role for shape in shapes}
        self.key_of_A = f"{first.name}.A"
        self.keys_of_G = {name: f"{name}.G" for name in self.names}
        of_G = {self.keys_of_G[shape.name]: shape.num_rows for shape in shapes}
        self.sizes = {self.key_of_A: first.num_columns} | of_G
        self.num_tokens = 0

    def add_to(self, factors: Mapping[str, PackedSymmetric], wide: bool) -> list[RemovableHandle]:
        """Add inputs to A, and gradients to the G that are wanted, until the hooks are removed.

        Args:
            factors: A and some G by their keys.
            wide: see `ModelShard.gathering_in`.
        """
        first, *_ = self.linears.values()

        def add_inputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            a = inputs_of(first, inputs[0])
            factors[self.key_of_A].add(a.float() if wide else a)
            self.num_tokens += len(a)

        wanted = [(self.linears[n], factors[k]) for n, k in self.keys_of_G.items() if k in factors]
        hooks = [watch_gradients(module, total.add) for module, total in wanted]
        return [first.register_forward_pre_hook(add_inputs), *hooks]


class LayerInputs:
    """Inputs of some layers, bfloat16 in the host's memory.

    The memory is reserved at the start and returned as soon as one is taken. From an accelerator
    they come in the background.
    """

    def __init__(
        self, layers: Mapping[str, tuple[int, LinearModule]], num_tokens: int, device: torch.device
    ) -> None:
        """Start with none.

        Args:
            layers: name of a layer's last linear -> place of its block in the shard, and a linear
                that reads the layer's inputs.
            num_tokens: that will pass.
            device: from which they come.
        """
        self._layers = layers
        widths = {name: num_inputs(module) for name, (_, module) in layers.items()}
        shapes = {name: (num_tokens, width) for name, width in widths.items()}
        self._kept = {n: torch.empty(shape, dtype=torch.bfloat16) for n, shape in shapes.items()}
        self._num_kept = dict.fromkeys(layers, 0)
        self._device = device

    @property
    def kept(self) -> dict[str, Tensor]:
        """Name of a layer's last linear -> its inputs [N, d], once all are there."""
        transfers(self._device).settle()
        return self._kept

    def watch(self, place: int) -> list[RemovableHandle]:
        """Keep what the layers of a block read from now on, until the hooks are removed."""
        own = [(name, module) for name, (at, module) in self._layers.items() if at == place]
        return [m.register_forward_pre_hook(partial(self._keep, name)) for name, m in own]

    def _keep(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2)
        first = self._num_kept[name]
        transfers(self._device).land(x, self._kept[name][first : first + len(x)])
        self._num_kept[name] += len(x)


# What removals of single experts would change in the output of their layer: sums while tokens and
# gradients pass. Source: docs/method.md, section 10


_ENTRIES_MIXED = 2**25
"""Of outputs of experts that are gathered at once for a weighted sum."""


class Removals(NamedTuple):
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
        needed[rerouted[0].T, pairs.tokens] = yes
    row = needed.flatten().cumsum(0).view(num_experts, num_tokens) - 1
    wanted = needed.flatten().nonzero()[:, 0]
    counts = needed.sum(dim=1).tolist()
    x = hidden.index_select(0, wanted % num_tokens)
    outputs = mixture.experts.unseen(x, counts).float()

    def mixed(tokens: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        size = max(1, _ENTRIES_MIXED // (numbers.shape[1] * hidden.shape[1]))
        parts = zip(*(torch.split(x, size) for x in (tokens, numbers, weights)), strict=True)
        sums = [
            torch.einsum("nk,nkd->nd", w.float(), outputs[row[number, token[:, None]]])
            for token, number, w in parts
        ]
        return torch.cat(sums)

    before = mixed(every, numbers, weights)
    if rerouted is None:
        changes = torch.zeros_like(before).index_select(0, pairs.tokens)
    else:
        changes = mixed(pairs.tokens, *rerouted) - before.index_select(0, pairs.tokens)
    norms = outputs[row[pairs.places, pairs.tokens]].norm(dim=1) * pairs.of(weights).float()
    rises = _rises(mixture, hidden, is_routed)
    return Removals(pairs.places, pairs.tokens, changes, norms, before, rises)


def _rises(mixture: Mixture, hidden: Tensor, is_routed: Tensor) -> Tensor | None:
    """Return p / (1 - p) of the experts that a token is not routed to.

    By so much a softmax that is not normalised later rises without them.
    """
    if not mixture.has_softmax or getattr(mixture.router, "norm_topk_prob", True):
        return None
    logits, _, _ = mixture.route(hidden)
    p = logits.new_zeros(is_routed.shape, dtype=torch.float32)
    p.index_copy_(1, mixture.rows(p.device), logits.float().softmax(dim=1))
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

    def leave(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Any) -> None:
        effects = waiting.pop()

        def add(g: Tensor) -> None:
            add_changes(sums, effects.experts, effects.changes, g.index_select(0, effects.tokens))
            if effects.rises is not None:
                add_rises(sums, effects.rises, effects.output, g)

        see_gradient(outputs[0] if isinstance(outputs, tuple) else outputs, add)

    entering = mixture.experts.register_forward_pre_hook(enter)
    return [entering, mixture.layer.register_forward_hook(leave)]
