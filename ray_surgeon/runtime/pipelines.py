"""Waves of sequences on their way from worker to worker, as the coordinator sees them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, Literal, TypeVar

from ray_surgeon.runtime import dense_states
from ray_surgeon.runtime import wave as on_worker
from ray_surgeon.runtime.cluster import Cluster, Future, Progress, at_hand, value_of
from ray_surgeon.runtime.collectives import TensorPayload
from ray_surgeon.runtime.placement import WorkerIndex
from ray_surgeon.runtime.wave import Counts, Labels, Only, Passage, Tokens, Wave

T = TypeVar("T")

_STEPS: dict[str, Callable[..., TensorPayload]] = {
    "forward": on_worker.forward,
    "backward": on_worker.backward,
    "infer": on_worker.infer,
}
"""What a shard that is not the last does in an operation."""


def forward_and_backward(
    cluster: Cluster, sequences: Tokens, labels: Labels, only: Only = None, counts: Counts = None
) -> list[float]:
    """Run sequences forward and backward, and return the loss of each in nats.

    A loss is summed over the sequence's tokens that count.

    Waves of sequences go through the shards in one-forward-one-backward order. Submission runs a
    bounded number of them ahead.

    Args:
        cluster: with loaded workers, whose hooks gather what is wanted.
        sequences: [num_sequences, sequence_length] tokens.
        labels: what the model is to say.
        only: numbers of the sequences to run; all if not given.
        counts: [num_sequences, sequence_length], whether a token counts as something that is
            predicted; None if all do. The gradients are those of the summed loss of the tokens that
            count.
    """
    text = dense_states.CALIBRATION if labels.remembers else None
    return run_pass(cluster, Passage(sequences, counts, only, text), labels)


def run_pass(cluster: Cluster, passage: Passage, work: Labels | on_worker.OfEach[T]) -> list[T]:
    """Let sequences pass, and return what comes of each; see `forward_and_backward`.

    Args:
        cluster: with loaded workers.
        passage: the sequences.
        work: what to do at the end: go backward from the loss at labels, or what to make of the
            states of each sequence.
    """
    num_shards = cluster.placement.num_shards
    num_sequences = len(passage.numbers)
    is_inside = passage.of_teacher or (isinstance(work, Labels) and work.is_step)
    progress = Progress() if is_inside else cluster.progress
    progress.begin(num_sequences, "sequences", passage.tokens.shape[1])
    order, at_end = _WAYS[isinstance(work, Labels)]
    waves = passage.waves(cluster.placement, cluster.stores)
    turns = sorted(
        (turn, replica, operation)
        for replica, own in enumerate(waves)
        for turn, operation in enumerate(order(num_shards, len(own)))
    )
    # (replica, number of its wave) -> what comes of its last operation, and of its sequences
    moving: dict[tuple[int, int], Future[TensorPayload]] = {}
    results: dict[tuple[int, int], Future[list[T]]] = {}
    for _, replica, (shard, direction, number) in turns:
        key = (replica, number)
        index = WorkerIndex(shard, replica)
        wave = waves[replica][number]
        if shard == 0 and direction != "backward":
            earlier = (replica, number - num_shards - 1)
            if earlier in moving:  # so many are on their way at once
                cluster.get([moving.pop(earlier)])
                progress.reach(progress.done + len(waves[replica][earlier[1]].numbers))
            moving[key] = at_hand(wave.tokens)
        inputs = value_of(moving[key])
        if shard == num_shards - 1:
            pair = cluster.submit_pair(index, at_end, number, inputs, wave, work)
            moving[key], results[key] = pair
        else:
            more = (passage.of_teacher,) * (direction == "infer")
            moving[key] = cluster.submit(index, _STEPS[direction], number, inputs, *more)
    values = cluster.get(list(results.values()))
    progress.reach(num_sequences)
    if passage.text is not None:
        _share_states(cluster, passage.text, waves)
    numbers = chain.from_iterable(waves[replica][number].numbers for replica, number in results)
    result_of = dict(zip(numbers, chain.from_iterable(values), strict=True))
    return [result_of[number] for number in passage.numbers]


def _share_states(cluster: Cluster, text: str, waves: list[list[Wave]]) -> None:
    """Give the states that each replica keeps of its sequences of a text to the other replicas.

    This comes after the pass, in which replicas would wait for each other.
    """
    owners = [WorkerIndex(cluster.placement.num_shards - 1, i) for i in range(len(waves))]
    futures = list[Future[None]]()
    for owner, own in zip(owners, waves, strict=True):
        for wave in own if len(owners) > 1 else ():
            states = value_of(cluster.submit(owner, dense_states.kept_states, text, wave.numbers))
            futures += [
                cluster.submit(receiver, dense_states.receive_states, text, wave.numbers, states)
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
    waves = range(num_waves)
    forward: dict[Operation, int] = {
        (shard, "forward", n): 2 * n + shard for n in waves for shard in range(num_shards)
    }
    backward: dict[Operation, int] = {
        (shard, "backward", n): 2 * (n + last) - shard for n in waves for shard in range(last)
    }
    starts = forward | backward
    return sorted(starts, key=starts.__getitem__)  # of two at a time, the forward one comes first


def one_by_one(num_shards: int, num_waves: int) -> list[Operation]:
    """Return the order in which waves pass forward only."""
    return [(shard, "infer", wave) for wave in range(num_waves) for shard in range(num_shards)]


_Order = Callable[[int, int], list[Operation]]
_WAYS: tuple[tuple[_Order, Callable[..., Any]], ...] = (
    (one_by_one, on_worker.infer_each),
    (one_forward_one_backward, on_worker.forward_backward),
)
"""Forward only, and forward and backward: the order, and what the last shard does."""
