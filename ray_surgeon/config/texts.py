"""The sections of a job spec on texts: from a source, or written by the model; the calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from ray_surgeon.config.base import Address, Count, Positive, Section
from ray_surgeon.errors import ConfigError

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
"""Suffixes of text files."""


_OF_PYTHON = ("python-docs", "python-docstrings", "python-code")
OWN_TEXTS = (*_OF_PYTHON, "package-docstrings", "package-descriptions")
"""Texts available in every Python installation."""


_PLACES = dict.fromkeys(("self", "auto"), "the calibration") | {
    "calibration": "a recovery"
}
"""Special sources -> the only section that accepts them."""


START_TOKENS = 16
"""Default number of given tokens at the beginning of a text that the model continues."""


TURN_TOKENS = 96
"""Maximum number of tokens in a user's turn written by the model."""


ANSWER_TOKENS = 224
"""Maximum number of tokens in an answer of the model."""


_MARK_TOKENS = 48
"""Estimated tokens of the chat template around them, for the plan, which has no tokenizer."""


_CONVERSATION_TOKENS = 200
"""Estimated tokens of a conversation written by the model, for the plan; a low estimate."""


class SourceSection(Section):
    """A text, and the positions of its windows."""

    may_be: ClassVar[tuple[str, ...]] = ()  # special sources: self, auto, calibration
    own_splits: ClassVar[tuple[str, ...]] = ("train", "test")  # where the source has none

    source: Address
    """python-docs (the topics of Python's own help), python-docstrings (the longer docstrings of
    its library), python-code (source files of its library's packages, without tests),
    package-docstrings (docstrings of the installed packages, one file from each package in turn;
    set max_tokens), package-descriptions (prose in the descriptions of the installed packages),
    files on any fsspec URI ending in .txt, .jsonl or .parquet (* for several), the name of a Hub
    data set, or a local data-set folder
    """
    config: str | None = None
    """Configuration of a Hub data set, e.g. wikitext-2-raw-v1"""
    split: str = "train"
    """Split of a data set. Files, Python's texts and local data sets without splits have train (the
    first 80 % of the tokens read, see max_tokens) and test (the rest)
    """
    column: str = "text"
    """Column or key of the text, in data sets, .jsonl and .parquet"""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set"""
    max_tokens: Count = 10_000_000
    """Maximum number of tokens read from the text: a number, or for example 2M"""
    stride: Positive | None = None
    """Window i starts at token stride * i; null: windows without overlap are drawn with the seed"""
    seed: int = Field(0, ge=0)
    """Seed of the draw of windows, if stride is null; for source self, seed of the sampling of
    tokens, from which every text derives its own
    """
    bos: bool | None = None
    """Whether every window begins with the tokenizer's BOS token, which counts as one of its
    tokens; null: only if the tokenizer itself begins texts with it. Inference engines do the same,
    and some models perform poorly without it. Most papers report perplexities without it
    """

    @property
    def has_own_split(self) -> bool:
        """Whether train and test are cut here, because the source has no splits."""
        return self.source in OWN_TEXTS or self.source.endswith(TEXT_SUFFIXES)

    def problems(self) -> Iterator[ConfigError]:
        """Yield fields that do not belong to the kind of source."""
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
    """A text and its windows."""

    num_sequences: Positive
    """Number of windows"""
    sequence_length: int = Field(gt=1)
    """Tokens in each window"""


class StreamedSection(SourceSection):
    """A text of a recovery, read from its beginning as far as needed."""

    may_be: ClassVar[tuple[str, ...]] = ("calibration",)
    own_splits: ClassVar[tuple[str, ...]] = ("train", "test", "all")

    source: Address
    """As for other texts; or `calibration`: the calibration windows that are not held aside,
    repeated in different orders, which include the model's own conversations
    """
    weight: float = Field(1.0, gt=0)
    """Share of the tokens: this weight divided by the sum of all weights"""
    split: str = "train"
    """Split of a data set. Files, Python's texts and local data sets without splits also have all
    (the whole text, read as needed), besides train (the first 80 % of the tokens read, see
    max_tokens) and test (the rest)
    """
    max_tokens: Count = 10_000_000
    """Maximum number of tokens read from the text, at once, if train and test are cut from it"""

    def problems(self) -> Iterator[ConfigError]:
        """Yield fields that select windows, which this kind of text does not allow."""
        further = self.model_dump(exclude_defaults=True).keys() - {"source", "weight"}
        if self.source == "calibration" and further:
            yield ConfigError(
                field=", ".join(sorted(further)),
                found="source calibration has no other options",
                remedy="give source and weight alone",
            )
        if self.stride is not None or self.seed:
            yield ConfigError(
                field="stride, seed",
                found="choose windows, and this text gives all in turn",
                remedy="remove them",
            )

    def check_border(self, measured: SourceSection, where: str) -> None:
        """Raise if this text shares tokens with an evaluation text.

        Raises:
            ValueError: it is the whole text, or is cut at another place; `where` is its path in the
                spec.
        """
        if self.source != measured.source:
            return
        if self.split == "all":
            raise ConfigError(
                field=where,
                found=f"{self.source} is an evaluation text",
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
    """Divisor of the logits; 1 is the model's own distribution, 0 is greedy decoding. Answers in
    conversations, which need more coherence than users' turns, use 0.7 times this value
    """
    prompt: str | None = Field(None, min_length=1)
    """Prompt before every text, which is not part of the text and may contain special tokens; null:
    the tokenizer's BOS token, or its EOS token if it has no BOS token
    """
    chat: bool = False
    """Whether the model writes conversations, both users' turns and its own answers, from only the
    opening of its chat template (Magpie, arXiv 2406.08464). Needs a model with a chat template, and
    no data
    """
    prompts: Address | None = None
    """File of prompts for the model to answer, on any fsspec URI; each line is a JSON object with
    `prompt` (a text to continue) or `messages` (a list of {role, content} for the chat template; a
    last message of the assistant is used as the answer)
    """
    starts: SourceSection | None = None
    """Source of the first tokens of every text that the model writes; for models without a chat
    template
    """
    start_tokens: int = Field(START_TOKENS, ge=2)
    """With starts: number of given tokens at the beginning of each text"""
    texts_per_sequence: Positive = 1
    """Number of texts in a sequence, each with its own beginning. More texts cover more subjects
    and take fewer steps, because more of them are written at once. Must divide sequence_length.
    Texts are separated by the tokenizer's BOS token if the tokenizer begins texts with it,
    otherwise by the prompt's last token. Not for conversations and answers, which are packed by
    their length
    """

    @property
    def has_answers(self) -> bool:
        """Whether the text distinguishes the tokens of the model's answers."""
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
                found=f"texts of {ways[0]} are packed by their length",
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
        """Return the number of texts that fill the sequences, and the number of tokens of each.

        For conversations both are estimates.
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
        """Yield conflicts between the lengths of texts and sequences.

        Args:
            sequence_length: tokens of a sequence.
            where: path of this section in the calibration, with a trailing dot, or empty.
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


