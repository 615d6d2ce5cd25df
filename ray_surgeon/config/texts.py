"""The sections of a job spec on texts: those that are read, and those that the model writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from ray_surgeon.config.base import Address, Positive, Section
from ray_surgeon.errors import ConfigError

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
"""Of files with text."""


_OF_PYTHON = ("python-docs", "python-docstrings", "python-code")
OWN_TEXTS = (*_OF_PYTHON, "package-docstrings", "package-descriptions")
"""Texts that are there where Python is."""


_PLACES = dict.fromkeys(("self", "auto"), "the calibration") | {
    "calibration": "a recovery"
}
"""Sources that are no texts of their own -> where they have a place."""


START_TOKENS = 16
"""Tokens that a text of the model begins with, if it goes on with a given one."""


TURN_TOKENS = 96
"""Tokens of a user's turn that the model writes, at most."""


ANSWER_TOKENS = 224
"""Tokens of an answer that the model writes, at most."""


_MARK_TOKENS = 48
"""Tokens of a chat template around them; a guess for the plan, which knows no tokenizer."""


_CONVERSATION_TOKENS = 200
"""Tokens of a conversation that the model writes; a low guess for the plan."""


class SourceSection(Section):
    """A text, and where its windows start."""

    may_be: ClassVar[
        tuple[str, ...]
    ] = ()  # self, which the model writes, auto, or calibration
    own_splits: ClassVar[tuple[str, ...]] = ("train", "test")  # of sources without splits

    source: Address
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
    """Seed of the draw of windows, without stride; of source self, of the draws of tokens, of which
    every text has its own
    """
    bos: bool | None = None
    """Whether every window begins with the tokenizer's BOS token, which counts as one of its
    tokens; null: only if the tokenizer itself begins a text with it. Engines do the same, and some
    models work badly without it. Papers mostly give perplexities without it
    """

    @property
    def has_own_split(self) -> bool:
        """Whether train and test are cut here, because the source has no splits."""
        return self.source in OWN_TEXTS or self.source.endswith(TEXT_SUFFIXES)

    def problems(self) -> Iterator[ConfigError]:
        """Yield fields that do not fit the kind of source."""
        if self.source in _PLACES.keys() - self.may_be:
            yield ConfigError(
                field="source",
                found=f"{self.source} has a place in {_PLACES[self.source]} only",
                remedy="name a text",
            )
        if self.has_own_split and self.split not in self.own_splits:
            splits = " and ".join(self.own_splits)
            yield ConfigError(
                field="split",
                found=f"is {self.split!r}, but {self.source} has {splits} only",
                remedy="give one of these",
            )
        if self.has_own_split and (self.config or self.revision):
            yield ConfigError(
                field="config, revision",
                found=f"belong to a Hub data set, not to {self.source}",
                remedy="remove them",
            )
        if self.column != "text" and (
            self.source in OWN_TEXTS or self.source.endswith(".txt")
        ):
            yield ConfigError(
                field="column",
                found=f"is {self.column!r}, but {self.source} has none",
                remedy="remove it",
            )
        if self.stride is not None and self.seed:
            yield ConfigError(
                field="seed",
                found="draws windows, and stride places them",
                remedy="remove one of the two",
            )


class TextSection(SourceSection):
    """A text and the windows that are cut from it."""

    num_sequences: Positive
    """Number of windows"""
    sequence_length: int = Field(gt=1)
    """Tokens in each window"""


class StreamedSection(SourceSection):
    """A text of a recovery, read from its beginning as far as the tokens need it."""

    may_be: ClassVar[tuple[str, ...]] = ("calibration",)
    own_splits: ClassVar[tuple[str, ...]] = ("train", "test", "all")

    source: Address
    """As for other texts; or `calibration`, the windows of the calibration that are not held aside,
    again and again in another order: so the model's own conversations have a share of the tokens
    """
    weight: float = Field(1.0, gt=0)
    """Its share of the tokens is its weight over the sum of all weights"""
    split: str = "train"
    """Split of a data set. Files, Python's texts and local data sets without splits also have all
    (the whole text, read as it is needed), train (the first 80 % of the tokens that are read, see
    max_tokens) and test (the rest)
    """
    max_tokens: Positive = 10_000_000
    """Where train and test are cut from the text: read no more than this many tokens of it, at once
    """

    def problems(self) -> Iterator[ConfigError]:
        """Yield fields that choose windows, which are there already or are all taken."""
        further = self.model_dump(exclude_defaults=True).keys() - {"source", "weight"}
        if self.source == "calibration" and further:
            yield ConfigError(
                field=", ".join(sorted(further)),
                found="the calibration's windows are there already",
                remedy="give source and weight alone",
            )
        if self.stride is not None or self.seed:
            yield ConfigError(
                field="stride, seed",
                found="choose windows, and this text gives all in turn",
                remedy="remove them",
            )

    def check_border(self, measured: SourceSection, where: str) -> None:
        """Refuse this text if it has tokens of a measured one.

        Raises:
            ValueError: it is the whole text, or cut at another place; `where` is its place in the
                spec.
        """
        if self.source != measured.source:
            return
        if self.split == "all":
            raise ConfigError(
                field=where,
                found=f"{self.source} is measured on",
                remedy="set split to train",
            )
        if self.source != "python-code" and self.max_tokens != measured.max_tokens:
            border = "or the border between train and test moves"
            raise ValueError(
                f"{where}.max_tokens: must equal that of {self.source}, {border}"
            )


