"""Files of prompts: texts that are continued, or messages for a chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray_surgeon.storage.copies import read_lines
from ray_surgeon.storage.files import JSON_ERRORS
from ray_surgeon.storage.retrying import REASON, refusing
from ray_surgeon.storage.texts import first_token


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file, and its answer if the file gives one."""

    tokens: tuple[int, ...]  # of the prompt, with those of the chat template
    text: str  # that they stand for
    answer: tuple[int, ...] | None  # with the token that ends it; None: the model is to write it


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer knows how conversations of its model look."""
    return bool(getattr(tokenizer, "chat_template", None))


def read_prompts(uri: str, tokenizer: Any, where: str, longest: int | None = None) -> list[Prompt]:
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
    first = first_token(tokenizer)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        at = f"{where}: line {number} of {uri}"
        with refusing(f"{at} is not JSON ({REASON})", _LINES, JSON_ERRORS):
            record = json.loads(line)
        for wrong in _faults(record):
            raise ValueError(f"{at} {wrong}")
        prompts.append(_prompt(record, tokenizer, first, at))
        size = len(prompts[-1].tokens)
        if longest is not None and size > longest:
            raise ValueError(
                f"{at} is a prompt of {size} tokens, but only {longest} leave room for an answer; "
                "shorten it, or remove the line"
            )
    if not prompts:
        raise ValueError(f"{where}: {uri} has no lines; {_LINES}")
    return prompts


_LINES = 'write one JSON object a line, {"prompt": "..."} or {"messages": [{"role": "user", ...}]}'


def _faults(record: Any) -> Iterator[str]:
    """Yield what is wrong with a line; only the first is to be asked for."""
    if not isinstance(record, dict):
        yield f"is a {type(record).__name__}, not an object; {_LINES}"
    if ("prompt" in record) == ("messages" in record):
        fields = sorted(map(str, record))
        yield f"has {fields}, but one of prompt and messages is needed; {_LINES}"
    if "prompt" in record:
        text = record["prompt"]
        if not isinstance(text, str) or not text:
            yield f"has a prompt {text!r}, expected a text that is not empty; {_LINES}"
        return
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        yield f"has messages that are no list of messages; {_LINES}"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            yield f"has a message without a text as its content; {_LINES}"
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            yield f"has a message of role {role!r}; known are system, user and assistant"
    roles = [message["role"] for message in messages]
    if "user" not in roles or roles[-1] == "system":
        yield (
            f"has messages of {', '.join(roles)}; one of a user must be there, and the last one is "
            "of a user, or of the assistant if the answer is given"
        )
    if roles[-1] == "assistant" and not messages[-1]["content"].strip():
        yield "has an empty answer; remove that message to let the model answer"


def _prompt(record: Mapping[str, Any], tokenizer: Any, first: int | None, at: str) -> Prompt:
    """Return the prompt of a line; `first` is the token that the tokenizer puts before a text."""
    if "messages" in record:
        return _of_messages(record["messages"], tokenizer, at)
    tokens = _tokens(tokenizer, record["prompt"])
    return Prompt(tokens if first is None else (first, *tokens), record["prompt"], None)


def _of_messages(messages: list[dict[str, Any]], tokenizer: Any, at: str) -> Prompt:
    if not has_chat_template(tokenizer):
        raise ValueError(
            f"{at} has messages, but the model's tokenizer has no chat template; give prompt, a "
            "text that the model continues"
        )
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    question = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    refused = f"{at}: the model's chat template refuses these messages ({REASON})"
    # templates are code of the model's, which may raise anything
    with refusing(refused, "change their roles", Exception):
        text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    answer = None
    if question is not messages:
        said = messages[-1]["content"].strip()
        after = _tokens(tokenizer, whole.rpartition(said)[2])
        answer = (*_tokens(tokenizer, said), *after[:1])
    return Prompt(_tokens(tokenizer, text), text, answer)


def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