_READING = SourceSection.model_fields.keys() - {"source", "seed"}
"""Fields of texts from a source."""
_WRITING = WritingSection.model_fields.keys()
"""Fields of texts written by the model."""


class MixedSection(SourceSection, WritingSection):
    """A text of the calibration; with source self, text written by the dense model.

    The model writes it before the first shot. This needs no data, and covers the model's own
    knowledge.
    """

    may_be: ClassVar[tuple[str, ...]] = ("self",)

    weight: float = Field(1.0, gt=0)
    """Share of num_sequences: this weight divided by the sum of all weights"""

    @property
    def is_written(self) -> bool:
        """Whether the model writes the text."""
        return self.source == "self"

    def problems(self) -> Iterator[ConfigError]:
        """Yield fields that do not belong to the source."""
        if self.source == "auto":
            misplaced = _READING | _WRITING | {"weight", "mix"}
            found = "cannot be given to auto"
            remedy = "remove it"
        elif self.source == "self":
            misplaced = _READING
            found = "belongs to a text that is read, and the model writes this one"
            remedy = "remove it"
        else:
            misplaced = set(_WRITING)
            found = "belongs to text that the model writes"
            remedy = "set source to self"
        names = []
        for name in self.model_dump(exclude_defaults=True):
            if name in misplaced:
                names.append(name)
        if names:
            yield ConfigError(", ".join(names), found, remedy)


