"""Answers to prompts: the dense model's, written once, and how close a pruned model comes to them.

The pruned model is compared in two ways. It reads the dense model's answers, and both models
predict the next token at every position (acceptance, agreement, divergence). It also writes its own
answers greedily, as the dense model did, and these are compared up to the first difference. Source:
docs/method.md, section 11.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ray_surgeon.config.sections import GenerationSection
from ray_surgeon.config.texts import START_TOKENS, TURN_TOKENS
from ray_surgeon.data.self_text import (
    LOOP_TOKENS,
    SelfText,
    Writer,
    longest_loop,
    was_written,
)
from ray_surgeon.data.written_text import (
    Continuations,
    Conversations,
    Language,
    read_prompts,
)
from ray_surgeon.distributed import passes
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.dense_states import ANSWERS
from ray_surgeon.distributed.microbatch import Counts, Tokens
from ray_surgeon.distributed.writing import GenerationRequest, write_texts
from ray_surgeon.errors import ConfigError
from ray_surgeon.run_state import Facts, RunState
from ray_surgeon.storage import files

WHERE = "evaluation.generation"
_SEED = 7_919
"""Offset of the seed, so that prompts differ from those of the calibration with the same seed."""
_HELD_SHARE = 0.1
"""Maximum fraction of the calibration's prompts that is held aside for the comparison."""

_LOOP_SHARE = 0.3
"""Fraction of a short answer that a loop covers at least."""
_FEWEST_LOOP_TOKENS = 8
"""Minimum number of tokens of a loop in any answer."""

