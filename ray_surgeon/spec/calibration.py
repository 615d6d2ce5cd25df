"""The section of a job spec on the text whose loss a method keeps low."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag

from ray_surgeon.spec.base import Address, by_tag, tag
from ray_surgeon.spec.texts import MixedSection, SourceSection, TextSection
from ray_surgeon.spec.written import SelfSection, WritingSection

MixSection = Annotated[
    Annotated[MixedSection, Tag(tag("text"))] | Annotated[SelfSection, Tag(tag("self"))],
    by_tag(
        lambda get: "self" if get("source", None) == "self" else "text", "a text, or source self"
    ),
]


_MISPLACED = {
    "auto": "source auto chooses the texts, so {} cannot be given; remove it, or name a source",
    "self": "{} belongs to a text that is read, and the model writes this one; remove it",
    "text": (
        "{} belongs to text that the model writes; set source to self, or put it into a text of "
        "mix with source self"
    ),
}
"""Source -> what is said of fields that it has not."""
OF_CALIBRATION = ("weight", "weigh", "held_aside")
"""Fields of a calibration that no other text has."""


class CalibrationSection(TextSection, WritingSection):
    """The text whose loss the method keeps low, or a mix of texts."""

    may_be_written: ClassVar[bool] = True

    source: Address = Field(min_length=1)
    """As for other texts; or `self`, text that the dense model writes, see the fields from
    temperature on; or `auto`, a mix that suits the model: its own conversations if it has a chat
    template, what it writes after `def ` and beginnings of docstrings, and Python's code,
    docstrings and help
    """
    weight: float = Field(1.0, gt=0)
    """Weight of this text in the mix"""
    mix: tuple[MixSection, ...] = ()
    """More texts; num_sequences counts the windows of all, which are taken in turns"""
    weigh: Literal["all", "answers"] = "all"
    """Tokens that give the gradients of G and of the divergence: all, or answers (those of the
    model's answers, in texts that have them; other texts count whole). A takes all tokens in any
    case
    """
    held_aside: float | None = Field(None, ge=0, le=0.5)
    """Fraction of the calibration's windows that no stage is fitted on; stages are measured on them
    before and after, and what does not help is undone. null: a tenth, at most six windows, if a
    stage checks itself so (reconstruction, search, corrections, damping auto), otherwise none
    """

    @property
    def own(self) -> CalibrationSection | SelfSection:
        """The first text of the calibration."""
        if self.source != "self":
            return self
        return SelfSection(source="self", weight=self.weight, seed=self.seed, **self.of_writing)

    @property
    def shares(self) -> list[tuple[CalibrationSection | MixedSection | SelfSection, int]]:
        """Each text with its number of windows, which add up to num_sequences."""
        counts = _split(self.num_sequences, [self.weight, *(text.weight for text in self.mix)])
        return list(zip((self.own, *self.mix), counts, strict=True))

    def further(self, num_sequences: int) -> list[int]:
        """Return of how many more windows each text has a share, none of what the model writes.

        Raises:
            ValueError: some are wanted, and the model writes all of the text.
        """
        texts = [text for text, _ in self.shares]
        if num_sequences and all(isinstance(text, SelfSection) for text in texts):
            raise ValueError(
                f"calibration: the model writes all of it, but {num_sequences} more windows are "
                "wanted of texts that are there already; add a text to calibration.mix"
            )
        weights = [0.0 if isinstance(text, SelfSection) else text.weight for text in texts]
        return _split(num_sequences, weights) if num_sequences else [0] * len(texts)

    def check_border(self, measured: SourceSection, where: str) -> None:
        """Refuse a text that the calibration cuts into train and test at another place.

        Raises:
            ValueError: the calibration reads more or less of the same text; `where` is the measured
                one's place in the spec.
        """
        if measured.source == "python-code":
            return  # its train and test are different files, however much is read
        texts = (text.starts if isinstance(text, SelfSection) else text for text, _ in self.shares)
        cuts = [text.max_tokens for text in texts if text and text.source == measured.source]
        if any(max_tokens != measured.max_tokens for max_tokens in cuts):
            raise ValueError(
                f"{where}.max_tokens: must equal that of {measured.source} in calibration, because "
                "both are cut from it and the border between train and test would move; set both"
            )

    def problems(self) -> Iterator[str]:
        """Yield fields that do not fit the source, and texts that do not fit each other."""
        yield from super().problems()
        yield from self._problems_of_source()
        for number, (text, count) in enumerate(self.shares):
            if not count:
                yield (
                    f"mix: the share of {text.source} in {self.num_sequences} sequences is none; "
                    "raise its weight or num_sequences"
                )
            if isinstance(text, SelfSection):
                where = f"mix.{number - 1}: " if number else ""
                yield from text.problems_of_lengths(self.sequence_length, where)
        if not self.mix and self.weight != 1.0:
            yield "weight has no effect without mix; remove it"
        windows = list[dict[str, Any]]()
        for number, (text, _) in enumerate(self.shares):
            kind = SelfSection if isinstance(text, SelfSection) else SourceSection
            fields = text.model_dump(include=kind.model_fields.keys() - {"weight"})
            if fields in windows:
                yield (
                    f"mix.{number - 1}: these windows of {text.source} are in the calibration "
                    "already; raise the weight of that text instead"
                )
            windows.append(fields)

    def _problems_of_source(self) -> Iterator[str]:
        of_any = {"source", "num_sequences", "sequence_length", "seed", "weigh", "held_aside"}
        of_writing = WritingSection.model_fields.keys()
        fields = type(self).model_fields
        by_source = {"auto": of_any, "self": of_any | of_writing | {"weight", "mix"}}
        allowed = by_source.get(self.source, fields.keys() - of_writing)
        changed = [name for name, field in fields.items() if getattr(self, name) != field.default]
        if misplaced := [name for name in changed if name not in allowed]:
            yield _MISPLACED.get(self.source, _MISPLACED["text"]).format(", ".join(misplaced))
        written = [text for text, _ in self.shares if isinstance(text, SelfSection)]
        has_answers = self.source == "auto" or any(text.has_answers for text in written)
        if self.weigh == "answers" and not has_answers:
            yield (
                "weigh is answers, but no text of the calibration has any; set it to all, or add "
                "{source: self, chat: true} or {source: self, prompts: FILE} to mix"
            )


def _split(total: int, weights: Sequence[float]) -> list[int]:
    """Return numbers in proportion to weights that add up to `total`.

    Exact shares are rounded down, the largest rests up.
    """
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    rests = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in rests[: total - sum(counts)]:
        counts[i] += 1
    return counts
