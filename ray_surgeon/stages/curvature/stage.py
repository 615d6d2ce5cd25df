"""The curvature pass of a shot: A and G of every linear, from the calibration text.

Of several dampings the one may be chosen with which removals cost least on windows held aside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import Any

import numpy as np

from ray_surgeon.maths.damping import A_CHOICES, G_CHOICES, choose_damping, cost_held_aside
from ray_surgeon.maths.kronecker import Damping, PackedFactors
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.plan.needs import StepPlan, WorkerView
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.stages.curvature.gather import gather_curvature, gather_terms
from ray_surgeon.stages.curvature.section import DampingSection, ExtendedKfacSection
from ray_surgeon.stages.prune.method import Method
from ray_surgeon.stages.stage import CalibrationText, Facts, RunState, Stage


class _HeldFactors(dict[str, PackedFactors]):
    """Linear -> its factors of the windows held aside, on a worker."""


def _keep_held_factors(worker: Worker, method: Method) -> None:
    """Keep the factors of the owned linears that are probed, of the windows held aside."""
    held = _HeldFactors()
    for name in _probed(worker.layout, method):
        if name in worker.shard.linears and worker.owns(name):
            factors = worker.shard.own_factors(name)
            held[name] = replace(factors, A=factors.A.copied(), G=factors.G.copied())
    worker.keep(held)


def _probed(layout: ModelLayout, method: Method) -> list[str]:
    """Return the linears on which dampings are tried.

    Of each role that is ranked, these are one a third and one two thirds through the model.
    """
    of_role: dict[str, list[str]] = {}
    for shape in layout.linears:
        if shape.sees_all_tokens and method.needs(shape) is not None:
            of_role.setdefault(shape.role, []).append(shape.name)
    two_each = [names[len(names) * third // 3] for names in of_role.values() for third in (1, 2)]
    return list(dict.fromkeys(two_each))


def _costs_held_aside(
    worker: Worker, method: Method, damping: Damping, share: float
) -> list[float]:
    """Return what removals in the owned probed linears cost by the factors held aside.

    See `cost_held_aside`.
    """
    prunes_rows = method.gathers is None
    costs = []
    for name, held in worker.kept(_HeldFactors).items():
        linear = replace(method.linear(worker, name), damping=damping)
        costs.append(cost_held_aside(linear, held, share, prunes_rows=prunes_rows))
    return costs


def _drop_held_factors(worker: Worker) -> None:
    """Keep the factors of the windows held aside no longer."""
    worker.drop(_HeldFactors)


def _choose_damping(cluster: Cluster, method: Method, shot: int) -> tuple[Method, dict[str, Any]]:
    """Return a method with the damping that costs least, and what the report says of it."""
    curvature = method.used_curvature
    has_G = curvature.gathers == "both"
    share = method.section.removed_in(shot)

    def cost_of(a: float, g: float) -> list[float]:
        damping = Damping(a, g if has_G else 0.0, curvature.as_damping.max)
        of_workers = cluster.run_all(_costs_held_aside, method, damping, share)
        return [cost for of_worker in of_workers for cost in of_worker]

    of_G = G_CHOICES if has_G else (DampingSection().g,)
    a, g, tried = choose_damping(cost_of, A_CHOICES, of_G)
    cluster.run_all(_drop_held_factors)
    changed = curvature.model_copy(update={"damping": DampingSection(a=a, g=g)})
    costs = [{"a": x, "g": y, "cost": z if isfinite(z) else None} for x, y, z in tried]
    return replace(method, curvature=changed), {"a": a, "g": g, "tried": costs}


def calibrate(
    method: Method, cluster: Cluster, text: CalibrationText, shot: int, *, remembers: bool
) -> tuple[Method, dict[str, Any]]:
    """Gather the curvature of the present weights.

    Args:
        method: of pruning.
        cluster: with loaded workers.
        text: the calibration text.
        shot: number of the shot.
        remembers: see `gather_curvature`.

    Returns:
        The method with the damping that was chosen, if it was; and what the report says.
        `calibration_loss` is the mean NLL in nats per predicted token.
    """
    curvature = method.used_curvature
    sequences = text.tokens
    seed = curvature.label_seed(shot, len(sequences))
    gather = partial(
        gather_curvature, cluster, kind=curvature.kind, label_seed=seed, only=method.gathers
    )
    has_held = curvature.chooses_damping and len(text.held) >= cluster.placement.num_replicas
    if has_held:
        gather(text.held, counts=text.held_counts)
        cluster.run_all(_keep_held_factors, method)
    n = curvature.sequences_backward
    record: dict[str, Any] = {}
    with method.around_pass(cluster, text):
        loss = gather(
            sequences, num_backward=n, beside=method.beside, remembers=remembers, counts=text.counts
        )
        if has_held:
            method, record["damping_chosen"] = _choose_damping(cluster, method, shot)
        if isinstance(curvature, ExtendedKfacSection):
            sizes = gather_terms(cluster, sequences, curvature, seed)
            record["median_size_of_terms"] = [float(np.median([*term.values()])) for term in sizes]
    record["calibration_loss"] = loss
    return method, record


@dataclass(frozen=True)
class Curvature(Stage):
    """Workers gather the curvature of the present weights."""

    name = "curvature"
    method: Method
    # whether the first pass keeps the dense model's states of the calibration text
    remembers: bool

    def run(self, run: RunState, facts: Facts) -> None:
        """Gather, and choose the damping if the job leaves it open."""
        remembers = self.remembers and run.shot == 1
        method = run.kept(Method)
        method, record = calibrate(method, run.cluster, run.text, run.shot, remembers=remembers)
        run.keep(method, of_shot=True)
        run.record |= record
        facts["calibration_loss"] = record["calibration_loss"]
        facts["num_tokens"] = run.text.tokens.size
        if chosen := record.get("damping_chosen"):
            facts["damping"] = f"{chosen['a']:g}/{chosen['g']:g}"

    # For the plan

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the passes over the calibration text."""
        curvature = self.method.used_curvature
        stores = worker.stores
        waves = worker.num_waves
        of_all = curvature.sequences_backward or worker.num_sequences
        # of the replica that has most of them
        backward = 0 if curvature.gathers == "A" else -(-of_all // worker.num_replicas)
        # the changes that removals would make for a token
        num_changes = self.method.beside.num_changes(worker.shapes.layout)
        forward = (1 + (num_changes > 0)) * 2 * worker.active + worker.all_factors / 2
        head = worker.head_flops * (backward or worker.sequences)
        runs_again = stores.activations == "recompute"
        further = (1 + runs_again) * 2 * worker.active + 2 * worker.head_flops
        of_pass = worker.sequences * forward + head + backward * further
        num_passes = 1
        if isinstance(curvature, ExtendedKfacSection):
            num_passes += (curvature.num_kronecker_terms - 1) * curvature.num_power_iterations
        loads = (waves + -(-backward // worker.wave)) * worker.all_blocks
        weights = worker.moved(stores.weights, loads)
        factors = worker.moved(stores.factors, 2 * waves * worker.all_factors)
        on_device = worker.all_factors if stores.factors == "device" else worker.largest_factors
        changes = num_changes * worker.hidden_size
        passing = worker.passing(more_kept=4 * changes, more_in_a_moment=12 * changes)
        device = worker.weights + on_device + passing
        factors_on_host = worker.all_factors * (stores.factors == "host" and worker.device_is_host)
        host = worker.host + factors_on_host + worker.travelling(worker.sequence_length)
        flops = num_passes * worker.sequence_length * of_pass
        pairs = zip(weights, factors, strict=True)
        of_host, of_disk = (num_passes * sum(pair) for pair in pairs)
        bubble = (waves + worker.num_shards - 1) / waves
        yield StepPlan(self.name, device, host, flops, 0.0, of_host, of_disk, bubble)

    def beside(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return further Kronecker terms, which are not packed."""
        curvature = self.method.used_curvature
        if not isinstance(curvature, ExtendedKfacSection):
            return ()
        further = curvature.num_kronecker_terms - 1
        squares = sum(linear.num_rows**2 + linear.num_columns**2 for linear in worker.linears)
        device = (further + 1.5) * 4.0 * squares
        return [StepPlan(name, device, 0.0) for name in (self.name, "costs", "update")]
