"""Which prompts the dense and the pruned model answer, to be compared.

See `ray_surgeon.stages.answers.answers`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig

from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.spec.written import START_TOKENS, TURN_TOKENS
from ray_surgeon.stages.answers.answers import check_prompts
from ray_surgeon.stages.answers.section import GenerationSection
from ray_surgeon.stages.self_text.conversations import write_prompts
from ray_surgeon.stages.self_text.requests import Conversations, Request, chat_marks, shows_turns
from ray_surgeon.storage.prompts import has_chat_template, read_prompts

WHERE = "evaluation.generation"
_SEED = 7_919
"""Added to a user's seed.

So the prompts are not those of conversations in the calibration with the same seed.
"""
_HELD_SHARE = 0.1
"""Share of a calibration's file of prompts that is held aside for the comparison, at most."""


@dataclass(frozen=True)
class Yardstick:
    """Prompts, and what their answers need."""

    section: GenerationSection
    # tokens of each; if the dense model writes some, in case that none of them is of use
    prompts: tuple[tuple[int, ...], ...]
    request: Conversations | None  # for prompts that the dense model writes
    ends: frozenset[int]  # tokens that end an answer
    tokenizer: Any = field(repr=False)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be the same when a run goes on; prompts that the model writes may differ."""
        digest = None
        if self.request is None:
            digest = hashlib.sha256(repr(self.prompts).encode()).hexdigest()
        return self.section.model_dump(mode="json", exclude={"prompts"}) | {"prompts": digest}

    def asked(self, cluster: Cluster) -> tuple[tuple[int, ...], ...]:
        """Return the prompts, written by the dense model on the cluster if they are not given."""
        if self.request is None:
            return self.prompts
        return write_prompts(cluster, self.request, self.section.num_prompts) or self.prompts

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without those of the chat template."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def can_write_prompts(section: GenerationSection, tokenizer: Any, config: PretrainedConfig) -> bool:
    """Whether a model can write prompts from its chat template's opening.

    It must have room for their answers.
    """
    if not shows_turns(tokenizer):
        return False
    marks = chat_marks(tokenizer, config, WHERE)
    longest = getattr(config, "max_position_embeddings", None)
    needed = len(marks.opening) + TURN_TOKENS + len(marks.closing) + section.max_new_tokens
    return bool(marks.opening) and (longest is None or needed <= longest)


def yardstick_of(
    section: GenerationSection, tokenizer: Any, config: PretrainedConfig, windows: NDArray[np.int64]
) -> Yardstick:
    """Return the prompts of a section, or how they are to be written.

    Args:
        section: `evaluation.generation`.
        tokenizer: of the model.
        config: of the model.
        windows: [num_sequences, sequence_length] of the evaluation text that a model without a chat
            template goes on with.

    Raises:
        ValueError: a prompt cannot be read or answered; names the field.
    """
    longest = getattr(config, "max_position_embeddings", None)
    new = section.max_new_tokens
    marks = chat_marks(tokenizer, config, WHERE)
    starts = windows[: section.num_prompts, : min(START_TOKENS, windows.shape[1])]
    prompts = [tuple(start) for start in starts.tolist()]
    if section.prompts is None and has_chat_template(tokenizer) and marks.opening:
        # a third is a turn's
        length = len(marks.opening) + len(marks.closing) + len(marks.end) + 3 * TURN_TOKENS
        request = Conversations(marks, None, 0, length, 1.0, section.seed + _SEED, WHERE)
        check_prompts(
            [(*marks.opening, *marks.closing, *[0] * request.turn_tokens)],
            new,
            longest,
            f"{WHERE}.max_new_tokens",
        )
        return Yardstick(section, tuple(prompts), request, marks.ends_of_answer, tokenizer)
    if section.prompts is not None:
        most = None if longest is None else longest - new
        read = read_prompts(section.prompts, tokenizer, f"{WHERE}.prompts", most)
        drawn = np.sort(
            np.random.default_rng(section.seed).permutation(len(read))[: section.num_prompts]
        )
        prompts = [read[number].tokens for number in drawn]
    check_prompts(prompts, new, longest, f"{WHERE}.prompts")
    return Yardstick(section, tuple(prompts), None, marks.ends_of_answer, tokenizer)


def held_prompts(
    section: GenerationSection,
    written: Mapping[int, Request],
    tokenizer: Any,
    config: PretrainedConfig,
) -> tuple[Yardstick | None, dict[int, Request]]:
    """Take some prompts of the calibration's file out of it, for the comparison alone.

    Args:
        section: `evaluation.generation`, without prompts of its own.
        written: number of a calibration text -> what the model is to write for it.
        tokenizer: of the model.
        config: of the model.

    Returns:
        The yardstick, None if the calibration has no file of two prompts or more; and what is left
        to be written.
    """
    for number, request in written.items():
        prompts = request.prompts if isinstance(request, Conversations) else None
        if prompts is None or len(prompts) < 2:
            continue
        count = min(section.num_prompts, max(1, round(_HELD_SHARE * len(prompts))))
        held = set(np.random.default_rng(section.seed).permutation(len(prompts))[:count].tolist())
        taken = tuple(prompts[i].tokens for i in sorted(held))
        rest = tuple(prompt for i, prompt in enumerate(prompts) if i not in held)
        assert isinstance(request, Conversations)
        longest = getattr(config, "max_position_embeddings", None)
        check_prompts(taken, section.max_new_tokens, longest, f"{request.where}.prompts")
        yardstick = Yardstick(section, taken, None, request.marks.ends_of_answer, tokenizer)
        return yardstick, {**written, number: replace(request, prompts=rest)}
    return None, dict(written)
