"""The curvature pass of a shot: A and G of every linear, from the calibration text.

Of several dampings the one may be chosen with which removals cost least on windows held aside.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from math import isfinite
from typing import Any

import numpy as np

from ray_surgeon.curvature.collector import WantedFactors, gather_curvature, gather_terms
from ray_surgeon.maths.kronecker import PackedFactors
from ray_surgeon.maths.structured import A_CHOICES, G_CHOICES, choose_damping, cost_held_aside
from ray_surgeon.pruning.method import Method
from ray_surgeon.run_state import CalibrationText, Facts, RunState
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.spec.curvature import DampingSection, ExtendedKfacSection


def _keep_held_factors(worker: Worker, method: Method) -> None:
    """Keep the factors of the windows held aside, of the owned linears on which dampings are tried.

    Of each role that is ranked, these are one a third and one two thirds through the model.
    """
    of_role: dict[str, list[str]] = {}
    for shape in worker.layout.linears:
        is_ranked = method.gathers is None or shape.role in method.gathers
        if shape.sees_all_tokens and is_ranked:
            of_role.setdefault(shape.role, []).append(shape.name)
    tried = (names[len(names) * third // 3] for names in of_role.values() for third in (1, 2))
    held = dict[str, PackedFactors]()
    for name in tried:
        if name in worker.shard.linears and worker.owns(name):
            factors = worker.shard.own_factors(name)
            A, G = (replace(own, flat=own.flat.clone()) for own in (factors.A, factors.G))
            held[name] = replace(factors, A=A, G=G)
    worker.state.held_factors = held


def _costs_held_aside(worker: Worker, method: Method, share: float) -> list[float]:
    """Return what removals in these linears cost by the factors held aside.

    See `cost_held_aside`.
    """
    rows = method.gathers is None
    all_held = worker.state.held_factors.items()
    return [cost_held_aside(method.linear(worker, n), held, share, rows) for n, held in all_held]


def _drop_held_factors(worker: Worker) -> None:
    worker.state.held_factors = {}


def _choose_damping(cluster: Cluster, method: Method, shot: int) -> tuple[Method, dict[str, Any]]:
    """Return a method with the damping that costs least, and what the report says of it."""
    curvature = method.used_curvature
    share = method.section.removed_in(shot)

    def damped(a: float, g: float) -> Method:
        damping = {"damping": DampingSection(a=a, g=g)}
        return replace(method, curvature=curvature.model_copy(update=damping))

    def cost_of(a: float, g: float) -> list[float]:
        return list(chain(*cluster.run_all(_costs_held_aside, damped(a, g), share)))

    of_G = G_CHOICES if curvature.gathers == "both" else (DampingSection().g,)
    a, g, tried = choose_damping(cost_of, A_CHOICES, of_G)
    cluster.run_all(_drop_held_factors)
    costs = [{"a": x, "g": y, "cost": z if isfinite(z) else None} for x, y, z in tried]
    return damped(a, g), {"a": a, "g": g, "tried": costs}


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
    seed = curvature.label_seed(shot, len(text.tokens))
    wanted = WantedFactors(
        kind=curvature.kind,
        label_seed=seed,
        only=method.gathers,
        num_backward=curvature.sequences_backward,
    )
    has_held = curvature.chooses_damping and len(text.held) >= cluster.placement.num_replicas
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
            record["median_size_of_terms"] = [float(np.median([*term.values()])) for term in sizes]
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
            The method, with the damping that was chosen.
        """
        remembers = self.remembers and run.shot == 1
        method, record = calibrate(method, run.cluster, run.text, run.shot, remembers=remembers)
        run.record.update(record)
        facts["calibration_loss"] = record["calibration_loss"]
        facts["num_tokens"] = run.text.tokens.size
        if chosen := record.get("damping_chosen"):
            facts["damping"] = f"{chosen['a']:g}/{chosen['g']:g}"
        return method
