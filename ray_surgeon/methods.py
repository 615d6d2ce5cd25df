"""What one shot does to the weights under each method, up to the evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ray_surgeon.cluster.messages import CostOptions, CostsReply, GroupOptions, GroupsReply, LinearSummary
from ray_surgeon.cluster.protocol import Cluster
from ray_surgeon.cluster.steps import collect_curvature, collect_terms, prune_layerwise, train_corrections
from ray_surgeon.job import Event, Job, StepMeter
from ray_surgeon.models.budgets import Budget
from ray_surgeon.surgery.groups import Allocation, GroupCosts, OutOfReachError, allocate_globally, allocate_uniformly
from ray_surgeon.surgery.threshold import (
    StructureCosts,
    Threshold,
    bucket_of,
    can_reach,
    cost_curve,
    cost_of_bits,
    smallest_enough,
    structured_threshold,
    units_to_remove,
)

Ended = Callable[..., Event]
"""(step, **facts) -> the event of a step that has ended"""


@dataclass(frozen=True)
class Pruned:
    """What a shot has removed.

    Attributes:
        linears: what is left of each.
        sparsity: removed fraction of the parameters.
        threshold: the global one; None if the method has none.
        calibration_loss: before this shot, in nats per token; None if no pass has measured it.
        record: more for the report.
    """

    linears: list[LinearSummary]
    sparsity: float
    threshold: float | None = None
    calibration_loss: float | None = None
    record: dict[str, Any] = field(default_factory=dict)


def prune_by_costs(job: Job, cluster: Cluster, meter: StepMeter, ended: Ended, shot: int) -> Generator[Event, None, Pruned]:
    """The LLM Surgeon and all that differs from it by options: curvature, costs, one threshold, update. Returns `Pruned`."""
    spec, target = job.spec, job.spec.pruning.targets[shot - 1]
    curvature, options = spec.curvature, job.cost_options
    seed = curvature.seed + shot * len(job.calibration) if curvature.fisher == "sampled" else None
    with meter.step("curvature"):
        with_gradient = spec.updates.first_order_step > 0
        loss = collect_curvature(cluster, job.calibration, curvature.kind, seed, with_gradient=with_gradient)
    yield ended("curvature", calibration_loss=loss, tokens_per_s=job.calibration.size / meter.seconds["curvature"])

    term_sizes = []
    if curvature.takes_power_passes:
        with meter.step("terms"):
            nearest = curvature.first_term == "nearest"
            terms, passes = curvature.num_kronecker_terms, curvature.num_power_passes
            sizes = collect_terms(cluster, job.calibration, terms, passes, seed, nearest=nearest)
        term_sizes = [float(np.median(list(by_linear.values()))) for by_linear in sizes]
        yield ended("terms", median_size_of_last=term_sizes[-1])

    with meter.step("costs"):
        replies: list[CostsReply] = cluster.run_all("costs", options)
        if spec.is_greedy:
            replies = _greedy_costs(cluster, options, replies, target)
    damping = [asdict(event) for reply in replies for event in reply.damping]
    clipping = [asdict(event) for reply in replies for event in reply.clipping]
    yield ended("costs", damping_raised=len(damping), **({"terms_clipped": len(clipping)} if curvature.num_kronecker_terms > 1 else {}))

    with meter.step("threshold"):
        threshold, curve = _threshold(cluster, options, replies, target)
    yield ended("threshold", threshold=threshold.value, sparsity=threshold.sparsity)

    with meter.step("update"):
        linears = _prune(cluster, threshold, job, options)
    sparsity = 1 - sum(s.num_kept for s in linears) / sum(s.num_rows * s.num_columns for s in linears)
    predicted = sum(linear.predicted_loss_increase or 0.0 for linear in linears)
    residuals = sorted(linear.residual for linear in linears)
    yield ended("update", predicted_loss_increase=predicted, max_residual=residuals[-1])
    record = {
        "predicted_loss_increase": predicted,
        "update_residual": {"median": residuals[len(residuals) // 2], "max": residuals[-1]},
        "damping_used": damping,
        "terms": {"median_size": term_sizes, "clipped": clipping},
        "cost_curve": _as_fractions(curve, replies),
    }
    if not options.by_element:
        record["shrinkable"] = _sum_over_shards(cluster, "shrinkable") / sum(s.num_rows * s.num_columns for s in linears)
    return Pruned(linears, sparsity, threshold.value, loss, record)


def prune_groups(job: Job, cluster: Cluster, meter: StepMeter, ended: Ended, shot: int) -> Generator[Event, None, Pruned]:
    """Coupled groups: curvature of their last linears, greedy costs, one allocation, exact updates. Returns `Pruned`."""
    curvature, budget = job.spec.curvature, job.known_budget
    options, goal = job.group_options(last=shot == job.spec.pruning.shots), job.goal(shot)
    seed = curvature.seed + shot * len(job.calibration) if curvature.fisher == "sampled" else None
    with meter.step("curvature"):
        step = job.spec.updates.first_order_step
        loss = collect_curvature(cluster, job.calibration, curvature.kind, seed, with_gradient=step > 0, readers_only=True)
        if curvature.takes_power_passes:
            collect_terms(cluster, job.calibration, 1, curvature.num_power_passes, seed, nearest=True)
    yield ended("curvature", calibration_loss=loss, tokens_per_s=job.calibration.size / meter.seconds["curvature"])

    with meter.step("costs"):
        replies = _climb(cluster, job, options, budget, goal)
    damping = [asdict(event) for reply in replies for event in reply.damping]
    yield ended("costs", damping_raised=len(damping))

    with meter.step("threshold"):
        allocation = _allocate(replies, job, budget, goal)
    num_parameters, going = sum(reply.num_parameters for reply in replies), allocation.counts
    num_kept = sum(reply.num_kept for reply in replies) - sum(going[c.reader] * c.num_parameters for r in replies for c in r.costs)
    left = [(c.kind, c.num_left - going[c.reader]) for reply in replies for c in reply.costs]
    sparsity, need = 1 - num_kept / num_parameters, budget.of(left)
    yield ended("threshold", groups=sum(going.values()), sparsity=sparsity, need=need, unit=budget.unit)

    with meter.step("update"):
        workers = cluster.run_all("prune_groups", options, allocation.counts, step)
    linears = [summary for worker in workers for summary in worker]
    predicted = sum(linear.predicted_loss_increase or 0.0 for linear in linears)
    yield ended("update", predicted_loss_increase=predicted)
    record = {
        "predicted_loss_increase": predicted,
        "damping_used": damping,
        "groups_removed": allocation.counts,
        "cost_curve": _as_fractions(_groups_curve(replies), replies),
        "budget": {"unit": budget.unit, "dense": budget.dense, "goal": goal, "need": need},
    }
    return Pruned(linears, sparsity, allocation.height, loss, record)


def prune_block_by_block(job: Job, cluster: Cluster, meter: StepMeter, ended: Ended, shot: int) -> Generator[Event, None, Pruned]:
    """SparseGPT and Wanda: every linear to the sparsity of the shot. Returns `Pruned`."""
    with meter.step("update"):
        linears = prune_layerwise(cluster, job.calibration, job.layerwise_options(job.spec.pruning.targets[shot - 1]))
    sparsity = 1 - sum(s.num_kept for s in linears) / sum(s.num_rows * s.num_columns for s in linears)
    yield ended("update", sparsity=sparsity)
    return Pruned(linears, sparsity, record={"damping_used": []})


def correct(job: Job, cluster: Cluster, meter: StepMeter, ended: Ended, shot: int) -> Generator[Event, None, list[float]]:
    """Train and absorb low-rank corrections, if the job wants them. Returns the loss of every step."""
    batches = job.correction_batches(shot)
    if not job.spec.correction.lora_rank:
        return []
    with meter.step("correction"):
        losses = train_corrections(cluster, job.calibration, batches, job.low_rank_options(shot)) if batches else []
    yield ended("correction", num_steps=len(losses), **({"first_loss": losses[0], "last_loss": losses[-1]} if losses else {}))
    return losses


Method = Callable[[Job, Cluster, StepMeter, Ended, int], Generator[Event, None, Pruned]]


def method_of(job: Job) -> Method:
    """Return what a shot of this job does."""
    if job.spec.pruning.method != "llm_surgeon":
        return prune_block_by_block
    return prune_groups if job.spec.pruning.structure == "groups" else prune_by_costs


def _prune(cluster: Cluster, threshold: Threshold, job: Job, options: CostOptions) -> list[LinearSummary]:
    return [summary for worker in cluster.run_all("prune", threshold.value, job.prune_options, options) for summary in worker]


def _structures(replies: list[CostsReply]) -> list[StructureCosts]:
    linears = sorted((linear for reply in replies for linear in reply.costs), key=lambda linear: linear.name)
    return [
        StructureCosts(c.name, c.num_parameters, c.num_rows, c.num_columns, torch.tensor(c.rows), torch.tensor(c.columns)) for c in linears
    ]


def _greedy_costs(cluster: Cluster, options: CostOptions, once: list[CostsReply], target_sparsity: float) -> list[CostsReply]:
    """Let every linear climb its greedy curve as high as the target needs, starting from twice the threshold of single costs."""
    limit, replies = 2 * structured_threshold(_structures(once), target_sparsity).value, once
    reached = False
    while not reached:
        replies = cluster.run_all("costs", replace(options, greedy_limit=limit))
        reached = can_reach(_structures(replies), target_sparsity)
        limit *= 4
    return replies


def _climb(cluster: Cluster, job: Job, options: GroupOptions, budget: Budget, goal: float) -> list[GroupsReply]:
    """Let every block climb its greedy curve as far as the target needs: somewhat farther than single costs say, and again if need be."""
    curvature = job.cost_options.curvature
    once: list[GroupsReply] = cluster.run_all("group_costs", options, curvature)
    first, factor = _allocate(once, job, budget, goal), 1.0
    counts = {cost.kind: first.counts[cost.reader] for reply in once for cost in reply.costs}
    while True:
        if options.uniform:
            needed = {kind: math.ceil(factor * 1.25 * n) + options.multiples.get(kind, 1) for kind, n in counts.items()}
            farther = replace(options, limit=-1.0, needed=needed)
        else:
            farther = replace(options, limit=2 * factor * (first.height or 0.0))
        replies: list[GroupsReply] = cluster.run_all("group_costs", farther, curvature)
        try:
            _allocate(replies, job, budget, goal)
        except OutOfReachError:
            factor *= 4
        else:
            return replies


def _allocate(replies: list[GroupsReply], job: Job, budget: Budget, goal: float) -> Allocation:
    costs = sorted((c for reply in replies for c in reply.costs), key=lambda c: c.reader)
    groups = [
        GroupCosts(c.reader, c.kind, torch.from_numpy(c.heights.copy()), c.num_left, c.allowed, budget.by_left[c.kind]) for c in costs
    ]
    missing, pruning = budget.of((c.kind, c.num_left) for c in costs) - goal, job.spec.pruning
    if pruning.allocation == "uniform":
        return allocate_uniformly(groups, missing)
    return allocate_globally(groups, missing, per_unit=pruning.rank_by == "cost_per_parameter")


Curve = list[tuple[float, float]]
"""see `cost_curve`"""


def _groups_curve(replies: list[GroupsReply]) -> Curve:
    readers = [c for reply in replies for c in reply.costs]
    heights = torch.cat([torch.from_numpy(c.heights.copy()) for c in readers])
    return cost_curve(heights, torch.cat([torch.full((len(c.heights),), c.num_parameters) for c in readers]))


def _as_fractions(curve: Curve, replies: Sequence[CostsReply | GroupsReply]) -> Curve:
    """Return a curve over the fraction of all parameters that is gone then, what earlier shots removed included."""
    num_parameters = sum(reply.num_parameters for reply in replies)
    num_gone = num_parameters - sum(reply.num_kept for reply in replies)
    return [(min(1.0, (num_gone + size) / num_parameters), cost) for size, cost in curve]


def _threshold(cluster: Cluster, options: CostOptions, replies: list[CostsReply], target_sparsity: float) -> tuple[Threshold, Curve]:
    if options.by_element:
        return _element_threshold(cluster, options, replies, target_sparsity)
    linears = _structures(replies)
    costs = torch.cat([side for c in linears for side in (c.rows, c.columns)])
    sizes = torch.cat([torch.full((len(side),), n) for c in linears for side, n in ((c.rows, c.num_columns), (c.columns, c.num_rows))])
    return _structured_threshold(cluster, linears, target_sparsity), cost_curve(costs, sizes)


def _structured_threshold(cluster: Cluster, costs: list[StructureCosts], target_sparsity: float) -> Threshold:
    """Find the smallest threshold that removes the target together with what is dead then; that is for the workers to count."""
    enough = structured_threshold(costs, target_sparsity)
    values = torch.cat([side.double() for linear in costs for side in (linear.rows, linear.columns)])
    values = torch.cat([torch.zeros(1, dtype=torch.float64), values[values <= enough.value]]).sort().values

    def num_removed(value: float) -> int:
        return enough.num_parameters - _sum_over_shards(cluster, "num_kept_at", value)

    wanted = math.ceil(target_sparsity * enough.num_parameters - 1e-6)
    value = smallest_enough(values, num_removed, wanted)
    return Threshold(value, num_removed(value), enough.num_parameters)


def _sum_over_shards(cluster: Cluster, method: str, *arguments: object) -> int:
    """Return the sum of what replica 0 of every shard answers."""
    numbers: list[int] = cluster.run_all(method, *arguments)
    return sum(number for number, index in zip(numbers, cluster.placement.workers, strict=True) if index.replica == 0)


def _element_threshold(
    cluster: Cluster, options: CostOptions, replies: list[CostsReply], target_sparsity: float
) -> tuple[Threshold, Curve]:
    """Find the exact k-th smallest cost by two rounds of counting; the costs stay where they are."""
    num_parameters = sum(reply.num_parameters for reply in replies)
    num_gone = num_parameters - sum(reply.num_kept for reply in replies)

    def counts(high: int | None) -> torch.Tensor:
        return torch.from_numpy(np.sum(cluster.run_all("cost_histogram", options, high), axis=0))

    upper = counts(None)
    found = upper.nonzero()[:, 0]
    curve = cost_curve(torch.tensor([cost_of_bits(int(high), 0) for high in found]), upper[found] * options.units.num_removed)
    num_units = units_to_remove(target_sparsity, num_parameters, num_gone, options.units.num_removed, int(upper.sum()))
    if num_units == 0:
        return Threshold(-1.0, num_gone, num_parameters), curve
    high, rest = bucket_of(upper, num_units)
    lower = counts(high)
    low, _ = bucket_of(lower, rest)
    removed = int(upper[:high].sum() + lower[: low + 1].sum()) * options.units.num_removed
    return Threshold(cost_of_bits(high, low), num_gone + removed, num_parameters), curve
