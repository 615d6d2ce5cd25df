"""The model to train towards, where it is not the dense model of the job itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ray_surgeon.memory.stores import ScratchNames
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.run_state import RunState
from ray_surgeon.runtime.placement import Placement
from ray_surgeon.runtime.weights import ModelRecipe, load
from ray_surgeon.spec.sections import ModelSection


@dataclass(frozen=True, eq=False)
class LoadTeacher:
    """Workers have the teacher first, in place of the model, until that is loaded.

    What later weights are compared with is the teacher's then: its texts, answers and states.
    """

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
