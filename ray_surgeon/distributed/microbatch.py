"""Steps of a worker that run a microbatch of sequences through its shard."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypedDict, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_surgeon.distributed.collectives import TensorPayload
from ray_surgeon.distributed.dense_states import dense_state, keep_states
from ray_surgeon.distributed.placement import Placement
from ray_surgeon.distributed.worker import Worker
from ray_surgeon.memory.stores import Stores
from ray_surgeon.models.loss import Predicted, compare_with_dense, next_token_loss
from ray_surgeon.models.runner import BlockRunner

T = TypeVar("T")


@dataclass(frozen=True)
class Labels:
    """Targets of the predictions in a pass forward and backward; the text by default."""

    seed: int | None = None  # of labels drawn from the model itself (sampled Fisher)
    # name of the text under which the dense model's hidden states of the sequences are kept, whose
    # predictions are the targets
    dense: str | None = None
    # whether the last shards keep the hidden states of the calibration, because the weights are
    # the dense model's
    remembers: bool = False
    # whether this is a training step: its loss may be non-finite, and the training counts its
    # steps itself
    is_step: bool = False


Tokens: TypeAlias = NDArray[np.int64]
"""[num_sequences, sequence_length]."""
Counts: TypeAlias = NDArray[np.bool_] | None
"""[num_sequences, sequence_length], whether a token counts as a prediction; None if all do."""
Only: TypeAlias = Sequence[int] | None
"""Numbers of the sequences to run; None for all."""


class SequenceOfWave(NamedTuple):
    """A sequence of a microbatch, on the device."""

    number: int
    tokens: Tensor  # [1, T]
    counts: Tensor | None  # [1, T] bool, whether a token counts; None if all do


OfEach = Callable[[Worker, Tensor, SequenceOfWave], T]
"""Turns the hidden states [1, T, d] of a sequence before the head into its result."""


@dataclass(frozen=True)
class Microbatch:
    """Sequences that pass the shards together."""

    numbers: list[int]  # of the sequences
    tokens: Tokens  # [m, T]
    counts: Counts  # [m, T]
    # name under which the hidden states before the head are kept; None if they are not
    text: str | None
    of_teacher: bool = False  # whether the sequences pass the teacher's blocks

    def sequences(self, worker: Worker) -> Iterator[SequenceOfWave]:
        """Yield the sequences on the worker's device."""
        tokens = torch.split(worker.unpack(self.tokens), 1)
        counts: Iterable[Tensor | None] = [None] * len(tokens)
        if self.counts is not None:
            counts = torch.split(worker.unpack(self.counts), 1)
        yield from map(SequenceOfWave, self.numbers, tokens, counts)


