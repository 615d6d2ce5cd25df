"""The section of a job spec on the prompts that the dense and the pruned model answer."""

from __future__ import annotations

from pydantic import Field

from ray_surgeon.spec.base import Address, Positive, Section


class GenerationSection(Section):
    """Answers to prompts, by the dense model and, after every shot, by the pruned one."""

    prompts: Address | None = Field(None, min_length=1)
    """File of prompts on any fsspec URI, each line a JSON object with `prompt` (a text that is
    continued) or `messages` (a list of {role, content} for the chat template). Use prompts that are
    no part of the calibration. null: the dense model writes them, as users' turns from the opening
    of its chat template, or, without one, from the first words of the evaluation text
    """
    num_prompts: Positive = 16
    """How many prompts are answered; of a longer file they are drawn with the seed"""
    max_new_tokens: Positive = 96
    """Tokens of an answer, at most"""
    seed: int = Field(0, ge=0)
    """Seed of the prompts that are written, or drawn from the file"""
