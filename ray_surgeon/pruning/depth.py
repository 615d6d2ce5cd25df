"""Removes whole layers, the cheapest first, before anything narrower is removed in the same shot.

Costs are measured again after each removal, which changes those of its neighbours most. See
docs/method.md, section 12.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray_surgeon.config.groups import MEASURED, DepthSection
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.errors import ConfigError
from ray_surgeon.models.layers import Layer, layers_of, linear_before
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.pruning import depth_passes as passes
from ray_surgeon.pruning import layer_removal as removal
from ray_surgeon.pruning.baselines.layers import score_layers
from ray_surgeon.pruning.coupled_groups import Groups
from ray_surgeon.pruning.method import Method
from ray_surgeon.run_state import Facts, RunState, held_measure

TOKENS_EACH = 20
"""Tokens per input of a fitted linear; more tokens change the fit by at most 5 %."""
_PRICE_MARGIN = 2.0
"""Layers up to this multiple of the lowest known price are measured again at once.

Removals raise prices, so the lowest known one is often out of date. One pass measures many layers.
"""


@dataclass(frozen=True)
class Depth:
    """Removes layers until the target of the shot is reached."""

    method: Groups
    layers: tuple[Layer, ...]  # layers of the kinds that may be removed

    @property
    def section(self) -> DepthSection:
        """The section of the job spec."""
        return self.method.section.depth or DepthSection()

    def remove_layers(self, run: RunState, method: Groups, facts: Facts) -> Groups:
        """Remove one layer after the other.

        Returns:
            The method, with the removed layers.
        """
        cluster = run.cluster
        gone = self.find_gone(cluster)
        steps = list[dict[str, Any]]()
        scores = dict[Layer, float]()  # layer -> its cost as it was last measured
        while self._is_missing(method, gone, run.shot):
            cheapest = self._cheapest(run, method, self._candidates(gone), scores)
            step: dict[str, Any] = {"layer": str(cheapest), "cost": scores[cheapest]}
            linear = self._sum_for_update(run, cheapest, gone)
            cluster.run_all(removal.remove, cheapest)
            gone = self.find_gone(cluster)
            step.update(self._try_update(run, linear))
            steps.append(step)
        run.record["layers_removed"] = steps
        facts["removed"] = ", ".join(step["layer"] for step in steps)
        if steps:
            facts["divergence held aside"] = steps[-1]["divergence_held_aside"]
        return self.known(method, gone)

    def find_gone(self, cluster: Cluster) -> list[Layer]:
        """Return the removed layers, and let passes skip the removed blocks."""
        found = set[Layer]()
        for of_worker in cluster.run_all(removal.layers_gone, self.layers):
            found.update(of_worker)
        return [layer for layer in self.layers if layer in found]

    @staticmethod
    def known(method: Groups, gone: Sequence[Layer]) -> Groups:
        """Return the method with the removed layers."""
        return replace(method, removed=frozenset(layer.key for layer in gone))

    # Number and choice of layers

    def _is_missing(self, method: Groups, gone: Sequence[Layer], shot: int) -> bool:
        """Whether a shot has to remove another layer."""
        num_removed = self.section.num_removed
        if num_removed is not None:
            return len(gone) < round(num_removed * shot / self.method.section.shots)
        method = self.known(method, gone)
        return method.need(()) - method.goal(shot) > 1e-9 * method.budget.dense

    def _candidates(self, gone: Sequence[Layer]) -> list[Layer]:
        """Return the layers that may be removed; one of every kind stays."""
        blocks = {layer.block for layer in gone if layer.kind == "blocks"}
        left = list[Layer]()
        for layer in self.layers:
            if layer not in gone and layer.block not in blocks:
                left.append(layer)
        num_left = Counter(layer.kind for layer in left)
        return [layer for layer in left if num_left[layer.kind] > 1]

    def _cheapest(
        self,
        run: RunState,
        method: Groups,
        candidates: Sequence[Layer],
        scores: dict[Layer, float],
    ) -> Layer:
        """Return the layer that costs least for each unit of the budget that it saves.

        Removals raise the costs of the other layers, so a cost that was measured before a removal
        is a lower bound (lazy greedy, Minoux 1978). Layers are measured again until no bound is
        lower than the cheapest measured layer.

        Args:
            run: in this step.
            method: method of pruning, which has the budget.
            candidates: layers that may be removed.
            scores: cost of each layer as it was last measured; updated in place.
        """
        of_layers = method.budget.of_layers

        def price(layer: Layer) -> float:
            saved = of_layers[layer.key]
            if saved <= 0:
                return math.inf  # by measured seconds, a layer may save nothing
            return scores[layer] / saved

        if self.section.costs not in MEASURED and scores:
            return min(candidates, key=price)
        wanted = list(candidates)
        if scores:
            enough = _PRICE_MARGIN * min(map(price, candidates))
            cheap = [layer for layer in candidates if price(layer) <= enough]
            wanted = cheap or wanted
        measured = set[Layer]()
        while wanted:
            scores.update(self._costs(run, wanted))
            measured.update(wanted)
            lowest = min(map(price, measured))
            wanted = [x for x in candidates if x not in measured and price(x) < lowest]
        return min(measured, key=price)

    def _costs(self, run: RunState, layers: Sequence[Layer]) -> dict[Layer, float]:
        """Return the cost of the removal of each layer, in the unit of the section's `costs`."""
        if self.section.costs != "divergence":
            return score_layers(self.section.costs, run, layers)
        sums = passes.sums_without_each(run.cluster, run.text, layers)
        divergences, _ = sums.unbind(dim=1)
        with_all, *without = divergences.tolist()
        costs = dict[Layer, float]()
        for layer, divergence in zip(layers, without, strict=True):
            costs[layer] = divergence - with_all
        return costs

    # The update that compensates for a removed layer

    def _sum_for_update(
        self,
        run: RunState,
        layer: Layer,
        gone: Sequence[Layer],
    ) -> str | None:
        """Gather the sums for folding a layer into the linear before it, and return that linear.

        None if there is no update, or no such linear.
        """
        if not self.section.update:
            return None
        names = list[str]()
        for one in gone:
            names.extend(one.linears)
        linear = linear_before(run.layout, layer, names)
        if linear is None:
            return None
        tokens = run.text.tokens
        most = TOKENS_EACH * run.layout.shapes[linear].num_columns
        sample = tokens[:: max(1, tokens.size // most)]
        passes.sum_additions(run.cluster, run.layout, sample, layer, linear)
        return linear

    def _try_update(self, run: RunState, linear: str | None) -> dict[str, Any]:
        """Update the linear, and undo the update if it does not help on the windows held aside.

        Returns:
            Entries for the report.
        """
        before = held_measure(run.cluster, run.text)
        record: dict[str, Any] = {
            "divergence_without_update": before,
            "updated": None,
            "divergence_held_aside": before,
        }
        if linear is None:
            return record
        run.cluster.run_all(removal.fold, linear)
        after = held_measure(run.cluster, run.text)
        if after < before:
            record["updated"] = linear
            record["divergence_held_aside"] = after
        else:
            run.cluster.run_all(removal.unfold, linear)
        run.cluster.run_all(removal.end_fitting)
        return record


def depth_of(method: Method, layout: ModelLayout, num_held: int) -> Depth | None:
    """Return the stage of a method that removes layers.

    Raises:
        ValueError: no windows are held aside.
    """
    if not isinstance(method, Groups) or not method.section.layer_kinds:
        return None
    if not num_held:
        raise ConfigError(
            field="calibration.held_aside",
            found="it leaves no windows on which layers are chosen and measured",
            remedy="raise it, or num_sequences",
        )
    return Depth(method, layers_of(layout, method.section.layer_kinds))
