"""Answers to prompts: those of the dense model, written once, and how near a pruned model comes.

The pruned model is compared twice. It reads the dense model's answers, and both say at every token
what comes next (acceptance, agreement, divergence). And it writes its own answers, taking the most
likely token each time as the dense model did, until they part. Source: docs/method.md, section 11.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ray_surgeon.data.conversations import repeats
from ray_surgeon.data.self_text import was_written
from ray_surgeon.evaluation.prompts import Prompts, PromptSet
from ray_surgeon.run_state import Facts, RunState
from ray_surgeon.runtime import passes
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.dense_states import ANSWERS
from ray_surgeon.runtime.wave import Counts, Tokens
from ray_surgeon.runtime.writing import GenerationRequest, write_texts
from ray_surgeon.storage import files

_EXAMPLE_CHARACTERS = 2000
"""Of a text that a record shows as an example."""

Decode = Callable[[Sequence[int]], str]
"""Returns the text of tokens."""


@dataclass(frozen=True)
class Answers:
    """What the dense model answers, taking the most likely token each time."""

    prompts: Prompts
    answers: Prompts  # likewise, with the token that ends it if it has ended
    ends: frozenset[int]  # tokens that end an answer

    @property
    def ended(self) -> list[bool]:
        """Whether each answer has ended, rather than been cut."""
        return [answer[-1] in self.ends for answer in self.answers]

    def windows(self) -> tuple[Tokens, Counts]:
        """Return each of n prompts with its answer, filled up on the right, where no model looks.

        Returns:
            [n, T] tokens, and [n, T] whether a token belongs to the answer.
        """
        pairs = list(zip(self.prompts, self.answers, strict=True))
        tokens = pad_sequence([torch.tensor(p + a) for p, a in pairs], batch_first=True)
        counts = [torch.arange(len(p + a)) >= len(p) for p, a in pairs]
        return tokens.numpy(), pad_sequence(counts, batch_first=True).numpy()


@dataclass(frozen=True)
class Generation:
    """A pruned model beside the dense model's answers."""

    # at the tokens of the dense model's answers
    acceptance: float  # mean of ``sum_v min(p_v, q_v)``
    agreement: float  # fraction of them for which both models have the same most likely token
    divergence: float  # mean over them of the divergence from the dense model, in nats
    # for each prompt, tokens in which both own answers agree from the start
    departures: tuple[int, ...]
    # of the answers that the dense model ended, the fraction that is not ended; None if it ended
    # none
    not_ended: float | None
    repeating: float  # fraction of the answers that get stuck in a loop
    answers: Prompts  # the pruned model's own


# On the coordinator


def answers_of(
    cluster: Cluster, prompts: Prompts, max_tokens: int, ends: frozenset[int]
) -> Answers:
    """Let the dense model answer prompts, and keep what pruned models are compared with.

    Raises:
        FloatingPointError: a hidden state is not finite.
    """
    answers = Answers(prompts, _written(cluster, prompts, max_tokens, ends), ends)
    remember_answers(cluster, answers)
    return answers


def _written(cluster: Cluster, prompts: Prompts, max_tokens: int, ends: frozenset[int]) -> Prompts:
    wanted = GenerationRequest(prompts, max_tokens, temperature=0.0, ends=ends)
    return tuple(tuple(text.tolist()) for text in write_texts(cluster, wanted))


def remember_answers(cluster: Cluster, answers: Answers) -> None:
    """Let the last shards of all replicas keep the dense model's states of its answers.

    Raises:
        FloatingPointError: a state is not finite.
    """
    tokens, _ = answers.windows()
    passes.pass_up_to_the_head(cluster, tokens, None, ANSWERS, "the dense model's answers")


def measure_rates(cluster: Cluster, answers: Answers) -> dict[str, float]:
    """Measure weights on the answers that workers remember, without writing any.

    Returns:
        Acceptance, agreement and divergence, as in `Generation`.

    Raises:
        FloatingPointError: the divergence is not a number.
    """
    tokens, counts = answers.windows()
    comparisons = passes.compared(cluster, ANSWERS, tokens, counts, acceptance=True)
    num_tokens = passes.num_counted(tokens, counts)
    means = {
        name: sum(comparison[name] for comparison in comparisons) / num_tokens
        for name in ("acceptance", "agreement", "divergence")
    }
    passes.finite("the divergence from the dense model on its answers", means["divergence"])
    return means


