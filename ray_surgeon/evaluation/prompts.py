"""The prompts that the dense and the pruned model answer for a comparison.

See `ray_surgeon.evaluation.answers`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ray_surgeon.config.evaluation import GenerationSection
from ray_surgeon.config.texts import START_TOKENS, TURN_TOKENS
from ray_surgeon.data.conversations import Writer
from ray_surgeon.data.prompts import read_prompts
from ray_surgeon.data.self_text import SelfText
from ray_surgeon.data.written_text import Continuations, Conversations, Language
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.microbatch import Tokens
from ray_surgeon.errors import ConfigError

WHERE = "evaluation.generation"
_SEED = 7_919
"""Added to the user's seed.

The prompts then differ from those of conversations in the calibration with the same seed.
"""
_HELD_SHARE = 0.1
"""Maximum share of a calibration's file of prompts that is held aside for the comparison."""

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
        language: of the model; None for a plan alone, which has no prompts.
        windows: [num_windows, sequence_length] of the first evaluation text.

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
        prompts: tokens of each.
        new: maximum number of tokens of an answer.
        longest: maximum number of tokens that the model takes.
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
                    f"{new}, but the model takes at most {longest}, one of a prompt "
                    "at least"
                ),
                remedy="change those",
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
    """Return prompts of a file, a request to write some, or the beginnings of windows."""
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
    """Take some prompts out of the calibration's file, for the comparison alone.

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
