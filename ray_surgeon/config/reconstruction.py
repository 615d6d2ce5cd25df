"""The section of a job spec on the reconstruction of layers."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ray_surgeon.config.base import Positive, Section


class ReconstructionSection(Section):
    """Reconstruction of feed-forward layers, see `ray_surgeon.recovery.reconstruction`."""

    is_checked: ClassVar[bool] = True

    learning_rate: float | None = Field(None, gt=0, le=1)
    """Adam's largest learning rate, relative to the root mean square of each weight; after a short
    warm-up it falls linearly to zero. null: the best of three rates on the windows held aside,
    tried on two layers
    """
    tokens_per_step: Positive = 512
    """Calibration tokens per step; limited by the number of all tokens"""
    num_epochs: Positive = 2
    """Passes over the calibration tokens"""
    seed: int = Field(0, ge=0)
    """Seed of the order of the tokens"""
