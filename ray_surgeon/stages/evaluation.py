"""What the models are measured on: texts, after every shot, and tasks.

Tasks of the dense model, that is; those of exports are measured with each export.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_surgeon.export.tasks import check_tasks, evaluate_tasks
from ray_surgeon.plan.counts import StepPlan
from ray_surgeon.plan.estimate import WorkerView
from ray_surgeon.runtime.passes import measure, remember
from ray_surgeon.spec.evaluation import TasksSection
from ray_surgeon.spec.sections import ModelSection
from ray_surgeon.stages.stage import HELD, Facts, RunState, Stage


class CollapseError(RuntimeError):
    """The model is worse than the spec allows."""


class DenseEvaluation(Stage):
    """Measures the dense model, and keeps its states of all that is compared with it later."""

    name = "evaluation"
    of_dense_model = True

    def run(self, run: RunState, facts: Facts) -> None:
        """Measure, and let the last shards keep the dense model's states."""
        perplexity = {name: remember(run.cluster, name, text) for name, text in run.texts.items()}
        facts |= {f"perplexity {name}": value for name, value in perplexity.items()}
        run.report.dense["perplexity"] = perplexity
        for stage in run.stages:
            for name, text in stage.texts_to_remember(run).items():
                remember(run.cluster, name, *text)
        if len(run.text.held):
            remember(run.cluster, HELD, run.text.held, run.text.held_counts)
            facts["windows held aside"] = len(run.text.held)


@dataclass(frozen=True)
class Evaluation(Stage):
    """Measures the pruned model."""

    name = "evaluation"
    sizes: Sequence[tuple[int, int]]  # number and length of the windows of each text
    stop_above: float | None  # times the dense model's perplexity; None for no limit

    def run(self, run: RunState, facts: Facts) -> None:
        """Measure every text."""
        facts["sparsity"] = run.sparsity
        measured = {name: measure(run.cluster, name, text) for name, text in run.texts.items()}
        for what in ("perplexity", "divergence"):
            values = {name: getattr(of_text, what) for name, of_text in measured.items()}
            facts |= {f"{what} {name}": value for name, value in values.items()}
            run.record[what] = values

    def ended(self, run: RunState) -> None:
        """End the run if the model is too much worse.

        Raises:
            CollapseError: a perplexity is above the limit.
        """
        limit = self.stop_above
        for text, value in run.record["perplexity"].items() if limit is not None else ():
            dense = run.report.dense["perplexity"][text]
            if not value <= limit * dense:
                problem = f"after shot {run.shot} the perplexity on {text} is {value:.4g}"
                times = f"{value / dense:.3g} times the dense model's"
                allowed = f"evaluation.stop_above allows {limit:g}"
                remedy = "The shots before are committed; prune less, or raise the limit"
                raise CollapseError(f"{problem}, {times}; {allowed}. {remedy}")

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the passes over the texts."""
        yield worker.measuring(self.name, self.sizes)

    def on_host(self, worker: WorkerView) -> float:
        """Return the dense model's states of the texts."""
        return worker.remembered(sum(count * length for count, length in self.sizes))


@dataclass(frozen=True)
class Tasks(Stage):
    """Runs the tasks once, before the first shot."""

    name = "tasks"
    of_dense_model = True
    section: TasksSection
    model: ModelSection | None = None  # a teacher; None for the model of the job

    def __post_init__(self) -> None:
        """Check that the tasks can run.

        Raises:
            ValueError: the harness is not installed, or does not know a task.
        """
        check_tasks(self.section)

    def run(self, run: RunState, facts: Facts) -> None:
        """Measure the dense model."""
        run.report.dense["tasks"] = evaluate_tasks(
            run.cluster, self.model or run.model, self.section
        )

    def fingerprints(self) -> Mapping[str, Any]:
        """Return the tasks: scores before and after are of the same ones."""
        return {"tasks": self.section.model_dump(mode="json", exclude={"batch_size"})}
