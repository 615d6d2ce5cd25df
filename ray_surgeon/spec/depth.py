"""The section of a job spec on depth: layers that are removed whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from ray_surgeon.models.layers import LAYER_KINDS
from ray_surgeon.spec.base import Positive, Section
from ray_surgeon.spec.schedule import ScheduleSection

LayerCosts = Literal["divergence", "loss", "influence", "last", "random"]
MEASURED = {"divergence", "loss"}
"""Costs that are taken again after every removal."""


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


class Deepened(ScheduleSection):
    """Pruning that may remove whole layers."""

    groups: tuple[str, ...]
    depth: DepthSection | None = None
    """How layers are removed, before the channels and heads of the same shot, where groups names
    blocks, attention_layers or ffn_layers; null: by the defaults
    """

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """Kinds of layers that may be removed whole."""
        return tuple(kind for kind in LAYER_KINDS if kind in self.groups)

    @property
    def narrow_kinds(self) -> tuple[str, ...]:
        """Kinds of groups that are parts of layers."""
        return tuple(kind for kind in self.groups if kind not in LAYER_KINDS)

    @property
    def takes_curvature(self) -> bool:
        """Layers need none."""
        return bool(self.narrow_kinds)

    @property
    def checks_itself(self) -> bool:
        """Layers are chosen on windows held aside."""
        return super().checks_itself or bool(self.layer_kinds)

    def problems(self) -> Iterator[str]:
        """Yield what fields have against each other."""
        kinds = ", ".join(LAYER_KINDS)
        if self.depth is not None and not self.layer_kinds:
            yield f"depth: is of whole layers; remove it, or name one of {kinds} in groups"
        num_removed = None if self.depth is None else self.depth.num_removed
        if self.layer_kinds and (num_removed is None) == bool(self.narrow_kinds):
            what = ", ".join(self.narrow_kinds or self.layer_kinds)
            if num_removed is None:
                remedy = "say how many layers go first"
                yield f"depth.num_removed: groups names {what} beside layers; {remedy}"
            else:
                yield f"depth.num_removed: the target says how many {what} go; remove it"
        if self.depth and self.depth.costs == "influence" and self.layer_kinds != ("blocks",):
            yield "depth.costs: influence is of blocks; set groups to [blocks], or use divergence"
