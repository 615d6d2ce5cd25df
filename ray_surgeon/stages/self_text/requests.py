"""What the dense model is to write, from the sections of a calibration."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from ray_surgeon.runtime.writing import Wanted, texts_together
from ray_surgeon.spec.calibration import CalibrationSection
from ray_surgeon.spec.written import TURN_TOKENS, SelfSection
from ray_surgeon.storage.prompts import Prompt, has_chat_template, read_prompts
from ray_surgeon.storage.texts import first_token, read_windows

_LEAST_ROOM = 24
"""Tokens of a window that are left for a turn and its answer, beside the chat template, at least.
"""


@dataclass(frozen=True)
class Texts:
    """Plain texts, some of which fill a window together."""

    wanted: Wanted
    starts: tuple[tuple[int, ...], ...]  # tokens of each text that stand before what is written
    sequence_length: int


@dataclass(frozen=True)
class ChatMarks:
    """Tokens that a chat template puts around what a user and the model say."""

    opening: tuple[int, ...] = ()  # before the user's turn
    closing: tuple[int, ...] = ()  # between the turn and the answer
    end: tuple[int, ...] = ()  # after the answer
    last: frozenset[int] = frozenset()  # tokens that end any text
    special: frozenset[int] = frozenset()  # tokens that are no text

    @property
    def ends_of_turn(self) -> frozenset[int]:
        """Tokens with which the user's turn is over."""
        return self.last | set(self.closing[:1])

    @property
    def ends_of_answer(self) -> frozenset[int]:
        """Tokens with which the answer is over."""
        return self.last | set(self.end[:1])


