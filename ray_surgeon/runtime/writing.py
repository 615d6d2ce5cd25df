"""Lets the model write token by token, while keys and values stay on workers.

Texts that are written together all start at position 0, without padding. While a text's own prompt
is not used up, the next token of the prompt is fed in place of the drawn one.

The texts depend on the model and on `GenerationRequest` alone: the draws of a text on the seed and
its number, the texts of a batch on numbers and lengths, and the rows that are left out of a batch
on tokens that are a fixed number of steps old. Shards, replicas and backends change nothing.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray

from ray_surgeon.runtime.cluster import Cluster, Future, at_hand, value_of
from ray_surgeon.runtime.collectives import TensorPayload
from ray_surgeon.runtime.placement import WorkerIndex
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.runtime.worker_state import TextBatch

TEXTS_TOGETHER = 16
"""Texts in a batch, at most, if they are long; weights are read once for all of them."""
TOKENS_TOGETHER = 8192
"""Tokens in a batch, at most, if texts are short and so more than these many are in it."""
PREFILL_TOKENS = 1024
"""Tokens of prompts that pass the shards in one call."""
_STEPS_IN_FLIGHT = 4
"""Steps that are submitted ahead of the tokens that have come back."""
_FEWER_ROWS = 0.75
"""Ended texts are left out of a batch when no more than this fraction of its rows still writes."""


def texts_together(length: int) -> int:
    """Return how many texts of so many tokens are written together, at most."""
    return max(TEXTS_TOGETHER, TOKENS_TOGETHER // length)


@dataclass(frozen=True)
class GenerationRequest:
    """Texts that the model is to write."""

    prompts: tuple[tuple[int, ...], ...]  # one a text: tokens that stand before it, one or more
    num_tokens: int  # of each text, at most, without its prompt
    temperature: float = 1.0  # logits are divided by it; 0 takes the most likely token
    seed: int = 0  # of the draws
    ends: frozenset[int] = frozenset()  # a text ends with the first of these tokens
    max_length: int = sys.maxsize  # tokens of a prompt and its text together, at most
    num_together: int | None = None  # texts in a batch, at most; None: see `texts_together`

    def room(self, number: int) -> int:
        """Return how many tokens a text may have."""
        return max(0, min(self.num_tokens, self.max_length - len(self.prompts[number])))

    def num_steps(self, numbers: Sequence[int]) -> int:
        """Return in how many steps a batch is written if no text ends before it must."""
        lengths = {i: len(self.prompts[i]) for i in numbers}
        return max(lengths[i] + self.room(i) for i in numbers) - min(lengths.values())

    def batches(self) -> list[list[int]]:
        """Return the numbers of the texts of each batch: nearly equally many, of similar length."""
        lengths = [len(prompt) for prompt in self.prompts]
        numbers = sorted((i for i in range(len(lengths)) if self.room(i)), key=lengths.__getitem__)
        if not numbers:
            return []
        longest = max(lengths[i] + self.room(i) for i in numbers)
        num_batches = -(-len(numbers) // (self.num_together or texts_together(longest)))
        return [part.tolist() for part in np.array_split(np.array(numbers), num_batches)]


# On a worker


def begin(worker: Worker, batch: int, numbers: Sequence[int], wanted: GenerationRequest) -> None:
    """Prepare a batch of the texts with these numbers, whose prompts are all that `wanted` has."""
    chances = []
    for number in numbers:
        generator = torch.Generator().manual_seed(wanted.seed + 1_000_003 * number)
        chances.append(torch.rand(wanted.num_tokens, generator=generator))
    worker.state.writing[batch] = TextBatch(
        worker.shard, worker.runner, wanted.prompts, chances, wanted.temperature
    )


def write_on(
    worker: Worker, batch: int, inputs: TensorPayload, rows: list[int] | None
) -> TensorPayload:
    """Run the next tokens of a batch through a shard.

    Args:
        worker: with the shard.
        batch: its number.
        inputs: tokens [m, n] for the first shard, hidden states [m, n, d] for others.
        rows: the rows of the batch that go on from here; None: all.

    Returns:
        Hidden states [m, n, d], from the last shard the tokens [m, 1] that follow.
    """
    text = worker.state.writing[batch]
    received = worker.unpack(inputs)
    if rows is not None:
        chosen = torch.tensor(rows, device=received.device)
        text.keep_rows(worker.shard, worker.runner, chosen)
        received = received[chosen] if worker.shard.blocks.is_first else received
    (hidden,) = worker.runner.infer(received, text.cache)
    text.num_tokens += received.shape[1]
    if worker.shard.blocks.is_last:
        hidden = text.choose(worker.shard, hidden[:, -1])[:, None]
    return worker.pack(hidden)


def end(worker: Worker, batch: int) -> None:
    """Forget a batch."""
    del worker.state.writing[batch]


# On the coordinator


def write_texts(cluster: Cluster, wanted: GenerationRequest) -> list[NDArray[np.int64]]:
    """Let the model write.

    Args:
        cluster: with loaded workers.
        wanted: prompts and what is to follow them.

    Returns:
        For each prompt what follows it, int64 tokens up to and including the first of `ends`; no
        tokens if its prompt leaves no room.
    """
    writer = _Writer(cluster, wanted, [[] for _ in wanted.prompts])
    batches = wanted.batches()
    waiting = iter(enumerate(batches))

    def write_waiting(replica: int) -> Iterator[int]:
        for batch, numbers in waiting:
            yield from writer.write(batch, numbers, replica)

    # so many batches at once keep all workers busy
    num_slots = min(len(batches), len(cluster.placement.workers))
    slots = [write_waiting(slot % cluster.placement.num_replicas) for slot in range(num_slots)]
    cluster.progress.begin(sum(map(wanted.num_steps, batches)), "tokens")
    for steps in zip_longest(*slots, fillvalue=0):
        cluster.progress.reach(cluster.progress.done + sum(steps))
    return [np.array(text, dtype=np.int64) for text in writer.texts]


@dataclass(frozen=True)
class _Writer:
    """Writes batches of texts."""

    cluster: Cluster
    wanted: GenerationRequest
    texts: list[list[int]]  # tokens of every text that have come so far

    def write(self, batch: int, numbers: list[int], replica: int) -> Iterator[int]:
        """Write a batch of the texts with these numbers, and yield how many of its steps are done.

        It is written step by step, on one replica.
        """
        cluster = self.cluster
        workers = [WorkerIndex(shard, replica) for shard in range(cluster.placement.num_shards)]

        def pass_on(
            inputs: Future[TensorPayload], rows: list[int] | None = None
        ) -> Future[TensorPayload]:
            for worker in workers:
                inputs = cluster.submit(worker, write_on, batch, value_of(inputs), rows)
            return inputs

        own = replace(self.wanted, prompts=tuple(self.wanted.prompts[i] for i in numbers))
        cluster.get([cluster.submit(worker, begin, batch, numbers, own) for worker in workers])
        shortest = min(map(len, own.prompts))
        tokens = np.array([prompt[:shortest] for prompt in own.prompts], dtype=np.int64)
        size = max(1, PREFILL_TOKENS // len(numbers))
        *pieces, inputs = [at_hand(tokens[:, i : i + size]) for i in range(0, shortest, size)]
        for piece in pieces:
            pass_on(piece)
        # numbers of the texts, position of the tokens that come of a step, and these [m, 1]
        in_flight = deque[tuple[list[int], int, Future[TensorPayload]]]()
        steps_left = self.wanted.num_steps(numbers)
        for position in range(shortest, shortest + steps_left):
            if not (rows := self._writing(numbers)):
                break
            leaves_out = len(rows) <= _FEWER_ROWS * len(numbers)
            if leaves_out:
                numbers = [numbers[row] for row in rows]
            inputs = pass_on(inputs, rows if leaves_out else None)
            in_flight.append((numbers, position, inputs))
            if len(in_flight) > _STEPS_IN_FLIGHT:
                self._take(*in_flight.popleft())
            steps_left -= 1
            yield 1
        while in_flight and self._writing(numbers):
            self._take(*in_flight.popleft())
            yield 0
        cluster.get([cluster.submit(worker, end, batch) for worker in workers])
        yield steps_left

    def _writing(self, numbers: list[int]) -> list[int]:
        """Return the rows of a batch that have not ended."""
        return [row for row, number in enumerate(numbers) if not self._has_ended(number)]

    def _has_ended(self, number: int) -> bool:
        """Whether what was written so far of a text is all of it."""
        text = self.texts[number]
        return len(text) == self.wanted.room(number) or not self.wanted.ends.isdisjoint(text[-1:])

    def _take(self, numbers: list[int], position: int, payload: Future[TensorPayload]) -> None:
        """Add the tokens of a step to the texts that have not ended."""
        (tokens,) = self.cluster.get([payload])
        for number, token in zip(numbers, tokens[:, 0].tolist(), strict=True):
            if position >= len(self.wanted.prompts[number]) and not self._has_ended(number):
                self.texts[number].append(token)
