"""The section of a job spec on the removal of whole layers."""

from __future__ import annotations

from typing import ClassVar, Literal

from ray_surgeon.config.base import Positive, Section

LayerCosts = Literal["divergence", "loss", "influence", "last", "random"]
MEASURED = {"divergence", "loss"}
"""Costs that are measured again after every removal."""


class DepthSection(Section):
    """How layers are chosen, and what makes up for them."""

    is_checked: ClassVar[bool] = True

    costs: LayerCosts = "divergence"
    """What the removal of a layer costs on windows held aside: divergence, from the dense model
    with the layer off, measured again after every removal; or a score of a baseline: loss, the same
    of the loss (SLEB); influence, by which angle a block turns its hidden states (ShortGPT); last,
    the last layers go first; random
    """
    num_removed: Positive | None = None
    """How many layers go over all shots, where groups names narrower kinds, too, of which then as
    many go as the target needs. null: where it names none, as many layers as the target needs
    """
    update: bool = True
    """Whether the linear before a removed layer learns to add what the layer added, as far as it is
    linear in what this linear reads; undone where the windows held aside get worse by it
    """
