"""Schedules microbatches of sequences through the shards, on the coordinator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

from ray_surgeon.distributed import dense_states
from ray_surgeon.distributed import microbatch as on_worker
from ray_surgeon.distributed.cluster import Cluster, Future, Progress, at_hand, value_of
from ray_surgeon.distributed.collectives import TensorPayload
from ray_surgeon.distributed.microbatch import (
    Counts,
    Labels,
    Microbatch,
    Only,
    Pass,
    Tokens,
)
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

    Microbatches pass the shards in one-forward-one-backward order. A bounded number of them is
    submitted ahead.

    Args:
        cluster: with loaded workers, whose hooks gather statistics.
        sequences: [num_sequences, sequence_length] tokens.
        labels: targets of the predictions.
        only: numbers of the sequences to run; None for all.
        counts: [num_sequences, sequence_length], whether a token counts as a prediction; None if
            all do.
    """
    one_pass = Pass(
        tokens=sequences,
        counts=counts,
        only=only,
        text=dense_states.CALIBRATION if labels.remembers else None,
    )
    return run_pass(cluster, one_pass, labels)


def run_pass(
    cluster: Cluster,
    one_pass: Pass,
    work: Labels | on_worker.OfEach[T],
) -> list[T]:
    """Run sequences through the shards, and return the result of each sequence.

    Args:
        cluster: with loaded workers.
        one_pass: the sequences.
        work: the work at the end: labels, to go backward from the loss, or a function that turns
            the hidden states of each sequence into its result.
    """
    num_shards = cluster.placement.num_shards
    progress = cluster.progress
    if one_pass.of_teacher or (isinstance(work, Labels) and work.is_step):
        progress = Progress()  # the step that the pass is part of counts its own progress
    progress.begin(len(one_pass.numbers), "sequences", one_pass.tokens.shape[1])
    order, at_end = _SCHEDULES["train" if isinstance(work, Labels) else "infer"]
    microbatches = one_pass.microbatches(cluster.placement, cluster.stores)
    # (replica, number of its microbatch) -> result of the last operation, and of the sequences
    moving: dict[tuple[int, int], Future[TensorPayload]] = {}
    results: dict[tuple[int, int], Future[list[T]]] = {}
    for replica, (shard, direction, number) in _interleaved(
        order, num_shards, microbatches
    ):
        key = (replica, number)
        index = WorkerIndex(shard, replica)
        microbatch = microbatches[replica][number]
        if shard == 0 and direction != "backward":
            # at most num_shards + 1 microbatches of a replica are in flight
            earlier = (replica, number - num_shards - 1)
            if earlier in moving:
                cluster.get([moving.pop(earlier)])
                progress.reach(
                    progress.done + len(microbatches[replica][earlier[1]].numbers)
                )
            moving[key] = at_hand(microbatch.tokens)
        inputs = value_of(moving[key])
        if shard == num_shards - 1:
            pair = cluster.submit_pair(index, at_end, number, inputs, microbatch, work)
            moving[key], results[key] = pair
        elif direction == "infer":
            step = _STEPS[direction]
            moving[key] = cluster.submit(index, step, number, inputs, one_pass.of_teacher)
        else:
            moving[key] = cluster.submit(index, _STEPS[direction], number, inputs)
    values = cluster.get(list(results.values()))
    progress.reach(len(one_pass.numbers))
    if one_pass.text is not None:
        _share_states(cluster, one_pass.text, microbatches)
    result_of: dict[int, T] = {}
    for (replica, number), of_wave in zip(results, values, strict=True):
        result_of.update(zip(microbatches[replica][number].numbers, of_wave, strict=True))
    return [result_of[number] for number in one_pass.numbers]


def _share_states(
    cluster: Cluster, text: str, microbatches: list[list[Microbatch]]
) -> None:
    """Send the states of a text that each replica keeps to the other replicas.

    This follows the pass, because replicas would wait for each other during it.
    """
    if len(microbatches) == 1:
        return
    last_shard = cluster.placement.num_shards - 1
    owners = [WorkerIndex(last_shard, replica) for replica in range(len(microbatches))]
    futures = list[Future[None]]()
    for owner, own_waves in zip(owners, microbatches, strict=True):
        for microbatch in own_waves:
            sent = cluster.submit(
                owner, dense_states.kept_states, text, microbatch.numbers
            )
            states = value_of(sent)
            for receiver in owners:
                if receiver == owner:
                    continue
                futures.append(
                    cluster.submit(
                        receiver,
                        dense_states.receive_states,
                        text,
                        microbatch.numbers,
                        states,
                    )
                )
    cluster.get(futures)


Operation = tuple[int, Literal["forward", "backward", "infer"], int]
"""(shard, direction, number of a microbatch).

On the last shard the forward operation includes the backward pass.
"""


def one_forward_one_backward(num_shards: int, num_waves: int) -> list[Operation]:
    """Return the operations of all shards in 1F1B order (Narayanan et al. 2019).

    Operations are sorted by the time at which they would start if all took equally long. At most
    ``num_shards - shard`` microbatches are in flight on a shard.
    """
    last = num_shards - 1
    starts: dict[Operation, int] = {}
    for microbatch in range(num_waves):
        for shard in range(num_shards):
            starts[shard, "forward", microbatch] = 2 * microbatch + shard
    for microbatch in range(num_waves):
        for shard in range(last):
            starts[shard, "backward", microbatch] = 2 * (microbatch + last) - shard
    # the sort is stable: a forward operation precedes a backward one of the same time
    return sorted(starts, key=starts.__getitem__)


def one_by_one(num_shards: int, num_waves: int) -> list[Operation]:
    """Return the operations of microbatches that pass forward only, one after the other."""
    operations: list[Operation] = []
    for microbatch in range(num_waves):
        for shard in range(num_shards):
            operations.append((shard, "infer", microbatch))
    return operations


_Order = Callable[[int, int], list[Operation]]
_SCHEDULES: dict[str, tuple[_Order, Callable[..., Any]]] = {
    "infer": (one_by_one, on_worker.infer_each),
    "train": (one_forward_one_backward, on_worker.forward_backward),
}
"""Kind of a pass -> order of its operations, and step of the last shard."""


def _interleaved(
    order: _Order, num_shards: int, microbatches: list[list[Microbatch]]
) -> Iterator[tuple[int, Operation]]:
    """Yield (replica, operation) for the microbatches of all replicas, which take turns."""
    turns: list[tuple[int, int, Operation]] = []
    for replica, own_waves in enumerate(microbatches):
        for turn, operation in enumerate(order(num_shards, len(own_waves))):
            turns.append((turn, replica, operation))
    for _, replica, operation in sorted(turns):
        yield replica, operation
