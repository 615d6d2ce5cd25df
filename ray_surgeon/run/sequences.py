"""Sequences that a caller of `ray_surgeon.curvature` gives, as token ids."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.run.in_memory import a_tokenizer
from ray_surgeon.storage.texts import first_token


def token_ids(
    sequences: Sequence[Sequence[int]] | Tensor | Iterable[str],
    tokenizer: PreTrainedTokenizerBase | None,
    layout: ModelLayout,
) -> list[list[int]]:
    """Return the token ids of sequences or texts.

    Args:
        sequences: token sequences, or texts if there is a tokenizer.
        tokenizer: for texts.
        layout: of the model that takes them.

    Raises:
        ValueError: the model cannot take one, or there is none.
    """
    if sequences is None or isinstance(sequences, str | Mapping):
        raise ValueError(
            f"sequences: got a {type(sequences).__name__}; give a list of sequences, such as "
            "input_ids, or of texts"
        )
    config = layout.config
    longest = (
        config.max_position_embeddings if layout.family.positions else math.inf
    )  # rotary embeddings go on
    windows = [_ids_of(number, sequence, tokenizer) for number, sequence in enumerate(sequences)]
    if not windows:
        raise ValueError("sequences: there is none; give at least one of two tokens or more")
    for number, ids in enumerate(windows):
        # the last token predicts nothing
        if not (2 <= len(ids) <= longest and min(ids) >= 0 and max(ids) < config.vocab_size):
            raise ValueError(
                f"sequences[{number}]: {len(ids)} tokens from {min(ids, default=None)} to "
                f"{max(ids, default=None)}; the model takes 2 to {longest} tokens, from 0 to "
                f"{config.vocab_size - 1}; use its own tokenizer, and cut long texts"
            )
    return windows


def _ids_of(number: int, sequence: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if isinstance(sequence, str):
        if tokenizer is None:
            raise ValueError("tokenizer: texts need one; give it, or sequences of tokens")
        ids: list[int] = a_tokenizer(tokenizer)(sequence, add_special_tokens=False)["input_ids"]
        first = first_token(tokenizer)
        return ids if first is None else [first, *ids]
    try:
        return [operator.index(token) for token in sequence]
    except TypeError as error:
        raise ValueError(
            f"sequences[{number}]: got {reprlib.repr(sequence)}; give a list of integers, or a "
            "text and the tokenizer"
        ) from error
