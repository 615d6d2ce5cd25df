"""Costs of whole layers by SLEB, ShortGPT and simpler scores."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ray_surgeon.models.layers import Layer
from ray_surgeon.pruning.depth_passes import influences_of, sums_without_each
from ray_surgeon.run_state import RunState


def score_layers(kind: str, run: RunState, layers: Sequence[Layer]) -> dict[Layer, float]:
    """Return the cost of the removal of each layer, each kind in its own unit.

    Args:
        kind: ``loss`` (SLEB, Song et al. 2024), ``influence`` (ShortGPT, Men et al. 2024),
            ``last`` or ``random``.
        run: a run whose text has windows held aside.
        layers: the layers that may be removed.
    """
    if kind == "last":
        return {layer: -float(layer.block) for layer in layers}
    if kind == "random":
        drawing = random.Random(run.shot)
        return {layer: drawing.random() for layer in layers}
    if kind == "influence":
        of_blocks = influences_of(run.cluster, run.text.held)
        return {layer: of_blocks[layer.block] for layer in layers}
    _, losses = sums_without_each(run.cluster, run.text, layers).unbind(dim=1)
    with_all, *without = losses.tolist()
    return {layer: loss - with_all for layer, loss in zip(layers, without, strict=True)}