class WritingSection(Section):
    """How the dense model writes text."""

    temperature: float = Field(1.0, ge=0, le=10)
    """Logits are divided by it; 1 is the model's own distribution, 0 takes the most likely token.
    Answers in conversations, which should make more sense than users' turns, are drawn at 0.7 of it
    """
    prompt: str | None = Field(None, min_length=1)
    """Prompt before every text, which is not part of the text and may have special tokens; null:
    the tokenizer's BOS token, or its EOS token if it has no BOS token
    """
    chat: bool = False
    """Whether the model writes conversations, users' turns and its own answers, from nothing but
    the opening of its chat template (Magpie, arXiv 2406.08464). Needs a model with a chat template,
    and no data
    """
    prompts: Address | None = None
    """File of prompts that the model answers, on any fsspec URI; each line a JSON object with
    `prompt` (a text that is continued) or `messages` (a list of {role, content} for the chat
    template; a last one of the assistant is the answer)
    """
    starts: SourceSection | None = None
    """A text of which windows give the first tokens of every text that the model writes; for models
    without a chat template
    """
    start_tokens: int = Field(START_TOKENS, ge=2)
    """With starts: tokens that each text begins with"""
    texts_per_sequence: Positive = 1
    """How many texts fill a sequence together, each written from its own beginning. More texts
    cover more subjects and take fewer steps, because more of them are written at once. Must divide
    sequence_length. Between two texts stands the tokenizer's BOS token if the tokenizer begins
    texts with it, otherwise the prompt's last token. Conversations and answers are packed as they
    fit, so it is for other texts only
    """

    @property
    def has_answers(self) -> bool:
        """Whether it is known which tokens are the model's answers."""
        return self.chat or self.prompts is not None

    def problems(self) -> Iterator[ConfigError]:
        """Yield conflicts between fields of the writing."""
        ways = [
            name
            for name in ("prompt", "chat", "prompts", "starts")
            if getattr(self, name)
        ]
        if len(ways) > 1:
            yield ConfigError(
                field=", ".join(ways),
                found="say different things about the text that is written",
                remedy="keep one",
            )
        if self.has_answers and self.texts_per_sequence != 1:
            yield ConfigError(
                field="texts_per_sequence",
                found=f"texts of {ways[0]} are packed as they fit",
                remedy="remove it",
            )
        if self.temperature == 0 and self.prompts is None and self.starts is None:
            yield ConfigError(
                field="temperature",
                found="0 writes the same text every time",
                remedy="raise it, or give prompts",
            )
        if self.starts is None and self.start_tokens != START_TOKENS:
            yield ConfigError(
                field="start_tokens",
                found="belongs to starts",
                remedy="remove it, or give starts",
            )

    def sizes(self, num_sequences: int, sequence_length: int) -> tuple[int, int]:
        """Return how many texts fill so many sequences, and of how many tokens each is.

        Of conversations both are a guess.
        """
        if self.has_answers:
            num_texts = -(-num_sequences * sequence_length // _CONVERSATION_TOKENS)
            return num_texts, min(
                sequence_length, _MARK_TOKENS + TURN_TOKENS + ANSWER_TOKENS
            )
        return (
            num_sequences * self.texts_per_sequence,
            sequence_length // self.texts_per_sequence,
        )

    def problems_of_lengths(
        self, sequence_length: int, where: str
    ) -> Iterator[ConfigError]:
        """Yield why texts cannot fill sequences.

        Args:
            sequence_length: tokens of a sequence.
            where: path of this section in the calibration, with a point at its end, or nothing.
        """
        texts = self.texts_per_sequence
        if sequence_length % texts or sequence_length < 2 * texts:
            yield ConfigError(
                field=f"{where}texts_per_sequence",
                found=f"{texts} texts of two tokens or more do not fill a sequence",
                remedy="give a divisor of sequence_length",
            )
        length = sequence_length // texts
        if self.starts is not None and self.start_tokens >= length:
            yield ConfigError(
                field=f"{where}start_tokens",
                found=f"{self.start_tokens} of {length} in a text",
                remedy="lower it",
            )
