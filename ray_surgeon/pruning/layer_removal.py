"""Whole layers on a worker: the effect of their removal, the removal, and the update after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ray_surgeon.distributed.collectives import TensorPayload
from ray_surgeon.distributed.microbatch import SequenceOfWave, Tokens, comparison
from ray_surgeon.distributed.worker import LinearFit, Worker, collective
from ray_surgeon.maths.folding import folded
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.models.layers import Layer, added_by, influences, layers_of, without_each
from ray_surgeon.run_state import HELD

DAMPING = (1e-4, 1.0)
"""Damping of A relative to its mean diagonal: the first and the largest value tried."""


# The effect of the removal of each layer


def pass_without_each(
    worker: Worker, inputs: TensorPayload, layers: Sequence[Layer]
) -> TensorPayload:
    """Run a sequence through a shard that is not the last; see `without_each`."""
    states = without_each(worker.shard, worker.runner, worker.unpack(inputs), layers)
    return worker.pack(states)


def losses_without_each(
    worker: Worker,
    inputs: TensorPayload,
    number: int,
    window: Tokens,
    counts: Tensor,
    layers: Sequence[Layer],
) -> list[tuple[float, float]]:
    """Run a sequence through the last shard, and measure it with all layers and without each.

    Args:
        worker: worker with the dense model's states of the windows held aside.
        inputs: see `without_each`.
        number: number of the window held aside.
        window: [1, T] tokens of the window.
        counts: [1, T] bool, whether a token counts.
        layers: layers to turn off.

    Returns:
        For the whole model and without each layer, sums over the tokens that count, in nats: the
        divergence from the dense model, and the loss.
    """
    states = without_each(worker.shard, worker.runner, worker.unpack(inputs), layers)
    sequence = SequenceOfWave(number, worker.unpack(window), counts.to(worker.device))
    losses = list[tuple[float, float]]()
    for state in torch.split(states, 1):
        sums = comparison(worker, state, sequence, HELD, False)
        losses.append((sums["divergence"], sums["nll"]))
    return losses


def pass_with_influences(worker: Worker, inputs: TensorPayload) -> TensorPayload:
    """Run a sequence through a shard, and add to the influences of its blocks."""
    hidden, of_blocks = influences(worker.shard, worker.runner, worker.unpack(inputs))
    total = worker.state.influences
    for block, value in of_blocks.items():
        total[block] = total.get(block, 0.0) + value
    return worker.pack(hidden)


def take_influences(worker: Worker) -> dict[int, float]:
    """Return block -> sum of its influences, and clear the sums."""
    total = worker.state.influences
    worker.state.influences = {}
    return total


# Removal


def layers_gone(worker: Worker, layers: Sequence[Layer] | None) -> list[Layer]:
    """Return the removed layers of a shard, and let its passes skip the removed blocks.

    Args:
        worker: worker with its masks.
        layers: layers to check; None for all blocks.
    """
    shard = worker.shard
    if layers is None:
        layers = layers_of(worker.layout, ("blocks",))
    gone = list[Layer]()
    for layer in layers:
        if layer.block not in shard.blocks:
            continue
        masks = [worker.mask(name, StructuredMask) for name in layer.linears]
        if not any(mask.columns.any() for mask in masks):
            gone.append(layer)
    blocks = [layer.block for layer in gone if layer.kind == "blocks"]
    shard.blocks_gone = frozenset(block - shard.blocks.first for block in blocks)
    return gone


def remove(worker: Worker, layer: Layer) -> None:
    """Remove a layer, if it is in the worker's shard.

    The last linear of an attention or feed-forward layer keeps its rows, as a bias of zeros.
    """
    if layer.block not in worker.shard.blocks:
        return
    for name in layer.linears:
        mask = worker.mask(name, StructuredMask)
        rows = torch.zeros_like(mask.rows) if name == layer.consumer else mask.rows
        W = torch.zeros(len(mask.rows), len(mask.columns), device=worker.device)
        worker.masks[name] = mask.without(rows, mask.columns)
        worker.shard.set_weight(name, W)


# The update that compensates for a removed layer


def _fit(worker: Worker) -> LinearFit:
    assert worker.state.fit is not None
    return worker.state.fit


def begin_fitting(worker: Worker, linear: str) -> None:
    """Start empty sums on the workers that have a linear."""
    if linear in worker.shard.linears:
        shape = worker.layout.shapes[linear]
        worker.state.fit = LinearFit(shape.num_rows, shape.num_columns, worker.device)


@contextlib.contextmanager
def _noting(worker: Worker, number: int, linear: str) -> Iterator[None]:
    """Context in which the inputs of a linear are kept."""
    noted = list[Tensor]()
    module = worker.shard.linears[linear]
    hook = module.register_forward_pre_hook(lambda module, read: noted.append(read[0]))
    try:
        yield
    finally:
        hook.remove()
    (read,) = noted
    x = read.flatten(0, -2).float()
    if worker.layout.shapes[linear].has_bias:
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    _fit(worker).inputs[number] = x


def pass_and_note(
    worker: Worker, number: int, inputs: TensorPayload, linear: str
) -> TensorPayload:
    """Run a sequence through a shard, and keep the inputs of a linear in it."""
    with _noting(worker, number, linear):
        hidden = worker.runner.infer(worker.unpack(inputs))
    return worker.pack(torch.cat(hidden))


def added(worker: Worker, inputs: TensorPayload, layer: Layer) -> TensorPayload:
    """Return the output [1, T, d] that a layer adds to the stream; see `added_by`."""
    states = added_by(worker.shard, worker.runner, worker.unpack(inputs), layer)
    return worker.pack(states)


def sum_up(worker: Worker, number: int, addition: TensorPayload) -> None:
    """Add a sequence to the sums, given the output that the layer added to it."""
    fitting = _fit(worker)
    x = fitting.inputs.pop(number)
    d = worker.unpack(addition)[0].float()
    fitting.A.addmm_(x.T, x)
    fitting.D.addmm_(d.T, x)


def note_and_sum_up(
    worker: Worker, number: int, inputs: TensorPayload, layer: Layer, linear: str
) -> None:
    """Add a sequence to the sums on a shard with both the linear and the layer."""
    with _noting(worker, number, linear):
        addition = added(worker, inputs, layer)
    sum_up(worker, number, addition)


@collective
def fold(worker: Worker, linear: str) -> None:
    """Fold the layer into a linear, and send the linear to the replicas; see `folded`."""
    if linear not in worker.shard.linears:
        return
    fitting = _fit(worker)
    owner = worker.owner(linear)
    for total in (fitting.A, fitting.D):
        worker.replicas.reduce(total, owner)
    fitting.before = worker.shard.weight(linear)
    if worker.owns(linear):
        damping, max_damping = DAMPING
        W, _ = folded(
            fitting.before,
            fitting.A,
            fitting.D,
            damping=damping,
            max_damping=max_damping,
            name=linear,
        )
        worker.shard.set_weight(linear, W)
    worker.share_linears([linear])


def unfold(worker: Worker, linear: str) -> None:
    """Restore the weight from before `fold`."""
    if linear in worker.shard.linears:
        before = _fit(worker).before
        assert before is not None
        worker.shard.set_weight(linear, before)


def end_fitting(worker: Worker) -> None:
    """Free the sums."""
    worker.state.fit = None
