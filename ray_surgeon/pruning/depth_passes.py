"""Passes that measure removals of layers; `layer_removal` has the workers' part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ray_surgeon.distributed import microbatch
from ray_surgeon.distributed.cluster import Cluster, Future, at_hand, value_of
from ray_surgeon.distributed.microbatch import Tokens
from ray_surgeon.distributed.passes import num_counted
from ray_surgeon.distributed.placement import WorkerIndex
from ray_surgeon.models.layers import Layer
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.pruning import layer_removal as removal
from ray_surgeon.run_state import CalibrationText

Passing = Callable[[WorkerIndex, int, Any], Future[Any]]
"""(worker, number of a sequence, its inputs) -> its outputs."""

AtEnd = Callable[[int, int, Any], Future[Any]]
"""(replica, number of a sequence, its inputs) -> its result."""

EVERY = 3
"""Stride of the compared tokens, because the head costs as much as several blocks."""


def sums_without_each(
    cluster: Cluster, text: CalibrationText, layers: Sequence[Layer]
) -> torch.Tensor:
    """Measure the model on the windows held aside with all layers, and without each.

    Every sequence passes once; from each layer on, the states without it travel with the others.

    Args:
        cluster: cluster with the dense model's states of the windows held aside.
        text: calibration text.
        layers: layers to turn off, in the order of the model.

    Returns:
        [1 + num_layers, 2] float64: divergence from the dense model, and loss, in nats per token.
    """
    counts = np.zeros(text.held.shape, dtype=bool)
    counts[:, 1::EVERY] = True
    if text.held_counts is not None:
        counts &= text.held_counts
    last = cluster.placement.num_shards - 1
    # names of linears are not needed, and mixtures have many
    layers = [replace(layer, linears=()) for layer in layers]

    def at_end(replica: int, number: int, inputs: Any) -> Future[Any]:
        own = slice(number, number + 1)
        return cluster.submit(
            WorkerIndex(last, replica),
            removal.losses_without_each,
            inputs,
            number,
            text.held[own],
            torch.from_numpy(counts[own]),
            layers,
        )

    def passing(at: WorkerIndex, number: int, inputs: Any) -> Future[Any]:
        return cluster.submit(at, removal.pass_without_each, inputs, layers)

    losses = _through(cluster, text.held, last, passing, at_end)
    total = torch.tensor(losses, dtype=torch.float64).sum(dim=0)
    return total / max(1, num_counted(text.held, counts))


def influences_of(cluster: Cluster, tokens: Tokens) -> dict[int, float]:
    """Return block -> its mean influence per token; see `models.layers.influences`."""
    last = cluster.placement.num_shards - 1

    def passing(at: WorkerIndex, number: int, inputs: Any) -> Future[Any]:
        return cluster.submit(at, removal.pass_with_influences, inputs)

    def at_end(replica: int, number: int, inputs: Any) -> Future[Any]:
        return passing(WorkerIndex(last, replica), number, inputs)

    _through(cluster, tokens, last, passing, at_end)
    total: dict[int, float] = {}
    for of_worker in cluster.run_all(removal.take_influences):
        for block, value in of_worker.items():
            total[block] = total.get(block, 0.0) + value
    return {block: value / tokens.size for block, value in total.items()}


def sum_additions(
    cluster: Cluster, layout: ModelLayout, tokens: Tokens, layer: Layer, linear: str
) -> None:
    """Let the workers with a linear sum the output that a later layer adds to the stream.

    Args:
        cluster: cluster with the layer in place.
        layout: layout of the model.
        tokens: [num_sequences, sequence_length] calibration tokens.
        layer: the layer that is about to be removed.
        linear: the last linear that adds to the stream before the layer.
    """
    at_linear = _shard_of(cluster, layout.shapes[linear].block)
    at_layer = _shard_of(cluster, layer.block)
    cluster.run_all(removal.begin_fitting, linear)

    def passing(at: WorkerIndex, number: int, inputs: Any) -> Future[Any]:
        if at.shard == at_linear:
            return cluster.submit(at, removal.pass_and_note, number, inputs, linear)
        return cluster.submit(at, microbatch.infer, number, inputs, False)

    def at_end(replica: int, number: int, inputs: Any) -> Future[Any]:
        summing = WorkerIndex(at_linear, replica)
        if at_layer == at_linear:
            step = removal.note_and_sum_up
            return cluster.submit(summing, step, number, inputs, layer, linear)
        adding = WorkerIndex(at_layer, replica)
        addition = cluster.submit(adding, removal.added, inputs, layer)
        return cluster.submit(summing, removal.sum_up, number, value_of(addition))

    _through(cluster, tokens, at_layer, passing, at_end)


def _shard_of(cluster: Cluster, block: int) -> int:
    for shard, blocks in enumerate(cluster.placement.blocks):
        if block in blocks:
            return shard
    raise AssertionError(f"no shard has block {block}")


def _through(
    cluster: Cluster, tokens: Tokens, last: int, passing: Passing, at_end: AtEnd
) -> list[Any]:
    """Pass sequences through the shards up to `last`, and return the results of that shard.

    Replicas take turns. Each replica has at most ``num_shards + 1`` sequences in flight.

    Args:
        cluster: cluster with loaded workers.
        tokens: [num_sequences, sequence_length].
        last: number of the last shard.
        passing: (worker, number of a sequence, its inputs) -> its outputs, for the shards before.
        at_end: (replica, number of a sequence, its inputs) -> its result, for the last shard.
    """
    num_replicas = cluster.placement.num_replicas
    ahead = num_replicas * (cluster.placement.num_shards + 1)
    futures = list[Future[Any]]()
    cluster.progress.begin(len(tokens), "sequences", tokens.shape[1])
    for number, window in enumerate(tokens):
        if number >= ahead:
            cluster.get([futures[number - ahead]])
            cluster.progress.reach(number - ahead + 1)
        replica = number % num_replicas
        moving: Future[Any] = at_hand(window[None])
        for shard in range(last):
            moving = passing(WorkerIndex(shard, replica), number, value_of(moving))
        futures.append(at_end(replica, number, value_of(moving)))
    results = cluster.get(futures)
    cluster.progress.reach(len(tokens))
    return results
