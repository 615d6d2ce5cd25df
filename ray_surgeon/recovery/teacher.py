"""The model to train towards, where it is not the dense model of the job itself."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ray_surgeon.memory.stores import ScratchNames
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.plan.counts import StepPlan
from ray_surgeon.plan.estimate import WorkerView
from ray_surgeon.plan.work import Shapes, Work
from ray_surgeon.run_state import RunState, Stage
from ray_surgeon.runtime.placement import Placement
from ray_surgeon.runtime.weights import ModelRecipe, load
from ray_surgeon.spec.sections import ModelSection

_OF_TEACHER = ("load", "self_text", "answers", "evaluation")
"""Steps that need with the teacher what they need with the model."""


@dataclass(frozen=True, eq=False)
class LoadTeacher(Stage):
    """Workers have the teacher first, in place of the model, until that is loaded.

    What later weights are compared with is the teacher's then: its texts, answers and states.
    """

    name = "teacher"
    model: ModelSection  # pinned to what was checked
    layout: ModelLayout = field(repr=False)
    placement: Placement  # of its blocks, on as many workers as the model's
    fingerprint: Any  # of its weights; None if there are none to check

    def recipe(self, scratch: ScratchNames) -> ModelRecipe:
        """Return how workers get it."""
        return ModelRecipe(self.model, (), scratch, (self.layout, self.placement.blocks))

    def load(self, run: RunState) -> None:
        """Load it in place of the model."""
        recipe = self.recipe(run.scratch)
        run.cluster.run_all(load, recipe, False, run.cluster.stores)

    def fingerprints(self) -> Mapping[str, Any]:
        """Return that of its weights."""
        return {"teacher": self.fingerprint}

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return what is done with it, as one step."""
        view = self.view(worker)
        for stage in worker.shapes.work.stages:
            for step in stage.needs(view) if stage.name in _OF_TEACHER else ():
                yield replace(step, name=self.name)

    def beside(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return its head, which stays on the device."""
        config = self.layout.config
        head = config.vocab_size * config.hidden_size * worker.shapes.width * worker.blocks.is_last
        for name in {stage.name for stage in worker.shapes.work.stages} - {self.name}:
            yield StepPlan(name, head, 0.0)

    def on_host(self, worker: WorkerView) -> float:
        """Return its states of texts."""
        view = self.view(worker)
        return sum(s.on_host(view) for s in worker.shapes.work.stages if s is not self)

    def view(self, worker: WorkerView) -> WorkerView:
        """Return a worker as it is with the teacher in place of the model."""
        work = worker.shapes.work
        shapes = _shapes(self.layout, work.dtype, work.num_sequences, work.sequence_length)
        place = worker.stores, worker.device_is_host, worker.shard
        return WorkerView(shapes, self.placement, *place)


@functools.lru_cache(maxsize=1)
def _shapes(layout: ModelLayout, dtype: str, num_sequences: int, length: int) -> Shapes:
    return Shapes(layout, Work(dtype, num_sequences, length, "none", frozenset(), ()))
