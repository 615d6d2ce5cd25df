"""Passes of text through the shards: a worker's part for one wave, and the schedule.

Activations go from worker to worker; the coordinator sees references, losses and, for a comparison
of exports, logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ray_surgeon.models.loss import perplexity_of
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.dense_model import CALIBRATION, kept_states, receive_states
from ray_surgeon.runtime.placement import WorkerIndex
from ray_surgeon.runtime.schedule import Operation, submission_order
from ray_surgeon.runtime.transport import TensorPayload, encode
from ray_surgeon.runtime.wave import (
    Compared,
    Labels,
    backward,
    forward,
    forward_backward,
    infer,
    infer_comparison,
    infer_logits,
    infer_loss,
    infer_loss_and_keep,
    infer_states,
)
from ray_surgeon.runtime.worker import Worker

T = TypeVar("T")


# On a worker


# On the coordinator


def token_payload(tokens: NDArray[np.int64]) -> TensorPayload:
    """Return tokens [T] or [n, T] as they travel."""
    return encode(torch.from_numpy(np.atleast_2d(tokens)))


def counts_payload(
    counts: NDArray[np.bool_] | None, numbers: Sequence[int]
) -> TensorPayload | None:
    """Return which tokens of some sequences count, [m, T] bool, as it travels.

    None stands for all tokens.
    """
    return None if counts is None else encode(torch.from_numpy(counts[numbers]))


def num_counted(
    sequences: NDArray[np.int64],
    counts: NDArray[np.bool_] | None = None,
    only: Sequence[int] | None = None,
) -> int:
    """Return how many tokens are predicted and count; the first of a sequence is not predicted.

    Args:
        sequences: [num_sequences, sequence_length] tokens.
        counts: [num_sequences, sequence_length], whether a token counts; None if all do.
        only: numbers of the sequences that are meant; all if not given.
    """
    if counts is None:
        return (len(sequences) if only is None else len(only)) * (int(sequences.shape[1]) - 1)
    return int((counts if only is None else counts[list(only)])[:, 1:].sum())


@dataclass
class _ReplicaPipeline:
    """What is on its way between the shards of one replica."""

    replica: int
    waves: list[list[int]]  # numbers of the sequences
    moving: dict[int, TensorPayload | None] = field(default_factory=dict)
    losses: list[list[float]] = field(default_factory=list)
    finished: dict[int, object] = field(default_factory=dict)
    num_done: int = 0


def waves_of_replicas(cluster: Cluster, numbers: Sequence[int]) -> list[list[list[int]]]:
    """Return, for every replica, the numbers of the sequences of each of its waves.

    Replicas take sequences in turns.
    """
    num_replicas = cluster.placement.num_replicas
    size = cluster.stores.wave
    own = [list(numbers[replica::num_replicas]) for replica in range(num_replicas)]
    return [[mine[i : i + size] for i in range(0, len(mine), size)] for mine in own]


def forward_and_backward(
    cluster: Cluster,
    sequences: NDArray[np.int64],
    labels: Labels | None = None,
    *,
    only: Sequence[int] | None = None,
    counted: bool = True,
    counts: NDArray[np.bool_] | None = None,
) -> list[float]:
    """Run sequences forward and backward, and return the loss of each in nats.

    A loss is summed over the sequence's tokens that count.

    Waves of sequences go through the shards in one-forward-one-backward order. Submission runs a
    bounded number of them ahead.

    Args:
        cluster: with loaded workers, whose hooks gather what is wanted.
        sequences: [num_sequences, sequence_length] tokens.
        labels: what the model is to say; the text if not given.
        only: numbers of the sequences to run; all if not given.
        counted: whether the progress of the step counts these sequences.
        counts: [num_sequences, sequence_length], whether a token counts as something that is
            predicted; None if all do. The gradients are those of the summed loss of the tokens that
            count.
    """
    num_shards = cluster.placement.num_shards
    wanted = list(range(len(sequences)) if only is None else only)
    if counted:
        cluster.progress.begin(len(wanted), "sequences", sequences.shape[1])
    pipelines = [
        _ReplicaPipeline(replica, waves)
        for replica, waves in enumerate(waves_of_replicas(cluster, wanted))
    ]
    orders = [submission_order(num_shards, len(pipeline.waves)) for pipeline in pipelines]
    for operations in zip_longest(*orders):
        for pipeline, operation in zip(pipelines, operations, strict=True):
            if operation is not None:
                _submit(cluster, pipeline, operation, sequences, labels or Labels(), counts)
                if counted:
                    cluster.progress.reach(sum(p.num_done for p in pipelines))
    by_number: dict[int, float] = {}
    for pipeline in pipelines:
        for numbers, losses in zip(pipeline.waves, cluster.get(pipeline.losses), strict=True):
            by_number |= dict(zip(numbers, losses, strict=True))
    if counted:
        cluster.progress.reach(len(wanted))
    if labels is not None and labels.remembers:
        share_states(cluster, CALIBRATION, [pipeline.waves for pipeline in pipelines])
    return [by_number[number] for number in wanted]


def share_states(
    cluster: Cluster,
    text: str,
    waves_of: Sequence[Sequence[Sequence[int]]],
    receive: Callable[[Worker, str, Sequence[int], TensorPayload], None] = receive_states,
) -> None:
    """Give the states that each replica keeps of its waves to the other replicas.

    This comes after the pass, in which replicas would wait for each other.

    Args:
        cluster: with loaded workers.
        text: its name.
        waves_of: for every replica the numbers of the sequences of each of its waves.
        receive: keeps them.
    """
    last = cluster.placement.num_shards - 1
    num_replicas = len(waves_of)
    futures = list[Any]()
    for replica, waves in enumerate(waves_of if num_replicas > 1 else ()):
        for numbers in waves:
            states = cluster.submit(WorkerIndex(last, replica), kept_states, text, numbers)
            for receiver in range(num_replicas):
                if receiver != replica:
                    futures.append(
                        cluster.submit(WorkerIndex(last, receiver), receive, text, numbers, states)
                    )
    cluster.get(futures)


def _submit(
    cluster: Cluster,
    pipeline: _ReplicaPipeline,
    operation: Operation,
    sequences: NDArray[np.int64],
    labels: Labels,
    counts: NDArray[np.bool_] | None,
) -> None:
    shard, direction, wave = operation
    num_shards = cluster.placement.num_shards
    index = WorkerIndex(shard, pipeline.replica)
    numbers = pipeline.waves[wave]
    if shard == 0 and direction == "forward":
        pipeline.moving[wave] = token_payload(sequences[numbers])
        ahead = wave - num_shards - 1
        if ahead in pipeline.finished:
            cluster.get([pipeline.finished.pop(ahead)])
            pipeline.num_done += len(pipeline.waves[ahead])
    moving = pipeline.moving.pop(wave)
    finished = None
    if shard == num_shards - 1:
        text = token_payload(sequences[numbers])
        counting = counts_payload(counts, numbers)
        moving, losses = cluster.submit_pair(
            index, forward_backward, wave, moving, text, numbers, labels, counting
        )
        pipeline.losses.append(losses)
        finished = losses
    elif direction == "forward":
        moving = cluster.submit(index, forward, wave, moving)
    else:
        moving = cluster.submit(index, backward, wave, moving)
    if shard == 0 and (direction == "backward" or num_shards == 1):
        pipeline.finished[wave] = moving if finished is None else finished
    else:
        pipeline.moving[wave] = moving


def _to_last_shard(
    cluster: Cluster, replica: int, tokens: NDArray[np.int64]
) -> tuple[WorkerIndex, TensorPayload]:
    moving = token_payload(tokens)
    last = cluster.placement.num_shards - 1
    for shard in range(last):
        moving = cluster.submit(WorkerIndex(shard, replica), infer, moving)
    return WorkerIndex(last, replica), moving


def each_wave(
    cluster: Cluster,
    sequences: NDArray[np.int64],
    at_the_end: Callable[[WorkerIndex, Any, list[int]], list[T]],
    only: Sequence[int] | None = None,
) -> list[T]:
    """Run sequences forward, and return what comes of each.

    Args:
        cluster: with loaded workers.
        sequences: [num_sequences, sequence_length] tokens.
        at_the_end: (worker with the last shard, what it gets, numbers of the sequences of a wave)
            -> future with an item for each.
        only: numbers of the sequences to run; all if not given.
    """
    wanted = list(range(len(sequences)) if only is None else only)
    cluster.progress.begin(len(wanted), "sequences", sequences.shape[1])
    of_replicas = waves_of_replicas(cluster, wanted)
    waves = [
        (r, numbers)
        for turn in zip_longest(*of_replicas)
        for r, numbers in enumerate(turn)
        if numbers is not None
    ]
    in_flight = cluster.placement.num_replicas * (cluster.placement.num_shards + 1)
    futures: list[list[T]] = []
    by_number: dict[int, T] = {}
    for i, (replica, numbers) in enumerate(waves):
        if i >= in_flight:
            cluster.get([futures[i - in_flight]])
            cluster.progress.reach(sum(len(done) for _, done in waves[: i - in_flight + 1]))
        futures.append(at_the_end(*_to_last_shard(cluster, replica, sequences[numbers]), numbers))
    for (_, numbers), results in zip(waves, cluster.get(futures), strict=True):
        by_number |= dict(zip(numbers, results, strict=True))
    cluster.progress.reach(len(wanted))
    return [by_number[number] for number in wanted]


def sequence_losses(
    cluster: Cluster, sequences: NDArray[np.int64], counts: NDArray[np.bool_] | None = None
) -> list[float]:
    """Return the NLL in nats of sequences, summed over the tokens that count.

    See `each_wave` and `num_counted`.
    """

    def at_the_end(last: WorkerIndex, moving: Any, numbers: list[int]) -> list[float]:
        tokens = token_payload(sequences[numbers])
        return cluster.submit(last, infer_loss, moving, tokens, counts_payload(counts, numbers))

    return each_wave(cluster, sequences, at_the_end)


def pass_up_to_the_head(
    cluster: Cluster, sequences: NDArray[np.int64], only: Sequence[int], text: str | None
) -> bool:
    """Run sequences forward without the head, and return whether all states are finite.

    The head costs as much as several blocks.

    Args:
        cluster: with loaded workers, whose hooks gather what is wanted.
        sequences: [num_sequences, sequence_length] tokens.
        only: numbers of the sequences to run.
        text: as whose states those before the head are kept by the last shards of all replicas;
            None if they are not.
    """

    def at_the_end(last: WorkerIndex, moving: Any, numbers: list[int]) -> list[bool]:
        return cluster.submit(last, infer_states, moving, text, numbers)

    finite = each_wave(cluster, sequences, at_the_end, only)
    if text is not None:
        share_states(cluster, text, waves_of_replicas(cluster, only))
    return all(finite)


@dataclass(frozen=True)
class Measured:
    """What an evaluation finds on one text."""

    perplexity: float  # exp of the mean NLL of the predicted tokens that count
    divergence: float  # mean over them of the divergence from the dense model, in nats


def remember(
    cluster: Cluster, text: str, windows: NDArray[np.int64], counts: NDArray[np.bool_] | None = None
) -> float:
    """Return the dense model's perplexity, and keep its hidden states.

    See `remembered_losses`.

    Raises:
        FloatingPointError: the loss is not a number.
    """
    losses = remembered_losses(cluster, text, windows, counts)
    return _finite(text, perplexity_of(sum(losses) / num_counted(windows, counts)))


def remembered_losses(
    cluster: Cluster, text: str, windows: NDArray[np.int64], counts: NDArray[np.bool_] | None = None
) -> list[float]:
    """Return the NLL in nats of sequences, and let all last shards keep the hidden states.

    The NLL is summed over the tokens that count.

    Args:
        cluster: with the dense weights.
        text: its name.
        windows: [num_sequences, sequence_length] tokens.
        counts: [num_sequences, sequence_length], whether a token counts; None if all do.
    """

    def at_the_end(last: WorkerIndex, moving: Any, numbers: list[int]) -> list[float]:
        tokens = token_payload(windows[numbers])
        counting = counts_payload(counts, numbers)
        return cluster.submit(last, infer_loss_and_keep, moving, tokens, text, numbers, counting)

    losses = each_wave(cluster, windows, at_the_end)
    share_states(cluster, text, waves_of_replicas(cluster, range(len(windows))))
    return losses


def measure(
    cluster: Cluster, text: str, windows: NDArray[np.int64], counts: NDArray[np.bool_] | None = None
) -> Measured:
    """Measure the present weights on a text that was remembered.

    Args:
        cluster: with loaded workers.
        text: its name.
        windows: [num_sequences, sequence_length] tokens; ``sequence_length - 1`` are predicted in
            each.
        counts: [num_sequences, sequence_length], whether a token counts; None if all do. The means
            are over those that do.

    Raises:
        FloatingPointError: the loss is not a number.
    """
    comparisons = compared(cluster, text, windows, counts)
    num_tokens = num_counted(windows, counts)
    loss = sum(comparison.nll for comparison in comparisons) / num_tokens
    divergence = sum(comparison.divergence for comparison in comparisons) / num_tokens
    return Measured(_finite(text, perplexity_of(loss)), _finite(text, divergence))


def divergences_of(
    cluster: Cluster, text: str, windows: NDArray[np.int64], counts: NDArray[np.bool_] | None = None
) -> list[float]:
    """Return the divergence from the dense model of every window of a remembered text.

    Values are in nats per predicted token.

    With `counts`, per token that counts, see `measure`; 0 for a window in which none does.

    Raises:
        FloatingPointError: one is not a number.
    """
    divergences = [
        comparison.divergence / max(1, num_counted(windows, counts, [number]))
        for number, comparison in enumerate(compared(cluster, text, windows, counts))
    ]
    if not all(map(math.isfinite, divergences)):
        raise FloatingPointError(
            f"the divergence from the dense model on {text} is not finite; check the weights and "
            "the dtype"
        )
    return divergences


def compared(
    cluster: Cluster,
    text: str,
    windows: NDArray[np.int64],
    counts: NDArray[np.bool_] | None = None,
    *,
    with_acceptance: bool = False,
) -> list[Compared]:
    """Compare the present weights with the dense ones on windows of a remembered text.

    Args:
        cluster: with loaded workers.
        text: its name.
        windows: [num_sequences, sequence_length] tokens.
        counts: [num_sequences, sequence_length], whether a token counts; None if all do.
        with_acceptance: whether to compute acceptance and agreement.
    """

    def at_the_end(last: WorkerIndex, moving: Any, numbers: list[int]) -> list[Compared]:
        tokens = token_payload(windows[numbers])
        counting = counts_payload(counts, numbers)
        return cluster.submit(
            last, infer_comparison, moving, tokens, text, numbers, counting, with_acceptance
        )

    return each_wave(cluster, windows, at_the_end)


def _finite(text: str, value: float) -> float:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the perplexity on {text}, or its divergence, is not finite; check the weights and "
            "the dtype"
        )
    return value


def logits(cluster: Cluster, tokens: Sequence[int]) -> TensorPayload:
    """Return the logits [1, T, vocabulary] of one sequence."""
    index, moving = _to_last_shard(cluster, 0, np.asarray(tokens, dtype=np.int64))
    return cluster.get([cluster.submit(index, infer_logits, moving)])[0]
