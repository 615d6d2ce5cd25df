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
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.placement import WorkerIndex
from ray_surgeon.runtime.transport import TensorPayload
from ray_surgeon.runtime.wave import token_payload
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


@dataclass(frozen=True)
class Wanted:
    """Texts that the model is to write."""

    prompts: tuple[tuple[int, ...], ...]  # one a text: tokens that stand before it, one or more
    num_tokens: int  # of each text, at most, without its prompt
    temperature: float = 1.0  # logits are divided by it; 0 takes the most likely token
    seed: int = 0  # of the draws
    ends: frozenset[int] = frozenset()  # a text ends with the first of these tokens
    max_length: int | None = None  # tokens of a prompt and its text together, at most
    num_together: int | None = None  # texts in a batch, at most; None: see `texts_together`

    def room(self, number: int) -> int:
        """Return how many tokens a text may have."""
        if self.max_length is None:
            return self.num_tokens
        return max(0, min(self.num_tokens, self.max_length - len(self.prompts[number])))

    def batches(self) -> list[list[int]]:
        """Return the numbers of the texts of each batch: nearly equally many, of similar length."""
        lengths = [len(prompt) for prompt in self.prompts]
        numbers = sorted((i for i in range(len(lengths)) if self.room(i)), key=lengths.__getitem__)
        if not numbers:
            return []
        longest = max(lengths[i] + self.room(i) for i in numbers)
        num_batches = -(-len(numbers) // (self.num_together or texts_together(longest)))
        return [part.tolist() for part in np.array_split(np.array(numbers), num_batches)]


def num_batches(num_texts: int, length: int) -> int:
    """Return in how many batches texts of so many tokens are written, whatever the cluster is."""
    return -(-num_texts // texts_together(length))


def texts_together(length: int) -> int:
    """Return how many texts of so many tokens are written together, at most."""
    return max(TEXTS_TOGETHER, TOKENS_TOGETHER // length)


# On a worker


@dataclass
class _Draws:
    """What the last shard needs to choose the next tokens of the rows of a batch."""

    prompts: Tensor  # [m, longest prompt] int64, zeros after shorter ones
    lengths: Tensor  # [m] int64, of the prompts
    chances: Tensor  # [m, num_tokens] in [0, 1)
    temperature: float

    @staticmethod
    def of(wanted: Wanted, numbers: Sequence[int], device: torch.device) -> _Draws:
        """Return those of the texts with these numbers."""
        lengths = [len(prompt) for prompt in wanted.prompts]
        prompts = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        chances = torch.empty(len(lengths), wanted.num_tokens)
        for row, (number, prompt) in enumerate(zip(numbers, wanted.prompts, strict=True)):
            prompts[row, : len(prompt)] = torch.tensor(prompt)
            generator = torch.Generator().manual_seed(wanted.seed + 1_000_003 * number)
            chances[row] = torch.rand(wanted.num_tokens, generator=generator)
        of_prompts = torch.tensor(lengths, device=device)
        return _Draws(prompts.to(device), of_prompts, chances.to(device), wanted.temperature)

    def of_rows(self, rows: Tensor) -> _Draws:
        """Return those of some rows."""
        return _Draws(self.prompts[rows], self.lengths[rows], self.chances[rows], self.temperature)

    def choose(self, worker: Worker, hidden: Tensor, position: int) -> Tensor:
        """Return the tokens [m] at a position, after the last hidden states [m, d] before it."""
        own = (position - self.lengths).clamp(0, self.chances.shape[1] - 1)
        chances = self.chances.gather(1, own[:, None])[:, 0]
        drawn = worker.shard.next_tokens(hidden, chances, self.temperature)
        if position >= self.prompts.shape[1]:
            return drawn
        return torch.where(position < self.lengths, self.prompts[:, position], drawn)


@dataclass
class _Batch:
    """Texts that are being written together."""

    cache: DynamicCache  # keys and values of all tokens so far
    draws: _Draws | None  # on the last shard
    num_tokens: int = 0  # so far, prompts included

    def keep_rows(self, worker: Worker, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.cache.batch_select_indices(rows)
        kept = worker.runner.new_cache()  # one that has no room set aside for the rows before
        kept.layers = self.cache.layers
        self.cache = kept
        if self.draws is not None:
            self.draws = self.draws.of_rows(rows)


@dataclass
class _Writing:
    """Everything that a worker is writing."""

    batches: dict[int, _Batch] = field(default_factory=dict)


def begin(worker: Worker, batch: int, numbers: Sequence[int], wanted: Wanted) -> None:
    """Prepare a batch of texts with these numbers, whose prompts are all that `wanted` has."""
    is_last = worker.shard.blocks.is_last
    draws = _Draws.of(wanted, numbers, worker.device) if is_last else None
    worker.keeping(_Writing).batches[batch] = _Batch(worker.runner.new_cache(), draws)


def write_on(
    worker: Worker, batch: int, inputs: TensorPayload, rows: Sequence[int] | None = None
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
    text = worker.kept(_Writing).batches[batch]
    received = worker.unpack(inputs)
    if rows is not None:
        chosen = torch.tensor(rows, device=received.device)
        text.keep_rows(worker, chosen)
        received = received[chosen] if worker.shard.blocks.is_first else received
    hidden = worker.runner.go_on(received, text.cache)
    text.num_tokens += received.shape[1]
    if text.draws is None:
        return worker.pack(hidden)
    return worker.pack(text.draws.choose(worker, hidden[:, -1], text.num_tokens)[:, None])


def end(worker: Worker, batch: int) -> None:
    """Forget a batch."""
    del worker.kept(_Writing).batches[batch]


# On the coordinator


def write_texts(cluster: Cluster, wanted: Wanted) -> list[NDArray[np.int64]]:
    """Let the model write.

    Args:
        cluster: with loaded workers.
        wanted: prompts and what is to follow them.

    Returns:
        For each prompt what follows it, int64 tokens up to and including the first of `ends`; no
        tokens if its prompt leaves no room.
    """
    batches = wanted.batches()
    texts: list[list[int]] = [[] for _ in wanted.prompts]
    steps = [_num_steps(wanted, numbers) for numbers in batches]
    num_replicas = cluster.placement.num_replicas
    num_slots = min(len(batches), cluster.placement.num_shards * num_replicas)
    slots: list[_BatchOfTexts | None] = [None] * num_slots
    waiting = iter(enumerate(batches))
    done = 0
    running = len(batches)
    cluster.progress.begin(sum(steps), "tokens")
    while running:  # so many batches at once keep all workers busy
        for slot, batch in enumerate(slots):
            if batch is None:
                if (following := next(waiting, None)) is not None:
                    replica = slot % num_replicas
                    slots[slot] = _BatchOfTexts(cluster, wanted, *following, replica, texts)
            elif batch.go_on():
                cluster.progress.reach(done + sum(b.num_steps for b in slots if b is not None))
            else:
                batch.close()
                slots[slot] = None
                done += steps[batch.number]
                running -= 1
                cluster.progress.reach(done + sum(b.num_steps for b in slots if b is not None))
    return [np.array(text, dtype=np.int64) for text in texts]


def _num_steps(wanted: Wanted, numbers: Sequence[int]) -> int:
    """Return in how many steps a batch is written if no text ends before it must."""
    lengths = [len(wanted.prompts[i]) for i in numbers]
    last = max(length + wanted.room(i) for length, i in zip(lengths, numbers, strict=True))
    return last - min(lengths)


class _BatchOfTexts:
    """A batch that is being written, as the coordinator sees it."""

    def __init__(
        self,
        cluster: Cluster,
        wanted: Wanted,
        number: int,
        numbers: list[int],
        replica: int,
        texts: list[list[int]],
    ) -> None:
        """Begin to write.

        Args:
            cluster: with loaded workers.
            wanted: all texts.
            number: of the batch.
            numbers: of its texts.
            replica: that writes it.
            texts: of all numbers; tokens are added as they come.
        """
        shards = range(cluster.placement.num_shards)
        self._cluster = cluster
        self._wanted = wanted
        self._texts = texts
        self._workers = [WorkerIndex(shard, replica) for shard in shards]
        self._steps_left = _num_steps(wanted, numbers)
        self.number = number
        self.num_steps = 0  # that were submitted
        self._rows = numbers  # numbers of the texts that it still has
        self._ended: set[int] = set()
        self._in_flight: deque[tuple[list[int], int, TensorPayload]] = deque()
        prompts = tuple(wanted.prompts[i] for i in numbers)
        own = Wanted(prompts, wanted.num_tokens, wanted.temperature, wanted.seed)
        cluster.get(
            [cluster.submit(worker, begin, number, numbers, own) for worker in self._workers]
        )
        self._position = min(map(len, prompts))  # of the tokens that come back next
        *pieces, self._inputs = self._pieces(prompts)
        for piece in pieces:
            self._pass(piece, None)

    def go_on(self) -> bool:
        """Submit a step, take the tokens of an older one; return whether there is more to do."""
        if self._steps_left:
            self._inputs = self._pass(self._inputs, self._rows_to_keep())
            self._in_flight.append((self._rows, self._position, self._inputs))
            self._position += 1
            self._steps_left -= 1
            self.num_steps += 1
        if len(self._in_flight) > _STEPS_IN_FLIGHT or not self._steps_left:
            self._take(*self._in_flight.popleft())
        is_done = self._ended.issuperset(self._rows)
        return bool((self._steps_left or self._in_flight) and not is_done)

    def close(self) -> None:
        """Let the workers forget it."""
        self._cluster.get([self._cluster.submit(w, end, self.number) for w in self._workers])

    def _pieces(self, prompts: Sequence[Sequence[int]]) -> Iterator[TensorPayload]:
        """Yield the tokens that all texts have from their prompts, in pieces [m, n]."""
        tokens = np.array([prompt[: self._position] for prompt in prompts], dtype=np.int64)
        size = max(1, PREFILL_TOKENS // len(prompts))
        for start in range(0, self._position, size):
            yield token_payload(tokens[:, start : start + size])

    def _pass(self, inputs: TensorPayload, rows: list[int] | None) -> TensorPayload:
        for worker in self._workers:
            inputs = self._cluster.submit(worker, write_on, self.number, inputs, rows)
        return inputs

    def _rows_to_keep(self) -> list[int] | None:
        """Return the rows that go on, if enough have ended that leaving them out is worth it."""
        rows = [row for row, text in enumerate(self._rows) if text not in self._ended]
        if len(rows) > _FEWER_ROWS * len(self._rows):
            return None
        self._rows = [self._rows[row] for row in rows]
        return rows

    def _take(self, rows: Sequence[int], position: int, payload: TensorPayload) -> None:
        """Add the tokens at a position to the texts that have not ended."""
        (come,) = self._cluster.get([payload])
        for number, token in zip(rows, come.array[:, 0].tolist(), strict=True):
            text = self._texts[number]
            if number in self._ended or position < len(self._wanted.prompts[number]):
                continue
            text.append(token)
            if token in self._wanted.ends or len(text) == self._wanted.room(number):
                self._ended.add(number)
