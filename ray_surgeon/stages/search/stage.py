"""The stage of the search, between costs and threshold of a shot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ray_surgeon.plan.needs import StepPlan, WorkerView
from ray_surgeon.stages.prune.groups import Groups
from ray_surgeon.stages.prune.method import Method, Scores, Tokens
from ray_surgeon.stages.prune.stages import Present, Update
from ray_surgeon.stages.search.search import SEARCHED, Search
from ray_surgeon.stages.search.section import SearchSection
from ray_surgeon.stages.stage import Facts, RunState, Stage, Text
from ray_surgeon.storage.texts import Windows


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
        method = run.kept(Present).method
        assert isinstance(method, Groups)
        search = Search(self.section, method)
        scores, record = search.run(run.cluster, run.kept(Scores), self.windows, run.text, run.shot)
        run.keep(scores, of_shot=True)
        run.record["search"] = record
        facts |= search.facts(record)

    def texts_to_remember(self, run: RunState) -> Mapping[str, Text]:
        """Return the windows of the search."""
        return {SEARCHED: Text(self.windows)}

    def fingerprints(self) -> Mapping[str, Any]:
        """Return that of the windows."""
        return {"search": self.fingerprint}

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the passes, while factors stay and the host keeps every consumer twice."""
        (update,) = Update(self.method).needs(worker)
        sizes = [(self.section.num_sequences, worker.sequence_length)]
        passes = worker.measuring(self.name, sizes)
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
        yield StepPlan(
            self.name,
            max(of_passes, update.device),
            update.host + passes.host - worker.host + twice,
            num_passes * passes.flops,
            trials * update.float32_flops,
            num_passes * passes.host_bytes + trials * update.host_bytes,
            num_passes * passes.disk_bytes + trials * update.disk_bytes,
        )

    def on_host(self, worker: WorkerView) -> float:
        """Return the dense model's states of the windows."""
        return worker.remembered(self.section.num_sequences * worker.sequence_length)
