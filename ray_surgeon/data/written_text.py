"""What the dense model is to write, from the sections of a calibration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from ray_surgeon.data.prompts import Prompt, has_chat_template, read_prompts
from ray_surgeon.data.texts import first_token, read_windows, tokens_of
from ray_surgeon.runtime.writing import GenerationRequest, texts_together
from ray_surgeon.spec.base import REASON, refusing
from ray_surgeon.spec.calibration import CalibrationSection, MixedSection
from ray_surgeon.spec.texts import TURN_TOKENS

_LEAST_ROOM = 24
"""Tokens of a window that are left for a turn and its answer, beside the chat template, at least.
"""
_SAID = "What the user said 7351"
_ANSWERED = "What was answered 9462"


@dataclass(frozen=True)
class Texts:
    """Plain texts, some of which fill a window together."""

    wanted: GenerationRequest
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
    def num_tokens(self) -> int:
        """Tokens of a conversation beside what is said."""
        return len(self.opening) + len(self.closing) + len(self.end)

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
    prompts: Sequence[Prompt] | None  # of a file; None: the model writes the turns, too
    num_sequences: int
    sequence_length: int
    temperature: float
    seed: int
    where: str  # field of the job spec, for errors

    @property
    def turn_tokens(self) -> int:
        """Tokens of a turn, at most: a third of a window beside those of the chat template."""
        return min(TURN_TOKENS, (self.sequence_length - self.marks.num_tokens) // 3)


Request = Texts | Conversations


@dataclass(frozen=True)
class Language:
    """A tokenizer, and the configuration of its model."""

    tokenizer: Any
    config: PretrainedConfig

    @property
    def longest(self) -> float:
        """Tokens that the model takes, at most."""
        return getattr(self.config, "max_position_embeddings", None) or math.inf

    def marks(self, where: str) -> ChatMarks:
        """Return what the chat template puts around turns, from what it makes of two marks.

        Without a template, there are only tokens that end texts, and those that are no text.

        Args:
            where: the field of the job spec, for errors.

        Raises:
            ValueError: the template does not show what it is given.
        """
        tokenizer = self.tokenizer
        eos = self.config.eos_token_id
        ending = {tokenizer.eos_token_id, *(eos if isinstance(eos, list | tuple) else (eos,))}
        special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
        # the rest of a table that was rounded up
        unused = range(len(tokenizer), self.config.vocab_size)
        not_text = frozenset({*special, *tokenizer.all_special_ids, *unused})
        marks = ChatMarks(last=frozenset(ending - {None}), special=not_text)
        if not has_chat_template(tokenizer):
            return marks
        messages = [{"role": "user", "content": _SAID}, {"role": "assistant", "content": _ANSWERED}]
        render = tokenizer.apply_chat_template
        remedy = "give a tokenizer with another one, or a text without chat"
        failure = f"{where}: the model's chat template fails ({REASON})"
        with refusing(failure, remedy, Exception):  # it is code of the model's
            question = render(messages[:1], tokenize=False, add_generation_prompt=True)
            whole = render(messages, tokenize=False)
        if _SAID not in question or _ANSWERED not in whole:
            raise ValueError(f"{where}: the chat template changes what is said; {remedy}")
        before, _, between = question.partition(_SAID)
        around = (before, between, whole.rpartition(_ANSWERED)[2])
        opening, closing, end = (tokens_of(tokenizer, text) for text in around)
        return replace(marks, opening=opening, closing=closing, end=end)

    def requests(self, section: CalibrationSection) -> dict[int, Request]:
        """Return number of a calibration text -> what the dense model is to write for it.

        Raises:
            ValueError: the model cannot write it, or a file for it cannot be read; names the field.
        """
        requests: dict[int, Request] = {}
        for number, (text, count) in enumerate(section.shares):
            if text.is_written:
                where = f"calibration.mix.{number - 1}" if number else "calibration"
                make = self.chats if text.has_answers else self.texts
                requests[number] = make(text, count, section.sequence_length, where)
        return requests

    def texts(self, text: MixedSection, count: int, sequence_length: int, where: str) -> Texts:
        """Return what is to be written of plain texts; see `requests`."""
        tokenizer = self.tokenizer
        num_texts, length = text.sizes(count, sequence_length)
        prompt: tuple[int, ...] = ()  # before every text, and no part of it
        if text.starts is not None:
            at = f"{where}.starts"
            windows = read_windows(text.starts, num_texts, text.start_tokens, tokenizer, at)
            starts = prompts = tuple(map(tuple, windows.tokens.tolist()))
        else:
            ends = [n for n in (tokenizer.bos_token_id, tokenizer.eos_token_id) if n is not None]
            prompt = tuple(ends[:1]) if text.prompt is None else tokens_of(tokenizer, text.prompt)
            first = first_token(tokenizer)
            start = prompt[-1:] if first is None and text.texts_per_sequence > 1 else ()
            starts = (start if first is None else (first,),) * num_texts
            prompts = (prompt,) * num_texts
        most = self.longest - length
        if not prompts[0] or len(prompt) > most:
            size = f"the prompt has {len(prompt)} tokens, and 1 to {most} may stand there"
            raise ValueError(f"{where}: {size}; change the prompt or the lengths")
        self.check(prompts)
        own = length - len(starts[0])
        together = texts_together(length)
        wanted = GenerationRequest(prompts, own, text.temperature, text.seed, num_together=together)
        return Texts(wanted, starts, sequence_length)

    def chats(self, text: MixedSection, count: int, length: int, where: str) -> Conversations:
        """Return what is to be written of conversations; see `requests`."""
        short = f"calibration.sequence_length: {length}, but"
        if length > self.longest:
            raise ValueError(f"{short} the model takes at most {self.longest}")
        marks = self.marks(where)
        prompts = None
        if text.prompts is not None:
            prompts = read_prompts(text.prompts, self.tokenizer, f"{where}.prompts", length - 1)
        elif not marks.opening:
            problem = "the model's chat template is absent, or puts nothing before a turn"
            remedy = "give starts, such as {source: python-docstrings}, or prompts"
            raise ValueError(f"{where}.chat: true, but {problem}; {remedy}")
        elif length - marks.num_tokens < _LEAST_ROOM:
            raise ValueError(f"{short} the chat template alone takes {marks.num_tokens}; raise it")
        said = [prompt.tokens + (prompt.answer or ()) for prompt in prompts or ()]
        self.check([marks.opening, marks.closing, marks.end, *said])
        return Conversations(marks, prompts, count, length, text.temperature, text.seed, where)

    def check(self, texts: Iterable[Iterable[int]]) -> None:
        """Refuse tokens that the model has not, which a tokenizer of another model may give."""
        size = self.config.vocab_size
        largest = max(itertools.chain.from_iterable(texts), default=0)
        if largest >= size:
            raise ValueError(f"model.source: the tokenizer's token {largest} is none of the {size}")
