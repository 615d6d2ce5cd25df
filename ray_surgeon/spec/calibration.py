"""The section of a job spec on the text whose loss a method keeps low."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from ray_surgeon.spec.base import Address
from ray_surgeon.spec.texts import SourceSection, TextSection, WritingSection

_READING = SourceSection.model_fields.keys() - {"source", "seed"}
_WRITING = WritingSection.model_fields.keys()
_MISPLACED = {
    "auto": (_READING | _WRITING | {"weight", "mix"}, "{} cannot be given to auto; remove it"),
    "self": (_READING, "{} belongs to a text that is read, and the model writes this one"),
    "text": (_WRITING, "{} belongs to text that the model writes; set source to self"),
}
"""Source -> fields that it has not, and what is said of them."""


class MixedSection(SourceSection, WritingSection):
    """A text of the calibration, or source self: text that the dense model writes, token by token.

    The model writes it before the first shot. It needs no data, and covers what the model knows.
    """

    may_be: ClassVar[tuple[str, ...]] = ("self",)

    weight: float = Field(1.0, gt=0)
    """Its share of num_sequences is its weight over the sum of all weights"""

    @property
    def is_written(self) -> bool:
        """Whether the model writes it."""
        return self.source == "self"

    def problems(self) -> Iterator[str]:
        """Yield fields that do not fit the source."""
        misplaced, problem = _MISPLACED.get(self.source, _MISPLACED["text"])
        changed = self.model_dump(exclude_defaults=True)
        if names := [name for name in changed if name in misplaced]:
            yield problem.format(", ".join(names))


class CalibrationSection(MixedSection, TextSection):
    """The text whose loss the method keeps low, or a mix of texts."""

    may_be: ClassVar[tuple[str, ...]] = ("self", "auto")

    source: Address
    """As for other texts; or `self`, text that the dense model writes, see the fields from
    temperature on; or `auto`, a mix that suits the model: its own conversations if it has a chat
    template, what it writes after `def ` and beginnings of docstrings, and Python's code,
    docstrings and help
    """
    mix: tuple[MixedSection, ...] = ()
    """More texts; num_sequences counts the windows of all, which are taken in turns"""
    weigh: Literal["all", "answers"] = "all"
    """Tokens that give the gradients of G and of the divergence: all, or answers (those of the
    model's answers, in texts that have them; other texts count whole). A takes all tokens in any
    case
    """
    held_aside: float | None = Field(None, ge=0, le=0.5)
    """Fraction of the calibration's windows that no stage is fitted on; stages are measured on them
    before and after, and what does not help is undone. null: a tenth, at most six windows, if a
    stage checks itself so (reconstruction, recovery, damping auto), otherwise none
    """

    @property
    def shares(self) -> list[tuple[MixedSection, int]]:
        """Each text with its number of windows, which add up to num_sequences."""
        texts = (self, *self.mix)
        return list(zip(texts, _split(self.num_sequences, [t.weight for t in texts]), strict=True))

    def check_border(self, measured: SourceSection, where: str) -> None:
        """Refuse a text that the calibration cuts into train and test at another place.

        Raises:
            ValueError: the calibration reads more or less of the same text; `where` is the measured
                one's place in the spec.
        """
        source = measured.source
        texts = (text.starts if text.is_written else text for text in (self, *self.mix))
        cuts = {text.max_tokens for text in texts if text and text.source == source}
        # train and test of python-code are different files, however much is read
        if source != "python-code" and cuts - {measured.max_tokens}:
            why = ", or the border between train and test moves"
            raise ValueError(f"{where}.max_tokens: must equal that of {source} in calibration{why}")

    def problems(self) -> Iterator[str]:
        """Yield texts that do not fit each other."""
        total = self.num_sequences
        windows = list[dict[str, Any]]()
        for number, (text, count) in enumerate(self.shares):
            where = f"mix.{number - 1}: " if number else ""
            if not count:
                yield f"mix: the share of {text.source} in {total} sequences is none; raise weight"
            if text.is_written:
                yield from text.problems_of_lengths(self.sequence_length, where)
            fields = text.model_dump(include=MixedSection.model_fields.keys() - {"weight"})
            if fields in windows:
                yield f"{where}windows of {text.source} are in the calibration; raise their weight"
            windows.append(fields)
        if not self.mix and self.weight != 1.0:
            yield "weight has no effect without mix; remove it"
        has_answers = any(text.is_written and text.has_answers for text in (self, *self.mix))
        if self.weigh == "answers" and not has_answers and self.source != "auto":
            yield "weigh: no text of the calibration has any answers; add one with chat or prompts"


def _split(total: int, weights: Sequence[float]) -> list[int]:
    """Return numbers in proportion to weights that add up to `total`.

    Exact shares are rounded down, the largest rests up.
    """
    exact = [total * weight / (sum(weights) or 1.0) for weight in weights]
    counts = [int(share) for share in exact]
    rests = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in rests[: total - sum(counts)]:
        counts[i] += 1
    return counts
