"""The choice of damping: of several, the one with which removals cost least on held-aside text."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from typing import Any

from ray_surgeon.maths.damping import A_CHOICES, G_CHOICES, choose_damping, cost_held_aside
from ray_surgeon.maths.kronecker import Damping, PackedFactors
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.stages.curvature.section import DampingSection
from ray_surgeon.stages.prune.method import Method


class _HeldFactors(dict[str, PackedFactors]):
    """Linear -> its factors of the windows held aside, on a worker."""


# On a worker


def keep_held_factors(worker: Worker, method: Method) -> None:
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


def costs_held_aside(worker: Worker, method: Method, damping: Damping, share: float) -> list[float]:
    """Return what removals in the owned probed linears cost by the factors held aside.

    See `cost_held_aside`.
    """
    prunes_rows = method.gathers is None
    costs = []
    for name, held in worker.kept(_HeldFactors).items():
        linear = replace(method.linear(worker, name), damping=damping)
        mask = worker.masks[name]
        if not isinstance(mask, StructuredMask):
            mask = StructuredMask.full(*linear.W.shape)
        costs.append(cost_held_aside(linear, mask, held, share, prunes_rows=prunes_rows))
    return costs


def drop_held_factors(worker: Worker) -> None:
    """Keep the factors of the windows held aside no longer."""
    worker.drop(_HeldFactors)


# On the coordinator


def choose(cluster: Cluster, method: Method, shot: int) -> tuple[Method, dict[str, Any]]:
    """Return a method with the damping that costs least, and what the report says of it."""
    curvature = method.used_curvature
    has_G = curvature.gathers == "both"
    share = method.section.removed_in(shot)

    def cost_of(a: float, g: float) -> list[float]:
        damping = Damping(a, g if has_G else 0.0, curvature.as_damping.max)
        of_workers = cluster.run_all(costs_held_aside, method, damping, share)
        return [cost for of_worker in of_workers for cost in of_worker]

    of_G = G_CHOICES if has_G else (DampingSection().g,)
    a, g, tried = choose_damping(cost_of, A_CHOICES, of_G)
    cluster.run_all(drop_held_factors)
    changed = curvature.model_copy(update={"damping": DampingSection(a=a, g=g)})
    costs = [{"a": x, "g": y, "cost": z if isfinite(z) else None} for x, y, z in tried]
    return replace(method, curvature=changed), {"a": a, "g": g, "tried": costs}
