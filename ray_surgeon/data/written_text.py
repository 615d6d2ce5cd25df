"""Requests for texts that the dense model writes, and files of prompts for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pydantic
from transformers import PretrainedConfig

from ray_surgeon.config.base import REASON, refusing
from ray_surgeon.config.texts import TURN_TOKENS, CalibrationSection, MixedSection
from ray_surgeon.data.texts import first_token, read_windows, tokens_of
from ray_surgeon.distributed.writing import GenerationRequest, texts_together
from ray_surgeon.errors import ConfigError
from ray_surgeon.storage.sources import read_lines


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file, and its answer if the file gives one."""

    tokens: tuple[int, ...]  # of the prompt, with those of the chat template
    # with the token that ends it; None: it is to be written
    answer: tuple[int, ...] | None = None


class _Message(pydantic.BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str


class _Line(pydantic.BaseModel):
    prompt: str | None = pydantic.Field(None, min_length=1)
    messages: list[_Message] | None = None

    @pydantic.model_validator(mode="after")
    def _is_a_prompt(self) -> _Line:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("one of prompt and messages is needed")
        messages = self.messages or []
        roles = [message.role for message in messages]
        if self.messages is not None and ("user" not in roles or roles[-1] == "system"):
            raise ValueError(
                "one of a user must be there, and the last one is no system's"
            )
        if roles[-1:] == ["assistant"] and not messages[-1].content.strip():
            raise ValueError(
                "has an empty answer; remove that message to let the model answer"
            )
        return self


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer knows how conversations of its model look."""
    return bool(getattr(tokenizer, "chat_template", None))


def read_prompts(
    uri: str, tokenizer: Any, where: str, longest: float = math.inf
) -> list[Prompt]:
    """Read a file of prompts.

    Args:
        uri: on any file system. Each line is a JSON object with `prompt` or `messages`.
        tokenizer: a transformers tokenizer.
        where: the field of the job spec, for errors.
        longest: tokens that a prompt may have.

    Raises:
        ValueError: the file cannot be read or is empty, or a line is no prompt; names the line.
    """
    remedy = "check the address, the permissions and the network"
    with refusing(f"{where}: cannot read {uri}", remedy, (OSError, ValueError)):
        lines = list(read_lines(uri))
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        at = f"{where}: line {number} of {uri}"
        prompts.append(_prompt(line, tokenizer, at))
        size = len(prompts[-1].tokens)
        if size > longest:
            room = f"but only {longest} leave room for an answer"
            raise ValueError(f"{at} is a prompt of {size} tokens, {room}")
    if not prompts:
        raise ConfigError(
            field=where,
            found=f"{uri} has no lines",
            remedy=_LINES,
        )
    return prompts


_LINES = 'write one JSON object a line, {"prompt": "..."} or {"messages": [{"role": "user", ...}]}'


def _prompt(text: str, tokenizer: Any, at: str) -> Prompt:
    """Return the prompt of a line."""
    try:
        line = _Line.model_validate_json(text)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        said = [*map(str, problem["loc"]), problem["msg"].removeprefix("Value error, ")]
        raise ValueError(f"{at} is no prompt ({': '.join(said)}); {_LINES}") from error
    if line.messages is None:
        first = first_token(tokenizer)
        tokens = tokens_of(tokenizer, line.prompt or "")
        return Prompt(tokens if first is None else (first, *tokens))
    if not has_chat_template(tokenizer):
        raise ValueError(
            f"{at} has messages, but the model has no chat template; give prompt"
        )
    messages = [message.model_dump() for message in line.messages]
    is_answered = messages[-1]["role"] == "assistant"
    question = messages[:-1] if is_answered else messages
    refused = f"{at}: the model's chat template refuses these messages ({REASON})"
    # templates are code of the model's, which may raise anything
    with refusing(refused, "change their roles", Exception):
        start = tokenizer.apply_chat_template(
            question, tokenize=False, add_generation_prompt=True
        )
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    answer = None
    if is_answered:
        said = messages[-1]["content"].strip()
        after = tokens_of(tokenizer, whole.rpartition(said)[2])
        answer = (*tokens_of(tokenizer, said), *after[:1])
    return Prompt(tokens_of(tokenizer, start), answer)


_LEAST_ROOM = 24
"""Minimum tokens of a window for a turn and its answer, without the chat template."""
_SAID = "What the user said 7351"
_ANSWERED = "What was answered 9462"


@dataclass(frozen=True)
class Continuations:
    """WritingRequest for plain texts; several of them may fill a window together."""

    wanted: GenerationRequest
    starts: tuple[tuple[int, ...], ...]  # tokens of each text before the written ones
    sequence_length: int


@dataclass(frozen=True)
class ChatMarks:
    """Tokens that a chat template puts around the turns of a user and the model."""

    opening: tuple[int, ...] = ()  # before the user's turn
    closing: tuple[int, ...] = ()  # between the turn and the answer
    end: tuple[int, ...] = ()  # after the answer
    last: frozenset[int] = frozenset()  # tokens that end any text
    special: frozenset[int] = frozenset()  # tokens that are not text

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the template adds to a conversation."""
        return len(self.opening) + len(self.closing) + len(self.end)

    @property
    def ends_of_turn(self) -> frozenset[int]:
        """Tokens that end the user's turn."""
        return self.last | set(self.closing[:1])

    @property
    def ends_of_answer(self) -> frozenset[int]:
        """Tokens that end the answer."""
        return self.last | set(self.end[:1])


@dataclass(frozen=True)
class Conversations:
    """WritingRequest for conversations of a user's turn and an answer, packed into windows."""

    marks: ChatMarks
    prompts: Sequence[Prompt] | None  # of a file; None if the model writes the turns, too
    num_sequences: int
    sequence_length: int
    temperature: float
    seed: int
    where: str  # field of the job spec, for errors

    @property
    def turn_tokens(self) -> int:
        """Maximum tokens of a turn: a third of a window without the chat template."""
        room = self.sequence_length - self.marks.num_tokens
        return min(TURN_TOKENS, room // 3)


WritingRequest = Continuations | Conversations


@dataclass(frozen=True)
class Language:
    """A tokenizer, and the configuration of its model."""

    tokenizer: Any
    config: PretrainedConfig

    @property
    def longest(self) -> float:
        """Maximum number of tokens that the model takes."""
        return getattr(self.config, "max_position_embeddings", None) or math.inf

    def marks(self, where: str) -> ChatMarks:
        """Return the tokens that the chat template puts around turns.

        They are found by rendering two marker texts. Without a template, there are only tokens that
        end texts and special tokens.

        Args:
            where: the field of the job spec, for errors.

        Raises:
            ValueError: the template does not show the texts that it is given.
        """
        tokenizer = self.tokenizer
        marks = ChatMarks(last=self._ending_tokens(), special=self._special_tokens())
        if not has_chat_template(tokenizer):
            return marks
        messages = [
            {"role": "user", "content": _SAID},
            {"role": "assistant", "content": _ANSWERED},
        ]
        render = tokenizer.apply_chat_template
        remedy = "give a tokenizer with another one, or a text without chat"
        failure = f"{where}: the model's chat template fails ({REASON})"
        with refusing(failure, remedy, Exception):  # it is code of the model's
            question = render(messages[:1], tokenize=False, add_generation_prompt=True)
            whole = render(messages, tokenize=False)
        if _SAID not in question or _ANSWERED not in whole:
            raise ConfigError(
                field=where,
                found="the chat template changes what is said",
                remedy="give a tokenizer with another one, or a text without chat",
            )
        before, _, between = question.partition(_SAID)
        after = whole.rpartition(_ANSWERED)[2]
        return replace(
            marks,
            opening=tokens_of(tokenizer, before),
            closing=tokens_of(tokenizer, between),
            end=tokens_of(tokenizer, after),
        )

    def _ending_tokens(self) -> frozenset[int]:
        """Return the tokens that end a text, of the tokenizer and of the configuration."""
        eos = self.config.eos_token_id
        if not isinstance(eos, list | tuple):
            eos = [eos]
        return frozenset({self.tokenizer.eos_token_id, *eos} - {None})

    def _special_tokens(self) -> frozenset[int]:
        """Return the tokens that are not text."""
        tokenizer = self.tokenizer
        special = set[int](tokenizer.all_special_ids)
        for number, token in tokenizer.added_tokens_decoder.items():
            if token.special:
                special.add(number)
        # the end of an embedding table whose size was rounded up
        special.update(range(len(tokenizer), self.config.vocab_size))
        return frozenset(special)

    def requests(self, section: CalibrationSection) -> dict[int, WritingRequest]:
        """Return the requests for the dense model, by the index of the calibration text.

        Raises:
            ValueError: the model cannot write a text, or a file for it cannot be read; names the
                field.
        """
        requests: dict[int, WritingRequest] = {}
        for number, (text, count) in enumerate(section.shares):
            if not text.is_written:
                continue
            where = f"calibration.mix.{number - 1}" if number else "calibration"
            if text.has_answers:
                request: WritingRequest = self.chats(
                    text, count, section.sequence_length, where
                )
            else:
                request = self.texts(text, count, section.sequence_length, where)
            requests[number] = request
        return requests

    def texts(
        self,
        text: MixedSection,
        count: int,
        sequence_length: int,
        where: str,
    ) -> Continuations:
        """Return the request for plain texts; see `requests`."""
        num_texts, length = text.sizes(count, sequence_length)
        prompt: tuple[int, ...] = ()  # before every text, but not a part of it
        if text.starts is not None:
            windows = read_windows(
                text.starts,
                num_texts,
                text.start_tokens,
                self.tokenizer,
                f"{where}.starts",
            )
            starts = tuple(map(tuple, windows.tokens.tolist()))
            prompts = starts
        else:
            prompt = self._prompt_of(text)
            starts = (self._start_of(text, prompt),) * num_texts
            prompts = (prompt,) * num_texts
        most = self.longest - length
        if not prompts[0] or len(prompt) > most:
            raise ConfigError(
                field=where,
                found=f"the prompt has {len(prompt)} tokens, and 1 to {most} may stand there",
                remedy="change the prompt or the lengths",
            )
        self.check(prompts)
        wanted = GenerationRequest(
            prompts=prompts,
            num_tokens=length - len(starts[0]),
            temperature=text.temperature,
            seed=text.seed,
            num_together=texts_together(length),
        )
        return Continuations(
            wanted=wanted, starts=starts, sequence_length=sequence_length
        )

    def _prompt_of(self, text: MixedSection) -> tuple[int, ...]:
        """Return the given prompt, or else the token that separates texts, if there is one."""
        tokenizer = self.tokenizer
        if text.prompt is not None:
            return tokens_of(tokenizer, text.prompt)
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            if token is not None:
                return (token,)
        return ()

    def _start_of(self, text: MixedSection, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """Return the token with which every written text begins, if there is one."""
        first = first_token(self.tokenizer)
        if first is not None:
            return (first,)
        if text.texts_per_sequence > 1:
            return prompt[-1:]
        return ()

    def chats(
        self,
        text: MixedSection,
        count: int,
        length: int,
        where: str,
    ) -> Conversations:
        """Return the request for conversations; see `requests`."""
        if length > self.longest:
            raise ValueError(
                f"calibration.sequence_length: {length}, but the model takes at most {self.longest}"
            )
        marks = self.marks(where)
        prompts = None
        said = list[tuple[int, ...]]()
        if text.prompts is not None:
            at = f"{where}.prompts"
            prompts = read_prompts(text.prompts, self.tokenizer, at, length - 1)
            said = [prompt.tokens + (prompt.answer or ()) for prompt in prompts]
        elif not marks.opening:
            raise ConfigError(
                field=f"{where}.chat",
                found=(
                    "true, but the model's chat template is absent, or puts nothing before a turn"
                ),
                remedy="give starts, such as {source: python-docstrings}, or prompts",
            )
        elif length - marks.num_tokens < _LEAST_ROOM:
            raise ConfigError(
                field="calibration.sequence_length",
                found=f"{length}, but the chat template alone takes {marks.num_tokens}",
                remedy="raise it",
            )
        self.check([marks.opening, marks.closing, marks.end, *said])
        return Conversations(
            marks=marks,
            prompts=prompts,
            num_sequences=count,
            sequence_length=length,
            temperature=text.temperature,
            seed=text.seed,
            where=where,
        )

    def check(self, texts: Iterable[Iterable[int]]) -> None:
        """Refuse tokens outside of the vocabulary, as from the tokenizer of another model."""
        size = self.config.vocab_size
        largest = max(itertools.chain.from_iterable(texts), default=0)
        if largest >= size:
            raise ValueError(
                f"model.source: the tokenizer's token {largest} is none of the {size}"
            )
