"""The calibration text of a job that names none: a mix that suits the model."""

from __future__ import annotations

import math
from typing import Any

from ray_surgeon.data.prompts import has_chat_template
from ray_surgeon.spec.calibration import CalibrationSection
from ray_surgeon.spec.texts import START_TOKENS

_CHAT_SHARE = 1 / 4
"""Of the windows of a default mix, conversations that the model writes, if it has a chat template.
"""


_CONTINUED_SHARE = {True: 1 / 4, False: 1 / 2}
"""Share of what the model writes after `def ` and after beginnings of docstrings.

The first is with a chat template, the second without.
"""


_FUNCTIONS_SHARE = 3 / 4
"""Of these, functions that it writes after `def `.

What a coder can do lives on them: see docs/results.md.
"""


_SHARES = {"python-docstrings": 1 / 32, "python-docs": 1 / 32}
"""Of the windows, what is taken of small texts. All that is left is python-code."""


_SMALL_TEXT_TOKENS = 48_000
"""Tokens that are taken of a small text, at most."""


_CODE_TOKENS = 400_000
"""Tokens of code from which windows are drawn, if a job does not need more."""


_SHORTEST_TEXT = 64
"""Tokens of a text of a model without a chat template, at least, where several fill a window."""


def default_mix(section: CalibrationSection, tokenizer: Any) -> tuple[CalibrationSection, str]:
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
        problem = "calibration.weigh: answers, but the model has no chat template"
        raise ValueError(f"{problem}; give source self")
    count = section.num_sequences
    length = section.sequence_length
    num_chat = max(1, int(count * _CHAT_SHARE)) if is_chat else 0
    num_continued = int(count * _CONTINUED_SHARE[is_chat])
    num_functions = math.ceil(num_continued * _FUNCTIONS_SHARE)
    most = _SMALL_TEXT_TOKENS // length
    small = [(min(int(count * share), most), name) for name, share in _SHARES.items()]
    num_code = count - num_chat - num_continued - sum(number for number, _ in small)
    code = {"source": "python-code", "max_tokens": max(_CODE_TOKENS, 2 * num_code * length)}
    functions = {"texts_per_sequence": _texts_in(length, 2), "prompt": "def "}
    begun = {"texts_per_sequence": _texts_in(length, 4), "starts": {"source": "python-docstrings"}}
    begun["start_tokens"] = min(START_TOKENS, length // 2)
    texts: list[tuple[int, dict[str, Any], str]] = [
        (num_chat, {"chat": True}, "conversations that the model writes"),
        (num_functions, functions, "what it writes after `def `"),
        (num_continued - num_functions, begun, "what it writes after beginnings of docstrings"),
        (num_code, code, "python-code"),
        *((number, {"source": name}, name) for number, name in small),
    ]
    texts = [(n, {"source": "self"} | text, what) for n, text, what in texts if n]
    (weight, main, _), *others = texts
    mix = [{**text, "seed": section.seed, "weight": number} for number, text, _ in others]
    kept = {"seed", "num_sequences", "sequence_length", "weigh", "held_aside"}
    fields = {"weight": weight if mix else 1.0, "mix": mix} | section.model_dump(include=kept)
    parts = ", ".join(f"{number} of {what}" for number, _, what in texts)
    chosen = f"calibration.source auto: {count} windows of {length} tokens, {parts}"
    remedy = "to change this, name a source, and more in calibration.mix"
    return CalibrationSection.model_validate(main | fields), f"{chosen}; {remedy}"


def _texts_in(length: int, most: int) -> int:
    """Return how many texts of the model, none of them short, fill a window."""
    return most if length % most == 0 and length >= most * _SHORTEST_TEXT else 1
