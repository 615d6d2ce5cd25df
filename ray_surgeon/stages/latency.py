"""Measures how long blocks of every width take, for a target that is a latency."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ray_surgeon.export.folder import Pruned
from ray_surgeon.export.for_engines import Shrinking
from ray_surgeon.export.latency import latency_budget
from ray_surgeon.spec.targets import LatencyTarget
from ray_surgeon.stages.prune.groups import Groups
from ray_surgeon.stages.prune.method import Method
from ray_surgeon.stages.prune.methods import Present
from ray_surgeon.stages.stage import Facts, RunState, Stage


@dataclass(frozen=True)
class Latency(Stage):
    """Gives the method of a run its budget."""

    name = "latency"
    method: Groups

    @staticmethod
    def of(method: Method) -> Latency | None:
        """Return the stage if the method's budget must be measured."""
        return Latency(method) if isinstance(method, Groups) and method.budget is None else None

    def run(self, run: RunState, facts: Facts) -> None:
        """Measure, unless an earlier try of the run did."""
        method = self.method
        section = method.section
        assert isinstance(section.target, LatencyTarget)
        shrinking = Shrinking(
            method.fewest, section.multiple, section.tensor_parallel, section.uniform
        )
        uri = run.directory.path("latency.json")
        dense = Pruned(run.cluster, run.layout, run.model, {}, run.calibration[0])
        budget = latency_budget(dense, section.target, shrinking, uri)
        run.keep(Present(replace(method, budget=budget)))
        facts["dense_s"] = budget.dense
