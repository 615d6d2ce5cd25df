"""The stages of pruning: costs, threshold and update; and the method that a job asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from ray_surgeon.maths.element_pruning import ElementUnits
from ray_surgeon.models.budgets import (
    Budget,
    bytes_budget,
    fewest_left,
    flops_budget,
    linears_budget,
    parameters_budget,
)
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import kv_heads_left
from ray_surgeon.plan.needs import StepPlan, WorkerView
from ray_surgeon.plan.work import LinearNeeds
from ray_surgeon.runtime.worker import LinearSummary
from ray_surgeon.spec.targets import FlopsTarget, LatencyTarget, ParametersTarget
from ray_surgeon.stages.calibration import held_measure
from ray_surgeon.stages.curvature.section import AnyCurvature
from ray_surgeon.stages.prune.experts import problems_of_mixture
from ray_surgeon.stages.prune.groups import Groups
from ray_surgeon.stages.prune.groups_section import CoupledSection
from ray_surgeon.stages.prune.method import Choice, Method, Scores
from ray_surgeon.stages.prune.section import METHODS, PruningSection
from ray_surgeon.stages.stage import Facts, RunState, Stage


def method_for(
    pruning: PruningSection, curvature: AnyCurvature | None, layout: ModelLayout, dtype: str
) -> Method:
    """Return the method of a job for a model.

    Args:
        pruning: section of the job spec.
        curvature: likewise; None for methods that gather their own.
        layout: of the model.
        dtype: of its weights.

    Raises:
        ValueError: the method cannot do what is asked to this model.
    """
    for problem in problems_of_mixture(layout, pruning, curvature) if layout.is_mixture else ():
        raise ValueError(problem)
    if isinstance(pruning, CoupledSection):
        return _groups(pruning, curvature, layout, dtype)
    m = getattr(pruning, "units", ElementUnits()).m
    for shape in layout.linears:
        num_inputs = shape.num_columns - shape.has_bias
        if num_inputs % m:
            raise ValueError(
                f"pruning.n_m: {shape.name} has {num_inputs} inputs, not a multiple of {m}; choose "
                "another M"
            )
    method: Method = METHODS[type(pruning)](pruning, curvature)
    if pruning.target_sparsity > (most := method.reach(layout)):
        raise ValueError(
            f"pruning.target_sparsity: {pruning.target_sparsity:g}, but {most:.4g} is all that "
            f"{pruning.method} can take from this model, because biases count and stay; lower it"
        )
    return method


def _groups(
    pruning: CoupledSection, curvature: AnyCurvature | None, layout: ModelLayout, dtype: str
) -> Groups:
    """Return the method of coupled groups; see `method_for`."""
    heads = layout.heads
    devices = pruning.tensor_parallel
    uniform = pruning.uniform
    if heads.num_kv not in kv_heads_left(layout, devices, uniform=uniform):
        raise ValueError(
            f"pruning.tensor_parallel: {devices}, but no engine splits the dense model's "
            f"{heads.num_query} query heads and {heads.num_kv} KV heads so; give a number that "
            "divides them"
        )
    for groups in layout.group_sets:
        if groups.kind != "attention" and len(groups.columns) % devices:
            raise ValueError(
                f"pruning.tensor_parallel: {devices}, but {groups.consumer} has "
                f"{len(groups.columns)} channels; give a divisor"
            )
    _check_kinds(layout, pruning)
    fewest = fewest_left(layout, pruning.groups, pruning.fewest_groups, devices, uniform=uniform)
    roles = {groups.kind: layout.shapes[groups.consumer].role for groups in layout.group_sets}
    consumers = frozenset(roles[kind] for kind in pruning.groups if kind in roles)
    return Groups(pruning, curvature, _budget(layout, pruning, dtype), fewest, consumers)


def _check_kinds(layout: ModelLayout, pruning: CoupledSection) -> None:
    missing = [kind for kind in pruning.groups if kind not in layout.kinds]
    if missing:
        raise ValueError(
            f"pruning.groups: {', '.join(missing)}, but {layout.config.model_type} has "
            f"{', '.join(layout.kinds)} that can be pruned here; name some of these"
        )


def _budget(layout: ModelLayout, pruning: CoupledSection, dtype: str) -> Budget | None:
    """Return what groups save from; None if it must be measured first."""
    target = pruning.target
    if target is None:
        return linears_budget(layout)
    if isinstance(target, LatencyTarget):
        return None
    if isinstance(target, FlopsTarget):
        return flops_budget(layout, target.prompt_length)
    if isinstance(target, ParametersTarget):
        return parameters_budget(layout)
    return bytes_budget(layout, getattr(torch, dtype).itemsize)


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
