"""Windows of several texts for a long training, read while they are needed.

Each text is one long stream of tokens as in `storage.texts`, packed into windows without padding.
Its windows are shuffled in a buffer of its own, and the texts take turns by their weights.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_surgeon.config.texts import OWN_TEXTS, TEXT_SUFFIXES, StreamedSection
from ray_surgeon.data import documents
from ray_surgeon.data.texts import (
    part_of_split,
    token_pieces,
    token_stream,
    window_beginning,
)
from ray_surgeon.errors import ConfigError
from ray_surgeon.storage import files

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
    """Windows of each text that are kept in memory, of which the next one is drawn.

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
        """Refuse texts on this machine that end before so many windows of all texts.

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
