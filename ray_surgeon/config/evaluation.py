"""Sections of the evaluation: texts, answers to prompts, and tasks."""

from __future__ import annotations

from pydantic import Field, model_validator

from ray_surgeon.config.base import Address, Location, OrAuto, Positive, Section
from ray_surgeon.config.texts import TextSection


class EvaluationText(TextSection):
    """A named text on which perplexity is measured before the first and after every shot."""

    name: str = Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=63)
    """Name of the text in the report: letters, digits, dots, dashes"""
    split: str = "test"
    """As in calibration, the test part by default"""


class GenerationSection(Section):
    """Answers to prompts, by the dense model and, after every shot, by the pruned one."""

    prompts: Address | None = None
    """File of prompts on any fsspec URI; each line is a JSON object with `prompt` (a text to
    continue) or `messages` (a list of {role, content} for the chat template). Use prompts outside
    the calibration. null: the dense model writes them, as users' turns from the opening of its chat
    template, or, without one, from the first words of the evaluation text
    """
    num_prompts: Positive = 16
    """Number of prompts to answer; from a longer file they are drawn with the seed"""
    max_new_tokens: Positive = 96
    """Maximum number of tokens in an answer"""
    seed: int = Field(0, ge=0)
    """Seed of the written prompts, or of the draw from the file"""


class TasksSection(Section):
    """Downstream tasks by EleutherAI's harness; extra: eval.

    They run on the dense model and on exports for transformers, except quantised ones.
    """

    names: tuple[str, ...] = Field(min_length=1)
    """Tasks or groups of tasks of the harness, e.g. [piqa, arc_easy]"""
    include: Location | None = None
    """Folder or fsspec URI of further task definitions; their code is executed"""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples before each question; null: as each task defines"""
    limit: Positive | None = None
    """Maximum number of questions per task, the first ones, for a trial"""
    batch_size: Positive = 1
    """Number of questions in a batch"""


class EvaluationSection(Section):
    """The measurements of the model. A list is short for `texts`."""

    texts: tuple[EvaluationText, ...] = Field(min_length=1)
    """Texts for perplexity, each reported after every shot"""
    generation: OrAuto[GenerationSection] | None = "auto"
    """Comparison of the pruned model's answers to prompts with the dense model's: the share of
    tokens that speculative decoding would accept, and free answers. auto: if the model has a chat
    template, or the calibration has prompts, of which a tenth is then held aside; null: no
    comparison
    """
    tasks: TasksSection | None = None
    """Downstream tasks, before the first shot and on every export"""
    stop_above: float | None = Field(None, gt=1)
    """Stop the run before the commit of a shot if the perplexity on a text exceeds the dense
    model's by more than this factor
    """

    @model_validator(mode="before")
    @classmethod
    def _list_of_texts(cls, value: object) -> object:
        return {"texts": value} if isinstance(value, (list, tuple)) else value