Prompts = tuple[tuple[int, ...], ...]
"""Tokens of each prompt, at least one."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts and the settings for their answers."""

    section: GenerationSection
    # fallback if the dense model writes prompts and none of them is useful
    prompts: Prompts
    request: Conversations | None  # for prompts that the dense model writes
    ends: frozenset[int]  # tokens that end an answer
    tokenizer: Any = field(repr=False)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Settings and prompts that must not change when a run resumes.

        Prompts that the model writes are not included, because they may differ.
        """
        fingerprint = self.section.model_dump(mode="json", exclude={"prompts"})
        fingerprint["prompts"] = None
        if self.request is None:
            digest = hashlib.sha256(repr(self.prompts).encode())
            fingerprint["prompts"] = digest.hexdigest()
        return fingerprint

    def prompts_on(self, cluster: Cluster) -> Prompts:
        """Return the prompts, written by the dense model on the cluster if they are not given."""
        if self.request is None:
            return self.prompts
        written = Writer(cluster, self.request).prompts(self.section.num_prompts)
        return written or self.prompts

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without the chat template's special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def prompt_set_for(
    section: GenerationSection | str | None,
    self_text: SelfText | None,
    language: Language | None,
    windows: Tokens,
) -> tuple[PromptSet | None, SelfText | None]:
    """Return the prompts whose answers are compared, and the calibration without these prompts.

    By default they are taken from the calibration's file of prompts, or else written by the dense
    model, if it has a chat template.

    Args:
        section: `evaluation.generation`.
        self_text: the stage in which the model writes calibration text, if there is one.
        language: language of the model; None for a plan alone, which has no prompts.
        windows: [num_windows, sequence_length] windows of the first evaluation text.

    Raises:
        ValueError: a prompt cannot be read or answered; names the field.
    """
    if section is None or language is None:
        return None, self_text
    if isinstance(section, GenerationSection):
        return _prompt_set_of(section, language, windows), self_text
    if self_text is not None:
        held = _held_prompts(self_text, language)
        if held is not None:
            return held
    try:
        prompt_set = _prompt_set_of(GenerationSection(), language, windows)
    except ValueError:  # unusable chat template, or no room for answers
        return None, self_text
    if prompt_set.request is None:
        return None, self_text
    return prompt_set, self_text


def check_prompts(
    prompts: Sequence[Sequence[int]],
    new: int,
    longest: float,
    where: str,
) -> None:
    """Refuse prompts that the model cannot answer.

    Args:
        prompts: tokens of each prompt.
        new: maximum number of tokens of an answer.
        longest: maximum number of tokens of a sequence.
        where: field of the prompts in the job spec.

    Raises:
        ValueError: a prompt is empty or leaves no room; names the field.
    """
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= longest - new:
            raise ConfigError(
                field=where,
                found=(
                    f"prompt {number} has {len(prompt)} tokens and its answer up to "
                    f"{new}, but the model takes at most {longest} tokens in all, and a "
                    "prompt needs at least one"
                ),
                remedy="change the prompt or max_new_tokens",
            )


def _drawn(count: int, most: int, seed: int) -> list[int]:
    """Return the sorted numbers of at most `most` of `count` prompts, drawn at random."""
    order = np.random.default_rng(seed).permutation(count)
    return sorted(order[:most].tolist())


def _prompt_set_of(
    section: GenerationSection,
    language: Language,
    windows: Tokens,
) -> PromptSet:
    """Return prompts from a file, a request to write them, or the beginnings of windows."""
    new = section.max_new_tokens
    marks = language.marks(WHERE)
    request = None
    where = f"{WHERE}.prompts"
    starts = windows[: section.num_prompts, :START_TOKENS].tolist()
    prompts: Prompts = tuple(map(tuple, starts))
    checked = prompts
    if section.prompts is not None:
        longest = language.longest - new
        read = read_prompts(section.prompts, language.tokenizer, where, longest)
        drawn = _drawn(len(read), section.num_prompts, section.seed)
        prompts = tuple(read[number].tokens for number in drawn)
        checked = prompts
    elif marks.opening:
        request = Conversations(
            marks=marks,
            prompts=None,
            num_sequences=0,
            sequence_length=marks.num_tokens + 3 * TURN_TOKENS,  # a turn takes a third
            temperature=1.0,
            seed=section.seed + _SEED,
            where=WHERE,
        )
        longest_turn = [0] * request.turn_tokens
        checked = ((*marks.opening, *marks.closing, *longest_turn),)
        where = f"{WHERE}.max_new_tokens"
    check_prompts(checked, new, language.longest, where)
    return PromptSet(
        section=section,
        prompts=prompts,
        request=request,
        ends=marks.ends_of_answer,
        tokenizer=language.tokenizer,
    )


def _held_prompts(
    self_text: SelfText,
    language: Language,
) -> tuple[PromptSet, SelfText] | None:
    """Hold aside some prompts of the calibration's file for the comparison.

    Returns:
        The prompts, and the stage without them; None if the calibration has no file of two or more
        prompts.
    """
    section = GenerationSection()
    for number, request in self_text.requests.items():
        if isinstance(request, Continuations) or request.prompts is None:
            continue
        prompts = request.prompts
        if len(prompts) < 2:
            continue
        count = min(section.num_prompts, max(1, round(_HELD_SHARE * len(prompts))))
        held = _drawn(len(prompts), count, section.seed)
        taken = tuple(prompts[i].tokens for i in held)
        rest = tuple(prompt for i, prompt in enumerate(prompts) if i not in held)
        where = f"{request.where}.prompts"
        check_prompts(taken, section.max_new_tokens, language.longest, where)
        prompt_set = PromptSet(
            section=section,
            prompts=taken,
            request=None,
            ends=request.marks.ends_of_answer,
            tokenizer=language.tokenizer,
        )
        requests = {**self_text.requests, number: replace(request, prompts=rest)}
        return prompt_set, replace(self_text, requests=requests)
    return None


_EXAMPLE_CHARACTERS = 2000
"""Maximum number of characters of a text in a record."""

Decode = Callable[[Sequence[int]], str]
"""Returns the text of tokens."""


@dataclass(frozen=True)
class Answers:
    """The dense model's greedy answers to prompts."""

    prompts: Prompts
    answers: Prompts  # tokens of each, including the token that ends it, if any
    ends: frozenset[int]  # tokens that end an answer

    @property
    def ended(self) -> list[bool]:
        """Whether each answer has ended, rather than been cut off."""
        return [answer[-1] in self.ends for answer in self.answers]

    def windows(self) -> tuple[Tokens, Counts]:
        """Return each of n prompts with its answer, padded on the right.

        Returns:
            [n, T] tokens, and [n, T] whether a token belongs to the answer.
        """
        tokens = []
        counts = []
        for prompt, answer in zip(self.prompts, self.answers, strict=True):
            both = torch.tensor(prompt + answer)
            tokens.append(both)
            counts.append(torch.arange(len(both)) >= len(prompt))
        padded_tokens = pad_sequence(tokens, batch_first=True)
        padded_counts = pad_sequence(counts, batch_first=True)
        return padded_tokens.numpy(), padded_counts.numpy()


