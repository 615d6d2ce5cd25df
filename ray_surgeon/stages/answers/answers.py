"""Answers to prompts: those of the dense model, written once, and how near a pruned model comes.

The pruned model is compared twice. It reads the dense model's answers, and both say at every token
what comes next (acceptance, agreement, divergence). And it writes its own answers, taking the most
likely token each time as the dense model did, until they part. Source: docs/method.md, section 12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.dense_model import DenseStates
from ray_surgeon.runtime.passes import (
    compared,
    each_wave,
    num_counted,
    share_states,
    waves_of_replicas,
)
from ray_surgeon.runtime.placement import WorkerIndex
from ray_surgeon.runtime.sampling import Wanted, write_texts
from ray_surgeon.runtime.transport import TensorPayload, decode
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.stages.self_text.loops import repeats
from ray_surgeon.storage import files

ANSWERS = "(answers)"
"""Name of the answers among the texts that have states; no evaluation text can have it."""
_EXAMPLE_CHARACTERS = 2000
"""Of a text that a record shows as an example."""


@dataclass(frozen=True)
class Answers:
    """What the dense model answers, taking the most likely token each time."""

    prompts: tuple[tuple[int, ...], ...]  # one token or more each
    answers: tuple[tuple[int, ...], ...]  # likewise, with the token that ends it if it has ended
    ends: frozenset[int]  # tokens that end an answer

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(map(len, self.answers))

    @property
    def ended(self) -> list[bool]:
        """Whether each answer has ended, rather than been cut."""
        return [answer[-1] in self.ends for answer in self.answers]


@dataclass(frozen=True)
class Generation:
    """A pruned model beside the dense model's answers."""

    acceptance: float  # mean of ``sum_v min(p_v, q_v)`` over the answers' tokens
    agreement: float  # fraction of them for which both models have the same most likely token
    divergence: float  # mean over them of the divergence from the dense model, in nats
    # for each prompt, tokens in which both own answers agree from the start
    departures: tuple[int, ...]
    not_ended: (
        float | None
        # of the answers that the dense model ended, the fraction that is not ended; None if it
        # ended none
    )
    repeating: float  # fraction of the answers that get stuck in a loop
    answers: tuple[tuple[int, ...], ...]  # the pruned model's own


def check_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, longest: int | None, where: str
) -> None:
    """Refuse prompts that the model cannot answer.

    Args:
        prompts: tokens of each.
        max_new_tokens: of an answer.
        longest: tokens that the model takes at most; None if that is not limited.
        where: field of the prompts in the job spec.

    Raises:
        ValueError: there is no prompt, or one is empty or leaves no room; names the field.
    """
    if not prompts:
        raise ValueError(f"{where}: there is no prompt; give one at least")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"{where}: prompt {number} has no tokens; give a text")
        if longest is not None and len(prompt) + max_new_tokens > longest:
            raise ValueError(
                f"{where}: prompt {number} has {len(prompt)} tokens and its answer up to "
                f"{max_new_tokens}, but the model takes at most {longest} together; shorten it, or "
                "lower max_new_tokens"
            )


# On a worker


def keep_exactly(worker: Worker, inputs: TensorPayload, numbers: Sequence[int]) -> list[bool]:
    """Run a wave up to the head, keep the states there as they are, and return which are finite.

    Those of evaluation texts are rounded to bfloat16, which alone costs a float32 model some
    thousandths of the acceptance.
    """
    hidden = worker.runner.infer(worker.unpack(inputs))
    states = worker.keeping(DenseStates).of_text.setdefault(ANSWERS, {})
    states.update(zip(numbers, (h.cpu() for h in hidden), strict=True))
    return [bool(torch.isfinite(h).all()) for h in hidden]


def receive_exactly(
    worker: Worker, text: str, numbers: Sequence[int], states: TensorPayload
) -> None:
    """Keep states [m, T, d] that another worker sent, as they are."""
    rows = torch.split(decode(states, torch.device("cpu")), 1)
    own = worker.keeping(DenseStates).of_text.setdefault(text, {})
    own.update(zip(numbers, (row.clone() for row in rows), strict=True))


# On the coordinator


def answers_of(
    cluster: Cluster, prompts: Sequence[Sequence[int]], max_tokens: int, ends: frozenset[int]
) -> Answers:
    """Let the dense model answer prompts, and keep what pruned models are compared with.

    Args:
        cluster: with the dense weights.
        prompts: tokens of each; see `check_prompts`.
        max_tokens: of an answer.
        ends: tokens that end one.

    Raises:
        FloatingPointError: a hidden state is not finite.
    """
    wanted = Wanted(tuple(map(tuple, prompts)), max_tokens, temperature=0.0, ends=ends)
    written = tuple(tuple(text.tolist()) for text in write_texts(cluster, wanted))
    answers = Answers(wanted.prompts, written, ends)
    remember_answers(cluster, answers)
    return answers


