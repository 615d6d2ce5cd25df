"""The order in which micro-batches pass the shards: pure functions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Literal

Operation = tuple[int, Literal["forward", "backward", "infer"], int]
"""(shard, direction, micro-batch).

On the last shard the backward pass belongs to the forward operation.
"""


def one_forward_one_backward(
    shard: int, num_shards: int, num_micro_batches: int
) -> Iterator[Operation]:
    """Yield the operations of one shard in 1F1B order (Narayanan et al. 2019).

    At most ``num_shards - shard`` waves are in flight.
    """
    warm_up = min(num_shards - 1 - shard, num_micro_batches)
    for micro_batch in range(num_micro_batches + warm_up):
        if micro_batch < num_micro_batches:
            yield shard, "forward", micro_batch
        if shard != num_shards - 1 and micro_batch >= warm_up:
            yield shard, "backward", micro_batch - warm_up


def submission_order(num_shards: int, num_micro_batches: int) -> list[Operation]:
    """Merge the shards' 1F1B orders; an operation comes after those that it needs."""
    queues = [
        deque(one_forward_one_backward(shard, num_shards, num_micro_batches))
        for shard in range(num_shards)
    ]
    done: dict[Operation, None] = {}
    while any(queues):
        for queue in queues:
            while queue and _before(queue[0], num_shards) <= done.keys():
                done[queue.popleft()] = None
    return list(done)


def one_by_one(num_shards: int, num_micro_batches: int) -> list[Operation]:
    """Return the order in which micro-batches pass forward only."""
    return [
        (shard, "infer", micro_batch)
        for micro_batch in range(num_micro_batches)
        for shard in range(num_shards)
    ]


def _before(operation: Operation, num_shards: int) -> set[Operation]:
    """Return the operation of another shard that must come before this one, if any."""
    shard, direction, micro_batch = operation
    if direction == "forward":
        return {(shard - 1, "forward", micro_batch)} if shard else set()
    above_is_last = shard + 1 == num_shards - 1
    return {(shard + 1, "forward" if above_is_last else "backward", micro_batch)}
