"""The curvature pass of a shot: A and G of every linear, from the calibration text.

The damping may be chosen from several: the one with the smallest costs of removals on windows held
aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import isfinite
from typing import Any

from ray_surgeon.config.curvature import DampingSection
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.worker import Worker
from ray_surgeon.factors.collector import WantedFactors, gather_curvature, kind_of
from ray_surgeon.maths.kronecker import PackedFactors
from ray_surgeon.maths.structured import (
    A_CHOICES,
    G_CHOICES,
    choose_damping,
    cost_held_aside,
)
from ray_surgeon.pruning.method import Method
from ray_surgeon.run_state import CalibrationText, Facts, RunState


def _keep_held_factors(worker: Worker, method: Method) -> None:
    """Keep copies of the factors of some owned linears, to try dampings on them.

    For every ranked role, these are the linears at one third and two thirds of the model's depth.
    """
    names_of_roles: dict[str, list[str]] = {}
    for shape in worker.layout.linears:
        is_ranked = method.gathers is None or shape.role in method.gathers
        if shape.sees_all_tokens and is_ranked:
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
    """Return the costs of removals in the linears of `_keep_held_factors`."""
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
        costs.append(
            {"a": tried_a, "g": tried_g, "cost": cost if isfinite(cost) else None}
        )
    return damped(a, g), {"a": a, "g": g, "tried": costs}


def calibrate(
    method: Method, cluster: Cluster, text: CalibrationText, shot: int, *, remembers: bool
) -> tuple[Method, dict[str, Any]]:
    """Gather the curvature of the present weights.

    Args:
        method: the method of pruning.
        cluster: cluster with loaded workers.
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
        record.update(kind_of(curvature).gather_further(cluster, text.tokens, seed))
    record["calibration_loss"] = loss
    return method, record


@dataclass(frozen=True)
class Curvature:
    """Workers gather the curvature of the present weights."""

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
