"""What the models are measured on: texts, after every shot, and tasks.

Tasks of the dense model, that is; those of exports are measured with each export.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_surgeon.export.tasks import check_tasks, evaluate_tasks
from ray_surgeon.run_state import HELD, Facts, RunState, Text
from ray_surgeon.runtime.passes import measure, remember
from ray_surgeon.spec.evaluation import TasksSection
from ray_surgeon.spec.sections import ModelSection


class CollapseError(RuntimeError):
    """The model is worse than the spec allows."""


def measure_dense_model(run: RunState, further: Mapping[str, Text], facts: Facts) -> None:
    """Measure the dense model, and let the last shards keep its states of all that is compared.

    Args:
        run: before the first shot.
        further: texts beside those of the evaluation on which later weights are compared with the
            dense model, by name.
        facts: of the step.
    """
    perplexity = {name: remember(run.cluster, name, text) for name, text in run.texts.items()}
    for name, value in perplexity.items():
        facts[f"perplexity {name}"] = value
    run.report.dense["perplexity"] = perplexity
    for name, (tokens, counts) in further.items():
        remember(run.cluster, name, tokens, counts)
    if len(run.text.held):
        remember(run.cluster, HELD, run.text.held, run.text.held_counts)
        facts["windows held aside"] = len(run.text.held)


@dataclass(frozen=True)
class Evaluation:
    """Measures the pruned model on texts."""

    stop_above: float | None  # times the dense model's perplexity; None for no limit

    def measure(self, run: RunState, facts: Facts) -> None:
        """Measure every text."""
        facts["sparsity"] = run.sparsity
        measured = {name: measure(run.cluster, name, text) for name, text in run.texts.items()}
        run.record["perplexity"] = {name: found.perplexity for name, found in measured.items()}
        run.record["divergence"] = {name: found.divergence for name, found in measured.items()}
        for what in ("perplexity", "divergence"):
            for name, value in run.record[what].items():
                facts[f"{what} {name}"] = value

    def check_limit(self, run: RunState) -> None:
        """End the run if the model is too much worse than the dense one.

        Raises:
            CollapseError: a perplexity is above the limit.
        """
        limit = self.stop_above
        if limit is None:
            return
        for text, value in run.record["perplexity"].items():
            dense = run.report.dense["perplexity"][text]
            if not value <= limit * dense:
                raise CollapseError(
                    f"after shot {run.shot} the perplexity on {text} is {value:.4g}, "
                    f"{value / dense:.3g} times the dense model's; evaluation.stop_above allows "
                    f"{limit:g}. The shots before are committed; prune less, or raise the limit"
                )


@dataclass(frozen=True)
class Tasks:
    """Runs the tasks once, before the first shot."""

    section: TasksSection
    model: ModelSection | None = None  # a teacher; None for the model of the job

    def __post_init__(self) -> None:
        """Check that the tasks can run.

        Raises:
            ValueError: the harness is not installed, or does not know a task.
        """
        check_tasks(self.section)

    def measure_dense_model(self, run: RunState) -> None:
        """Run the tasks on the dense model."""
        run.report.dense["tasks"] = evaluate_tasks(
            run.cluster, self.model or run.model, self.section
        )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The tasks: scores before and after are of the same ones."""
        return self.section.model_dump(mode="json", exclude={"batch_size"})
