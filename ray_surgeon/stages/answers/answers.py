"""Answers to prompts: those of the dense model, written once, and how near a pruned model comes.

The pruned model is compared twice. It reads the dense model's answers, and both say at every token
what comes next (acceptance, agreement, divergence). And it writes its own answers, taking the most
likely token each time as the dense model did, until they part. Source: docs/method.md, section 12.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_surgeon.runtime import passes
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.wave import ANSWERS
from ray_surgeon.runtime.writing import Wanted, write_texts
from ray_surgeon.stages.self_text.loops import repeats
from ray_surgeon.storage import files

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
class Rates:
    """A pruned model at the tokens of the dense model's answers."""

    acceptance: float  # mean of ``sum_v min(p_v, q_v)`` over the answers' tokens
    agreement: float  # fraction of them for which both models have the same most likely token
    divergence: float  # mean over them of the divergence from the dense model, in nats


@dataclass(frozen=True)
class Generation(Rates):
    """A pruned model beside the dense model's answers."""

    # for each prompt, tokens in which both own answers agree from the start
    departures: tuple[int, ...]
    # of the answers that the dense model ended, the fraction that is not ended; None if it ended
    # none
    not_ended: float | None
    repeating: float  # fraction of the answers that get stuck in a loop
    answers: tuple[tuple[int, ...], ...]  # the pruned model's own


# On the coordinator


def answers_of(
    cluster: Cluster, prompts: tuple[tuple[int, ...], ...], max_tokens: int, ends: frozenset[int]
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
    answers = Answers(prompts, _written(cluster, prompts, max_tokens, ends), ends)
    remember_answers(cluster, answers)
    return answers


def _written(
    cluster: Cluster, prompts: tuple[tuple[int, ...], ...], max_tokens: int, ends: frozenset[int]
) -> tuple[tuple[int, ...], ...]:
    wanted = Wanted(prompts, max_tokens, temperature=0.0, ends=ends)
    return tuple(tuple(text.tolist()) for text in write_texts(cluster, wanted))


def windows_of_answers(answers: Answers) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return each prompt with its answer, filled up on the right, where causal models look last.

    Args:
        answers: n of them.

    Returns:
        [n, T] tokens, and [n, T] whether a token belongs to the answer.
    """
    lengths = [len(p) + len(a) for p, a in zip(answers.prompts, answers.answers, strict=True)]
    tokens = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
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
    every = range(len(tokens))
    passes.pass_up_to_the_head(cluster, tokens, every, ANSWERS, "the dense model's answers")


def measure_rates(cluster: Cluster, answers: Answers) -> Rates:
    """Measure the present weights on the dense model's answers, without writing any.

    Args:
        cluster: with loaded workers, which remember the answers.
        answers: of the dense model.

    Raises:
        FloatingPointError: the divergence is not a number.
    """
    tokens, counts = windows_of_answers(answers)
    comparisons = passes.compared(cluster, ANSWERS, tokens, counts, with_acceptance=True)
    num_tokens = passes.num_counted(tokens, counts)
    means = {
        name: sum(getattr(comparison, name) for comparison in comparisons) / num_tokens
        for name in ("acceptance", "agreement", "divergence")
    }
    passes.finite("the divergence from the dense model on its answers", means["divergence"])
    return Rates(**means)


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
    own = _written(cluster, answers.prompts, max_tokens, answers.ends)
    ended = zip(own, answers.ended, strict=True)
    is_open = [answer[-1] not in answers.ends for answer, was_ended in ended if was_ended]
    return Generation(
        **asdict(rates),
        departures=tuple(map(departure, answers.answers, own)),
        not_ended=fmean(is_open) if is_open else None,
        repeating=fmean(map(repeats, own)),
        answers=own,
    )


def departure(answer: Sequence[int], second_answer: Sequence[int]) -> int:
    """Return with how many equal tokens two answers begin."""
    pairs = zip(answer, second_answer, strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


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
        "share_ended": fmean(answers.ended),
        "share_repeating": fmean(map(repeats, answers.answers)),
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
    departures = generation.departures
    return {
        "acceptance": generation.acceptance,
        "agreement": generation.agreement,
        "divergence": generation.divergence,
        "tokens_until_departure": {"mean": fmean(departures), "median": median(departures)},
        "not_ended": generation.not_ended,
        "repeating": generation.repeating,
        "example": dense_record(answers, decode_tokens)["example"] | {"pruned": pruned},
    }


def write_answers(uri: str, answers: Answers) -> None:
    """Write the dense model's answers, for a run that goes on later without the dense model."""
    files.write_json(uri, asdict(answers) | {"ends": sorted(answers.ends)})


def read_answers(uri: str) -> Answers:
    """Read what `write_answers` wrote."""
    record = files.read_json(uri)
    prompts, answers = (tuple(map(tuple, record[part])) for part in ("prompts", "answers"))
    return Answers(prompts, answers, frozenset(record["ends"]))
