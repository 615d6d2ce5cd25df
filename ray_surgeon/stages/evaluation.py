"""Perplexity on the evaluation texts, and the divergence from the dense model, after every shot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ray_surgeon.plan.needs import StepPlan, WorkerView
from ray_surgeon.runtime.passes import Measured, measure, remember
from ray_surgeon.stages.calibration import HELD
from ray_surgeon.stages.stage import Facts, RunState, Stage


class CollapseError(RuntimeError):
    """The model is worse than the spec allows."""


class Measures(dict[str, Measured]):
    """Evaluation text -> what was measured on it after a shot."""


@dataclass(frozen=True)
class DenseEvaluation(Stage):
    """Measures the dense model, and keeps its states of all that is compared with it later."""

    name = "evaluation"
    sizes: Sequence[tuple[int, int]]  # number and length of the windows of each text

    def is_due(self, run: RunState) -> bool:
        """Whether the workers have the dense model."""
        return not run.resumes

    def run(self, run: RunState, facts: Facts) -> None:
        """Measure, and let the last shards keep the dense model's states."""
        perplexity = {name: remember(run.cluster, name, text) for name, text in run.texts.items()}
        facts |= {f"perplexity {name}": value for name, value in perplexity.items()}
        run.report.dense["perplexity"] = perplexity
        for stage in run.stages:
            for name, text in stage.texts_to_remember(run).items():
                remember(run.cluster, name, text.windows, text.counts)
        if len(run.text.held):
            remember(run.cluster, HELD, run.text.held, run.text.held_counts)
            facts["windows held aside"] = len(run.text.held)

    def on_host(self, worker: WorkerView) -> float:
        """Return the dense model's states of the texts."""
        return worker.remembered(sum(count * length for count, length in self.sizes))


@dataclass(frozen=True)
class Evaluation(Stage):
    """Measures the pruned model."""

    name = "evaluation"
    sizes: Sequence[tuple[int, int]]  # number and length of the windows of each text
    stop_above: float | None  # times the dense model's perplexity; None for no limit

    def run(self, run: RunState, facts: Facts) -> None:
        """Measure every text."""
        facts["sparsity"] = run.sparsity
        measures = Measures()
        for name, windows in run.texts.items():
            measures[name] = measure(run.cluster, name, windows)
        facts |= {f"perplexity {name}": value.perplexity for name, value in measures.items()}
        facts |= {f"divergence {name}": value.divergence for name, value in measures.items()}
        run.keep(measures, of_shot=True)

    def ended(self, run: RunState) -> None:
        """End the run if the model is too much worse.

        Raises:
            CollapseError: a perplexity is above the limit.
        """
        perplexity: Mapping[str, float] = run.report.dense["perplexity"]
        check_for_collapse(run.kept(Measures), perplexity, self.stop_above, run.shot)

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the passes over the texts."""
        yield worker.measuring(self.name, self.sizes)


def check_for_collapse(
    after: Mapping[str, Measured], before: Mapping[str, float], limit: float | None, shot: int
) -> None:
    """End the run if perplexity on a text is above its limit.

    Args:
        after: text -> what was measured.
        before: text -> perplexity of the dense model.
        limit: times that perplexity; None for no limit.
        shot: its number.

    Raises:
        CollapseError: it is.
    """
    if limit is None:
        return
    for text, measured in after.items():
        value = measured.perplexity
        if not value <= limit * before[text]:
            raise CollapseError(
                f"after shot {shot} the perplexity on {text} is {value:.4g}, "
                f"{value / before[text]:.3g} times the dense model's; evaluation.stop_above allows "
                f"{limit:g}. The shots before are committed; prune less, or raise "
                "evaluation.stop_above"
            )
