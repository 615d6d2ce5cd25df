"""Passes of text through the shards: what a worker does for one micro-batch, and how the coordinator schedules them.

Activations go from worker to worker; the coordinator sees references, losses and, for a comparison of exports, logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_surgeon.cluster.cluster import Cluster
from ray_surgeon.cluster.placement import WorkerIndex
from ray_surgeon.cluster.schedule import Operation, submission_order
from ray_surgeon.cluster.transport import TensorPayload, decode, encode
from ray_surgeon.cluster.worker import Worker

# On a worker


def forward(worker: Worker, micro_batch: int, inputs: TensorPayload | None) -> TensorPayload:
    """Run a micro-batch forward: tokens or hidden states in, hidden states out."""
    assert inputs is not None
    return encode(worker.shard.forward(micro_batch, decode(inputs, worker.device)))


def forward_backward(
    worker: Worker, micro_batch: int, inputs: TensorPayload | None, tokens: TensorPayload, label_seed: int | None
) -> tuple[TensorPayload | None, float]:
    """Run a micro-batch through the last shard and back.

    Args:
        worker: with the last shard.
        micro_batch: its number.
        inputs: tokens, if this is the only shard, or hidden states.
        tokens: [n, T] the labels.
        label_seed: seed of labels drawn from the model; None takes the data's (empirical Fisher).

    Returns:
        The gradient at the inputs, None if this is the only shard, and the summed NLL of the data in nats.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    assert inputs is not None
    labels = decode(tokens, worker.device)
    generator = None if label_seed is None else torch.Generator(worker.device).manual_seed(label_seed + micro_batch)
    hidden = worker.shard.forward(micro_batch, decode(inputs, worker.device))
    nll, gradient = worker.shard.loss(hidden, labels, with_gradient=True, generator=generator)
    total = float(nll.sum())
    if not math.isfinite(total):
        raise FloatingPointError(f"the loss of calibration micro-batch {micro_batch} is {total}; check the weights and the dtype")
    assert gradient is not None
    return _gradient_below(worker, worker.shard.backward(micro_batch, gradient)), total


def backward(worker: Worker, micro_batch: int, gradient: TensorPayload | None) -> TensorPayload | None:
    """Run a micro-batch backward: gradient at the outputs in, gradient at the inputs out; the first shard keeps its own."""
    assert gradient is not None
    return _gradient_below(worker, worker.shard.backward(micro_batch, decode(gradient, worker.device)))


def _gradient_below(worker: Worker, gradient: Tensor) -> TensorPayload | None:
    return None if worker.index.shard == 0 else encode(gradient)


def infer(worker: Worker, inputs: TensorPayload) -> TensorPayload:
    """Run a shard without gradients: tokens or hidden states in, hidden states out."""
    return encode(worker.shard.infer(decode(inputs, worker.device)))


def infer_loss(worker: Worker, inputs: TensorPayload, tokens: TensorPayload) -> list[float]:
    """Return the summed NLL in nats of each sequence, at the last shard."""
    nll, _ = worker.shard.loss(worker.shard.infer(decode(inputs, worker.device)), decode(tokens, worker.device))
    return [float(value) for value in nll]


def infer_logits(worker: Worker, inputs: TensorPayload) -> TensorPayload:
    """Return the logits [n, T, vocabulary], at the last shard."""
    return encode(worker.shard.logits(worker.shard.infer(decode(inputs, worker.device))))


# On the coordinator


def token_payload(tokens: NDArray[np.int64]) -> TensorPayload:
    """Return tokens [T] or [n, T] as they travel."""
    return encode(torch.from_numpy(np.atleast_2d(tokens)))


@dataclass
class _ReplicaPipeline:
    """What is on its way between the shards of one replica."""

    replica: int
    tokens: NDArray[np.int64]
    moving: dict[int, TensorPayload | None] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    finished: dict[int, object] = field(default_factory=dict)
    num_done: int = 0


