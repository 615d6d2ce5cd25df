"""The search for how many coupled groups every block loses.

Costs are scaled by what removals really change.

Inside of a linear the quadratic model's costs rank groups well. Between blocks they are off by
factors of three and more, because they know nothing of the blocks behind, nor of what is removed
there. So all removals are tried together, and those of one kind of groups in one block are undone
in turn: how far the divergence from the dense model falls, over what the costs say, is the scale of
these costs. The threshold over scaled costs is a new allocation, and the better one is taken.

Source: docs/method.md, section 8.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ray_surgeon.maths.threshold import next_scales, shrunk_ratios
from ray_surgeon.plan.counts import StepPlan
from ray_surgeon.plan.needs import WorkerView
from ray_surgeon.runtime.passes import divergences_of
from ray_surgeon.runtime.wave import Tokens
from ray_surgeon.runtime.worker import Worker, collective
from ray_surgeon.stages.prune.group_choice import Counts, GroupScores, Paths, Unit
from ray_surgeon.stages.prune.groups import Groups
from ray_surgeon.stages.prune.method import Method, Scores
from ray_surgeon.stages.prune.methods import Update
from ray_surgeon.stages.search.section import SearchSection
from ray_surgeon.stages.stage import CalibrationText, Facts, RunState, Stage, Text, held_measure
from ray_surgeon.storage.texts import Windows

SEARCHED = "(search)"
"""Name of the text of a search among those that have dense states; no evaluation text can have it.
"""


Scales = Mapping[Unit, float]
"""What costs of one kind of groups in one block are multiplied with."""


class Trial(dict[str, tuple[Unit, Tensor]]):
    """Consumer that is pruned on trial -> what its groups belong to, and [R, C] on the host.

    That is its weight from before, or the pruned one while that from before is back.
    """


@collective
def prune_on_trial(worker: Worker, method: Groups, counts: Counts) -> None:
    """Take the cheapest groups of every consumer out of it.

    Masks and producers stay, because zero columns take nothing from what producers give.
    """
    trial = Trial()
    shard = worker.shard
    for groups in method.sets(worker):
        name = groups.consumer
        if counts.get(name):
            trial[name] = (groups.block, groups.kind), shard.weight(name).to("cpu", shard.dtype)
            if worker.owns(name):
                shard.set_weight(name, method.removal(worker, groups, counts[name])[0].W)
    worker.keep(trial)
    worker.share_linears(trial)


def turn(worker: Worker, unit: Unit | None) -> None:
    """Undo the removals of one kind of groups in one block, or of all, or do them again."""
    trial = worker.kept(Trial)
    shard = worker.shard
    for name, (own, weight) in trial.items():
        if unit in (None, own):
            trial[name] = own, shard.weight(name).to("cpu", shard.dtype)
            shard.set_weight(name, weight.to(worker.device, torch.float32))


def end(worker: Worker) -> None:
    """Put all weights from before back."""
    turn(worker, None)
    worker.drop(Trial)


@dataclass(frozen=True)
class Search:
    """The search of one shot, on the coordinator."""

    section: SearchSection
    paths: Paths  # of the shot, after the costs
    # [num_sequences, sequence_length] tokens that the curvature has not seen; the dense model's
    # states were remembered
    windows: Tokens
    # whose windows held aside decide which allocation is taken; `windows` do if there are none
    text: CalibrationText

    def run(self, scores: GroupScores, facts: Facts) -> tuple[GroupScores, dict[str, Any]]:
        """Try allocations, and take the one of the lowest divergence held aside.

        Each has scales from the one before.

        Args:
            scores: all of them.
            facts: get the first allocation's measure, that of the one taken, and which it is.

        Returns:
            The scores with its scales, and for the report the divergences of all that were tried,
            which one was taken, and the scales.

        Raises:
            FloatingPointError: the loss is not a number.
        """
        cluster = self.paths.cluster
        held = len(self.text.held)
        scales: Scales = {}
        tried = list[tuple[GroupScores, Counts]]()
        record: dict[str, Any] = {"divergences": [], "held_aside": []}
        for number in range(self.section.rounds + 1):
            scores = self.paths.rescaled(scores, scales) if number else scores
            counts = self.paths.method.allocate(scores, self.paths.shot).counts
            if any(counts == before for _, before in tried):
                break  # nothing more can be learnt
            tried.append((scores, counts))
            cluster.run_all(prune_on_trial, self.paths.method, counts)
            divergences = divergences_of(cluster, SEARCHED, self.windows)
            record["divergences"].append(sum(divergences) / len(divergences))
            record["held_aside"].append(held_measure(cluster, self.text) if held else None)
            if number < self.section.rounds:
                scales = self._scales(scores, counts, divergences, scales)
            cluster.run_all(end)
        measures: list[float] = record["held_aside" if held else "divergences"]
        taken = record["taken"] = measures.index(min(measures))
        # workers keep the longest paths, which begin like the ones before
        best, _ = tried[taken]
        scaled = sorted({(*c.unit, c.scale) for c in best.costs})
        record["scales"] = [{"block": b, "kind": kind, "scale": s} for b, kind, s in scaled]
        stays = "the first allocation stays"
        facts |= {"divergence before": measures[0], "divergence": measures[taken]}
        facts["taken"] = f"allocation {taken + 1} of {len(measures)}" if taken else stays
        return best, record

    def _scales(
        self, scores: GroupScores, counts: Counts, divergences: Sequence[float], before: Scales
    ) -> Scales:
        """Return the scales for another allocation.

        Removals of this one are undone in turn, one kind in one block at a time.
        """
        cluster = self.paths.cluster
        costs = defaultdict[Unit, float](float)
        for c in scores.costs:
            costs[c.unit] += c.of_cheapest(counts.get(c.consumer, 0))
        units = sorted(unit for unit, cost in costs.items() if cost > 0)
        if not units:
            return before
        float64 = partial(torch.tensor, dtype=torch.float64)
        changes = list[Tensor]()
        for unit in units:
            cluster.run_all(turn, unit)
            undone = divergences_of(cluster, SEARCHED, self.windows)
            changes.append(float64(divergences) - float64(undone))
            cluster.run_all(turn, unit)
        kinds = [kind for _, kind in units]
        numbers = torch.tensor([kinds.index(kind) for kind in kinds])
        expected = float64([costs[unit] for unit in units])
        ratios = shrunk_ratios(torch.stack(changes), expected, numbers)
        scales = next_scales(float64([before.get(unit, 1.0) for unit in units]), ratios)
        return {**before, **dict(zip(units, scales.tolist(), strict=True))}


@dataclass(frozen=True)
class SearchStage(Stage):
    """Scales the costs of blocks by what removals really change."""

    name: ClassVar[str] = "search"
    section: SearchSection
    method: Groups
    windows: Tokens = field(repr=False)  # [num_sequences, sequence_length] tokens
    fingerprint: str  # of the windows

    @staticmethod
    def of(method: Method, windows: Windows) -> SearchStage | None:
        """Return the stage if a method has a search.

        Args:
            method: of pruning.
            windows: what the search measures on.
        """
        section = getattr(method.section, "search", None)
        if not isinstance(method, Groups) or section is None:
            return None
        return SearchStage(section, method, windows.tokens, windows.fingerprint)

    def run(self, run: RunState, facts: Facts) -> None:
        """Try allocations, and leave the scores of the best one."""
        paths = Paths(run.kept(Groups), run.cluster, run.shot)
        search = Search(self.section, paths, self.windows, run.text)
        scores, run.record["search"] = search.run(run.kept(Scores), facts)
        run.keep(scores, of_shot=True)

    def texts_to_remember(self, run: RunState) -> Mapping[str, Text]:
        """Return the windows of the search."""
        return {SEARCHED: (self.windows, None)}

    def fingerprints(self) -> Mapping[str, Any]:
        """Return that of the windows."""
        return {"search": self.fingerprint}

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the passes, while factors stay and the host keeps every consumer twice."""
        (update,) = Update(self.method).needs(worker)
        passes = worker.measuring(self.name, [(self.section.num_sequences, worker.sequence_length)])
        factors = worker.all_factors / worker.num_replicas
        of_passes = passes.device + factors * (worker.stores.factors == "device")
        roles = self.method.consumers
        consumers = [linear for linear in worker.linears if linear.role in roles]
        twice = worker.shapes.width * sum(linear.size for linear in consumers)
        layout = worker.shapes.layout
        ranked = [g for g in layout.group_sets if layout.shapes[g.consumer].role in roles]
        undone = {(groups.block, groups.kind) for groups in ranked}
        trials = self.section.rounds + 1
        num_passes = trials + self.section.rounds * len(undone)
        host = update.host + passes.host - worker.host + twice
        flops = num_passes * passes.flops, trials * update.float32_flops
        of_host = num_passes * passes.host_bytes + trials * update.host_bytes
        of_disk = num_passes * passes.disk_bytes + trials * update.disk_bytes
        device = max(of_passes, update.device)
        counts = passes.counts.times(num_passes) + update.counts.times(trials)
        yield StepPlan(self.name, device, host, *flops, of_host, of_disk, counts=counts)

    def on_host(self, worker: WorkerView) -> float:
        """Return the dense model's states of the windows."""
        return worker.remembered(self.section.num_sequences * worker.sequence_length)
