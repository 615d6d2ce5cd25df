"""A wave of sequences on a worker: what it does with what comes from the shard before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_surgeon.runtime.dense_model import CALIBRATION, DenseStates, keep_states
from ray_surgeon.runtime.transport import TensorPayload
from ray_surgeon.runtime.worker import Worker


@dataclass(frozen=True)
class Labels:
    """What the model is to say in a pass forward and backward; the text by default."""

    seed: int | None = None  # of labels drawn from the model itself (sampled Fisher)
    # what the dense model says, whose states are kept; sequences are those of the calibration then
    of_dense_model: bool = False
    # whether last shards keep the hidden states of the calibration, because the weights are the
    # dense model's
    remembers: bool = False
    # whether a loss that is no number is returned, as that of a training that may go wrong
    may_diverge: bool = False


def forward(worker: Worker, wave: int, inputs: TensorPayload | None) -> TensorPayload:
    """Run a wave forward: tokens [m, T] or hidden states [m, T, d] in, hidden states out."""
    assert inputs is not None
    return worker.pack(torch.cat(worker.runner.forward(wave, worker.unpack(inputs))))


def forward_backward(
    worker: Worker,
    wave: int,
    inputs: TensorPayload | None,
    tokens: TensorPayload,
    numbers: Sequence[int],
    labels: Labels,
    counts: TensorPayload | None = None,
) -> tuple[TensorPayload | None, list[float]]:
    """Run a wave through the last shard and back.

    Args:
        worker: with the last shard.
        wave: its number.
        inputs: tokens, if this is the only shard, or hidden states.
        tokens: [m, T] of the text.
        numbers: of the sequences.
        labels: what the model is to say.
        counts: [m, T] bool, which tokens count, see `next_token_loss`; None for all.

    Returns:
        The gradient at the inputs, None if this is the only shard, and the loss of each sequence,
        summed over its tokens that count, in nats.

    Raises:
        FloatingPointError: a loss is not finite, and no training may have made it so.
    """
    assert inputs is not None
    text = worker.unpack(tokens)
    counting = _unpacked(worker, counts, len(text))
    gradients = worker.runner.forward(wave, worker.unpack(inputs))
    losses = []
    for i, number in enumerate(numbers):
        generator = (
            None if labels.seed is None else torch.Generator().manual_seed(labels.seed + number)
        )
        dense = (
            worker.kept(DenseStates).on_device(worker, CALIBRATION, number)
            if labels.of_dense_model
            else None
        )
        loss, gradients[i], states = worker.runner.loss(
            gradients[i], text[i : i + 1], generator, dense, counting[i]
        )
        if labels.remembers:
            keep_states(worker, CALIBRATION, [number], states)
        losses.append(float(loss))
        if not labels.may_diverge and not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"the loss of calibration sequence {number} is {losses[-1]}; check the weights and "
                "the dtype"
            )
    return _gradient_below(worker, worker.runner.backward(wave, gradients)), losses


def backward(worker: Worker, wave: int, gradient: TensorPayload | None) -> TensorPayload | None:
    """Run a wave backward: gradient at the outputs in, gradient at the inputs out.

    The first shard keeps its own.
    """
    assert gradient is not None
    return _gradient_below(
        worker, worker.runner.backward(wave, list(torch.split(worker.unpack(gradient), 1)))
    )


def _gradient_below(worker: Worker, gradients: list[Tensor]) -> TensorPayload | None:
    return None if worker.index.shard == 0 else worker.pack(torch.cat(gradients))


def infer(worker: Worker, inputs: TensorPayload) -> TensorPayload:
    """Run a wave without gradients: tokens or hidden states in, hidden states out."""
    return worker.pack(torch.cat(worker.runner.infer(worker.unpack(inputs))))


def infer_loss(
    worker: Worker,
    inputs: TensorPayload,
    tokens: TensorPayload,
    counts: TensorPayload | None = None,
) -> list[float]:
    """Return each sequence's NLL in nats, summed over its tokens that count.

    Runs at the last shard.
    """
    return _text_losses(worker, worker.runner.infer(worker.unpack(inputs)), tokens, counts)


def _text_losses(
    worker: Worker, hidden: Sequence[Tensor], tokens: TensorPayload, counts: TensorPayload | None
) -> list[float]:
    labels = worker.unpack(tokens)
    counting = _unpacked(worker, counts, len(labels))
    return [
        float(worker.shard.loss(h, labels[i : i + 1], counts=counting[i])[0])
        for i, h in enumerate(hidden)
    ]


def _unpacked(
    worker: Worker, counts: TensorPayload | None, num_sequences: int
) -> list[Tensor | None]:
    """Return which tokens count, [1, T] bool of each sequence, on the device; None where all do."""
    return [None] * num_sequences if counts is None else list(torch.split(worker.unpack(counts), 1))


@dataclass(frozen=True)
class Compared:
    """One sequence of the present model beside the dense one; see `Comparison`.

    Values are sums over its tokens that count.
    """

    nll: float  # in nats
    divergence: float  # in nats
    acceptance: float = math.nan  # where it is asked for
    agreement: float = math.nan  # likewise


def infer_comparison(
    worker: Worker,
    inputs: TensorPayload,
    tokens: TensorPayload,
    text: str,
    numbers: Sequence[int],
    counts: TensorPayload | None = None,
    with_acceptance: bool = False,
) -> list[Compared]:
    """Compare the present model with the dense one on each sequence of a wave, at the last shard.

    Args:
        worker: with the last shard, which has the dense model's states of the text.
        inputs: tokens [m, T] or hidden states [m, T, d].
        tokens: [m, T].
        text: name of the text.
        numbers: of the sequences.
        counts: [m, T] bool, which tokens count; None for all.
        with_acceptance: whether to compute acceptance and agreement.
    """
    labels = worker.unpack(tokens)
    counting = _unpacked(worker, counts, len(labels))
    comparisons = []
    for i, (number, h) in enumerate(
        zip(numbers, worker.runner.infer(worker.unpack(inputs)), strict=True)
    ):
        dense = worker.kept(DenseStates).on_device(worker, text, number)
        sums = worker.shard.compare(
            h, dense, labels[i : i + 1], counts=counting[i], with_acceptance=with_acceptance
        )
        further = (
            ()
            if sums.acceptance is None or sums.agreement is None
            else (sums.acceptance, sums.agreement)
        )
        comparisons.append(Compared(*map(float, (sums.nll, sums.divergence, *further))))
    return comparisons


def infer_loss_and_keep(
    worker: Worker,
    inputs: TensorPayload,
    tokens: TensorPayload,
    text: str,
    numbers: Sequence[int],
    counts: TensorPayload | None = None,
) -> list[float]:
    """Return the summed NLL as `infer_loss` does, and keep the states before the head.

    Runs at the last shard.
    """
    hidden = worker.runner.infer(worker.unpack(inputs))
    keep_states(worker, text, numbers, torch.cat(hidden))
    return _text_losses(worker, hidden, tokens, counts)


def infer_states(
    worker: Worker, inputs: TensorPayload, text: str | None, numbers: Sequence[int]
) -> list[bool]:
    """Run a wave up to the head, and return which sequences are finite.

    The hidden states before the head are kept if a text is named.
    """
    hidden = worker.runner.infer(worker.unpack(inputs))
    if text is not None:
        keep_states(worker, text, numbers, torch.cat(hidden))
    return [bool(torch.isfinite(h).all()) for h in hidden]


def infer_logits(worker: Worker, inputs: TensorPayload) -> TensorPayload:
    """Return the logits [n, T, vocabulary], at the last shard."""
    return worker.pack(worker.shard.logits(torch.cat(worker.runner.infer(worker.unpack(inputs)))))
