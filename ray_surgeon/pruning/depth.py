"""Removes whole layers, the cheapest first, before anything narrower goes in the same shot.

What the next removal costs is measured after each: neighbours' costs change most. See
docs/method.md, section 12.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray_surgeon.models.layers import Layer, layers_of, linear_before
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.pruning import depth_passes as passes
from ray_surgeon.pruning import layer_removal as removal
from ray_surgeon.pruning.coupled_groups import Groups
from ray_surgeon.pruning.method import Method
from ray_surgeon.run_state import Facts, RunState, held_measure
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.spec.depth import MEASURED, DepthSection

TOKENS_EACH = 20
"""Tokens for each input of a linear that learns: more change what it learns by a twentieth at most.
"""
_FURTHER = 2.0
"""Times the lowest price before a removal up to which layers are measured again at once."""


@dataclass(frozen=True)
class Depth:
    """Removes layers until the shot's share of them is gone."""

    method: Groups
    layers: tuple[Layer, ...]  # of the kinds that may go

    @property
    def section(self) -> DepthSection:
        """The section of the job spec."""
        return self.method.section.depth or DepthSection()

    def remove_layers(self, run: RunState, method: Groups, facts: Facts) -> Groups:
        """Remove one layer after the other.

        Returns:
            The method, which knows what is gone.
        """
        cluster = run.cluster
        gone = self.find_gone(cluster)
        steps = list[dict[str, Any]]()
        scores = dict[Layer, float]()  # of each layer as it was last taken
        while self._is_missing(method, gone, run.shot):
            cheapest = self._cheapest(run, method, self._candidates(gone), scores)
            step = {"layer": str(cheapest), "cost": scores[cheapest]}
            linear = self._fitted(run, cheapest, gone)
            cluster.run_all(removal.remove, cheapest)
            gone = self.find_gone(cluster)
            steps.append(step | self._made_up(run, linear))
        run.record["layers_removed"] = steps
        facts["removed"] = ", ".join(step["layer"] for step in steps)
        if steps:
            facts["divergence held aside"] = steps[-1]["divergence_held_aside"]
        return self.known(method, gone)

    def find_gone(self, cluster: Cluster) -> list[Layer]:
        """Return which layers are gone, and let workers' passes go around them."""
        of_workers = cluster.run_all(removal.layers_gone, self.layers)
        found = {layer for of_worker in of_workers for layer in of_worker}
        return [layer for layer in self.layers if layer in found]

    @staticmethod
    def known(method: Groups, gone: Sequence[Layer]) -> Groups:
        """Return a method that knows what is gone."""
        return replace(method, removed=frozenset(layer.key for layer in gone))

    # How many, and which

    def _is_missing(self, method: Groups, gone: Sequence[Layer], shot: int) -> bool:
        """Whether a layer is still to go in a shot."""
        section = self.method.section
        if self.section.num_removed is not None:
            return len(gone) < round(self.section.num_removed * shot / section.shots)
        method = self.known(method, gone)
        budget = method.budget
        return method.need(()) - method.goal(shot) > 1e-9 * budget.dense

    def _candidates(self, gone: Sequence[Layer]) -> list[Layer]:
        """Return which layers may go; of every kind one stays."""
        blocks = {layer.block for layer in gone if layer.kind == "blocks"}
        there = [x for x in self.layers if x not in gone and x.block not in blocks]
        kinds = [layer.kind for layer in there]
        return [layer for layer in there if kinds.count(layer.kind) > 1]

    def _cheapest(
        self,
        run: RunState,
        method: Groups,
        candidates: Sequence[Layer],
        scores: dict[Layer, float],
    ) -> Layer:
        """Return the layer that costs least for each unit of the budget that it saves.

        Removals make others dearer, so costs that were measured before others went are bounds from
        below (lazy greedy, Minoux 1978). Layers are measured again until no bound is lower than the
        cheapest of them.

        Args:
            run: in this step.
            method: of pruning, which has the budget.
            candidates: that may go.
            scores: cost of each layer as it was last measured, which is filled.
        """
        of_layers = method.budget.of_layers

        def price(layer: Layer) -> float:
            saved = of_layers[layer.key]  # nothing, if what was measured says so
            return scores[layer] / saved if saved > 0 else math.inf

        if self.section.costs not in MEASURED and scores:
            return min(candidates, key=price)
        wanted = list(candidates)
        if scores:
            enough = _FURTHER * min(map(price, candidates))
            wanted = [layer for layer in candidates if price(layer) <= enough] or wanted
        taken = set[Layer]()
        while wanted:
            scores |= self._costs(run, wanted)
            taken |= set(wanted)
            lowest = min(map(price, taken))
            wanted = [x for x in candidates if x not in taken and price(x) < lowest]
        return min(taken, key=price)

    def _costs(self, run: RunState, layers: Sequence[Layer]) -> dict[Layer, float]:
        """Return what the removal of each layer costs, in the unit of the section's costs."""
        kind = self.section.costs
        if kind == "last":
            return {layer: -float(layer.block) for layer in layers}
        if kind == "random":
            drawing = random.Random(run.shot)
            return {layer: drawing.random() for layer in layers}
        if kind == "influence":
            of_blocks = passes.influences_of(run.cluster, run.text.held)
            return {layer: of_blocks[layer.block] for layer in layers}
        sums = passes.sums_without_each(run.cluster, run.text, layers)
        whole, *others = sums[:, int(kind == "loss")].tolist()
        return {layer: value - whole for layer, value in zip(layers, others, strict=True)}

    # What makes up for a layer

    def _fitted(self, run: RunState, layer: Layer, gone: Sequence[Layer]) -> str | None:
        """Return the linear that is to take over a layer, once what it needs is summed."""
        names = [name for one in gone for name in one.linears]
        linear = linear_before(run.layout, layer, names) if self.section.update else None
        if linear is not None:
            tokens = run.text.tokens
            most = TOKENS_EACH * run.layout.shapes[linear].num_columns
            some = tokens[:: max(1, tokens.size // most)]
            passes.sum_additions(run.cluster, run.layout, some, layer, linear)
        return linear

    def _made_up(self, run: RunState, linear: str | None) -> dict[str, Any]:
        """Let the linear take over, and undo it if the windows held aside get worse by it."""
        divergence = held_measure(run.cluster, run.text)
        record: dict[str, Any] = {"divergence_without_update": divergence, "updated": None}
        if linear is not None:
            run.cluster.run_all(removal.fold, linear)
            updated = held_measure(run.cluster, run.text)
            if updated < divergence:
                divergence = updated
                record["updated"] = linear
            else:
                run.cluster.run_all(removal.unfold, linear)
            run.cluster.run_all(removal.end_fitting)
        return record | {"divergence_held_aside": divergence}


def depth_of(method: Method, layout: ModelLayout, num_held: int) -> Depth | None:
    """Return the stage of a method that removes layers.

    Raises:
        ValueError: no windows are held aside.
    """
    if not isinstance(method, Groups) or not method.section.layer_kinds:
        return None
    if not num_held:
        problem = "it leaves no windows on which layers are chosen and measured"
        raise ValueError(f"calibration.held_aside: {problem}; raise it, or num_sequences")
    return Depth(method, layers_of(layout, method.section.layer_kinds))
