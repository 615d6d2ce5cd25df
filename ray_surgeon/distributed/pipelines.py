"""Schedules waves of sequences through the shards, on the coordinator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

from ray_surgeon.distributed import dense_states
from ray_surgeon.distributed import microbatch as on_worker
from ray_surgeon.distributed.cluster import Cluster, Future, Progress, at_hand, value_of
from ray_surgeon.distributed.collectives import TensorPayload
from ray_surgeon.distributed.microbatch import Counts, Labels, Only, Passage, Tokens, Wave
from ray_surgeon.distributed.placement import WorkerIndex

T = TypeVar("T")

_STEPS: dict[str, Callable[..., TensorPayload]] = {
    "forward": on_worker.forward,
    "backward": on_worker.backward,
    "infer": on_worker.infer,
}
"""Direction of an operation -> step of a shard that is not the last."""


def forward_and_backward(
    cluster: Cluster,
    sequences: Tokens,
    labels: Labels,
    only: Only = None,
    counts: Counts = None,
) -> list[float]:
    """Run sequences forward and backward, and return the loss of each in nats.

    A loss is summed over the sequence's tokens that count; gradients are those of this sum.

    Waves of sequences pass the shards in one-forward-one-backward order. A bounded number of waves
    is submitted ahead.

    Args:
        cluster: with loaded workers, whose hooks gather statistics.
        sequences: [num_sequences, sequence_length] tokens.
        labels: targets of the predictions.
        only: numbers of the sequences to run; None for all.
        counts: [num_sequences, sequence_length], whether a token counts as a prediction; None if
            all do.
    """
    passage = Passage(
        tokens=sequences,
        counts=counts,
        only=only,
        text=dense_states.CALIBRATION if labels.remembers else None,
    )
    return run_pass(cluster, passage, labels)


def run_pass(
    cluster: Cluster,
    passage: Passage,
    work: Labels | on_worker.OfEach[T],
) -> list[T]:
    """Run sequences through the shards, and return the result of each sequence.

    Args:
        cluster: with loaded workers.
        passage: the sequences.
        work: the work at the end: labels, to go backward from the loss, or a function that turns
            the hidden states of each sequence into its result.
    """
    num_shards = cluster.placement.num_shards
    progress = cluster.progress
    if passage.of_teacher or (isinstance(work, Labels) and work.is_step):
        progress = Progress()  # the step that the pass is part of counts its own progress
    progress.begin(len(passage.numbers), "sequences", passage.tokens.shape[1])
    order, at_end = _SCHEDULES["train" if isinstance(work, Labels) else "infer"]
    waves = passage.waves(cluster.placement, cluster.stores)
    # (replica, number of its wave) -> result of the last operation, and of the sequences
    moving: dict[tuple[int, int], Future[TensorPayload]] = {}
    results: dict[tuple[int, int], Future[list[T]]] = {}
    for replica, (shard, direction, number) in _interleaved(order, num_shards, waves):
        key = (replica, number)
        index = WorkerIndex(shard, replica)
        wave = waves[replica][number]
        if shard == 0 and direction != "backward":
            # at most num_shards + 1 waves of a replica are in flight
            earlier = (replica, number - num_shards - 1)
            if earlier in moving:
                cluster.get([moving.pop(earlier)])
                progress.reach(progress.done + len(waves[replica][earlier[1]].numbers))
            moving[key] = at_hand(wave.tokens)
        inputs = value_of(moving[key])
        if shard == num_shards - 1:
            pair = cluster.submit_pair(index, at_end, number, inputs, wave, work)
            moving[key], results[key] = pair
        elif direction == "infer":
            step = _STEPS[direction]
            moving[key] = cluster.submit(index, step, number, inputs, passage.of_teacher)
        else:
            moving[key] = cluster.submit(index, _STEPS[direction], number, inputs)
    values = cluster.get(list(results.values()))
    progress.reach(len(passage.numbers))
    if passage.text is not None:
        _share_states(cluster, passage.text, waves)
    result_of: dict[int, T] = {}
    for (replica, number), of_wave in zip(results, values, strict=True):
        result_of.update(zip(waves[replica][number].numbers, of_wave, strict=True))
    return [result_of[number] for number in passage.numbers]


def _share_states(cluster: Cluster, text: str, waves: list[list[Wave]]) -> None:
    """Send the states of a text that each replica keeps to the other replicas.

    This follows the pass, because replicas would wait for each other during it.
    """
    if len(waves) == 1:
        return
    last_shard = cluster.placement.num_shards - 1
    owners = [WorkerIndex(last_shard, replica) for replica in range(len(waves))]
    futures = list[Future[None]]()
    for owner, own_waves in zip(owners, waves, strict=True):
        for wave in own_waves:
            sent = cluster.submit(owner, dense_states.kept_states, text, wave.numbers)
            states = value_of(sent)
            for receiver in owners:
                if receiver == owner:
                    continue
                futures.append(
                    cluster.submit(
                        receiver, dense_states.receive_states, text, wave.numbers, states
                    )
                )
    cluster.get(futures)


Operation = tuple[int, Literal["forward", "backward", "infer"], int]
"""(shard, direction, number of a wave).

On the last shard the forward operation includes the backward pass.
"""


def one_forward_one_backward(num_shards: int, num_waves: int) -> list[Operation]:
    """Return the operations of all shards in 1F1B order (Narayanan et al. 2019).

    Operations are sorted by the time at which they would start if all took equally long. At most
    ``num_shards - shard`` waves are in flight on a shard.
    """
    last = num_shards - 1
    starts: dict[Operation, int] = {}
    for wave in range(num_waves):
        for shard in range(num_shards):
            starts[shard, "forward", wave] = 2 * wave + shard
    for wave in range(num_waves):
        for shard in range(last):
            starts[shard, "backward", wave] = 2 * (wave + last) - shard
    # the sort is stable: a forward operation precedes a backward one of the same time
    return sorted(starts, key=starts.__getitem__)


def one_by_one(num_shards: int, num_waves: int) -> list[Operation]:
    """Return the operations of waves that pass forward only, one wave after the other."""
    operations: list[Operation] = []
    for wave in range(num_waves):
        for shard in range(num_shards):
            operations.append((shard, "infer", wave))
    return operations


_Order = Callable[[int, int], list[Operation]]
_SCHEDULES: dict[str, tuple[_Order, Callable[..., Any]]] = {
    "infer": (one_by_one, on_worker.infer_each),
    "train": (one_forward_one_backward, on_worker.forward_backward),
}
"""Kind of a pass -> order of its operations, and step of the last shard."""


def _interleaved(
    order: _Order, num_shards: int, waves: list[list[Wave]]
) -> Iterator[tuple[int, Operation]]:
    """Yield (replica, operation) for the waves of all replicas, which take turns."""
    turns: list[tuple[int, int, Operation]] = []
    for replica, own_waves in enumerate(waves):
        for turn, operation in enumerate(order(num_shards, len(own_waves))):
            turns.append((turn, replica, operation))
    for _, replica, operation in sorted(turns):
        yield replica, operation
