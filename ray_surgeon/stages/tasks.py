"""Downstream tasks of the dense model; those of exports are measured with each export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_surgeon.export.tasks import check_tasks, evaluate_tasks
from ray_surgeon.spec.evaluation import TasksSection
from ray_surgeon.stages.stage import Facts, RunState, Stage


@dataclass(frozen=True)
class Tasks(Stage):
    """Runs the tasks once, before the first shot."""

    name = "tasks"
    section: TasksSection

    @staticmethod
    def of(section: TasksSection | None) -> Tasks | None:
        """Return the stage if there are tasks.

        Raises:
            ValueError: the harness is not installed, or does not know a task.
        """
        if section is None:
            return None
        check_tasks(section)
        return Tasks(section)

    def is_due(self, run: RunState) -> bool:
        """Whether the dense model was not measured by an earlier try."""
        return not run.resumes

    def run(self, run: RunState, facts: Facts) -> None:
        """Measure the dense model."""
        run.report.dense["tasks"] = evaluate_tasks(run.cluster, run.model, self.section)

    def fingerprints(self) -> Mapping[str, Any]:
        """Return the tasks: scores before and after are of the same ones."""
        return {"tasks": self.section.model_dump(mode="json", exclude={"batch_size"})}
