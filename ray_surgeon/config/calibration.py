"""The section of a job spec on the calibration text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from ray_surgeon.config.base import Address
from ray_surgeon.config.texts import SourceSection, TextSection, WritingSection
from ray_surgeon.errors import ConfigError

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
