"""Whole layers: decoder blocks, and the two parts of a block, each with what it adds to the stream.

The residual stream goes around a layer, so it can be turned off, and removed.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.runner import BlockRunner
from ray_surgeon.models.shard import ModelShard

LAYER_KINDS = ("blocks", "attention_layers", "ffn_layers")
"""Kinds of layers that may be removed: whole blocks, their attentions, and their feed-forward
layers, mixtures included.
"""


_TOGETHER = 8
"""Sequences without one layer each that pass a block in one call."""
LayerKey = tuple[str, int]
"""Kind and block of a layer."""


@dataclass(frozen=True)
class Layer:
    """One layer."""

    kind: str  # one of `LAYER_KINDS`
    block: int  # number of the block that it is, or is in
    linears: tuple[str, ...]  # global names
    # that of them which adds to the stream and stays as a bias if the layer alone goes; "" of a
    # block, and of a mixture
    consumer: str

    @property
    def key(self) -> LayerKey:
        """Which one it is."""
        return self.kind, self.block

    def __str__(self) -> str:
        """Return e.g. ``block 7`` or ``attention of block 7``."""
        part = {"attention_layers": "attention of ", "ffn_layers": "feed-forward layer of "}
        return f"{part.get(self.kind, '')}block {self.block}"


def layers_of(layout: ModelLayout, kinds: Sequence[str]) -> tuple[Layer, ...]:
    """Return the layers of some kinds, block after block, in the order of `LAYER_KINDS`."""
    family = layout.family
    in_attention = {family.attention.consumer, *family.attention.producers, *family.in_attention}
    names_of = defaultdict[int, list[str]](list)
    for shape in layout.linears:
        names_of[shape.block].append(shape.name)
    layers = []
    for block, names in names_of.items():
        prefix = family.block_prefix(block)
        attention = [name for name in names if name.removeprefix(prefix) in in_attention]
        others = [name for name in names if name.removeprefix(prefix) not in in_attention]
        ffn = prefix + family.ffn.consumer
        parts = {"blocks": (names, ""), "ffn_layers": (others, ffn if ffn in others else "")}
        parts["attention_layers"] = (attention, prefix + family.attention.consumer)
        for kind in LAYER_KINDS:
            if kind in kinds:
                linears, consumer = parts[kind]
                layers.append(Layer(kind, block, tuple(linears), consumer))
    return tuple(layers)


def module_of(shard: ModelShard, layer: Layer) -> nn.Module:
    """Return the module of a shard whose output a part of a block adds to the stream."""
    if layer.consumer:
        return shard.linears[layer.consumer]
    return shard.mixtures[layer.block - shard.blocks.first].layer


@contextlib.contextmanager
def turned_off(shard: ModelShard, layer: Layer) -> Iterator[None]:
    """Let a part of a block of a shard add nothing to the stream."""
    hook = module_of(shard, layer).register_forward_hook(_nothing)
    try:
        yield
    finally:
        hook.remove()


def _nothing(module: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


@torch.no_grad()
def without_each(
    shard: ModelShard, runner: BlockRunner, inputs: Tensor, layers: Sequence[Layer]
) -> Tensor:
    """Run a sequence with all layers and, from each layer of a shard on, without that one.

    Args:
        shard: with its weights.
        runner: of it.
        inputs: tokens [1, T], or hidden states [n, T, d] of the sequence, of which the first have
            passed all layers before the shard, and each other all but one.
        layers: that are turned off, in order; those of other shards are left out.

    Returns:
        [n + m, T, d], with one entry more for each layer of the shard.
    """
    entered = {n: runner.enter(inputs[:1].expand(n, *inputs.shape[1:])) for n in (1, _TOGETHER)}
    states = [entered[1][0], *torch.split(inputs[1:], 1)] if len(inputs) > 1 else [entered[1][0]]
    for place, own in enumerate(_by_place(shard, layers)):
        with shard.weights.block(place, place + 1):
            intact = states[0]
            for start in range(0, len(states), _TOGETHER):
                part = states[start : start + _TOGETHER]
                size = len(part) if len(part) in entered else 1
                for first in range(start, start + len(part), size):
                    together = torch.cat(states[first : first + size])
                    after = runner.through(place, together, entered[size][1])
                    states[first : first + size] = torch.split(after, 1)
            for layer in own:
                if layer.kind == "blocks":
                    states.append(intact)
                    continue
                with turned_off(shard, layer):
                    states.append(runner.through(place, intact, entered[1][1]))
    return torch.cat([runner.leave(state) for state in states])


def _by_place(shard: ModelShard, layers: Sequence[Layer]) -> list[list[Layer]]:
    """Return the layers in every block of a shard."""
    blocks = range(shard.blocks.first, shard.blocks.last)
    return [[layer for layer in layers if layer.block == block] for block in blocks]


@torch.no_grad()
def influences(
    shard: ModelShard, runner: BlockRunner, inputs: Tensor
) -> tuple[Tensor, dict[int, float]]:
    """Run a sequence, and see by which angle every block turns its hidden states.

    Source: ShortGPT's block influence (Men et al. 2024, arXiv 2403.03853).

    Args:
        shard: with its weights.
        runner: of it.
        inputs: tokens [1, T] or hidden states [1, T, d].

    Returns:
        Hidden states, and block -> sum over tokens of 1 - cos(states before, states after).
    """
    hidden, calls = runner.enter(inputs)
    of_blocks = {}
    for place in range(len(shard.block_modules)):
        with shard.weights.block(place, place + 1):
            after = runner.through(place, hidden, calls)
        cosines = torch.cosine_similarity(hidden.float(), after.float(), dim=-1)
        of_blocks[shard.blocks.first + place] = float((1 - cosines).sum())
        hidden = after
    return runner.leave(hidden), of_blocks


@torch.no_grad()
def added_by(shard: ModelShard, runner: BlockRunner, inputs: Tensor, layer: Layer) -> Tensor:
    """Return what a layer of a shard adds to the stream, [1, T, d].

    Args:
        shard: with its weights.
        runner: of it.
        inputs: tokens [1, T] or hidden states [1, T, d] before the shard.
        layer: one whose output is added as it is, without a norm of its own.
    """
    hidden, calls = runner.enter(inputs)
    added = list[Tensor]()

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        added.append(output[0] if isinstance(output, tuple) else output)

    place = layer.block - shard.blocks.first
    for earlier in range(place):
        with shard.weights.block(earlier, earlier + 1):
            hidden = runner.through(earlier, hidden, calls)
    hook = None if layer.kind == "blocks" else module_of(shard, layer).register_forward_hook(note)
    with shard.weights.block(place, place + 1):
        after = runner.through(place, hidden, calls)
    if hook is None:
        return after - hidden
    hook.remove()
    return added[0].reshape(hidden.shape)


def linear_before(layout: ModelLayout, layer: Layer, gone: Collection[str]) -> str | None:
    """Return the linear that is the last to add to the stream before a layer.

    None if there is none, or if a norm or a router comes between it and the stream.

    Args:
        layout: of the model.
        layer: one of its layers.
        gone: names of linears that are removed whole.
    """
    if layout.family.norms_outputs:
        return None
    parts = layers_of(layout, LAYER_KINDS[1:])
    first = next(i for i, part in enumerate(parts) if set(part.linears) <= set(layer.linears))
    there = (part for part in reversed(parts[:first]) if not set(part.linears) <= set(gone))
    return next((part.consumer or None for part in there), None)
