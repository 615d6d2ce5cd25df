"""Which prompts the dense and the pruned model answer, to be compared.

See `ray_surgeon.evaluation.answers`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ray_surgeon.data.conversations import Writer
from ray_surgeon.data.prompts import read_prompts
from ray_surgeon.data.self_text import SelfText
from ray_surgeon.data.written_text import Conversations, Language, Texts
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.wave import Tokens
from ray_surgeon.spec.evaluation import GenerationSection
from ray_surgeon.spec.texts import START_TOKENS, TURN_TOKENS

WHERE = "evaluation.generation"
_SEED = 7_919
"""Added to a user's seed.

So the prompts are not those of conversations in the calibration with the same seed.
"""
_HELD_SHARE = 0.1
"""Share of a calibration's file of prompts that is held aside for the comparison, at most."""

Prompts = tuple[tuple[int, ...], ...]
"""Tokens of each, one or more."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and what their answers need."""

    section: GenerationSection
    # if the dense model writes some, in case that none of them is of use
    prompts: Prompts
    request: Conversations | None  # for prompts that the dense model writes
    ends: frozenset[int]  # tokens that end an answer
    tokenizer: Any = field(repr=False)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be the same when a run goes on; prompts that the model writes may differ."""
        digest = None if self.request else hashlib.sha256(repr(self.prompts).encode()).hexdigest()
        return self.section.model_dump(mode="json", exclude={"prompts"}) | {"prompts": digest}

    def prompts_on(self, cluster: Cluster) -> Prompts:
        """Return the prompts, written by the dense model on the cluster if they are not given."""
        if self.request is None:
            return self.prompts
        return Writer(cluster, self.request).prompts(self.section.num_prompts) or self.prompts

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without those of the chat template."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def prompt_set_for(
    section: GenerationSection | str | None,
    self_text: SelfText | None,
    language: Language | None,
    windows: Tokens,
) -> tuple[PromptSet | None, SelfText | None]:
    """Return the prompts whose answers are compared, and what is left for the model to write.

    By default they are some of the calibration's file of prompts, or else written by the dense
    model, if it has a chat template.

    Args:
        section: `evaluation.generation`.
        self_text: the stage in which the model writes, if there is one.
        language: of the model; None for a plan alone, which has no prompts.
        windows: [num_windows, sequence_length] of the first evaluation text.

    Raises:
        ValueError: a prompt cannot be read or answered; names the field.
    """
    if section is None or language is None:
        return None, self_text
    if isinstance(section, GenerationSection):
        return _prompt_set_of(section, language, windows), self_text
    if self_text is not None and (held := _held_prompts(self_text, language)):
        return held
    try:
        prompt_set = _prompt_set_of(GenerationSection(), language, windows)
    except ValueError:  # a chat template that shows no turns, or a model with no room for answers
        return None, self_text
    return prompt_set if prompt_set.request else None, self_text


def check_prompts(prompts: Sequence[Sequence[int]], new: int, longest: float, where: str) -> None:
    """Refuse prompts that the model cannot answer.

    Args:
        prompts: tokens of each.
        new: tokens of an answer, at most.
        longest: tokens that the model takes at most.
        where: field of the prompts in the job spec.

    Raises:
        ValueError: a prompt is empty or leaves no room; names the field.
    """
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= longest - new:
            size = f"{len(prompt)} tokens and its answer up to {new}"
            problem = f"{where}: prompt {number} has {size}, but the model takes at most {longest}"
            raise ValueError(f"{problem}, one of a prompt at least; change those")


def _drawn(count: int, most: int, seed: int) -> list[int]:
    """Return the numbers of the prompts, of so many, that are drawn from a file."""
    return sorted(np.random.default_rng(seed).permutation(count)[:most].tolist())


def _prompt_set_of(section: GenerationSection, language: Language, windows: Tokens) -> PromptSet:
    """Return the prompts of a file, or how they are to be written, or beginnings of windows."""
    new = section.max_new_tokens
    marks = language.marks(WHERE)
    request = None
    where = f"{WHERE}.prompts"
    prompts: Prompts = tuple(map(tuple, windows[: section.num_prompts, :START_TOKENS].tolist()))
    checked = prompts
    if section.prompts is not None:
        read = read_prompts(section.prompts, language.tokenizer, where, language.longest - new)
        drawn = _drawn(len(read), section.num_prompts, section.seed)
        prompts = checked = tuple(read[number].tokens for number in drawn)
    elif marks.opening:
        length = marks.num_tokens + 3 * TURN_TOKENS  # a third is a turn's
        request = Conversations(marks, None, 0, length, 1.0, section.seed + _SEED, WHERE)
        checked = ((*marks.opening, *marks.closing, *[0] * request.turn_tokens),)
        where = f"{WHERE}.max_new_tokens"
    check_prompts(checked, new, language.longest, where)
    return PromptSet(section, prompts, request, marks.ends_of_answer, language.tokenizer)


def _held_prompts(self_text: SelfText, language: Language) -> tuple[PromptSet, SelfText] | None:
    """Take some prompts of the calibration's file out of it, for the comparison alone.

    Returns:
        The set of prompts, and what is left to be written; None if the calibration has no file of
        two prompts or more.
    """
    section = GenerationSection()
    for number, request in self_text.requests.items():
        if isinstance(request, Texts) or len(prompts := request.prompts or ()) < 2:
            continue
        count = min(section.num_prompts, max(1, round(_HELD_SHARE * len(prompts))))
        held = _drawn(len(prompts), count, section.seed)
        taken = tuple(prompts[i].tokens for i in held)
        rest = tuple(prompt for i, prompt in enumerate(prompts) if i not in held)
        check_prompts(taken, section.max_new_tokens, language.longest, f"{request.where}.prompts")
        ends = request.marks.ends_of_answer
        prompt_set = PromptSet(section, taken, None, ends, language.tokenizer)
        requests = {**self_text.requests, number: replace(request, prompts=rest)}
        return prompt_set, replace(self_text, requests=requests)
    return None
