"""The stages of a pruning method: costs, the global threshold, and the update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ray_surgeon.plan.linear_needs import LinearNeeds
from ray_surgeon.plan.needs import StepPlan, WorkerView
from ray_surgeon.runtime.worker import LinearSummary
from ray_surgeon.stages.calibration import held_measure
from ray_surgeon.stages.prune.method import Choice, Method, Scores
from ray_surgeon.stages.stage import Facts, RunState, Stage


@dataclass(frozen=True)
class Present:
    """The method of a run; kept of a shot, the method with what was chosen in it."""

    method: Method


def needs_of(method: Method, worker: WorkerView) -> list[LinearNeeds]:
    """Return what a method needs for each linear of a worker that it ranks or updates."""
    all_needs = (method.needs(linear) for linear in worker.linears)
    return [needs for needs in all_needs if needs is not None]


@dataclass(frozen=True)
class Costs(Stage):
    """Workers take the costs of everything that may be pruned."""

    name: ClassVar[str] = "costs"
    method: Method

    def run(self, run: RunState, facts: Facts) -> None:
        """Take the costs."""
        scores = run.kept(Present).method.score(run.cluster, run.shot)
        run.keep(scores, of_shot=True)
        facts["damping_raised"] = len(scores.raised_damping)

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the costs, linear by linear."""
        needs = needs_of(self.method, worker)
        sizes = [of_linear.costs_bytes for of_linear in needs]
        flops = [of_linear.costs_flops for of_linear in needs]
        kept = sum(of_linear.kept_bytes for of_linear in needs)
        yield worker.linear_by_linear(self.name, sizes, flops, kept)


@dataclass(frozen=True)
class Threshold(Stage):
    """The coordinator chooses what to prune."""

    name: ClassVar[str] = "threshold"

    def run(self, run: RunState, facts: Facts) -> None:
        """Choose, and may ask the workers again."""
        choice = run.kept(Present).method.choose(run.cluster, run.kept(Scores), run.shot)
        run.keep(choice, of_shot=True)
        facts |= choice.facts


@dataclass(frozen=True)
class Update(Stage):
    """Workers prune, and update what stays."""

    name: ClassVar[str] = "update"
    method: Method

    def run(self, run: RunState, facts: Facts) -> None:
        """Prune, and measure what that does to the windows held aside."""
        method = run.kept(Present).method
        cluster = run.cluster
        choice = run.find(Choice) or Choice(None, {})
        linears, record = method.apply(cluster, run.text.tokens, choice, run.shot)
        run.linears = method.of_loss(linears)
        scores = run.find(Scores)
        if scores is not None:
            run.record |= {**_record(run.linears, scores), **choice.record}
        run.record |= record
        facts["sparsity"] = run.sparsity
        predicted = run.record.get("predicted_loss_increase")
        if predicted is not None:
            facts["predicted_loss_increase"] = predicted
        if len(run.text.held) and method.has_costs:
            divergence = held_measure(cluster, run.text)
            run.record["divergence_held_aside"] = divergence
            facts["divergence held aside"] = divergence

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the update, linear by linear or block by block."""
        needs = needs_of(self.method, worker)
        sizes = [of_linear.update_bytes for of_linear in needs]
        flops = [of_linear.update_flops for of_linear in needs]
        if self.method.has_costs:
            kept = sum(of_linear.kept_bytes for of_linear in needs)
            yield worker.linear_by_linear(self.name, sizes, flops, kept)
        else:
            yield worker.block_by_block(self.name, list(zip(sizes, flops, strict=True)))


def _record(linears: Sequence[LinearSummary], scores: Scores[Any]) -> dict[str, Any]:
    """Return what the report says of a shot with costs.

    The loss increase that the quadratic model predicts is in nats per token; None if it predicts
    none.
    """
    predicted = [linear.predicted for linear in linears if linear.predicted is not None]
    residuals = sorted(linear.residual for linear in linears)
    return {
        "predicted_loss_increase": sum(predicted) if predicted else None,
        "update_residual": {"median": residuals[len(residuals) // 2], "max": residuals[-1]},
        "damping_used": [asdict(event) for event in scores.raised_damping],
        "terms_clipped": [asdict(event) for event in scores.clipping],
    }
