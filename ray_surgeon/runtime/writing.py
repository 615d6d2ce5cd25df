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
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ray_surgeon.models.loss import next_tokens
from ray_surgeon.runtime.cluster import Cluster, Future, at_hand, value_of
from ray_surgeon.runtime.collectives import TensorPayload
from ray_surgeon.runtime.placement import WorkerIndex
from ray_surgeon.runtime.worker import Worker

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


class _Batch:
    """Texts that are being written together, a row each."""

    def __init__(self, worker: Worker, numbers: Sequence[int], wanted: GenerationRequest) -> None:
        """Begin texts with these numbers, whose prompts are all that `wanted` has."""
        self.cache = worker.runner.new_cache()  # keys and values of all tokens so far
        self.num_tokens = 0  # so far, prompts included
        if not worker.shard.blocks.is_last:
            return
        prompts = [torch.tensor(prompt) for prompt in wanted.prompts]
        seeds = (wanted.seed + 1_000_003 * number for number in numbers)
        generators = (torch.Generator().manual_seed(seed) for seed in seeds)
        chances = [torch.rand(wanted.num_tokens, generator=drawing) for drawing in generators]
        # what the last shard needs to choose the next tokens: [m, longest prompt] int64, zeros
        # after shorter ones; [m] int64; and [m, num_tokens] in [0, 1)
        self._prompts = pad_sequence(prompts, batch_first=True).to(worker.device)
        self._lengths = torch.tensor([len(prompt) for prompt in prompts], device=worker.device)
        self._chances = torch.stack(chances).to(worker.device)
        self._temperature = wanted.temperature

    def keep_rows(self, worker: Worker, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.cache.batch_select_indices(rows)
        kept = worker.runner.new_cache()  # one that has no room set aside for the rows before
        kept.layers = self.cache.layers
        self.cache = kept
        if worker.shard.blocks.is_last:
            self._prompts = self._prompts[rows]
            self._lengths = self._lengths[rows]
            self._chances = self._chances[rows]

    def choose(self, worker: Worker, hidden: Tensor) -> Tensor:
        """Return the tokens [m] that follow, after the last hidden states [m, d] before them."""
        position = self.num_tokens
        own = (position - self._lengths).clamp(0, self._chances.shape[1] - 1)
        chances = self._chances.gather(1, own[:, None])[:, 0]
        drawn = next_tokens(hidden, worker.shard.head_weight, chances, self._temperature)
        if position >= self._prompts.shape[1]:
            return drawn
        return torch.where(position < self._lengths, self._prompts[:, position], drawn)


class _Writing(dict[int, _Batch]):
    """The batches that a worker is writing, by their numbers."""


def begin(worker: Worker, batch: int, numbers: Sequence[int], wanted: GenerationRequest) -> None:
    """Prepare a batch; see `_Batch`."""
    worker.keeping(_Writing)[batch] = _Batch(worker, numbers, wanted)


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
    text = worker.kept(_Writing)[batch]
    received = worker.unpack(inputs)
    if rows is not None:
        chosen = torch.tensor(rows, device=received.device)
        text.keep_rows(worker, chosen)
        received = received[chosen] if worker.shard.blocks.is_first else received
    (hidden,) = worker.runner.infer(received, text.cache)
    text.num_tokens += received.shape[1]
    if worker.shard.blocks.is_last:
        hidden = text.choose(worker, hidden[:, -1])[:, None]
    return worker.pack(hidden)


def end(worker: Worker, batch: int) -> None:
    """Forget a batch."""
    del worker.kept(_Writing)[batch]


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
