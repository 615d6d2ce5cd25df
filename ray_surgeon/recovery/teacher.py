"""The model to train towards, if it is not the dense model of the job itself."""

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
"""Steps that also run with the teacher, and have the same needs then."""


@dataclass(frozen=True, eq=False)
class LoadTeacher(Stage):
    """Loads the teacher in place of the model, which is loaded later.

    Later weights are compared with the teacher's texts, answers and states.
    """

    name = "teacher"
    model: ModelSection  # pinned to the files that were checked
    layout: ModelLayout = field(repr=False)
    placement: Placement  # of its blocks, on as many workers as the model has
    fingerprint: Any  # of its weights; None if there are no weights to check

    def recipe(self, scratch: ScratchNames) -> ModelRecipe:
        """Return the recipe by which workers load the teacher."""
        return ModelRecipe(self.model, (), scratch, (self.layout, self.placement.blocks))

    def load(self, run: RunState) -> None:
        """Load the teacher in place of the model."""
        recipe = self.recipe(run.scratch)
        run.cluster.run_all(load, recipe, False, run.cluster.stores)

    def fingerprints(self) -> Mapping[str, Any]:
        """Return the fingerprint of the teacher's weights."""
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
        """Return a view of a worker that has the teacher in place of the model."""
        work = worker.shapes.work
        return WorkerView(
            shapes=_shapes(
                self.layout,
                work.dtype,
                work.num_sequences,
                work.sequence_length,
            ),
            placement=self.placement,
            stores=worker.stores,
            device_is_host=worker.device_is_host,
            shard=worker.shard,
        )


@functools.lru_cache(maxsize=1)
def _shapes(layout: ModelLayout, dtype: str, num_sequences: int, length: int) -> Shapes:
    work = Work(
        dtype=dtype,
        num_sequences=num_sequences,
        sequence_length=length,
        factors="none",
        gathered=frozenset(),
        stages=(),
    )
    return Shapes(layout, work)