def windows_of_answers(
    answers: Answers, pad: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return each prompt with its answer, filled up on the right, where causal models look last.

    Args:
        answers: n of them.
        pad: token that fills up.

    Returns:
        [n, T] tokens, and [n, T] whether a token belongs to the answer.
    """
    lengths = [len(p) + len(a) for p, a in zip(answers.prompts, answers.answers, strict=True)]
    tokens = np.full((len(lengths), max(lengths)), pad, dtype=np.int64)
    counts = np.zeros(tokens.shape, dtype=np.bool_)
    for row, (prompt, answer) in enumerate(zip(answers.prompts, answers.answers, strict=True)):
        tokens[row, : lengths[row]] = prompt + answer
        counts[row, len(prompt) : lengths[row]] = True
    return tokens, counts


def remember_answers(cluster: Cluster, answers: Answers) -> None:
    """Let the last shards of all replicas keep the dense model's states of its answers.

    Raises:
        FloatingPointError: a state is not finite.
    """
    tokens, _ = windows_of_answers(answers)

    def at_the_end(last: WorkerIndex, moving: Any, numbers: list[int]) -> list[bool]:
        return cluster.submit(last, keep_exactly, moving, numbers)

    is_finite: list[bool] = each_wave(cluster, tokens, at_the_end)
    if not all(is_finite):
        raise FloatingPointError(
            "the dense model's states of its answers are not finite; check the weights and the "
            "dtype"
        )
    share_states(cluster, ANSWERS, waves_of_replicas(cluster, range(len(tokens))), receive_exactly)


@dataclass(frozen=True)
class Rates:
    """The present weights at the tokens of the dense model's answers; see `Generation`."""

    acceptance: float
    agreement: float
    divergence: float  # in nats


def measure_rates(cluster: Cluster, answers: Answers) -> Rates:
    """Measure the present weights on the dense model's answers, without writing any.

    Args:
        cluster: with loaded workers, which remember the answers.
        answers: of the dense model.

    Raises:
        FloatingPointError: the divergence is not a number.
    """
    tokens, counts = windows_of_answers(answers)
    comparisons = compared(cluster, ANSWERS, tokens, counts, with_acceptance=True)
    num_tokens = num_counted(tokens, counts)
    divergence = sum(comparison.divergence for comparison in comparisons) / num_tokens
    if not math.isfinite(divergence):
        raise FloatingPointError(
            "the divergence from the dense model on its answers is not finite; check the weights "
            "and the dtype"
        )
    acceptance, agreement = (
        sum(getattr(comparison, name) for comparison in comparisons) / num_tokens
        for name in ("acceptance", "agreement")
    )
    return Rates(acceptance, agreement, divergence)


def measure_answers(cluster: Cluster, answers: Answers, max_tokens: int) -> Generation:
    """Measure the present weights on the dense model's answers, and let them write their own.

    Args:
        cluster: with loaded workers, which remember the answers.
        answers: of the dense model.
        max_tokens: of an answer, as they were written with.

    Raises:
        FloatingPointError: the divergence is not a number.
    """
    rates = measure_rates(cluster, answers)
    wanted = Wanted(answers.prompts, max_tokens, temperature=0.0, ends=answers.ends)
    own = tuple(tuple(text.tolist()) for text in write_texts(cluster, wanted))
    of_ended = [answer for answer, ended in zip(own, answers.ended, strict=True) if ended]
    return Generation(
        acceptance=rates.acceptance,
        agreement=rates.agreement,
        divergence=rates.divergence,
        departures=tuple(map(departure, answers.answers, own)),
        not_ended=_share(answer[-1] not in answers.ends for answer in of_ended)
        if of_ended
        else None,
        repeating=_share(map(repeats, own)),
        answers=own,
    )


def departure(answer: Sequence[int], second_answer: Sequence[int]) -> int:
    """Return with how many equal tokens two answers begin."""
    for place, (token, another) in enumerate(zip(answer, second_answer, strict=False)):
        if token != another:
            return place
    return min(len(answer), len(second_answer))


def _share(flags: Iterable[bool]) -> float:
    """Return the fraction that is true."""
    values = list(flags)
    return sum(values) / len(values)


# Records


def dense_record(answers: Answers, decode_tokens: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """Return what a report tells of the dense model's answers.

    Args:
        answers: of the dense model.
        decode_tokens: the text of tokens.
    """
    return {
        "num_prompts": len(answers.prompts),
        "num_tokens": answers.num_tokens,
        "share_ended": _share(answers.ended),
        "share_repeating": _share(map(repeats, answers.answers)),
        "example": {
            "prompt": decode_tokens(answers.prompts[0])[:_EXAMPLE_CHARACTERS],
            "dense": decode_tokens(answers.answers[0])[:_EXAMPLE_CHARACTERS],
        },
    }


def shot_record(
    answers: Answers, generation: Generation, decode_tokens: Callable[[Sequence[int]], str]
) -> dict[str, Any]:
    """Return what a report tells of the answers after a shot; see `dense_record`."""
    pruned = decode_tokens(generation.answers[0])[:_EXAMPLE_CHARACTERS]
    return {
        "acceptance": generation.acceptance,
        "agreement": generation.agreement,
        "divergence": generation.divergence,
        "tokens_until_departure": {
            "mean": sum(generation.departures) / len(generation.departures),
            "median": median(generation.departures),
        },
        "not_ended": generation.not_ended,
        "repeating": generation.repeating,
        "example": dense_record(answers, decode_tokens)["example"] | {"pruned": pruned},
    }


def write_answers(uri: str, answers: Answers) -> None:
    """Write the dense model's answers, for a run that goes on later without the dense model."""
    files.write_json(uri, asdict(answers) | {"ends": sorted(answers.ends)})


def read_answers(uri: str) -> Answers:
    """Read what `write_answers` wrote."""
    record: Mapping[str, Any] = files.read_json(uri)
    prompts, answers = (tuple(map(tuple, record[part])) for part in ("prompts", "answers"))
    return Answers(prompts, answers, frozenset(record["ends"]))
