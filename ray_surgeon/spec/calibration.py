"""The section of a job spec on the text whose loss a method keeps low."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Annotated, ClassVar, Literal

from pydantic import Field, Tag, model_validator

from ray_surgeon.spec.base import Address, by_tag, tag
from ray_surgeon.spec.texts import MixedSection, SourceSection, TextSection
from ray_surgeon.spec.written import SelfSection, WritingSection

MixSection = Annotated[
    Annotated[MixedSection, Tag(tag("text"))] | Annotated[SelfSection, Tag(tag("self"))],
    by_tag(
        lambda get: "self" if get("source", None) == "self" else "text", "a text, or source self"
    ),
]


OF_CALIBRATION = ("weight", "weigh", "held_aside")
"""Fields of a calibration that no other text has."""


class CalibrationSection(TextSection, WritingSection):
    """The text whose loss the method keeps low, or a mix of texts."""

    may_be_written: ClassVar[bool] = True

    source: Address = Field(
        min_length=1,
        description="As for other texts; or `self`, text that the dense model writes, see the "
        "fields from temperature on; or `auto`, a mix that suits the model: its own conversations "
        "if it has a chat template, what it writes after `def ` and beginnings of docstrings, and "
        "Python's code, docstrings and help",
    )
    weight: float = Field(1.0, gt=0, description="Weight of this text in the mix")
    mix: tuple[MixSection, ...] = Field(
        (),
        description="More texts; num_sequences counts the windows of all, which are taken in turns",
    )
    weigh: Literal["all", "answers"] = Field(
        "all",
        description="Tokens that give the gradients of G and of the divergence: all, or answers "
        "(those of the model's answers, in texts that have them; other texts count whole). A takes "
        "all tokens in any case",
    )
    held_aside: float | None = Field(
        None,
        ge=0,
        le=0.5,
        description="Fraction of the calibration's windows that no stage is fitted on; stages are "
        "measured on them before and after, and what does not help is undone. null: a tenth, at "
        "most six windows, if a stage checks itself so (reconstruction, search, corrections, "
        "damping auto), otherwise none",
    )

    @property
    def own(self) -> SourceSection | SelfSection:
        """The first text of the calibration."""
        if self.source != "self":
            return self
        return SelfSection(source="self", weight=self.weight, seed=self.seed, **self.of_writing)

    @property
    def shares(self) -> list[tuple[SourceSection | SelfSection, int]]:
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
        weights = [
            0.0 if isinstance(text, SelfSection) else float(getattr(text, "weight", 1))
            for text in texts
        ]
        return _split(num_sequences, weights) if num_sequences else [0] * len(texts)

    def check_border(self, measured: SourceSection, where: str) -> None:
        """Refuse a text that the calibration cuts into train and test at another place.

        Raises:
            ValueError: the calibration reads more or less of the same text; `where` is the measured
                one's place in the spec.
        """
        texts = [text for text, _ in self.shares]
        starts = [
            text.starts
            for text in texts
            if isinstance(text, SelfSection) and text.starts is not None
        ]
        if measured.source == "python-code":
            return  # its train and test are different files, however much is read
        for text in (*texts, *starts):
            if (
                isinstance(text, SourceSection)
                and text.source == measured.source
                and text.max_tokens != measured.max_tokens
            ):
                raise ValueError(
                    f"{where}.max_tokens: must equal that of {text.source} in calibration, because "
                    "both are cut from it and the border between train and test would move; set "
                    "both"
                )

    @model_validator(mode="after")
    def _fields_fit_the_source(self) -> CalibrationSection:
        if self.source == "auto":
            chosen = {"source", "num_sequences", "sequence_length", "seed", "weigh", "held_aside"}
            if not_chosen := self._given_except(chosen):
                raise ValueError(
                    f"source auto chooses the texts, so {', '.join(not_chosen)} cannot be given; "
                    "remove it, or name a source"
                )
            return self
        if self.source == "self":
            allowed = {
                "source",
                "num_sequences",
                "sequence_length",
                "seed",
                "weigh",
                "held_aside",
                "weight",
                "mix",
            }
            if misplaced := self._given_except(allowed | WritingSection.model_fields.keys()):
                raise ValueError(
                    f"{', '.join(misplaced)} belongs to a text that is read, and the model writes "
                    "this one; remove it"
                )
        else:
            if misplaced := self._given_except(
                type(self).model_fields.keys() - WritingSection.model_fields.keys()
            ):
                raise ValueError(
                    f"{', '.join(misplaced)} belongs to text that the model writes; set source to "
                    "self, or put it into a text of mix with source self"
                )
        if self.weigh == "answers" and not any(
            isinstance(text, SelfSection) and text.has_answers for text, _ in self.shares
        ):
            raise ValueError(
                "weigh is answers, but no text of the calibration has any; set it to all, or add "
                "{source: self, chat: true} or {source: self, prompts: FILE} to mix"
            )
        return self

    def _given_except(self, names: Set[str]) -> list[str]:
        """Return the fields that are not as they are by default, without some."""
        fields = {
            name: field for name, field in type(self).model_fields.items() if name not in names
        }
        return [name for name, field in fields.items() if getattr(self, name) != field.default]

    @model_validator(mode="after")
    def _every_text_counts(self) -> CalibrationSection:
        for number, (text, count) in enumerate(self.shares):
            if not count:
                raise ValueError(
                    f"mix: the share of {text.source} in {self.num_sequences} sequences is none; "
                    "raise its weight or num_sequences"
                )
            if isinstance(text, SelfSection):
                text.check_lengths(self.sequence_length, f"mix.{number - 1}: " if number else "")
        if not self.mix and self.weight != 1.0:
            raise ValueError("weight has no effect without mix; remove it")
        return self

    @model_validator(mode="after")
    def _no_text_twice(self) -> CalibrationSection:
        texts = [
            text.model_dump(exclude={"weight"})
            if isinstance(text, SelfSection)
            else text.model_dump(include=set(SourceSection.model_fields))
            for text, _ in self.shares
        ]
        for number, text in enumerate(texts):
            if text in texts[:number]:
                raise ValueError(
                    f"mix.{number - 1}: these windows of {text['source']} are in the calibration "
                    "already; raise the weight of that text instead"
                )
        return self


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
