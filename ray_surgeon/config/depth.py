"""The section of a job spec on the removal of whole layers."""

from __future__ import annotations

from typing import ClassVar, Literal

from ray_surgeon.config.base import Positive, Section

LayerCosts = Literal["divergence", "loss", "influence", "last", "random"]
MEASURED = {"divergence", "loss"}
"""Costs that are measured again after every removal."""


class DepthSection(Section):
    """Choice of the removed layers, and the update that compensates for them."""

    is_checked: ClassVar[bool] = True

    costs: LayerCosts = "divergence"
    """Cost of removing a layer, on windows held aside. divergence: from the dense model with the
    layer off, measured again after every removal. Scores of baselines: loss: the loss with the
    layer off, measured in the same way (SLEB); influence: the angle between hidden states before
    and after a block (ShortGPT); last: the last layers first; random
    """
    num_removed: Positive | None = None
    """Number of layers to remove over all shots. Required if groups also contains kinds that are
    parts of layers; those then provide the rest of the target. null, if groups contains only
    layers: as many layers as the target needs
    """
    update: bool = True
    """Whether the linear before a removed layer learns the layer's contribution to the residual
    stream, as a linear function of its own inputs; undone if the windows held aside get worse
    """
