"""Lets the model write texts token by token, while keys and values stay on the workers.

Texts of a batch all start at position 0, without padding. While the prompt of a text lasts, its
next token is fed in place of the drawn one.

The texts depend on the model and on `GenerationRequest` alone: draws depend on the seed and the
number of the text, batches on the numbers and lengths of texts, and the rows that leave a batch on
tokens that are a fixed number of steps old. Shards, replicas and backends change nothing.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ray_surgeon.distributed.cluster import Cluster, Future, at_hand, value_of
from ray_surgeon.distributed.collectives import TensorPayload
from ray_surgeon.distributed.placement import WorkerIndex
from ray_surgeon.distributed.worker import TextBatch, Worker

TEXTS_TOGETHER = 16
"""Largest number of long texts in a batch; weights are read once for all of them."""
TOKENS_TOGETHER = 8192
"""Largest number of tokens in a batch of more than `TEXTS_TOGETHER` short texts."""
PREFILL_TOKENS = 1024
"""Tokens of prompts that pass the shards in one call."""
_STEPS_IN_FLIGHT = 4
"""Steps that are submitted ahead of the tokens that have come back."""
_FEWER_ROWS = 0.75
"""Ended texts leave a batch once at most this fraction of its rows is still being written."""


def texts_together(length: int) -> int:
    """Return the largest number of texts of `length` tokens that are written together."""
    return max(TEXTS_TOGETHER, TOKENS_TOGETHER // length)


@dataclass(frozen=True)
class GenerationRequest:
    """Texts that the model is to write."""

    prompts: tuple[tuple[int, ...], ...]  # tokens before each text, at least one
    num_tokens: int  # largest number of tokens of a text, without its prompt
    temperature: float = 1.0  # logits are divided by it; 0 takes the most likely token
    seed: int = 0  # of the draws
    ends: frozenset[int] = frozenset()  # a text ends with the first of these tokens
    # largest number of tokens of a prompt and its text together
    max_length: int = sys.maxsize
    # largest number of texts in a batch; None: see `texts_together`
    num_together: int | None = None

    def room(self, number: int) -> int:
        """Return the largest number of tokens that a text may have."""
        return max(0, min(self.num_tokens, self.max_length - len(self.prompts[number])))

    def num_steps(self, numbers: Sequence[int]) -> int:
        """Return the number of steps of a batch if no text ends early."""
        return self._longest(numbers) - min(len(self.prompts[i]) for i in numbers)

    def _longest(self, numbers: Sequence[int]) -> int:
        """Return the largest number of tokens of a prompt and its text."""
        return max(len(self.prompts[i]) + self.room(i) for i in numbers)

    def batches(self) -> list[list[int]]:
        """Return the numbers of the texts of each batch.

        Batches have nearly equal numbers of texts, which are of similar length.
        """
        numbers = [i for i in range(len(self.prompts)) if self.room(i)]
        if not numbers:
            return []
        numbers.sort(key=lambda i: len(self.prompts[i]))
        num_together = self.num_together or texts_together(self._longest(numbers))
        num_batches = -(-len(numbers) // num_together)
        return [part.tolist() for part in np.array_split(np.array(numbers), num_batches)]


# On a worker


def begin(
    worker: Worker, batch: int, numbers: Sequence[int], wanted: GenerationRequest
) -> None:
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
        batch: number of the batch.
        inputs: tokens [m, n] for the first shard, hidden states [m, n, d] for others.
        rows: the rows of the batch that continue; None for all.

    Returns:
        Hidden states [m, n, d]; from the last shard the next tokens [m, 1].
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
        wanted: the prompts, and how to continue them.

    Returns:
        The continuation of each prompt: int64 tokens up to and including the first of `ends`; no
        tokens if the prompt leaves no room.
    """
    writer = _Writer(cluster, wanted, [[] for _ in wanted.prompts])
    batches = wanted.batches()
    waiting = iter(enumerate(batches))
    # one batch per worker at a time keeps all workers busy
    num_slots = min(len(batches), len(cluster.placement.workers))
    slots: list[Iterator[int]] = []
    for slot in range(num_slots):
        replica = slot % cluster.placement.num_replicas
        slots.append(writer.write_batches(waiting, replica))
    cluster.progress.begin(sum(map(wanted.num_steps, batches)), "tokens")
    for steps in zip_longest(*slots, fillvalue=0):
        cluster.progress.reach(cluster.progress.done + sum(steps))
    return [np.array(text, dtype=np.int64) for text in writer.texts]


