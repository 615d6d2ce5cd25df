"""Token windows for calibration and evaluation, and streams of windows for a long training.

A text is one long stream of tokens: documents joined by blank lines, no special tokens, no padding.
Windows are cut from it, deterministically, with a fingerprint. Where the tokenizer begins a text
with a token of its own, every window begins with it: such models are lost without it.

A long training reads its windows while they are needed. The windows of each text are shuffled in a
buffer of its own, and the texts take turns by their weights.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from ray_surgeon.config.base import REASON, refusing
from ray_surgeon.config.texts import (
    OWN_TEXTS,
    TEXT_SUFFIXES,
    SourceSection,
    StreamedSection,
)
from ray_surgeon.data import documents
from ray_surgeon.errors import ConfigError
from ray_surgeon.storage import files

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


_RUN = 32
"""Tokens; fewer in a row are the same in texts that have nothing to do with each other."""


class TextEndedError(ValueError):
    """A text has fewer tokens than its share of a stream."""


@dataclass(frozen=True)
class TextStream:
    """Texts mixed by their weights; every window is a function of the fields alone."""

    texts: Sequence[tuple[StreamedSection, str]]
    """Each with its place in the job spec, for errors."""
    sequence_length: int
    """Tokens of a window."""
    tokenizer: Any
    """Of transformers."""
    seed: int
    """Of the order of windows."""
    buffer: int = 1024
    """Windows of each text that are kept in memory; the next one is drawn from them.

    A text with no more than these is shuffled whole. Beside them lies the piece that was tokenized
    last, see `token_pieces`; of a text that is cut into train and test here, all of it.
    """
    calibration: NDArray[np.int64] | None = None
    """Windows [num_sequences, sequence_length] of source calibration, once they are there."""
    held: NDArray[np.int64] | None = None
    """Windows [num_held, any length] held aside: no window of a text shares a run with them."""

    def __post_init__(self) -> None:
        """Refuse fields of a text that cannot be followed, without opening it.

        Raises:
            ValueError: max_tokens is given to a text that is not cut here, or its windows should
                begin with a BOS token and the tokenizer has none.
        """
        for number, (text, where) in enumerate(self.texts):
            self._beginning(number)
            is_limited = "max_tokens" in text.model_dump(exclude_defaults=True)
            if is_limited and not documents.is_split_here(text):
                raise ConfigError(
                    field=f"{where}.max_tokens",
                    found=f"{text.source} with split {text.split} is read as far as it is needed",
                    remedy="remove it",
                )

    def windows(self, start: int = 0) -> Iterator[NDArray[np.int64]]:
        """Yield windows [sequence_length], from window `start` on.

        Those before it are read and tokenized again, and not kept. A text is opened when its first
        window is wanted, and its buffer is filled then. When it ends, its buffer is emptied first,
        so that every whole window of it comes once.

        Raises:
            TextEndedError: the next window is of a text that has no more; also while windows before
                `start` are read again.
            ValueError: a text cannot be read.
        """
        sources = [self._shuffled(number) for number in range(len(self.texts))]
        return itertools.islice(
            (next(sources[number]) for number in self.turns()), start, None
        )

    def check_length(self, num_windows: int) -> None:
        """Refuse texts on this machine that are too short for this number of windows.

        They are read and tokenized until there is enough. Others, on the Hub or an object store,
        are not read: they may raise the same error when they end.

        Raises:
            TextEndedError: a text has too few tokens.
            ValueError: a text cannot be read.
        """
        counts = Counter(itertools.islice(self.turns(), num_windows))
        for number, count in sorted(counts.items()):
            needed = count * self._own_tokens(number)
            if _is_here(self.texts[number][0].source):
                num_tokens = self._num_tokens(number, needed)
                if num_tokens < needed:
                    share = f"{count} of {num_windows} windows of {self.sequence_length}"
                    said = f"it has {num_tokens} tokens, but its {share} need {needed}"
                    raise self._ended(number, said)

    def _beginning(self, number: int) -> list[int]:
        """Return the token that each window of a text begins with: none or the BOS token."""
        first = window_beginning(
            self.texts[number][0], self.tokenizer, self.texts[number][1]
        )
        if first is None:
            return []
        return [first]

    def _own_tokens(self, number: int) -> int:
        """Return how many tokens of a text are in each of its windows."""
        return self.sequence_length - len(self._beginning(number))

    def _num_tokens(self, number: int, enough: int) -> int:
        """Return how many tokens a text has, or some number from `enough` on."""
        text, where = self.texts[number]
        limit = enough
        if documents.is_split_here(text):
            limit = text.max_tokens
        num_read = 0
        for piece in token_pieces(text, self.tokenizer, where):
            num_read = min(num_read + len(piece), limit)
            # more text makes both parts longer, so a part that is enough now stays enough
            if num_read == limit or len(part_of_split(text, num_read)) >= enough:
                break
        return len(part_of_split(text, num_read))

    def turns(self) -> Iterator[int]:
        """Yield for ever which text the next window is of.

        Of the texts that are not ahead of their share it is the one which would fall behind first
        (earliest deadline first). After any number of windows every text has had its exact share up
        to less than one window.
        """
        total = sum(text.weight for text, _ in self.texts)
        shares = [text.weight / total for text, _ in self.texts]
        counts = [0] * len(shares)
        for num_windows in itertools.count(1):
            due = [i for i, share in enumerate(shares) if counts[i] < num_windows * share]
            number = min(due, key=lambda i: (counts[i] + 1) / shares[i])
            counts[number] += 1
            yield number

    def _shuffled(self, number: int) -> Iterator[NDArray[np.int64]]:
        """Yield the windows of a text, each drawn from the buffer, where the next one goes.

        Raises:
            TextEndedError: one more is wanted after the last.
        """
        generator = np.random.default_rng([self.seed, number])
        while self.texts[number][0].source == "calibration":
            assert self.calibration is not None
            yield from generator.permutation(self.calibration)
        windows = filter(self._is_free, self._packed(number))
        kept = list(itertools.islice(windows, self.buffer))
        count = len(kept)
        for window in windows:
            place = int(generator.integers(len(kept)))
            yield kept[place]
            kept[place] = window
            count += 1
        yield from (kept[place] for place in generator.permutation(len(kept)))
        num_tokens = count * self._own_tokens(number)
        raise self._ended(number, f"it ended after {num_tokens} tokens, {count} windows")

    def _is_free(self, window: NDArray[np.int64]) -> bool:
        """Whether no `_RUN` tokens from a multiple of it on are in the windows held aside."""
        starts = range(0, len(window) - _RUN + 1, _RUN)
        return self._runs_held.isdisjoint(window[i : i + _RUN].tobytes() for i in starts)

    @functools.cached_property
    def _runs_held(self) -> frozenset[bytes]:
        if self.held is None:
            return frozenset()
        runs = set()
        for window in self.held:
            for start in range(len(window) - _RUN + 1):
                runs.add(window[start : start + _RUN].tobytes())
        return frozenset(runs)

    def _packed(self, number: int) -> Iterator[NDArray[np.int64]]:
        """Yield the windows of a text in order; tokens at its end that fill none are left out."""
        text, where = self.texts[number]
        pieces = token_pieces(text, self.tokenizer, where)
        if documents.is_split_here(text):
            pieces = iter([token_stream(text, self.tokenizer, where)])
        beginning = np.array(self._beginning(number), dtype=np.int64)
        own = self._own_tokens(number)
        rest = beginning[:0]
        for piece in pieces:
            tokens = np.concatenate([rest, piece])
            for start in range(0, len(tokens) - own + 1, own):
                # a copy: a window that lies in the buffer does not keep its whole piece there
                yield np.concatenate([beginning, tokens[start : start + own]])
            rest = tokens[len(tokens) // own * own :]

    def _ended(self, number: int, said: str) -> TextEndedError:
        text, where = self.texts[number]
        remedy = "train on fewer tokens, give another text, or raise the weight of others"
        if documents.is_split_here(text):
            remedy += ", or max_tokens if the text is longer"
        return TextEndedError(f"{where} ({text.source}): {said}; {remedy}")


def _is_here(source: str) -> bool:
    """Whether a text can be read, if it is one, without a network."""
    if source.endswith(TEXT_SUFFIXES):
        return files.is_local(source)
    return source in OWN_TEXTS or (source != "calibration" and os.path.exists(source))
