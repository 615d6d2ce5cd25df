"""A worker's part in texts that are written token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from ray_surgeon.models.loss import next_tokens
from ray_surgeon.runtime.collectives import TensorPayload
from ray_surgeon.runtime.worker import Worker

TEXTS_TOGETHER = 16
"""Texts in a batch, at most, if they are long; weights are read once for all of them."""


TOKENS_TOGETHER = 8192
"""Tokens in a batch, at most, if texts are short and so more than these many are in it."""


def texts_together(length: int) -> int:
    """Return how many texts of so many tokens are written together, at most."""
    return max(TEXTS_TOGETHER, TOKENS_TOGETHER // length)


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

    def has_ended(self, number: int, text: Sequence[int]) -> bool:
        """Whether what was written so far of a text is all of it."""
        return len(text) == self.room(number) or (bool(text) and text[-1] in self.ends)

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
        prompts = [torch.tensor(prompt) for prompt in wanted.prompts]
        chances = [
            torch.rand(
                wanted.num_tokens,
                generator=torch.Generator().manual_seed(wanted.seed + 1_000_003 * number),
            )
            for number in numbers
        ]
        return _Draws(
            pad_sequence(prompts, batch_first=True).to(device),
            torch.tensor([len(prompt) for prompt in prompts], device=device),
            torch.stack(chances).to(device),
            wanted.temperature,
        )

    def of_rows(self, rows: Tensor) -> _Draws:
        """Return those of some rows."""
        return _Draws(self.prompts[rows], self.lengths[rows], self.chances[rows], self.temperature)

    def choose(self, worker: Worker, hidden: Tensor, position: int) -> Tensor:
        """Return the tokens [m] at a position, after the last hidden states [m, d] before it."""
        own = (position - self.lengths).clamp(0, self.chances.shape[1] - 1)
        chances = self.chances.gather(1, own[:, None])[:, 0]
        drawn = next_tokens(hidden, worker.shard.head_weight, chances, self.temperature)
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


class _Writing(dict[int, _Batch]):
    """The batches that a worker is writing, by their numbers."""


def begin(worker: Worker, batch: int, numbers: Sequence[int], wanted: Wanted) -> None:
    """Prepare a batch of texts with these numbers, whose prompts are all that `wanted` has."""
    is_last = worker.shard.blocks.is_last
    draws = _Draws.of(wanted, numbers, worker.device) if is_last else None
    worker.keeping(_Writing)[batch] = _Batch(worker.runner.new_cache(), draws)


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
    text = worker.kept(_Writing)[batch]
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
    del worker.kept(_Writing)[batch]
