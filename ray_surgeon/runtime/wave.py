"""A wave of sequences on a worker: what it does with what comes from the shard before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypedDict, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_surgeon.memory.stores import Stores
from ray_surgeon.models.loss import Predicted, compare_with_dense, next_token_loss
from ray_surgeon.models.runner import BlockRunner
from ray_surgeon.runtime.collectives import TensorPayload
from ray_surgeon.runtime.dense_states import dense_state, keep_states
from ray_surgeon.runtime.placement import Placement
from ray_surgeon.runtime.worker import Worker

T = TypeVar("T")


@dataclass(frozen=True)
class Labels:
    """What the model is to say in a pass forward and backward; the text by default."""

    seed: int | None = None  # of labels drawn from the model itself (sampled Fisher)
    # what the dense model says: name of the text as which its states of these sequences are kept
    dense: str | None = None
    # whether last shards keep the hidden states of the calibration, because the weights are the
    # dense model's
    remembers: bool = False
    # whether this is a step of a training: one that goes wrong has a loss that is no number, and
    # the training counts its steps itself
    is_step: bool = False


Tokens: TypeAlias = NDArray[np.int64]
"""[num_sequences, sequence_length]."""
Counts: TypeAlias = NDArray[np.bool_] | None
"""[num_sequences, sequence_length], whether a token counts as something that is predicted; None if
all do.
"""
Only: TypeAlias = Sequence[int] | None
"""Numbers of the sequences that are meant; None for all."""


class SequenceOfWave(NamedTuple):
    """A sequence of a wave, on the device."""

    number: int
    tokens: Tensor  # [1, T]
    counts: Tensor | None  # [1, T] bool, which tokens count; None for all


OfEach = Callable[[Worker, Tensor, SequenceOfWave], T]
"""What is made of the hidden states [1, T, d] of a sequence before the head."""


@dataclass(frozen=True)
class Wave:
    """Sequences that pass the shards together, as they travel to the last one."""

    numbers: list[int]  # of the sequences
    tokens: Tokens  # [m, T]
    counts: Counts  # [m, T]
    text: str | None  # as whose states those before the head are kept; None if they are not
    of_teacher: bool = False  # whether they pass the teacher's blocks

    def sequences(self, worker: Worker) -> Iterator[SequenceOfWave]:
        """Yield the sequences."""
        tokens = torch.split(worker.unpack(self.tokens), 1)
        counts: Iterable[Tensor | None] = [None] * len(tokens)
        if self.counts is not None:
            counts = torch.split(worker.unpack(self.counts), 1)
        yield from map(SequenceOfWave, self.numbers, tokens, counts)


@dataclass(frozen=True)
class Passage:
    """Sequences of a text that pass the shards, and which of them and of their tokens are meant."""

    tokens: Tokens
    counts: Counts = None
    only: Only = None
    # as whose states those before the head are kept by the last shards of all replicas; None if
    # they are not
    text: str | None = None
    of_teacher: bool = False  # whether they pass the teacher's blocks, in the midst of another step

    @property
    def numbers(self) -> list[int]:
        """Numbers of those that pass."""
        return list(range(len(self.tokens)) if self.only is None else self.only)

    def waves(self, placement: Placement, stores: Stores) -> list[list[Wave]]:
        """Return the waves of every replica; replicas take sequences in turns."""
        num_replicas = placement.num_replicas
        own_stores = stores.of_teacher if self.of_teacher else stores
        size = own_stores.wave_of(-(-len(self.numbers) // num_replicas), placement.num_shards)
        own = [self.numbers[replica::num_replicas] for replica in range(num_replicas)]
        return [[self._wave(mine[i : i + size]) for i in range(0, len(mine), size)] for mine in own]

    def _wave(self, numbers: list[int]) -> Wave:
        counts = None if self.counts is None else self.counts[numbers]
        return Wave(numbers, self.tokens[numbers], counts, self.text, self.of_teacher)


def forward(worker: Worker, number: int, inputs: TensorPayload) -> TensorPayload:
    """Run a wave forward: tokens [m, T] or hidden states [m, T, d] in, hidden states out."""
    return worker.pack(torch.cat(worker.runner.forward(number, worker.unpack(inputs))))


def forward_backward(
    worker: Worker, number: int, inputs: TensorPayload, wave: Wave, labels: Labels
) -> tuple[TensorPayload, list[float]]:
    """Run a wave through the last shard and back.

    Args:
        worker: with the last shard.
        number: of the wave.
        inputs: tokens, if this is the only shard, or hidden states.
        wave: what was to be predicted.
        labels: what the model is to say.

    Returns:
        The gradient at the inputs, empty if this is the only shard, and the loss of each sequence,
        summed over its tokens that count, in nats.

    Raises:
        FloatingPointError: a loss is not finite, and no training may have made it so.
    """
    gradients = worker.runner.forward(number, worker.unpack(inputs))
    of_each = list[Tensor]()
    for i, sequence in enumerate(wave.sequences(worker)):
        generator = dense = None
        if labels.seed is not None:
            generator = torch.Generator().manual_seed(labels.seed + sequence.number)
        if labels.dense is not None:
            dense = dense_state(worker, labels.dense, sequence.number)
        predicted = Predicted(sequence.tokens, sequence.counts, generator)
        loss, gradients[i], states = worker.runner.loss(gradients[i], predicted, dense)
        if wave.text is not None:
            keep_states(worker, wave.text, [sequence.number], [states])
        of_each.append(loss)
    gradient = _gradient_below(worker, worker.runner.backward(number, gradients))
    losses = torch.cat(of_each).tolist()  # once all is launched
    for sequence_number, value in zip(wave.numbers, losses, strict=True):
        if not labels.is_step and not math.isfinite(value):
            raise FloatingPointError(
                f"the loss of calibration sequence {sequence_number} is {value}; check the "
                "weights and the dtype"
            )
    return gradient, losses


def backward(worker: Worker, number: int, gradient: TensorPayload) -> TensorPayload:
    """Run a wave backward: gradient at the outputs in, gradient at the inputs out.

    The first shard keeps its own.
    """
    gradients = list(torch.split(worker.unpack(gradient), 1))
    return _gradient_below(worker, worker.runner.backward(number, gradients))


def _gradient_below(worker: Worker, gradients: list[Tensor]) -> TensorPayload:
    return worker.pack(torch.cat(gradients) if worker.index.shard else torch.empty(0))


# Without gradients; all but the first run at the last shard


def infer(worker: Worker, number: int, inputs: TensorPayload, of_teacher: bool) -> TensorPayload:
    """Run a wave: tokens or hidden states in, hidden states out."""
    return worker.pack(torch.cat(_runner(worker, of_teacher).infer(worker.unpack(inputs))))


def _runner(worker: Worker, of_teacher: bool) -> BlockRunner:
    if not of_teacher:
        return worker.runner
    assert worker.state.teacher is not None
    return worker.state.teacher.runner


def infer_each(
    worker: Worker, number: int, inputs: TensorPayload, wave: Wave, of_each: OfEach[T]
) -> tuple[TensorPayload, list[T]]:
    """Run a wave up to the head.

    Returns nothing that would go back, as `forward_backward` does, and what comes of each sequence.

    Args:
        worker: with the last shard.
        number: of the wave.
        inputs: tokens [m, T] or hidden states [m, T, d].
        wave: the sequences.
        of_each: what is made of one; see below.
    """
    hidden = _runner(worker, wave.of_teacher).infer(worker.unpack(inputs))
    if wave.text is not None:
        keep_states(worker, wave.text, wave.numbers, hidden)
    sequences = wave.sequences(worker)
    results = [of_each(worker, h, sequence) for h, sequence in zip(hidden, sequences, strict=True)]
    return worker.pack(torch.empty(0)), results


def nll(worker: Worker, hidden: Tensor, sequence: SequenceOfWave) -> float:
    """Return a sequence's NLL in nats, summed over its tokens that count."""
    head = worker.shard.head_weight
    return float(next_token_loss(hidden, head, Predicted(sequence.tokens, sequence.counts))[0])


