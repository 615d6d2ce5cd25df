"""The curvature pass of a shot: A and G of every linear, from the calibration text.

The damping may be chosen from several: the one whose removals cost least on windows held aside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import isfinite
from typing import Any

import numpy as np

from ray_surgeon.factors.collector import WantedFactors, gather_curvature, gather_terms
from ray_surgeon.maths.kronecker import PackedFactors
from ray_surgeon.maths.packed import PackedSymmetric
from ray_surgeon.maths.structured import (
    A_CHOICES,
    G_CHOICES,
    choose_damping,
    cost_held_aside,
)
from ray_surgeon.plan.counts import Counted, StepPlan
from ray_surgeon.plan.estimate import WorkerView
from ray_surgeon.pruning.method import Method
from ray_surgeon.run_state import CalibrationText, Facts, RunState, Stage
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.spec.curvature import DampingSection, ExtendedKfacSection


def _keep_held_factors(worker: Worker, method: Method) -> None:
    """Keep copies of the factors of some owned linears; dampings are tried on these.

    In every role that is ranked, they are the linears one and two thirds through the model.
    """
    names_of_roles: dict[str, list[str]] = {}
    for shape in worker.layout.linears:
        if shape.sees_all_tokens and method.needs(shape) is not None:
            names_of_roles.setdefault(shape.role, []).append(shape.name)
    held = dict[str, PackedFactors]()
    for names in names_of_roles.values():
        for third in (1, 2):
            name = names[len(names) * third // 3]
            if name not in worker.shard.linears or not worker.owns(name):
                continue
            factors = worker.shard.own_factors(name)
            A = replace(factors.A, flat=factors.A.flat.clone())
            G = replace(factors.G, flat=factors.G.flat.clone())
            held[name] = replace(factors, A=A, G=G)
    worker.state.held_factors = held


def _costs_held_aside(worker: Worker, method: Method, share: float) -> list[float]:
    """Return the costs of removals in these linears; see `cost_held_aside`."""
    prunes_rows = method.gathers is None
    costs = list[float]()
    for name, held in worker.state.held_factors.items():
        linear = method.linear(worker, name)
        costs.append(cost_held_aside(linear, held, share, prunes_rows))
    return costs


def _drop_held_factors(worker: Worker) -> None:
    worker.state.held_factors = {}


def _choose_damping(
    cluster: Cluster,
    method: Method,
    shot: int,
) -> tuple[Method, dict[str, Any]]:
    """Return a method with the damping that costs least, and its entry in the report."""
    curvature = method.used_curvature
    share = method.section.removed_in(shot)

    def damped(a: float, g: float) -> Method:
        damping = {"damping": DampingSection(a=a, g=g)}
        return replace(method, curvature=curvature.model_copy(update=damping))

    def costs_with(a: float, g: float) -> list[float]:
        of_workers = cluster.run_all(_costs_held_aside, damped(a, g), share)
        return list(chain.from_iterable(of_workers))

    choices_of_G: Sequence[float] = G_CHOICES
    if curvature.gathers != "both":
        choices_of_G = (DampingSection().g,)
    a, g, tried = choose_damping(costs_with, A_CHOICES, choices_of_G)
    cluster.run_all(_drop_held_factors)
    costs = list[dict[str, float | None]]()
    for tried_a, tried_g, cost in tried:
        costs.append({"a": tried_a, "g": tried_g, "cost": cost if isfinite(cost) else None})
    return damped(a, g), {"a": a, "g": g, "tried": costs}


def calibrate(
    method: Method, cluster: Cluster, text: CalibrationText, shot: int, *, remembers: bool
) -> tuple[Method, dict[str, Any]]:
    """Gather the curvature of the present weights.

    Args:
        method: the method of pruning.
        cluster: with loaded workers.
        text: the calibration text.
        shot: number of the shot.
        remembers: see `gather_curvature`.

    Returns:
        The method, with the chosen damping if there was a choice; and entries for the report.
        `calibration_loss` is the mean NLL in nats per predicted token.
    """
    curvature = method.used_curvature
    seed = curvature.label_seed(shot, len(text.tokens))
    wanted = WantedFactors(
        kind=curvature.kind,
        label_seed=seed,
        only=method.gathers,
        num_backward=curvature.sequences_backward,
    )
    num_replicas = cluster.placement.num_replicas
    has_held = curvature.chooses_damping and len(text.held) >= num_replicas
    if has_held:
        on_held = replace(wanted, num_backward=None)
        gather_curvature(cluster, text.held, on_held, counts=text.held_counts)
        cluster.run_all(_keep_held_factors, method)
    record: dict[str, Any] = {}
    with method.around_pass(cluster, text):
        loss = gather_curvature(
            cluster,
            text.tokens,
            wanted,
            counts=text.counts,
            beside=method.beside,
            remembers=remembers,
        )
        if has_held:
            method, record["damping_chosen"] = _choose_damping(cluster, method, shot)
        if isinstance(curvature, ExtendedKfacSection):
            sizes = gather_terms(cluster, text.tokens, curvature, seed)
            medians = [float(np.median(list(term.values()))) for term in sizes]
            record["median_size_of_terms"] = medians
    record["calibration_loss"] = loss
    return method, record


_CHANGES = 56
_REROUTED = 11 / 3
"""Launches for what removals of whole parts of a mixture would change: of a block, and more of each
of its linears.
"""


@dataclass(frozen=True)
class Curvature(Stage):
    """Workers gather the curvature of the present weights."""

    name = "curvature"
    method: Method
    # whether the first pass keeps the dense model's states of the calibration text
    remembers: bool

    def collect(self, run: RunState, method: Method, facts: Facts) -> Method:
        """Gather the factors, and choose the damping if the job leaves it open.

        Returns:
            The method, with the chosen damping.
        """
        remembers = self.remembers and run.shot == 1
        method, record = calibrate(
            method,
            run.cluster,
            text=run.text,
            shot=run.shot,
            remembers=remembers,
        )
        run.record.update(record)
        facts["calibration_loss"] = record["calibration_loss"]
        facts["num_tokens"] = run.text.tokens.size
        chosen = record.get("damping_chosen")
        if chosen:
            facts["damping"] = f"{chosen['a']:g}/{chosen['g']:g}"
        return method

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
        part = worker.shapes.layout.part_of_tokens
        gathered = [s for s in worker.linears if s.name in worker.shapes.work.gathered]
        # half of each product is left out
        A_flops = sum({s.shared_input: part(s) * s.num_columns**2 for s in gathered}.values())
        G_flops = sum(part(s) * s.num_rows**2 for s in gathered)
        forward = (1 + (num_changes > 0)) * 2 * worker.active + A_flops
        head = worker.head_flops * (backward or worker.sequences)
        runs = 1 + (stores.activations == "recompute")
        further = runs * 2 * worker.active + 2 * worker.head_flops + G_flops
        of_pass = worker.sequences * forward + head + backward * further
        num_passes = 1
        if isinstance(curvature, ExtendedKfacSection):
            num_passes += (curvature.num_kronecker_terms - 1) * curvature.num_power_iterations
        loads = (waves + -(-backward // worker.wave)) * worker.all_blocks
        weights = worker.moved(stores.weights, loads)
        factors = worker.moved(stores.factors, 2 * waves * worker.all_factors)
        on_device = worker.all_factors
        if stores.factors != "device":  # beside an accelerator's, those of the next block are ahead
            on_device = worker.largest_factors * (1 if worker.device_is_host else 2)
        changes = num_changes * worker.hidden_size
        passing = worker.passing(more_kept=4 * changes, more_in_a_moment=12 * changes)
        device = worker.weights + on_device + passing
        factors_on_host = worker.all_factors * (stores.factors == "host" and worker.device_is_host)
        host = worker.host + factors_on_host + worker.travelling(worker.sequence_length)
        flops = num_passes * worker.sequence_length * of_pass
        of_host, of_disk = (num_passes * sum(pair) for pair in zip(weights, factors, strict=True))
        bubble = worker.bubble(worker.sequences, stores)
        counts = self._counts(worker, backward, runs, num_changes).times(num_passes)
        yield StepPlan(self.name, device, host, flops, 0.0, of_host, of_disk, bubble, counts)

    @staticmethod
    def _counts(worker: WorkerView, backward: int, runs: int, num_changes: int) -> Counted:
        """Return what passes launch whose sequences pass backward in part."""
        T = worker.sequence_length
        counts = worker.pass_counts(worker.sequences - backward, T, heads=float(not backward))
        counts += worker.pass_counts(backward, T, runs, 1.0)
        gathered = [s for s in worker.linears if s.name in worker.shapes.work.gathered]
        of_A = {linear.shared_input: linear.num_columns for linear in gathered}.values()
        of_G = [linear.num_rows for linear in gathered]
        calls = -(-worker.sequences // worker.together), -(-backward // worker.together)
        for sizes, num_calls in zip((of_A, of_G), calls, strict=True):
            panels = sum(PackedSymmetric.num_panels(n, "cuda") for n in sizes)
            counts += Counted(panels, 0, sum(4.0 * n**2 for n in sizes)).times(num_calls)
            counts += Counted(len(gathered) * (num_calls > 0))  # zeros at the start
        if num_changes:
            routed = sum(not linear.sees_all_tokens for linear in worker.linears)
            own = Counted(_CHANGES * worker.num_blocks + _REROUTED * routed, 3 * worker.num_blocks)
            counts += own.times(calls[0])
        # of every factor to its owner
        between = worker.all_factors * (worker.num_replicas > 1)
        return counts + Counted(2 * len(gathered) * (between > 0), 0, 0.0, between)

    def beside(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return further Kronecker terms, which are not packed."""
        curvature = self.method.used_curvature
        if not isinstance(curvature, ExtendedKfacSection):
            return ()
        squares = sum(linear.num_rows**2 + linear.num_columns**2 for linear in worker.linears)
        further = curvature.num_kronecker_terms - 1
        device = (further + 1.5) * 4.0 * squares
        return [StepPlan(name, device, 0.0) for name in (self.name, "costs", "update")]
