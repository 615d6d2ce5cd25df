"""The model to train towards, if it is not the dense model of the job itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ray_surgeon.config.sections import ModelSection
from ray_surgeon.distributed.placement import Placement
from ray_surgeon.distributed.weights import ModelRecipe, load
from ray_surgeon.memory.stores import ScratchNames
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.run_state import RunState


@dataclass(frozen=True, eq=False)
class LoadTeacher:
    """Loads the teacher in place of the model, which is loaded later.

    Later weights are compared with the teacher's texts, answers and states.
    """

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