@dataclass(frozen=True)
class Generation:
    """Comparison of a pruned model with the dense model's answers.

    The first three are over the tokens of the dense model's answers.
    """

    acceptance: float  # mean of ``sum_v min(p_v, q_v)``
    agreement: float  # fraction of tokens for which both models predict the same token
    divergence: float  # mean divergence from the dense model, in nats
    # for each prompt, number of leading tokens in which both models' own answers agree
    departures: tuple[int, ...]
    # fraction of unfinished answers among those that the dense model finished; None if it finished
    # none
    not_ended: float | None
    repeating: float  # fraction of the answers that get stuck in a loop
    answers: Prompts  # the pruned model's own answers


# On the coordinator


def answers_of(
    cluster: Cluster, prompts: Prompts, max_tokens: int, ends: frozenset[int]
) -> Answers:
    """Let the dense model answer prompts, and keep its states for comparisons.

    Raises:
        FloatingPointError: a hidden state is not finite.
    """
    written = _written(cluster, prompts, max_tokens, ends)
    answers = Answers(prompts=prompts, answers=written, ends=ends)
    remember_answers(cluster, answers)
    return answers


def _written(
    cluster: Cluster,
    prompts: Prompts,
    max_tokens: int,
    ends: frozenset[int],
) -> Prompts:
    request = GenerationRequest(prompts, max_tokens, temperature=0.0, ends=ends)
    return tuple(tuple(text.tolist()) for text in write_texts(cluster, request))


def remember_answers(cluster: Cluster, answers: Answers) -> None:
    """Let the last shards of all replicas keep the dense model's states on its answers.

    Raises:
        FloatingPointError: a state is not finite.
    """
    tokens, _ = answers.windows()
    passes.pass_up_to_the_head(
        cluster,
        tokens,
        only=None,
        text=ANSWERS,
        whose="the dense model's answers",
    )


def measure_rates(cluster: Cluster, answers: Answers) -> dict[str, float]:
    """Compare the current weights with the dense model on its answers.

    Returns:
        Acceptance, agreement and divergence, as in `Generation`.

    Raises:
        FloatingPointError: the divergence is not a number.
    """
    tokens, counts = answers.windows()
    comparisons = passes.compared(cluster, ANSWERS, tokens, counts, acceptance=True)
    num_tokens = passes.num_counted(tokens, counts)
    means = {}
    for name in ("acceptance", "agreement", "divergence"):
        means[name] = sum(comparison[name] for comparison in comparisons) / num_tokens
    divergence = means["divergence"]
    passes.finite("the divergence from the dense model on its answers", divergence)
    return means


def measure_answers(cluster: Cluster, answers: Answers, max_tokens: int) -> Generation:
    """Compare the current weights with the dense model on its answers, and on their own answers.

    Raises:
        FloatingPointError: the divergence is not a number.
    """
    rates = measure_rates(cluster, answers)
    own = _written(cluster, answers.prompts, max_tokens, answers.ends)
    # for each answer that the dense model finished, whether the pruned one's is unfinished
    unfinished = []
    for answer, was_ended in zip(own, answers.ended, strict=True):
        if was_ended:
            unfinished.append(answer[-1] not in answers.ends)
    return Generation(
        acceptance=rates["acceptance"],
        agreement=rates["agreement"],
        divergence=rates["divergence"],
        departures=tuple(map(departure, answers.answers, own)),
        not_ended=fmean(unfinished) if unfinished else None,
        repeating=fmean(map(is_caught, own)),
        answers=own,
    )


def is_caught(answer: Sequence[int]) -> bool:
    """Return whether an answer is caught in a loop; see `longest_loop`.

    The loop must cover three tenths of the answer, at least 8 tokens. 32 tokens always suffice, as
    for calibration text (`self_text.repeats`), whose rule finds nothing in answers of 40 tokens
    that write four times "I'm glad.".
    """
    fewest = max(_FEWEST_LOOP_TOKENS, math.ceil(_LOOP_SHARE * len(answer)))
    return longest_loop(answer) >= min(LOOP_TOKENS, fewest)