class CalibrationSection(MixedSection, TextSection):
    """The text for the curvature and the training, or a mix of texts."""

    may_be: ClassVar[tuple[str, ...]] = ("self", "auto")

    source: Address
    """As for other texts; or `self`: text written by the dense model, see temperature and the
    fields after it; or `auto`: a mix suitable for the model: its own conversations if it has a chat
    template, its continuations of `def ` and of beginnings of docstrings, and Python's code,
    docstrings and help
    """
    mix: tuple[MixedSection, ...] = ()
    """Further texts; num_sequences is the total number of windows, which alternate between the
    texts
    """
    weigh: Literal["all", "answers"] = "all"
    """Tokens that count for the gradients in G and for the divergence: all, or answers (only the
    model's answers, in texts with answers; all tokens of other texts). A always uses all tokens
    """
    held_aside: float | None = Field(None, ge=0, le=0.5)
    """Fraction of the calibration windows that are excluded from every fit. Stages are measured on
    them before and after, and undone if they do not help. null: a tenth, at most six windows, if a
    stage uses them (reconstruction, recovery, damping auto), otherwise none
    """

    @property
    def shares(self) -> list[tuple[MixedSection, int]]:
        """Pairs of a text and its number of windows; the numbers add up to num_sequences."""
        texts = (self, *self.mix)
        counts = _split(self.num_sequences, [text.weight for text in texts])
        return list(zip(texts, counts, strict=True))

    def check_border(self, measured: SourceSection, where: str) -> None:
        """Raise if the calibration cuts an evaluation text at another place.

        Args:
            measured: a text on which the model is evaluated.
            where: path of that text in the spec, for the error.

        Raises:
            ValueError: the calibration reads more or less of the same text, so that the border
                between train and test differs.
        """
        # train and test of python-code are different files, however much is read
        if measured.source == "python-code":
            return
        for text in (self, *self.mix):
            read: SourceSection | None = text
            if text.is_written:
                read = text.starts
            if read is None or read.source != measured.source:
                continue
            if read.max_tokens != measured.max_tokens:
                raise ValueError(
                    f"{where}.max_tokens: must equal that of {measured.source} in calibration, or "
                    "the border between train and test moves"
                )

    def problems(self) -> Iterator[ConfigError]:
        """Yield conflicts between the texts."""
        earlier: list[dict[str, Any]] = []
        for number, (text, count) in enumerate(self.shares):
            where = ""
            if number > 0:
                where = f"mix.{number - 1}."
            if count == 0:
                yield ConfigError(
                    field="mix",
                    found=(
                        f"the share of {text.source} in {self.num_sequences} sequences is none"
                    ),
                    remedy="raise weight",
                )
            if text.is_written:
                yield from text.problems_of_lengths(self.sequence_length, where)
            fields = text.model_dump(
                include=MixedSection.model_fields.keys() - {"weight"}
            )
            if fields in earlier:
                yield ConfigError(
                    field=f"{where}source",
                    found=f"windows of {text.source} are in the calibration",
                    remedy="raise their weight",
                )
            earlier.append(fields)
        if not self.mix and self.weight != 1.0:
            yield ConfigError(
                field="weight",
                found="has no effect without mix",
                remedy="remove it",
            )
        if self.weigh == "answers" and self.source != "auto" and not self._has_answers():
            yield ConfigError(
                field="weigh",
                found="no text of the calibration has any answers",
                remedy="add one with chat or prompts",
            )

    def _has_answers(self) -> bool:
        return any(text.is_written and text.has_answers for text in (self, *self.mix))


def _split(total: int, weights: Sequence[float]) -> list[int]:
    """Return whole numbers in proportion to the weights, which add up to `total`.

    Exact shares are rounded down; those with the largest remainders are then rounded up.
    """
    exact = [total * weight / (sum(weights) or 1.0) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
