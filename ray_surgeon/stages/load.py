"""Workers load the dense model's weights, or those of the shot from which a run goes on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ray_surgeon.memory.stores import ScratchNames
from ray_surgeon.plan.needs import StepPlan, WorkerView
from ray_surgeon.runtime.loading import ModelRecipe, load
from ray_surgeon.runtime.wave import read_states
from ray_surgeon.stages.prune.method import Method
from ray_surgeon.stages.stage import Facts, RunState, Stage


@dataclass(frozen=True)
class Load(Stage):
    """The first stage of every run."""

    name = "load"
    method: Method  # which says what masks are of

    def run(self, run: RunState, facts: Facts) -> None:
        """Load weights, masks, and what the dense model said of texts."""
        shot_files: tuple[tuple[str, str], ...] = ()
        if run.resumes:
            last = run.directory.read_shot(run.num_done)
            shot_files = tuple((key, file.uri) for file in last.files for key in file.keys)
        recipe = ModelRecipe(run.model, shot_files, run.kept(ScratchNames))
        run.cluster.run_all(load, recipe, self.method.by_element, run.cluster.stores)
        if run.resumes:
            self.method.after_resuming(run.cluster)
            run.cluster.run_all(read_states, run.directory.dense_states)
        facts |= {"workers": len(run.cluster.placement.workers), "resumed_after_shot": run.num_done}

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return what a worker needs until its weights are where they stay."""
        yield StepPlan(self.name, worker.weights, worker.host + worker.shapes.largest_tensor)

    def on_host(self, worker: WorkerView) -> float:
        """Return the bytes of masks of elements; others are small."""
        return float(self.method.by_element * sum(linear.size for linear in worker.linears))