def departure(answer: Sequence[int], second_answer: Sequence[int]) -> int:
    """Return the number of leading tokens in which two answers agree."""
    num_equal = 0
    for token, second_token in zip(answer, second_answer, strict=False):
        if token != second_token:
            break
        num_equal += 1
    return num_equal


def dense_record(answers: Answers, decode_tokens: Decode) -> dict[str, Any]:
    """Return the report's entry on the dense model's answers; `decode_tokens` gives their text."""
    prompt = decode_tokens(answers.prompts[0])
    answer = decode_tokens(answers.answers[0])
    return {
        "num_prompts": len(answers.prompts),
        "num_tokens": sum(map(len, answers.answers)),
        "share_ended": fmean(answers.ended),
        "share_repeating": fmean(map(is_caught, answers.answers)),
        "example": {
            "prompt": prompt[:_EXAMPLE_CHARACTERS],
            "dense": answer[:_EXAMPLE_CHARACTERS],
        },
    }


def shot_record(
    answers: Answers,
    generation: Generation,
    decode_tokens: Decode,
) -> dict[str, Any]:
    """Return the report's entry on the answers after a shot; see `dense_record`."""
    pruned = decode_tokens(generation.answers[0])[:_EXAMPLE_CHARACTERS]
    return {
        "acceptance": generation.acceptance,
        "agreement": generation.agreement,
        "divergence": generation.divergence,
        "not_ended": generation.not_ended,
        "repeating": generation.repeating,
        "tokens_until_departure": {
            "mean": fmean(generation.departures),
            "median": median(generation.departures),
        },
        "example": {**dense_record(answers, decode_tokens)["example"], "pruned": pruned},
    }


def read_answers(uri: str) -> Answers:
    """Read the dense model's answers, for a run that resumes without the dense model."""
    record = files.read_json(uri)
    return Answers(
        prompts=tuple(map(tuple, record["prompts"])),
        answers=tuple(map(tuple, record["answers"])),
        ends=frozenset(record["ends"]),
    )


# Stages


@dataclass(frozen=True)
class DenseAnswers:
    """Lets the dense model answer the prompts, before the first shot."""

    prompt_set: PromptSet

    def collect(self, run: RunState, facts: Facts) -> Answers:
        """Return the dense model's answers; read them if an earlier attempt of the run wrote them.

        Raises:
            ValueError: the answers of an earlier attempt are missing.
        """
        uri = run.directory.path("answers.json")
        prompt_set = self.prompt_set
        if was_written(run, uri):
            answers = read_answers(uri)
            if not run.resumes:  # otherwise workers have read the dense model's states
                remember_answers(run.cluster, answers)
        else:
            answers = answers_of(
                run.cluster,
                prompt_set.prompts_on(run.cluster),
                max_tokens=prompt_set.section.max_new_tokens,
                ends=prompt_set.ends,
            )
            document = {
                "prompts": answers.prompts,
                "answers": answers.answers,
                "ends": sorted(answers.ends),
            }
            files.write_json(uri, document)
        record = dense_record(answers, prompt_set.text_of)
        facts["prompts"] = record["num_prompts"]
        facts["num_tokens"] = record["num_tokens"]
        if not run.resumes:
            run.report.dense["generation"] = record
        return answers


def measure_acceptance(run: RunState, answers: Answers, facts: Facts) -> None:
    """Measure the acceptance of the dense model's tokens before recovery."""
    rates = measure_rates(run.cluster, answers)
    run.record["generation_before_recovery"] = rates
    facts["accepted"] = rates["acceptance"]


@dataclass(frozen=True)
class PrunedAnswers:
    """Compares the pruned model's answers with the dense model's after every shot."""

    prompt_set: PromptSet

    def compare(self, run: RunState, answers: Answers, facts: Facts) -> None:
        """Compare the pruned model's answers with the dense model's."""
        max_tokens = self.prompt_set.section.max_new_tokens
        generation = measure_answers(run.cluster, answers, max_tokens)
        run.record["generation"] = shot_record(
            answers,
            generation,
            self.prompt_set.text_of,
        )
        facts["accepted"] = generation.acceptance
        facts["agreement"] = generation.agreement