class _Step(NamedTuple):
    """A submitted step of a batch."""

    numbers: list[int]  # of the texts
    position: int  # of the tokens that the step returns
    tokens: Future[TensorPayload]  # [m, 1]


@dataclass(frozen=True)
class _Writer:
    """Writes batches of texts."""

    cluster: Cluster
    wanted: GenerationRequest
    texts: list[list[int]]  # tokens of every text that have come so far

    def write_batches(
        self, waiting: Iterator[tuple[int, list[int]]], replica: int
    ) -> Iterator[int]:
        """Write waiting batches one after the other, until none is left; see `write`."""
        for batch, numbers in waiting:
            yield from self.write(batch, numbers, replica)

    def write(self, batch: int, numbers: list[int], replica: int) -> Iterator[int]:
        """Write a batch on one replica, step by step.

        Args:
            batch: number of the batch.
            numbers: numbers of its texts.
            replica: which replica writes it.

        Yields:
            Number of steps that were done since the last time.
        """
        cluster = self.cluster
        num_shards = cluster.placement.num_shards
        workers = [WorkerIndex(shard, replica) for shard in range(num_shards)]
        own = replace(self.wanted, prompts=tuple(self.wanted.prompts[i] for i in numbers))
        cluster.get(
            [cluster.submit(worker, begin, batch, numbers, own) for worker in workers]
        )
        shortest = min(map(len, own.prompts))
        inputs = self._prefill(workers, batch, own.prompts)
        in_flight = deque[_Step]()
        steps_left = self.wanted.num_steps(numbers)
        for position in range(shortest, shortest + steps_left):
            rows = self._rows_left(numbers)
            if not rows:
                break
            if len(rows) <= _FEWER_ROWS * len(numbers):
                numbers = [numbers[row] for row in rows]
                inputs = self._pass(workers, batch, inputs, rows)
            else:
                inputs = self._pass(workers, batch, inputs)
            in_flight.append(_Step(numbers, position, inputs))
            if len(in_flight) > _STEPS_IN_FLIGHT:
                self._take(in_flight.popleft())
            steps_left -= 1
            yield 1
        while in_flight and self._rows_left(numbers):
            self._take(in_flight.popleft())
            yield 0
        cluster.get([cluster.submit(worker, end, batch) for worker in workers])
        yield steps_left

    def _prefill(
        self, workers: list[WorkerIndex], batch: int, prompts: Sequence[Sequence[int]]
    ) -> Future[TensorPayload]:
        """Submit the tokens before the end of the shortest prompt, piece by piece.

        Returns:
            The last piece, which is not submitted, because its step has the first new tokens.
        """
        shortest = min(map(len, prompts))
        tokens = np.array([prompt[:shortest] for prompt in prompts], dtype=np.int64)
        size = max(1, PREFILL_TOKENS // len(prompts))
        *pieces, last = [
            at_hand(tokens[:, i : i + size]) for i in range(0, shortest, size)
        ]
        for piece in pieces:
            self._pass(workers, batch, piece)
        return last

    def _pass(
        self,
        workers: list[WorkerIndex],
        batch: int,
        inputs: Future[TensorPayload],
        rows: list[int] | None = None,
    ) -> Future[TensorPayload]:
        """Submit a step of a batch to all shards in turn; see `write_on`."""
        for worker in workers:
            inputs = self.cluster.submit(worker, write_on, batch, value_of(inputs), rows)
        return inputs

    def _rows_left(self, numbers: list[int]) -> list[int]:
        """Return the rows of a batch whose texts have not ended."""
        return [row for row, number in enumerate(numbers) if not self._has_ended(number)]

    def _has_ended(self, number: int) -> bool:
        text = self.texts[number]
        if len(text) == self.wanted.room(number):
            return True
        return bool(text) and text[-1] in self.wanted.ends

    def _take(self, step: _Step) -> None:
        """Wait for the tokens of a step, and add them to the texts that have not ended."""
        (tokens,) = self.cluster.get([step.tokens])
        for number, token in zip(step.numbers, tokens[:, 0].tolist(), strict=True):
            is_in_prompt = step.position < len(self.wanted.prompts[number])
            if not is_in_prompt and not self._has_ended(number):
                self.texts[number].append(token)
