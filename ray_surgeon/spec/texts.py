"""The sections of a job spec that say what is read: model, texts and tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from ray_surgeon.spec.base import Address, Positive, Section

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
"""Of files with text."""


OWN_TEXTS = (
    "python-docs",
    "python-docstrings",
    "python-code",
    "package-docstrings",
    "package-descriptions",
)
"""Texts that are there where Python is."""


class SourceSection(Section):
    """A text, and where its windows start."""

    may_be_written: ClassVar[bool] = False  # whether the model may write it, source self or auto

    source: Address = Field(min_length=1)
    """python-docs (the topics of Python's own help), python-docstrings (the longer docstrings of
    its library), python-code (source files of its library's packages, without tests),
    package-docstrings (those of the packages that are installed here, taking one file of each
    package in turn; give max_tokens), package-descriptions (prose in the descriptions of these
    packages), files on any fsspec URI ending in .txt, .jsonl or .parquet (* for several), the name
    of a Hub data set, or a local data-set folder
    """
    config: str | None = None
    """Configuration of a Hub data set, e.g. wikitext-2-raw-v1"""
    split: str = "train"
    """Split of a data set. Files, Python's texts and local data sets without splits have train (the
    first 80 % of the tokens that are read, see max_tokens) and test (the rest)
    """
    column: str = "text"
    """Column or key that holds the text, in data sets, .jsonl and .parquet"""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set"""
    max_tokens: Positive = 10_000_000
    """Read no more than this many tokens of the text"""
    stride: Positive | None = None
    """Window i starts at token stride * i; without it, windows that do not overlap are drawn with
    the seed
    """
    seed: int = Field(0, ge=0)
    """Seed of the draw of windows, without stride"""
    bos: bool | None = None
    """Whether every window begins with the tokenizer's BOS token, which counts as one of its
    tokens; null: only if the tokenizer itself begins a text with it. Engines do the same, and some
    models work badly without it. Papers mostly give perplexities without it
    """

    @property
    def has_own_split(self) -> bool:
        """Whether train and test are cut here, because the source has no splits."""
        return self.source in OWN_TEXTS or self.source.endswith(TEXT_SUFFIXES)

    def problems(self) -> Iterator[str]:
        """Yield what does not fit the kind of source."""
        yield from super().problems()
        if self.source in ("self", "auto") and not self.may_be_written:
            yield (
                f"source {self.source} has a place in the calibration only; name a text, such as "
                "python-docs"
            )
        if self.has_own_split and self.split not in ("train", "test"):
            yield f"split is {self.split!r}, but {self.source} has train and test only"
        if self.has_own_split and (self.config or self.revision):
            yield (
                f"config and revision belong to a Hub data set, which {self.source} is not; remove "
                "them"
            )
        if self.column != "text" and (self.source in OWN_TEXTS or self.source.endswith(".txt")):
            yield f"column is {self.column!r}, but {self.source} has none; remove it"
        if self.stride is not None and self.seed:
            yield "seed draws windows, and stride places them; remove one of the two"


class TextSection(SourceSection):
    """A text and the windows that are cut from it."""

    num_sequences: Positive
    """Number of windows"""
    sequence_length: int = Field(gt=1)
    """Tokens in each window"""


class MixedSection(SourceSection):
    """One more text of the calibration."""

    weight: float = Field(1.0, gt=0)
    """Its share of num_sequences is its weight over the sum of all weights"""
