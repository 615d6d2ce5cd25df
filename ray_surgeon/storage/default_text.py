"""The calibration text of a job that names none: a mix that suits the model."""

from __future__ import annotations

import math
from typing import Any

from ray_surgeon.spec.calibration import CalibrationSection
from ray_surgeon.spec.written import START_TOKENS
from ray_surgeon.storage.prompts import has_chat_template

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
"""Tokens that are taken of a small text, at most, so that some are left for a search."""


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
    count = section.num_sequences
    length = section.sequence_length
    seed = section.seed
    is_chat = has_chat_template(tokenizer)
    if section.weigh == "answers" and not is_chat:
        raise ValueError(
            "calibration.weigh: answers, but the model has no chat template, so that nothing it "
            "writes is an answer; remove it, or give a source self with prompts"
        )
    num_chat = max(1, int(count * _CHAT_SHARE)) if is_chat else 0
    num_continued = int(count * _CONTINUED_SHARE[is_chat])
    small = {
        name: min(int(count * share), _SMALL_TEXT_TOKENS // length)
        for name, share in _SHARES.items()
    }
    num_code = count - num_chat - num_continued - sum(small.values())
    code_tokens = max(_CODE_TOKENS, 2 * num_code * length)
    num_functions = math.ceil(num_continued * _FUNCTIONS_SHARE)
    begun = {
        "starts": {"source": "python-docstrings"},
        "start_tokens": min(START_TOKENS, length // 2),
    }
    texts: list[tuple[int, dict[str, Any]]] = [
        (num_chat, {"source": "self", "chat": True}),
        (
            num_functions,
            {"source": "self", "texts_per_sequence": _texts_in(length, 2), "prompt": "def "},
        ),
        (
            num_continued - num_functions,
            {"source": "self", "texts_per_sequence": _texts_in(length, 4), **begun},
        ),
        (num_code, {"source": "python-code", "max_tokens": code_tokens}),
    ]
    texts += [(number, {"source": name}) for name, number in small.items()]
    (weight, main), *others = [(number, text) for number, text in texts if number]
    mixed = CalibrationSection.model_validate(
        {
            **main,
            "seed": seed,
            "weight": weight if others else 1.0,
            "num_sequences": count,
            "sequence_length": length,
            "weigh": section.weigh,
            "held_aside": section.held_aside,
            "mix": [{**text, "seed": seed, "weight": number} for number, text in others],
        }
    )
    parts = [f"{num_chat} of conversations that the model writes"] if num_chat else []
    parts += (
        [f"{num_continued} that it writes after `def ` and beginnings of docstrings"]
        if num_continued
        else []
    )
    parts += [
        f"{number} of {text['source']}"
        for number, text in texts
        if text["source"] != "self" and number
    ]
    return mixed, (
        f"calibration.source auto: {count} windows of {length} tokens, {', '.join(parts)}; to "
        "change this, name a source, and more in calibration.mix"
    )


def _texts_in(length: int, most: int) -> int:
    """Return how many texts of the model, none of them short, fill a window."""
    return most if length % most == 0 and length >= most * _SHORTEST_TEXT else 1