@dataclass(frozen=True)
class Pass:
    """Sequences of a text that pass the shards."""

    tokens: Tokens
    counts: Counts = None
    only: Only = None
    # name under which the last shards of all replicas keep the hidden states before the head; None
    # if they do not
    text: str | None = None
    # whether the sequences pass the teacher's blocks, as part of another step
    of_teacher: bool = False

    @property
    def numbers(self) -> list[int]:
        """Numbers of the sequences that pass."""
        if self.only is None:
            return list(range(len(self.tokens)))
        return list(self.only)

    def microbatches(
        self, placement: Placement, stores: Stores
    ) -> list[list[Microbatch]]:
        """Return the microbatches of every replica; replicas take sequences in turn."""
        num_replicas = placement.num_replicas
        if self.of_teacher:
            stores = stores.of_teacher
        num_sequences = -(-len(self.numbers) // num_replicas)
        size = stores.wave_of(num_sequences, placement.num_shards)
        microbatches: list[list[Microbatch]] = []
        for replica in range(num_replicas):
            numbers = self.numbers[replica::num_replicas]
            starts = range(0, len(numbers), size)
            microbatches.append(
                [self._microbatch(numbers[start : start + size]) for start in starts]
            )
        return microbatches

    def _microbatch(self, numbers: list[int]) -> Microbatch:
        return Microbatch(
            numbers=numbers,
            tokens=self.tokens[numbers],
            counts=None if self.counts is None else self.counts[numbers],
            text=self.text,
            of_teacher=self.of_teacher,
        )


def forward(worker: Worker, number: int, inputs: TensorPayload) -> TensorPayload:
    """Run a microbatch forward, given tokens [m, T] or hidden states [m, T, d].

    Returns:
        Hidden states of the next shard's inputs.
    """
    hidden = torch.cat(worker.runner.forward(number, worker.unpack(inputs)))
    return worker.pack(hidden)


def forward_backward(
    worker: Worker,
    number: int,
    inputs: TensorPayload,
    microbatch: Microbatch,
    labels: Labels,
) -> tuple[TensorPayload, list[float]]:
    """Run a microbatch through the last shard and back.

    Args:
        worker: holds the last shard.
        number: number of the microbatch.
        inputs: tokens, if this is the only shard, or hidden states.
        microbatch: the sequences.
        labels: targets of the predictions.

    Returns:
        The gradient at the inputs, empty if this is the only shard, and the loss of each sequence,
        summed over its tokens that count, in nats.

    Raises:
        FloatingPointError: a loss is not finite, and this is not a training step.
    """
    # hidden states at first; each is replaced by its gradient
    gradients = worker.runner.forward(number, worker.unpack(inputs))
    losses_of_each: list[Tensor] = []
    for i, sequence in enumerate(microbatch.sequences(worker)):
        generator = None
        if labels.seed is not None:
            generator = torch.Generator().manual_seed(labels.seed + sequence.number)
        dense = None
        if labels.dense is not None:
            dense = dense_state(worker, labels.dense, sequence.number)
        predicted = Predicted(sequence.tokens, sequence.counts, generator)
        loss, gradients[i], states = worker.runner.loss(gradients[i], predicted, dense)
        if microbatch.text is not None:
            keep_states(worker, microbatch.text, [sequence.number], [states])
        losses_of_each.append(loss)
    gradient = _gradient_below(worker, worker.runner.backward(number, gradients))
    losses = torch.cat(losses_of_each).tolist()  # waits for the device, so it comes last
    for sequence_number, value in zip(microbatch.numbers, losses, strict=True):
        if not labels.is_step and not math.isfinite(value):
            raise FloatingPointError(
                f"the loss of calibration sequence {sequence_number} is {value}; check the "
                "weights and the dtype"
            )
    return gradient, losses


def backward(worker: Worker, number: int, gradient: TensorPayload) -> TensorPayload:
    """Run a microbatch backward, given the gradient at the outputs; return that at the inputs.

    The first shard returns an empty tensor.
    """
    gradients = list(torch.split(worker.unpack(gradient), 1))
    return _gradient_below(worker, worker.runner.backward(number, gradients))


def _gradient_below(worker: Worker, gradients: list[Tensor]) -> TensorPayload:
    if worker.index.shard == 0:
        return worker.pack(torch.empty(0))
    return worker.pack(torch.cat(gradients))


# Without gradients; all but the first run on the last shard


def infer(
    worker: Worker,
    number: int,
    inputs: TensorPayload,
    of_teacher: bool,
) -> TensorPayload:
    """Run a microbatch without gradients, given tokens or hidden states; return hidden states."""
    hidden = torch.cat(_runner(worker, of_teacher).infer(worker.unpack(inputs)))
    return worker.pack(hidden)


def _runner(worker: Worker, of_teacher: bool) -> BlockRunner:
    if not of_teacher:
        return worker.runner
    assert worker.state.teacher is not None
    return worker.state.teacher.runner


def infer_each(
    worker: Worker,
    number: int,
    inputs: TensorPayload,
    microbatch: Microbatch,
    of_each: OfEach[T],
) -> tuple[TensorPayload, list[T]]:
    """Run a microbatch up to the head, and compute a result for each sequence.

    Args:
        worker: holds the last shard.
        number: number of the microbatch.
        inputs: tokens [m, T] or hidden states [m, T, d].
        microbatch: the sequences.
        of_each: computes the result of a sequence, e.g. `nll`.

    Returns:
        An empty tensor, in place of the gradient that `forward_backward` returns, and the results.
    """
    hidden = _runner(worker, microbatch.of_teacher).infer(worker.unpack(inputs))
    if microbatch.text is not None:
        keep_states(worker, microbatch.text, microbatch.numbers, hidden)
    results: list[T] = []
    for states, sequence in zip(hidden, microbatch.sequences(worker), strict=True):
        results.append(of_each(worker, states, sequence))
    return worker.pack(torch.empty(0)), results


def nll(worker: Worker, hidden: Tensor, sequence: SequenceOfWave) -> float:
    """Return a sequence's NLL in nats, summed over its tokens that count."""
    predicted = Predicted(sequence.tokens, sequence.counts)
    loss, _ = next_token_loss(hidden, worker.shard.head_weight, predicted)
    return float(loss)


def logits(worker: Worker, hidden: Tensor, sequence: SequenceOfWave) -> TensorPayload:
    """Return a sequence's logits [1, T, vocabulary]."""
    return worker.pack(worker.shard.logits(hidden))


def is_finite(worker: Worker, hidden: Tensor, sequence: SequenceOfWave) -> bool:
    """Return whether a sequence's hidden states are finite."""
    return bool(torch.isfinite(hidden).all())


class Compared(TypedDict, total=False):
    """Sums over the tokens of a sequence that count; see `Comparison`."""

    nll: float
    divergence: float
    acceptance: float
    agreement: float


def comparison(
    worker: Worker,
    hidden: Tensor,
    sequence: SequenceOfWave,
    text: str,
    with_acceptance: bool,
) -> Compared:
    """Compare the present model with the dense one on a sequence.

    Args:
        worker: keeps the dense model's states of the text.
        hidden: hidden states [1, T, d] of the present model before the head.
        sequence: the sequence.
        text: name of the text.
        with_acceptance: whether to compute acceptance and agreement; without, they are left out.
    """
    dense, dense_head = dense_state(worker, text, sequence.number)
    sums = compare_with_dense(
        hidden,
        dense,
        Predicted(sequence.tokens, sequence.counts),
        worker.shard.head_weight,
        dense_head,
        with_acceptance=with_acceptance,
    )
    computed = {name: value for name, value in vars(sums).items() if value is not None}
    # one transfer from the device for all of them
    values = torch.cat(list(computed.values())).tolist()
    return cast(Compared, dict(zip(computed, values, strict=True)))
