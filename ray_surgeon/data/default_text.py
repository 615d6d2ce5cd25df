"""The calibration text of a job that names none: a mix that suits the model."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ray_surgeon.config.texts import START_TOKENS, CalibrationSection
from ray_surgeon.data.written_text import has_chat_template
from ray_surgeon.errors import ConfigError

_CHAT_SHARE = 1 / 4
"""Share of the windows of a default mix that are conversations written by the model, where it has a
chat template.
"""


_CONTINUED_SHARE_WITH_CHAT = 1 / 4
"""Share of the windows that the model writes after `def ` and after beginnings of docstrings, where
it has a chat template.
"""


_CONTINUED_SHARE_WITHOUT_CHAT = 1 / 2
"""The same share for a model without a chat template."""


_FUNCTIONS_SHARE = 3 / 4
"""Share of the continued windows that are functions, written after `def `.

The abilities of a model for code depend on them; see docs/results.md.
"""


_SHARES = {"python-docstrings": 1 / 32, "python-docs": 1 / 32}
"""Small text -> its share of the windows. All remaining windows are python-code."""


_SMALL_TEXT_TOKENS = 48_000
"""Maximum number of tokens that are taken from a small text."""


_CODE_TOKENS = 400_000
"""Number of tokens of code from which windows are drawn, unless a job needs more."""


_SHORTEST_TEXT = 64
"""Minimum number of tokens of a written text where several texts fill a window."""


def default_mix(
    section: CalibrationSection, tokenizer: Any
) -> tuple[CalibrationSection, str]:
    """Return the texts that a calibration of source auto stands for.

    Args:
        section: the calibration, of source auto.
        tokenizer: of the model.

    Returns:
        The calibration with its texts, and a line for people about them.

    Raises:
        ValueError: answers are to be weighed, and the model has no chat template.
    """
    is_chat = has_chat_template(tokenizer)
    if section.weigh == "answers" and not is_chat:
        raise ConfigError(
            field="calibration.weigh",
            found="answers, but the model has no chat template",
            remedy="give source self",
        )
    count = section.num_sequences
    length = section.sequence_length
    texts = [text for text in _texts(count, length, is_chat=is_chat) if text.num_windows]
    main, *others = texts
    mix = []
    for text in others:
        mix.append({**text.fields, "seed": section.seed, "weight": text.num_windows})
    weight: float = 1.0
    if mix:
        weight = main.num_windows
    kept = {"seed", "num_sequences", "sequence_length", "weigh", "held_aside"}
    fields = {
        **main.fields,
        "weight": weight,
        "mix": mix,
        **section.model_dump(include=kept),
    }
    parts = ", ".join(f"{text.num_windows} of {text.description}" for text in texts)
    line = (
        f"calibration.source auto: {count} windows of {length} tokens, {parts}; "
        "to change this, name a source, and more in calibration.mix"
    )
    return CalibrationSection.model_validate(fields), line


class _Text(NamedTuple):
    """A text of the default mix."""

    num_windows: int
    fields: dict[str, Any]  # of its section
    description: str  # for people


def _texts(num_windows: int, length: int, *, is_chat: bool) -> list[_Text]:
    """Return the texts of a default mix; some may have no windows.

    Args:
        num_windows: windows of all texts together.
        length: tokens in each window.
        is_chat: whether the model has a chat template.
    """
    num_chat = 0
    num_continued = int(num_windows * _CONTINUED_SHARE_WITHOUT_CHAT)
    if is_chat:
        num_chat = max(1, int(num_windows * _CHAT_SHARE))
        num_continued = int(num_windows * _CONTINUED_SHARE_WITH_CHAT)
    num_functions = math.ceil(num_continued * _FUNCTIONS_SHARE)
    small_texts = []
    num_code = num_windows - num_chat - num_continued
    for name, share in _SHARES.items():
        number = min(int(num_windows * share), _SMALL_TEXT_TOKENS // length)
        small_texts.append(_Text(number, {"source": name}, name))
        num_code -= number
    chat = {"source": "self", "chat": True}
    functions = {
        "source": "self",
        "texts_per_sequence": _texts_in(length, 2),
        "prompt": "def ",
    }
    docstrings = {
        "source": "self",
        "texts_per_sequence": _texts_in(length, 4),
        "starts": {"source": "python-docstrings"},
        "start_tokens": min(START_TOKENS, length // 2),
    }
    code = {
        "source": "python-code",
        "max_tokens": max(_CODE_TOKENS, 2 * num_code * length),
    }
    num_docstrings = num_continued - num_functions
    return [
        _Text(num_chat, chat, "conversations that the model writes"),
        _Text(num_functions, functions, "what it writes after `def `"),
        _Text(
            num_docstrings, docstrings, "what it writes after beginnings of docstrings"
        ),
        _Text(num_code, code, "python-code"),
        *small_texts,
    ]


def _texts_in(length: int, most: int) -> int:
    """Return how many texts of the model fill a window: `most`, or one if they would be short."""
    if length % most == 0 and length >= most * _SHORTEST_TEXT:
        return most
    return 1
