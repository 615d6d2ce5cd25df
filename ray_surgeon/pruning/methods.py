"""The method of a job, and the pruning of a shot."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from ray_surgeon.config.curvature import AnyCurvature
from ray_surgeon.config.groups import (
    CoupledSection,
    problems_of_mixture,
)
from ray_surgeon.config.pruning import (
    ElementsSection,
    PatternSection,
    PruningSection,
    RowsColumnsSection,
)
from ray_surgeon.config.schedule import BytesTarget, FlopsTarget, TimedTarget
from ray_surgeon.errors import ConfigError
from ray_surgeon.models import budgets
from ray_surgeon.models.budgets import Budget
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import kv_heads_left
from ray_surgeon.pruning.coupled_groups import Groups
from ray_surgeon.pruning.method import Choice, Method, NoPruning, Scores
from ray_surgeon.run_state import Facts, RunState, held_measure


def method_for(
    pruning: PruningSection | None,
    curvature: AnyCurvature | None,
    layout: ModelLayout,
    dtype: str,
) -> Method:
    """Return the method of a job for a model.

    Args:
        pruning: section of the job spec; None for a job without pruning.
        curvature: section of the job spec; None for methods that gather their own.
        layout: layout of the model.
        dtype: dtype of the model's weights.

    Raises:
        ValueError: the method cannot prune this model as requested.
    """
    if pruning is None:
        return NoPruning()
    problem = next(problems_of_mixture(layout, pruning, curvature), None)
    if problem is not None:
        raise problem
    if isinstance(pruning, CoupledSection):
        return _groups(pruning, curvature, layout, dtype)
    if isinstance(pruning, PatternSection):
        _check_pattern(pruning, layout)
    if isinstance(pruning, RowsColumnsSection):
        from ray_surgeon.pruning.rows_columns import RowsColumns

        return RowsColumns(pruning, curvature)
    if isinstance(pruning, ElementsSection):
        from ray_surgeon.pruning.elements import Elements

        return Elements(pruning, curvature)
    from ray_surgeon.pruning.baselines.layerwise import Layerwise

    return Layerwise(pruning, curvature)


def _check_pattern(pruning: PatternSection, layout: ModelLayout) -> None:
    m = pruning.units.m
    for shape in layout.linears:
        num_inputs = shape.num_columns - shape.has_bias
        if num_inputs % m:
            raise ConfigError(
                field="pruning.n_m",
                found=f"{shape.name} has {num_inputs} inputs, not a multiple of {m}",
                remedy="choose another M",
            )
    most = pruning.reach(layout)
    if pruning.target_sparsity > most:
        raise ConfigError(
            field="pruning.target_sparsity",
            found=(
                f"{pruning.target_sparsity:g}, but {most:.4g} is all that "
                f"{pruning.method} can take from this model, because biases count and "
                "stay"
            ),
            remedy="lower it",
        )


def _groups(
    pruning: CoupledSection,
    curvature: AnyCurvature | None,
    layout: ModelLayout,
    dtype: str,
) -> Groups:
    """Return the method of coupled groups; see `method_for`."""
    _check_devices(pruning, layout)
    _check_kinds(pruning, layout)
    fewest = budgets.fewest_left(
        layout,
        pruning.fewest_groups,
        pruning.tensor_parallel,
        uniform=pruning.uniform,
    )
    consumers = set[str]()
    for groups in layout.group_sets:
        if groups.kind in pruning.groups:
            consumers.add(layout.shapes[groups.consumer].role)
    return Groups(
        section=pruning,
        curvature=curvature,
        budget=_budget(layout, pruning, dtype),
        fewest=fewest,
        consumers=frozenset(consumers),
    )


def _check_devices(pruning: CoupledSection, layout: ModelLayout) -> None:
    heads = layout.heads
    devices = pruning.tensor_parallel
    if heads.num_kv not in kv_heads_left(layout, devices, uniform=pruning.uniform):
        raise ConfigError(
            field="pruning.tensor_parallel",
            found=f"{devices}",
            remedy=(
                f"give a divisor of the dense model's {heads.num_query} query heads "
                f"and {heads.num_kv} KV heads"
            ),
        )
    for groups in layout.group_sets:
        num_groups = len(groups.columns)
        if groups.kind != "attention" and num_groups % devices:
            raise ConfigError(
                field="pruning.tensor_parallel",
                found=f"{devices}, but {groups.consumer} has {num_groups} channels",
                remedy="give a divisor",
            )


def _check_kinds(pruning: CoupledSection, layout: ModelLayout) -> None:
    missing = [kind for kind in pruning.narrow_kinds if kind not in layout.kinds]
    if missing:
        raise ConfigError(
            field="pruning.groups",
            found=(
                f"{', '.join(missing)}, but {layout.config.model_type} has "
                f"{', '.join(layout.kinds)} that can be pruned here"
            ),
            remedy="name some of these",
        )
    if pruning.layer_kinds and not layout.family.has_attention:
        raise ConfigError(
            field="pruning.groups",
            found=(
                f"{', '.join(pruning.layer_kinds)}, but of {layout.config.model_type} only the "
                "channels of feed-forward layers are known"
            ),
            remedy="name ffn",
        )
    if pruning.layer_kinds and layout.mixers:
        mixers = ", ".join(sorted(set(layout.mixers.values())))
        raise ConfigError(
            field="pruning.groups",
            found=(
                f"{', '.join(pruning.layer_kinds)}, but some blocks of "
                f"{layout.config.model_type} have {mixers} in place of an attention, which stays"
            ),
            remedy=f"name some of {', '.join(layout.kinds)}",
        )
    norms_come_before = getattr(layout.config, "do_layer_norm_before", True)
    if pruning.layer_kinds and not norms_come_before:
        raise ConfigError(
            field="pruning.groups",
            found=(
                "norms come after what layers add (do_layer_norm_before false), so no layer can go"
            ),
            remedy="name ffn or attention",
        )


def _budget(layout: ModelLayout, pruning: CoupledSection, dtype: str) -> Budget:
    """Return the budget that the target of the section is measured in."""
    target = pruning.target
    if isinstance(target, TimedTarget):
        from ray_surgeon.pruning.seconds_table import budget_in

        budget = budget_in(target.table, layout, target)
        for kind in pruning.narrow_kinds:
            if not budget.size(kind):
                raise ConfigError(
                    field="pruning.groups",
                    found=f"by the seconds in {target.table}, no {kind} save anything",
                    remedy=f"leave {kind} out, or measure again",
                )
        return budget
    if isinstance(target, FlopsTarget):
        return budgets.flops_budget(layout, target.prompt_length)
    if isinstance(target, BytesTarget):
        return budgets.bytes_budget(layout, getattr(torch, dtype).itemsize)
    if target:
        return budgets.parameters_budget(layout)
    return budgets.linears_budget(layout)


def apply_choice(
    run: RunState,
    method: Method,
    scores: Scores[Any] | None,
    choice: Choice,
    facts: Facts,
) -> None:
    """Let workers prune and update, and measure the result on the windows held aside.

    Args:
        run: run in a shot.
        method: the method of pruning.
        scores: scores of the shot; None for a method without costs.
        choice: what to prune.
        facts: facts of the step; new facts are added.
    """
    linears, record = method.apply(run.cluster, run.text.tokens, choice, run.shot)
    run.linears = method.of_loss(linears)
    run.record.update(record)
    facts["sparsity"] = run.sparsity
    if scores is None:
        return
    # loss increases by the quadratic model, in nats per token
    predicted = list[float]()
    for linear in run.linears:
        if linear.predicted is not None:
            predicted.append(linear.predicted)
    residuals = sorted(linear.residual for linear in run.linears)
    run.record["predicted_loss_increase"] = None
    run.record["update_residual"] = {
        "median": residuals[len(residuals) // 2],
        "max": residuals[-1],
    }
    run.record["damping_used"] = [asdict(event) for event in scores.raised_damping]
    run.record["terms_clipped"] = [asdict(event) for event in scores.clipping]
    if predicted:
        run.record["predicted_loss_increase"] = sum(predicted)
        facts["predicted_loss_increase"] = sum(predicted)
    if len(run.text.held):
        divergence = held_measure(run.cluster, run.text)
        run.record["divergence_held_aside"] = divergence
        facts["divergence held aside"] = divergence
