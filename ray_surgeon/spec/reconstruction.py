"""The section of a job spec on the reconstruction of layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from ray_surgeon.models.layout import FEED_FORWARD_OF_ALL
from ray_surgeon.spec.base import Positive, Section
from ray_surgeon.spec.curvature import AnyCurvature
from ray_surgeon.spec.schedule import ScheduleSection


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


class Reconstructed(ScheduleSection):
    """Pruning after which layers may be reconstructed."""

    groups: tuple[str, ...]
    reconstruction: ReconstructionSection | None = None
    """In every shot, after the update: train every feed-forward layer that lost channels to
    reproduce its earlier outputs. Workers keep its inputs until then. null: no reconstruction
    """

    def problem_with(self, curvature: AnyCurvature) -> str | None:
        """Return why this section and a curvature do not go together; see `ScheduleSection`."""
        if self.reconstruction is not None and curvature.kind == "identity":
            return "curvature.kind: identity keeps no inputs of layers; use kfac or activations"
        return super().problem_with(curvature)

    def problems(self) -> Iterator[str]:
        """Yield what fields have against each other."""
        if self.reconstruction is not None and not FEED_FORWARD_OF_ALL.intersection(self.groups):
            kinds = " or ".join(sorted(FEED_FORWARD_OF_ALL))
            yield f"reconstruction: is of channels; add {kinds} to groups, or leave it out"
