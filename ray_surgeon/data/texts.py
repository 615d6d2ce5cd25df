"""Token windows for calibration and evaluation: deterministic, packed, with a fingerprint.

A text is one long stream of tokens: documents joined by blank lines, no special tokens, no padding.
Windows are cut from it. Where the tokenizer begins a text with a token of its own, every window
begins with it: such models are lost without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from ray_surgeon.config.base import REASON, refusing
from ray_surgeon.config.texts import SourceSection
from ray_surgeon.data import documents
from ray_surgeon.errors import ConfigError

_FEWEST_TOKENS = 4
DOCUMENTS_PER_CALL = 1000
"""Documents joined for one call of the tokenizer, so that a large corpus is not one string."""
_CODE_FILES_PER_CALL = 16
"""The same for files of code, which are long: tokenizing more than is wanted takes time."""


@dataclass(frozen=True)
class Windows:
    """Windows of one text."""

    tokens: NDArray[np.int64]  # [num_sequences, sequence_length] int64
    fingerprint: str  # SHA-256 over the tokens


def read_windows(
    section: SourceSection,
    num_sequences: int,
    sequence_length: int,
    tokenizer: Any,
    where: str,
) -> Windows:
    """Read a text and cut windows from it, each with the first token that its `bos` says.

    Args:
        section: which text. Window i starts at token ``stride * i``; without a stride, windows that
            do not overlap are drawn without replacement.
        num_sequences: how many windows.
        sequence_length: tokens in each.
        tokenizer: a transformers tokenizer.
        where: the field of the job spec, for errors.

    Raises:
        ValueError: the text is too short, or the tokenizer has no BOS token.
    """
    first = window_beginning(section, tokenizer, where)
    stream = token_stream(section, tokenizer, where)
    where = f"{where} ({section.source})"
    stride = section.stride
    own = sequence_length
    if first is not None:
        own -= 1
    if stride:
        needed = (num_sequences - 1) * stride + own
        at_stride = f" at stride {stride}"
    else:
        needed = num_sequences * own
        at_stride = ""
    if len(stream) < needed:
        raise ConfigError(
            field=where,
            found=(
                f"the text has {len(stream)} tokens, but {num_sequences} sequences of "
                f"{sequence_length}{at_stride} need {needed}"
            ),
            remedy="give more text, or fewer or shorter ones",
        )
    different = len(np.unique(stream))
    if different < min(_FEWEST_TOKENS, len(stream)):
        raise ConfigError(
            field=where,
            found=f"the text has only {different} different tokens",
            remedy="give real text",
        )
    if stride:
        starts = np.arange(num_sequences) * stride
    else:
        generator = np.random.default_rng(section.seed)
        starts = generator.permutation(len(stream) // own)[:num_sequences] * own
    tokens = np.stack([stream[start : start + own] for start in starts]).astype(np.int64)
    if first is not None:
        tokens = np.insert(tokens, 0, first, axis=1)
    return windows_of(tokens)


def load_tokenizer(folder: Path, origin: str) -> Any:
    """Return the tokenizer that lies beside a config.json.

    Args:
        folder: on this machine.
        origin: where it came from, for errors.

    Raises:
        ValueError: there is none, it is code, or spaces get lost in it.
    """
    about = folder / "tokenizer_config.json"
    remedy = "copy its files beside config.json"
    if about.exists() and '"auto_map"' in about.read_text(
        encoding="utf-8", errors="replace"
    ):
        remedy = "it is code, which is never run, so make a tokenizer.json of it"
    refused = f"model.source: {origin} has no tokenizer that loads ({REASON})"
    # the code of any tokenizer may raise anything
    with refusing(refused, remedy, Exception):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # some versions take the class for the file's
    if "ab" in tokenizer.decode(list(tokens_of(tokenizer, "a b"))):
        raise ValueError(
            f"model.source: the tokenizer of {origin} loses spaces in this version of transformers"
        )
    return tokenizer


def window_beginning(section: SourceSection, tokenizer: Any, where: str) -> int | None:
    """Return the token that every window of a text begins with, if there is one.

    Raises:
        ValueError: it is wanted, and the tokenizer has none; `where` is the text's place in the
            job spec.
    """
    if section.bos is None:
        return first_token(tokenizer)
    if not section.bos:
        return None
    first: int | None = tokenizer.bos_token_id
    if first is None:
        raise ConfigError(
            field=f"{where}.bos",
            found="true, but the tokenizer has no BOS token",
            remedy="remove it",
        )
    return first


def first_token(tokenizer: Any) -> int | None:
    """Return the token that a transformers tokenizer itself puts before a text, if there is one."""
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    if len(whole) > len(tokens_of(tokenizer, "a")) and whole[0] == tokenizer.bos_token_id:
        return int(whole[0])
    return None


def tokens_of(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return the tokens of a text alone."""
    options = {
        "add_special_tokens": False,
        "return_attention_mask": False,
        "verbose": False,
    }
    return tuple(tokenizer(text, **options)["input_ids"])


def order(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return (text, window) of the windows of several texts, evenly spread."""
    places = []
    for text, count in enumerate(counts):
        for i in range(count):
            places.append(((i + 0.5) / count, text, i))
    return [(text, i) for _, text, i in sorted(places)]


def interleaved(parts: Sequence[Windows]) -> Windows:
    """Return the windows of several texts in one; see `order`."""
    if len(parts) == 1:
        return parts[0]
    places = order([len(part.tokens) for part in parts])
    return windows_of(np.stack([parts[number].tokens[i] for number, i in places]))


def windows_of(tokens: NDArray[np.int64]) -> Windows:
    """Return tokens [num_sequences, sequence_length] with their fingerprint."""
    return Windows(tokens, hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest())


def token_stream(text: SourceSection, tokenizer: Any, where: str) -> NDArray[np.int64]:
    """Tokenize a text into one stream [num_tokens], at most `max_tokens` long.

    Args:
        text: which text.
        tokenizer: a transformers tokenizer.
        where: the field of the job spec, for errors.

    Raises:
        ValueError: the text cannot be found or read, or has no such split or column.
    """
    pieces = []
    count = 0
    for piece in token_pieces(text, tokenizer, where):
        pieces.append(piece)
        count += len(piece)
        if count >= text.max_tokens:
            break
    stream: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    if pieces:
        stream = np.concatenate(pieces)[: text.max_tokens]
    part = part_of_split(text, len(stream))
    return stream[part.start : part.stop]


def token_pieces(
    text: SourceSection, tokenizer: Any, where: str
) -> Iterator[NDArray[np.int64]]:
    """Yield all tokens of a text [num_tokens], in pieces that are read one by one.

    See `token_stream`; neither `max_tokens` nor the border between train and test counts here.
    """
    of_text = documents.documents_of(text, where)
    per_call = DOCUMENTS_PER_CALL
    if text.source == "python-code":
        per_call = _CODE_FILES_PER_CALL
    for batch in documents.batches(of_text, documents.PIECE_BYTES, per_call):
        chunk = "\n\n".join(batch)
        may_go_on = (
            len(batch) == per_call or sum(map(len, batch)) >= documents.PIECE_BYTES
        )
        if may_go_on:
            chunk += "\n\n"
        yield np.array(tokens_of(tokenizer, chunk), dtype=np.int64)


def part_of_split(text: SourceSection, num_tokens: int) -> range:
    """Return which of the first tokens of a text are in its split."""
    if not documents.is_split_here(text):
        return range(num_tokens)
    border = int(num_tokens * documents.TRAIN_SHARE)
    if text.split == "train":
        return range(border)
    return range(border, num_tokens)
