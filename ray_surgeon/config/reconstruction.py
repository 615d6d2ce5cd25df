"""The section of a job spec on the reconstruction of layers."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ray_surgeon.config.base import Positive, Section


class ReconstructionSection(Section):
    """Reconstruction of feed-forward layers, see `ray_surgeon.recovery.reconstruction`."""

    is_checked: ClassVar[bool] = True

    learning_rate: float | None = Field(None, gt=0, le=1)
    """Adam's largest rate, in units of the root mean square of each weight; it rises shortly, then
    falls linearly to zero. null: three rates are tried on two layers, and the best one on the
    windows held aside is taken
    """
    tokens_per_step: Positive = 512
    """Calibration tokens of one step, at most all"""
    num_epochs: Positive = 2
    """Passes over the calibration tokens"""
    seed: int = Field(0, ge=0)
    """Seed of the order of the tokens"""
