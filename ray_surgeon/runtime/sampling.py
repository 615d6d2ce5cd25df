"""Lets the model write token by token, while keys and values stay on workers.

Texts that are written together all start at position 0, without padding. While a text's own prompt
is not used up, the next token of the prompt is fed in place of the drawn one.

What is written depends on the model and on `Wanted` alone: the draws of a text on the seed and its
number, the texts of a batch on numbers and lengths, and the rows that are left out of a batch on
tokens that are a fixed number of steps old. Shards, replicas and backends change nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ray_surgeon.runtime.cluster import Cluster, Future, at_hand, value_of
from ray_surgeon.runtime.collectives import TensorPayload
from ray_surgeon.runtime.placement import WorkerIndex
from ray_surgeon.runtime.wave import token_payload
from ray_surgeon.runtime.writing import Wanted, begin, end, texts_together, write_on

PREFILL_TOKENS = 1024
"""Tokens of prompts that pass the shards in one call."""
_STEPS_IN_FLIGHT = 4
"""Steps that are submitted ahead of the tokens that have come back."""
_FEWER_ROWS = 0.75
"""Ended texts are left out of a batch when no more than this fraction of its rows still writes."""


def num_batches(num_texts: int, length: int) -> int:
    """Return in how many batches texts of so many tokens are written, whatever the cluster is."""
    return -(-num_texts // texts_together(length))


# On a worker


# On the coordinator

_Step: TypeAlias = tuple[list[int], int, Future[TensorPayload]]
"""Numbers of the texts of a batch, position of the tokens that come of a step, and these [m, 1]."""


def write_texts(cluster: Cluster, wanted: Wanted) -> list[NDArray[np.int64]]:
    """Let the model write.

    Args:
        cluster: with loaded workers.
        wanted: prompts and what is to follow them.

    Returns:
        For each prompt what follows it, int64 tokens up to and including the first of `ends`; no
        tokens if its prompt leaves no room.
    """
    texts: list[list[int]] = [[] for _ in wanted.prompts]
    batches = wanted.batches()
    waiting = iter(enumerate(batches))

    def write_waiting(replica: int) -> Iterator[int]:
        for batch in waiting:
            yield from _write_batch(cluster, wanted, *batch, replica, texts)

    num_replicas = cluster.placement.num_replicas
    # so many batches at once keep all workers busy
    num_slots = min(len(batches), cluster.placement.num_shards * num_replicas)
    slots = [write_waiting(slot % num_replicas) for slot in range(num_slots)]
    done = 0
    cluster.progress.begin(sum(map(wanted.num_steps, batches)), "tokens")
    for steps in zip_longest(*slots, fillvalue=0):
        done += sum(steps)
        cluster.progress.reach(done)
    return [np.array(text, dtype=np.int64) for text in texts]


def _write_batch(
    cluster: Cluster,
    wanted: Wanted,
    batch: int,
    numbers: list[int],
    replica: int,
    texts: list[list[int]],
) -> Iterator[int]:
    """Write a batch step by step, and yield how many of its steps are done with each.

    Args:
        cluster: with loaded workers.
        wanted: all texts.
        batch: its number.
        numbers: of its texts.
        replica: that writes it.
        texts: of all numbers; tokens are added as they come.
    """
    workers = [WorkerIndex(shard, replica) for shard in range(cluster.placement.num_shards)]

    def pass_on(
        inputs: Future[TensorPayload], rows: list[int] | None = None
    ) -> Future[TensorPayload]:
        for worker in workers:
            inputs = cluster.submit(worker, write_on, batch, value_of(inputs), rows)
        return inputs

    def writing() -> list[int]:
        """Return the rows that have not ended."""
        return [row for row, n in enumerate(numbers) if not wanted.has_ended(n, texts[n])]

    own = replace(wanted, prompts=tuple(wanted.prompts[i] for i in numbers))
    cluster.get([cluster.submit(worker, begin, batch, numbers, own) for worker in workers])
    shortest = min(map(len, own.prompts))
    *pieces, inputs = _pieces([prompt[:shortest] for prompt in own.prompts])
    for piece in pieces:
        pass_on(piece)
    in_flight = deque[_Step]()
    steps_left = wanted.num_steps(numbers)
    for position in range(shortest, shortest + steps_left):
        if not (rows := writing()):
            break
        leaves_out = len(rows) <= _FEWER_ROWS * len(numbers)
        if leaves_out:
            numbers = [numbers[row] for row in rows]
        inputs = pass_on(inputs, rows if leaves_out else None)
        in_flight.append((numbers, position, inputs))
        if len(in_flight) > _STEPS_IN_FLIGHT:
            _take(cluster, wanted, texts, in_flight)
        steps_left -= 1
        yield 1
    while in_flight and writing():
        _take(cluster, wanted, texts, in_flight)
        yield 0
    cluster.get([cluster.submit(worker, end, batch) for worker in workers])
    yield steps_left


def _pieces(prompts: Sequence[Sequence[int]]) -> list[Future[TensorPayload]]:
    """Return prompts of one length in pieces that pass the shards in one call each."""
    tokens = np.array(prompts, dtype=np.int64)
    size = max(1, PREFILL_TOKENS // len(tokens))
    starts = range(0, tokens.shape[1], size)
    return [at_hand(token_payload(tokens[:, start : start + size])) for start in starts]


def _take(
    cluster: Cluster, wanted: Wanted, texts: list[list[int]], in_flight: deque[_Step]
) -> None:
    """Add the tokens of the oldest step to the texts that have not ended."""
    numbers, position, payload = in_flight.popleft()
    (tokens,) = cluster.get([payload])
    for number, token in zip(numbers, tokens.array[:, 0].tolist(), strict=True):
        if position >= len(wanted.prompts[number]) and not wanted.has_ended(number, texts[number]):
            texts[number].append(token)
