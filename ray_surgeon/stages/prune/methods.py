"""The method of a job for a model, or why it cannot do what is asked."""

from __future__ import annotations

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
from ray_surgeon.spec.targets import FlopsTarget, LatencyTarget, ParametersTarget
from ray_surgeon.stages.curvature.section import AnyCurvature
from ray_surgeon.stages.prune.experts import problems_of_mixture
from ray_surgeon.stages.prune.groups import Groups
from ray_surgeon.stages.prune.groups_section import CoupledSection
from ray_surgeon.stages.prune.method import Method
from ray_surgeon.stages.prune.section import METHODS, PruningSection


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