@dataclass(frozen=True)
class Conversations:
    """Conversations of a user's turn and an answer, packed into windows."""

    marks: ChatMarks
    prompts: tuple[Prompt, ...] | None  # of a file; None: the model writes the turns, too
    num_sequences: int
    sequence_length: int
    temperature: float
    seed: int
    where: str  # field of the job spec, for errors

    @property
    def room(self) -> int:
        """Tokens of a window beside those of the chat template."""
        marks = self.marks
        return self.sequence_length - len(marks.opening) - len(marks.closing) - len(marks.end)

    @property
    def turn_tokens(self) -> int:
        """Tokens of a turn, at most."""
        return min(TURN_TOKENS, self.room // 3)


Request = Texts | Conversations


def to_be_written(
    section: CalibrationSection, tokenizer: Any, config: PretrainedConfig
) -> dict[int, Request]:
    """Return number of a calibration text -> what the dense model is to write for it.

    Raises:
        ValueError: the model cannot write it, or a file for it cannot be read; names the field.
    """
    requests: dict[int, Request] = {}
    for number, (text, count) in enumerate(section.shares):
        if isinstance(text, SelfSection):
            where = f"calibration.mix.{number - 1}" if number else "calibration"
            make = _conversations if text.has_answers else _texts
            requests[number] = make(text, count, section.sequence_length, tokenizer, config, where)
            _check_vocabulary(requests[number], config)
    return requests


def _texts(
    text: SelfSection, count: int, length: int, tokenizer: Any, config: PretrainedConfig, where: str
) -> Texts:
    num_texts, of_text = text.sizes(count, length)
    of_prompt = 0
    if text.starts is not None:
        windows = read_windows(
            text.starts, num_texts, text.start_tokens, tokenizer, f"{where}.starts"
        )
        starts = prompts = tuple(map(tuple, windows.tokens.tolist()))
    else:
        prompt = _prompt(text, tokenizer, where)
        of_prompt = len(prompt)
        begin = first_token(tokenizer)
        if begin is None and text.texts_per_sequence > 1:
            begin = prompt[-1]
        starts = (() if begin is None else (begin,),) * num_texts
        prompts = (prompt,) * num_texts
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    if not prompts[0] or of_prompt + of_text > longest:
        raise ValueError(
            f"{where}: the prompt has {of_prompt} tokens and each text {of_text}, but the model "
            f"takes at most {longest} together, and the prompt needs at least one; change the "
            "prompt or the lengths"
        )
    own = of_text - len(starts[0])
    together = texts_together(of_text)
    wanted = Wanted(prompts, own, text.temperature, text.seed, num_together=together)
    return Texts(wanted, starts, length)


def _prompt(text: SelfSection, tokenizer: Any, where: str) -> tuple[int, ...]:
    """Return the tokens before every text, which are no part of it."""
    if text.prompt is not None:
        return tuple(tokenizer(text.prompt, add_special_tokens=False)["input_ids"])
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return (int(token),)
    raise ValueError(
        f"{where}.prompt: the tokenizer has no token that begins a text; give a prompt"
    )


def _conversations(
    text: SelfSection, count: int, length: int, tokenizer: Any, config: PretrainedConfig, where: str
) -> Conversations:
    longest = getattr(config, "max_position_embeddings", None) or length
    if length > longest:
        raise ValueError(
            f"calibration.sequence_length: {length}, but the model takes at most {longest}; "
            "shorten it"
        )
    marks = chat_marks(tokenizer, config, where)
    prompts = None
    if text.prompts is not None:
        prompts = tuple(read_prompts(text.prompts, tokenizer, f"{where}.prompts", length - 1))
    elif not has_chat_template(tokenizer):
        raise ValueError(
            f"{where}.chat: true, but the model's tokenizer has no chat template, so the model "
            "cannot write conversations; remove it, and give starts, a text that the model goes on "
            "with, such as {source: python-docstrings}"
        )
    elif not marks.opening:
        raise ValueError(
            f"{where}.chat: true, but the chat template puts nothing before a user's turn that the "
            "model could go on with; give prompts or starts instead"
        )
    conversations = Conversations(marks, prompts, count, length, text.temperature, text.seed, where)
    if prompts is None and conversations.room < _LEAST_ROOM:
        raise ValueError(
            f"calibration.sequence_length: {length}, but the chat template alone takes "
            f"{length - conversations.room} tokens of a conversation, and {_LEAST_ROOM} more are "
            f"needed; make it longer, or remove chat from {where}"
        )
    return conversations


_SAID = "What the user said 7351"
_ANSWERED = "What was answered 9462"


def _rendered(tokenizer: Any, where: str) -> tuple[str, str]:
    """Return what a chat template makes of an open turn and of a turn with its answer.

    Raises:
        ValueError: the template fails, or does not show what is said.
    """
    user = {"role": "user", "content": _SAID}
    assistant = {"role": "assistant", "content": _ANSWERED}
    try:
        question = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    except Exception as error:  # templates are code of the model's, which may raise anything
        raise ValueError(
            f"{where}: the model's chat template fails ({error}); give a tokenizer with another one"
        ) from error
    if _SAID not in question or _ANSWERED not in whole:
        raise ValueError(
            f"{where}: the model's chat template changes what is said, so a turn's beginning and "
            "end are not known; give a tokenizer with another one, or a text without chat"
        )
    return question, whole


def chat_marks(tokenizer: Any, config: PretrainedConfig, where: str) -> ChatMarks:
    """Return what a tokenizer's chat template puts around turns, from what it makes of two marks.

    Args:
        tokenizer: a transformers tokenizer; without a template, there are only tokens that end
            texts.
        config: of the model.
        where: the field of the job spec, for errors.

    Raises:
        ValueError: the template does not show what it is given.
    """
    eos = config.eos_token_id
    ending = {tokenizer.eos_token_id, *(eos if isinstance(eos, list | tuple) else (eos,))}
    last = frozenset(int(token) for token in ending if token is not None)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token for token, about in added.items() if getattr(about, "special", False)}
    unused = range(len(tokenizer), config.vocab_size)  # the rest of a table that was rounded up
    not_text = frozenset({*special, *tokenizer.all_special_ids, *unused})
    if not has_chat_template(tokenizer):
        return ChatMarks(last=last, special=not_text)
    question, whole = _rendered(tokenizer, where)
    before, _, between = question.partition(_SAID)
    after = whole.rpartition(_ANSWERED)[2]
    opening, closing, end = (
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (before, between, after)
    )
    return ChatMarks(opening, closing, end, last, not_text)


def _check_vocabulary(request: Request, config: PretrainedConfig) -> None:
    if isinstance(request, Texts):
        texts = request.wanted.prompts
    else:
        marks = request.marks
        texts = (marks.opening, marks.closing, marks.end)
        for prompt in request.prompts or ():
            texts += (prompt.tokens, prompt.answer or ())
    largest = max(itertools.chain.from_iterable(texts), default=0)
    if largest >= config.vocab_size:
        raise ValueError(
            f"model.source: the tokenizer gives token {largest}, the model's vocabulary is "
            f"{config.vocab_size}; the tokenizer belongs to another model"
        )