def logits(worker: Worker, hidden: Tensor, sequence: SequenceOfWave) -> TensorPayload:
    """Return a sequence's logits [1, T, vocabulary]."""
    return worker.pack(worker.shard.logits(hidden))


def is_finite(worker: Worker, hidden: Tensor, sequence: SequenceOfWave) -> bool:
    """Return whether a sequence's hidden states are finite."""
    return bool(torch.isfinite(hidden).all())


class Compared(TypedDict, total=False):
    """Sums of a sequence over the tokens that count, see `Comparison`."""

    nll: float
    divergence: float
    acceptance: float
    agreement: float


def comparison(
    worker: Worker, hidden: Tensor, sequence: SequenceOfWave, text: str, with_acceptance: bool
) -> Compared:
    """Compare the present model with the dense one on a sequence.

    The worker has the dense model's states of the text. Acceptance and agreement are there if they
    are wanted.
    """
    _, tokens, counts = sequence
    dense, own = dense_state(worker, text, sequence.number)
    models = (hidden, dense, Predicted(tokens, counts), worker.shard.head_weight, own)
    sums = compare_with_dense(*models, with_acceptance=with_acceptance)
    values = {name: value for name, value in vars(sums).items() if value is not None}
    return cast(Compared, dict(zip(values, torch.cat(list(values.values())).tolist(), strict=True)))
