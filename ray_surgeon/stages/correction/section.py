"""The section of a job spec on low-rank corrections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from ray_surgeon.spec.base import Positive, Section


class CorrectionSection(Section):
    """Low-rank corrections: B A is trained beside every linear and absorbed into it.

    This comes after every shot.
    """

    loss: Literal["kl", "cross_entropy"] = "kl"
    """What corrections lower on the calibration text: the divergence from the dense model (kl),
    which recovers what pruning took, or the loss (cross_entropy), which also teaches the text
    """
    lora_rank: int = Field(8, ge=1, le=1024)
    """Rank of B A"""
    learning_rate: float | None = Field(None, gt=0, le=1)
    """Largest learning rate of Adam, relative to the root mean square of each weight; it rises
    shortly, then falls linearly to zero. null: the highest of three whose first steps do no harm on
    the windows held aside; it is halved where they get worse later
    """
    steps_per_shot: int = Field(3, ge=0)
    """Steps of Adam after every shot"""
    sequences_per_step: Positive = 1
    """Calibration sequences of one step, at most all"""
    final_epochs: int = Field(0, ge=0)
    """Passes over the calibration sequences after the last shot"""
    seed: int = Field(0, ge=0)
    """Seed of A at the start, and of the order of the sequences"""

    def problems(self) -> Iterator[str]:
        """Yield what fields have against each other."""
        if not self.steps_per_shot and not self.final_epochs:
            yield "steps_per_shot and final_epochs are 0; set one of them, or correction: null"
