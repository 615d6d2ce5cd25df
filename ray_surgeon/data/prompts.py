"""Files of prompts: texts that are continued, or messages for a chat template."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import pydantic

from ray_surgeon.config.base import REASON, refusing
from ray_surgeon.data.texts import first_token, tokens_of
from ray_surgeon.errors import ConfigError
from ray_surgeon.storage.copies import read_lines


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