def forward_and_backward(
    cluster: Cluster, sequences: NDArray[np.int64], label_seed: int | None = None, *, counted: bool = True
) -> list[float]:
    """Run every sequence forward and backward, in one-forward-one-backward order, and return its summed NLL in nats.

    Replica r sees sequences r, r + D, ... . Submission runs a bounded number of micro-batches ahead.

    Args:
        cluster: with loaded workers, whose hooks gather what is wanted.
        sequences: [num_sequences, sequence_length] tokens; one is a micro-batch.
        label_seed: see `forward_backward`.
        counted: whether the progress of the step counts these sequences.
    """
    num_shards, num_replicas = cluster.placement.num_shards, cluster.placement.num_replicas
    if counted:
        cluster.progress.begin(len(sequences), "sequences", sequences.shape[1])
    pipelines = [_ReplicaPipeline(r, sequences[r::num_replicas]) for r in range(num_replicas)]
    orders = [submission_order(num_shards, len(pipeline.tokens)) for pipeline in pipelines]
    for operations in zip_longest(*orders):
        for pipeline, operation in zip(pipelines, operations, strict=True):
            if operation is not None:
                _submit(cluster, pipeline, operation, label_seed)
                if counted:
                    cluster.progress.reach(sum(p.num_done for p in pipelines))
    losses = cluster.get([loss for pipeline in pipelines for loss in pipeline.losses])
    if counted:
        cluster.progress.reach(len(sequences))
    return [float(loss) for loss in losses]


def _submit(cluster: Cluster, pipeline: _ReplicaPipeline, operation: Operation, label_seed: int | None) -> None:
    shard, direction, micro_batch = operation
    num_shards, index = cluster.placement.num_shards, WorkerIndex(shard, pipeline.replica)
    number = pipeline.replica + micro_batch * cluster.placement.num_replicas
    if shard == 0 and direction == "forward":
        pipeline.moving[micro_batch] = token_payload(pipeline.tokens[micro_batch])
        ahead = micro_batch - num_shards - 1
        if ahead in pipeline.finished:
            cluster.get([pipeline.finished.pop(ahead)])
            pipeline.num_done += 1
    moving, finished = pipeline.moving.pop(micro_batch), None
    if shard == num_shards - 1:
        labels = token_payload(pipeline.tokens[micro_batch])
        moving, loss = cluster.submit_pair(index, forward_backward, number, moving, labels, label_seed)
        pipeline.losses.append(loss)
        finished = loss
    elif direction == "forward":
        moving = cluster.submit(index, forward, number, moving)
    else:
        moving = cluster.submit(index, backward, number, moving)
    if shard == 0 and (direction == "backward" or num_shards == 1):
        pipeline.finished[micro_batch] = moving if finished is None else finished
    else:
        pipeline.moving[micro_batch] = moving


def _to_last_shard(cluster: Cluster, replica: int, tokens: NDArray[np.int64]) -> tuple[WorkerIndex, TensorPayload]:
    moving, last = token_payload(tokens), cluster.placement.num_shards - 1
    for shard in range(last):
        moving = cluster.submit(WorkerIndex(shard, replica), infer, moving)
    return WorkerIndex(last, replica), moving


def sequence_losses(cluster: Cluster, sequences: NDArray[np.int64]) -> list[float]:
    """Return the summed NLL in nats of each sequence [num_sequences, sequence_length]; forward only."""
    num_replicas = cluster.placement.num_replicas
    cluster.progress.begin(len(sequences), "sequences", sequences.shape[1])
    in_flight = num_replicas * (cluster.placement.num_shards + 1)
    futures: list[list[float]] = []
    for i, tokens in enumerate(sequences):
        if i >= in_flight:
            cluster.get([futures[i - in_flight]])
            cluster.progress.reach(i - in_flight + 1)
        index, moving = _to_last_shard(cluster, i % num_replicas, tokens)
        futures.append(cluster.submit(index, infer_loss, moving, token_payload(tokens)))
    losses = [nll for values in cluster.get(futures) for nll in values]
    cluster.progress.reach(len(sequences))
    return losses


def perplexity(cluster: Cluster, windows: NDArray[np.int64]) -> float:
    """Return exp of the mean over windows of the mean NLL of their predicted tokens.

    Args:
        cluster: with loaded workers.
        windows: [num_sequences, sequence_length] tokens; ``sequence_length - 1`` are predicted in each.

    Raises:
        FloatingPointError: the loss is not a number.
    """
    mean = sum(sequence_losses(cluster, windows)) / (windows.shape[0] * (windows.shape[1] - 1))
    if math.isnan(mean):
        raise FloatingPointError("the loss on the evaluation text is not a number; the weights are damaged")
    return math.exp(mean) if mean < 700 else math.inf


def logits(cluster: Cluster, tokens: Sequence[int]) -> TensorPayload:
    """Return the logits [1, T, vocabulary] of one sequence."""
    index, moving = _to_last_shard(cluster, 0, np.asarray(tokens, dtype=np.int64))
    return cluster.get([cluster.submit(index, infer_logits, moving)])[0]
