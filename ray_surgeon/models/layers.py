"""Whole layers: decoder blocks, and the attention and feed-forward layer of each block.

Every layer adds its output to the residual stream, so it can be turned off, or removed.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ray_surgeon.models.families import Family
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.runner import BlockRunner, Call
from ray_surgeon.models.shard import ModelShard

LAYER_KINDS = ("blocks", "attention_layers", "ffn_layers")
"""Kinds of layers that may be removed: whole blocks, attention layers and feed-forward layers.

Mixtures of experts are feed-forward layers.
"""


_BATCH_SIZE = 8
"""Number of states that pass a block in one call, see `without_each`."""
LayerKey = tuple[str, int]
"""Kind and block of a layer."""


@dataclass(frozen=True)
class Layer:
    """A layer that may be removed."""

    kind: str  # one of `LAYER_KINDS`
    block: int  # number of the block (or of the block that contains the layer)
    linears: tuple[str, ...]  # global names
    # the linear whose output is added to the stream, and which stays as a bias if only this layer
    # is removed; "" for blocks and mixtures
    consumer: str

    @property
    def key(self) -> LayerKey:
        """Kind and block, which identify the layer."""
        return self.kind, self.block

    def __str__(self) -> str:
        """Return e.g. ``block 7`` or ``attention of block 7``."""
        part = {
            "attention_layers": "attention of ",
            "ffn_layers": "feed-forward layer of ",
        }
        return f"{part.get(self.kind, '')}block {self.block}"


def layers_of(layout: ModelLayout, kinds: Sequence[str]) -> tuple[Layer, ...]:
    """Return the layers of the given kinds: block by block, in the order of `LAYER_KINDS`."""
    names_by_block = defaultdict[int, list[str]](list)
    for shape in layout.linears:
        names_by_block[shape.block].append(shape.name)
    layers = []
    for block, names in names_by_block.items():
        for layer in _layers_of_block(layout.family, block, names):
            if layer.kind in kinds:
                layers.append(layer)
    return tuple(layers)


def _layers_of_block(
    family: Family,
    block: int,
    names: Sequence[str],
) -> tuple[Layer, ...]:
    """Return the layers of one block, in the order of `LAYER_KINDS`; `names` are its linears."""
    prefix = family.block_prefix(block)
    in_attention = {
        family.attention.consumer,
        *family.attention.producers,
        *family.in_attention,
    }
    attention = list[str]()
    ffn = list[str]()
    for name in names:
        if name.removeprefix(prefix) in in_attention:
            attention.append(name)
        else:
            ffn.append(name)
    attention_consumer = prefix + family.attention.consumer
    ffn_consumer = prefix + family.ffn.consumer
    if ffn_consumer not in ffn:
        ffn_consumer = ""
    layers = [Layer("blocks", block, tuple(names), consumer="")]
    if attention:
        layer = Layer(
            "attention_layers", block, tuple(attention), consumer=attention_consumer
        )
        layers.append(layer)
    layers.append(Layer("ffn_layers", block, tuple(ffn), consumer=ffn_consumer))
    return tuple(layers)


def module_of(shard: ModelShard, layer: Layer) -> nn.Module:
    """Return the module whose output an attention or feed-forward layer adds to the stream."""
    if layer.consumer:
        return shard.linears[layer.consumer]
    return shard.mixtures[layer.block - shard.blocks.first].layer


@contextlib.contextmanager
def turned_off(shard: ModelShard, layer: Layer) -> Iterator[None]:
    """Context in which an attention or feed-forward layer adds nothing to the stream."""
    hook = module_of(shard, layer).register_forward_hook(_replace_by_zeros)
    try:
        yield
    finally:
        hook.remove()


def _replace_by_zeros(module: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


@torch.no_grad()
def without_each(
    shard: ModelShard, runner: BlockRunner, inputs: Tensor, layers: Sequence[Layer]
) -> Tensor:
    """Run a sequence through a shard, with all layers and without each single one of them.

    Args:
        shard: shard with its weights.
        runner: runner of the shard.
        inputs: tokens [1, T], or hidden states [n, T, d] of one sequence: the first have passed all
            layers before the shard, each of the others all but one of these.
        layers: to be turned off, in order; layers of other shards are ignored.

    Returns:
        Hidden states [n + m, T, d] after the shard. The m last ones are those without each of the m
        layers of the shard.
    """
    hidden, calls = runner.enter(inputs[:1])
    _, batch_calls = runner.enter(inputs[:1].expand(_BATCH_SIZE, *inputs.shape[1:]))
    states = [hidden]
    if len(inputs) > 1:
        states += torch.split(inputs[1:], 1)
    for place in range(len(shard.block_modules)):
        block = shard.blocks.first + place
        with shard.weights.block(place, place + 1):
            intact = states[0]
            num_batched = len(states) // _BATCH_SIZE * _BATCH_SIZE
            for first in range(0, num_batched, _BATCH_SIZE):
                batch = slice(first, first + _BATCH_SIZE)
                states[batch] = _pass_block(runner, place, states[batch], batch_calls)
            for first in range(num_batched, len(states)):
                single = slice(first, first + 1)
                states[single] = _pass_block(runner, place, states[single], calls)
            for layer in layers:
                if layer.block != block:
                    continue
                if layer.kind == "blocks":
                    states.append(intact)
                    continue
                with turned_off(shard, layer):
                    states.append(runner.through(place, intact, calls))
    return torch.cat([runner.leave(state) for state in states])


def _pass_block(
    runner: BlockRunner, place: int, states: list[Tensor], calls: list[Call]
) -> tuple[Tensor, ...]:
    """Run hidden states [1, T, d] through a block in one call."""
    return torch.split(runner.through(place, torch.cat(states), calls), 1)


@torch.no_grad()
def influences(
    shard: ModelShard, runner: BlockRunner, inputs: Tensor
) -> tuple[Tensor, dict[int, float]]:
    """Run a sequence through a shard, and measure by how much each block turns hidden states.

    Source: ShortGPT's block influence (Men et al. 2024, arXiv 2403.03853).

    Args:
        shard: shard with its weights.
        runner: runner of the shard.
        inputs: tokens [1, T] or hidden states [1, T, d].

    Returns:
        Hidden states after the shard, and
        block -> sum over tokens of 1 - cos(states before, states after).
    """
    hidden, calls = runner.enter(inputs)
    block_influences = {}
    for place in range(len(shard.block_modules)):
        with shard.weights.block(place, place + 1):
            after = runner.through(place, hidden, calls)
        cosines = torch.cosine_similarity(hidden.float(), after.float(), dim=-1)
        block_influences[shard.blocks.first + place] = float((1 - cosines).sum())
        hidden = after
    return runner.leave(hidden), block_influences


@torch.no_grad()
def added_by(
    shard: ModelShard,
    runner: BlockRunner,
    inputs: Tensor,
    layer: Layer,
) -> Tensor:
    """Return the output [1, T, d] that a layer of a shard adds to the stream.

    It is the output before the model's multiplier, if it has one, as are those of linears.

    Args:
        shard: shard with its weights.
        runner: runner of the shard.
        inputs: tokens [1, T] or hidden states [1, T, d] before the shard.
        layer: one whose output is added without a norm in between.
    """
    hidden, calls = runner.enter(inputs)
    place = layer.block - shard.blocks.first
    for earlier in range(place):
        with shard.weights.block(earlier, earlier + 1):
            hidden = runner.through(earlier, hidden, calls)

    if layer.kind == "blocks":
        with shard.weights.block(place, place + 1):
            after = runner.through(place, hidden, calls)
        return (after - hidden) / shard.layout.residual_multiplier

    outputs = list[Tensor]()

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hook = module_of(shard, layer).register_forward_hook(record)
    with shard.weights.block(place, place + 1):
        runner.through(place, hidden, calls)
    hook.remove()
    return outputs[0].reshape(hidden.shape)


def linear_before(layout: ModelLayout, layer: Layer, gone: Collection[str]) -> str | None:
    """Return the last linear before a layer whose output is added to the stream.

    None if there is no such linear, or if a norm or a router lies between it and the stream.

    Args:
        layout: layout of the model.
        layer: one of the model's layers.
        gone: names of linears that are removed whole.
    """
    if layout.family.norms_outputs:
        return None
    before = None
    for part in layers_of(layout, LAYER_KINDS[1:]):
        if set(part.linears) <= set(layer.linears):
            break
        if not set(part.linears) <= set(gone):
            before = part.consumer or None
    return before