def measure_answers(cluster: Cluster, answers: Answers, max_tokens: int) -> Generation:
    """Measure weights on the answers that workers remember, and let them write their own.

    Raises:
        FloatingPointError: the divergence is not a number.
    """
    rates = measure_rates(cluster, answers)
    own = _written(cluster, answers.prompts, max_tokens, answers.ends)
    ended = zip(own, answers.ended, strict=True)
    is_open = [answer[-1] not in answers.ends for answer, was_ended in ended if was_ended]
    return Generation(
        **rates,
        departures=tuple(map(departure, answers.answers, own)),
        not_ended=fmean(is_open) if is_open else None,
        repeating=fmean(map(repeats, own)),
        answers=own,
    )


def departure(answer: Sequence[int], second_answer: Sequence[int]) -> int:
    """Return with how many equal tokens two answers begin."""
    pairs = zip(answer, second_answer, strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def dense_record(answers: Answers, decode_tokens: Decode) -> dict[str, Any]:
    """Return what a report tells of the dense model's answers; `decode_tokens` gives their text."""
    record: dict[str, Any] = {"num_prompts": len(answers.prompts)}
    record["num_tokens"] = sum(map(len, answers.answers))
    record["share_ended"] = fmean(answers.ended)
    record["share_repeating"] = fmean(map(repeats, answers.answers))
    first = {"prompt": answers.prompts[0], "dense": answers.answers[0]}
    texts = {name: decode_tokens(tokens) for name, tokens in first.items()}
    record["example"] = {name: text[:_EXAMPLE_CHARACTERS] for name, text in texts.items()}
    return record


def shot_record(answers: Answers, generation: Generation, decode_tokens: Decode) -> dict[str, Any]:
    """Return what a report tells of the answers after a shot; see `dense_record`."""
    pruned = decode_tokens(generation.answers[0])[:_EXAMPLE_CHARACTERS]
    record = asdict(generation)
    del record["answers"]
    departures = record.pop("departures")
    return record | {
        "tokens_until_departure": {"mean": fmean(departures), "median": median(departures)},
        "example": dense_record(answers, decode_tokens)["example"] | {"pruned": pruned},
    }


def read_answers(uri: str) -> Answers:
    """Read the dense model's answers, for a run that goes on without the dense model."""
    record = files.read_json(uri)
    prompts, answers = (tuple(map(tuple, record[part])) for part in ("prompts", "answers"))
    return Answers(prompts, answers, frozenset(record["ends"]))


# Stages


@dataclass(frozen=True)
class DenseAnswers:
    """The dense model answers the prompts, before the first shot."""

    prompt_set: PromptSet

    def collect(self, run: RunState, facts: Facts) -> Answers:
        """Return the dense model's answers, unless an earlier try of the run has written them.

        Raises:
            ValueError: the answers of an earlier try are gone.
        """
        uri = run.directory.path("answers.json")
        prompt_set = self.prompt_set
        if not was_written(run, uri):
            prompts = prompt_set.prompts_on(run.cluster)
            most = prompt_set.section.max_new_tokens
            answers = answers_of(run.cluster, prompts, most, prompt_set.ends)
            files.write_json(uri, asdict(answers) | {"ends": sorted(answers.ends)})
        else:
            answers = read_answers(uri)
            if not run.resumes:  # otherwise its states are among those of the dense model
                remember_answers(run.cluster, answers)
        record = dense_record(answers, prompt_set.text_of)
        facts["prompts"] = record["num_prompts"]
        facts["num_tokens"] = record["num_tokens"]
        if not run.resumes:
            run.report.dense["generation"] = record
        return answers


def measure_acceptance(run: RunState, answers: Answers, facts: Facts) -> None:
    """Measure how many of the dense model's tokens the model accepts before its recovery."""
    rates = measure_rates(run.cluster, answers)
    run.record["generation_before_recovery"] = rates
    facts["accepted"] = rates["acceptance"]


@dataclass(frozen=True)
class PrunedAnswers:
    """The pruned model's answers beside the dense model's, after every shot."""

    prompt_set: PromptSet

    def compare(self, run: RunState, answers: Answers, facts: Facts) -> None:
        """Compare the pruned model's answers with the dense model's."""
        generation = measure_answers(run.cluster, answers, self.prompt_set.section.max_new_tokens)
        run.record["generation"] = shot_record(answers, generation, self.prompt_set.text_of)
        facts["accepted"] = generation.acceptance
        facts["agreement"] = generation.agreement
