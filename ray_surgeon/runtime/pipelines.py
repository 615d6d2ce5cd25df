"""Waves of sequences on their way from worker to worker, as the coordinator sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, zip_longest
from typing import Literal, TypeVar

from ray_surgeon.runtime import wave as on_worker
from ray_surgeon.runtime.cluster import Cluster, Future, at_hand, value_of
from ray_surgeon.runtime.collectives import TensorPayload
from ray_surgeon.runtime.placement import WorkerIndex
from ray_surgeon.runtime.wave import CALIBRATION, Counts, Labels, Tokens, Wave
from ray_surgeon.runtime.worker import Worker

T = TypeVar("T")


_STEPS = {"forward": on_worker.forward, "backward": on_worker.backward, "infer": on_worker.infer}
"""What a shard that is not the last does in an operation."""


def forward_and_backward(
    cluster: Cluster,
    sequences: Tokens,
    labels: Labels | None = None,
    *,
    only: Sequence[int] | None = None,
    counted: bool = True,
    counts: Counts = None,
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
    labels = labels or Labels()
    step = partial(on_worker.forward_backward, labels=labels)
    text = CALIBRATION if labels.remembers else None
    order = one_forward_one_backward
    return run_pass(cluster, sequences, step, order, only, counts, text, counted=counted)


def run_pass(
    cluster: Cluster,
    sequences: Tokens,
    at_the_end: Callable[[Worker, int, TensorPayload, Wave], tuple[TensorPayload, list[T]]],
    order: Callable[[int, int], list[Operation]] | None = None,
    only: Sequence[int] | None = None,
    counts: Counts = None,
    text: str | None = None,
    *,
    counted: bool = True,
) -> list[T]:
    """Let sequences pass, and return what comes of each; see `forward_and_backward`.

    Args:
        cluster: with loaded workers.
        sequences: [num_sequences, sequence_length] tokens.
        at_the_end: (worker with the last shard, number of a wave, its inputs, itself) -> what goes
            back from there, and what comes of each sequence.
        order: (number of shards, number of waves) -> the operations of a replica; those of
            `one_by_one` if not given.
        only: numbers of the sequences that are meant; all if not given.
        counts: which tokens count.
        text: as whose states those before the head are kept by the last shards of all replicas;
            None if they are not.
        counted: whether the progress of the step counts these sequences.
    """
    num_shards = cluster.placement.num_shards
    wanted = list(range(len(sequences)) if only is None else only)
    if counted:
        cluster.progress.begin(len(wanted), "sequences", sequences.shape[1])
    waves = _waves_of_replicas(cluster, wanted)
    # (replica, number of its wave) -> what comes of its last operation, and of its sequences
    moving: dict[tuple[int, int], Future[TensorPayload]] = {}
    results: dict[tuple[int, int], Future[list[T]]] = {}
    num_done = 0
    for replica, operation in _in_turns(order or one_by_one, num_shards, waves):
        shard, direction, number = operation
        key = (replica, number)
        index = WorkerIndex(shard, replica)
        wave_of = partial(Wave.of, sequences, waves[replica][number], counts, text)
        if shard == 0 and direction != "backward":
            earlier = (replica, number - num_shards - 1)
            if earlier in moving:  # so many are on their way at once
                cluster.get([moving.pop(earlier)])
                num_done += len(waves[replica][earlier[1]])
            moving[key] = at_hand(wave_of().tokens)
        inputs = value_of(moving[key])
        if shard == num_shards - 1:
            pair = cluster.submit_pair(index, at_the_end, number, inputs, wave_of())
            moving[key], results[key] = pair
        else:
            moving[key] = cluster.submit(index, _STEPS[direction], number, inputs)
        if counted:
            cluster.progress.reach(num_done)
    values = cluster.get(list(results.values()))
    if counted:
        cluster.progress.reach(len(wanted))
    if text is not None:
        _share_states(cluster, text, wanted)
    numbers = chain.from_iterable(waves[replica][number] for replica, number in results)
    result_of = dict(zip(numbers, chain.from_iterable(values), strict=True))
    return [result_of[number] for number in wanted]


def _waves_of_replicas(cluster: Cluster, numbers: Sequence[int]) -> list[list[list[int]]]:
    """Return, for every replica, the numbers of the sequences of each of its waves.

    Replicas take sequences in turns.
    """
    num_replicas = cluster.placement.num_replicas
    size = cluster.stores.wave
    own = [list(numbers[replica::num_replicas]) for replica in range(num_replicas)]
    return [[mine[i : i + size] for i in range(0, len(mine), size)] for mine in own]


def _in_turns(
    order: Callable[[int, int], list[Operation]], num_shards: int, waves: list[list[list[int]]]
) -> Iterator[tuple[int, Operation]]:
    """Yield the operations of replicas, which take turns."""
    for operations in zip_longest(*(order(num_shards, len(own)) for own in waves)):
        for replica, operation in enumerate(operations):
            if operation is not None:
                yield replica, operation


def _share_states(cluster: Cluster, text: str, numbers: Sequence[int]) -> None:
    """Give the states that each replica keeps of its sequences of a text to the other replicas.

    This comes after the pass, in which replicas would wait for each other.
    """
    last = cluster.placement.num_shards - 1
    owners = [WorkerIndex(last, replica) for replica in range(cluster.placement.num_replicas)]
    futures = list[Future[None]]()
    for owner, waves in zip(owners, _waves_of_replicas(cluster, numbers), strict=True):
        for wave in waves if len(owners) > 1 else ():
            states = cluster.submit(owner, on_worker.kept_states, text, wave)
            futures += [
                cluster.submit(receiver, on_worker.receive_states, text, wave, value_of(states))
                for receiver in owners
                if receiver != owner
            ]
    cluster.get(futures)


Operation = tuple[int, Literal["forward", "backward", "infer"], int]
"""(shard, direction, number of a wave).

On the last shard the backward pass belongs to the forward operation.
"""


def one_forward_one_backward(num_shards: int, num_waves: int) -> list[Operation]:
    """Return the operations of all shards in 1F1B order (Narayanan et al. 2019).

    They come in the order in which they would start if each took as long as any other. At most
    ``num_shards - shard`` waves are in flight.
    """
    last = num_shards - 1
    forward: dict[Operation, int] = {
        (shard, "forward", wave): 2 * wave + shard
        for wave in range(num_waves)
        for shard in range(num_shards)
    }
    backward: dict[Operation, int] = {
        (shard, "backward", wave): 2 * (wave + last) - shard
        for wave in range(num_waves)
        for shard in range(last)
    }
    starts = forward | backward
    return sorted(starts, key=starts.__getitem__)  # of two at a time, the forward one comes first


def one_by_one(num_shards: int, num_waves: int) -> list[Operation]:
    """Return the order in which waves pass forward only."""
    return [(shard, "infer", wave) for wave in range(num_waves) for shard in range(num_shards)]
