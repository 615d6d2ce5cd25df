"""The choice of damping: of several, the one with which removals cost least on held-aside text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from ray_surgeon.maths.damping import A_CHOICES, G_CHOICES, choose_damping, cost_held_aside
from ray_surgeon.maths.kronecker import Damping, PackedFactors
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.stages.curvature.section import DampingSection
from ray_surgeon.stages.prune.method import Method, linear_of


@dataclass
class _HeldFactors:
    """Factors of the windows held aside, on a worker."""

    of_linear: dict[str, PackedFactors]


@dataclass(frozen=True)
class DampingChoice:
    """The choice for a method, in one shot."""

    method: Method

    # On a worker

    def probed(self, layout: ModelLayout) -> list[str]:
        """Return the linears on which dampings are tried.

        Of each role that is ranked, these are one a third and one two thirds through the model.
        """
        of_role: dict[str, list[str]] = {}
        for shape in layout.linears:
            if shape.expert is None and self.method.needs(shape) is not None:
                of_role.setdefault(shape.role, []).append(shape.name)
        names = [of[len(of) * third // 3] for of in of_role.values() for third in (1, 2)]
        return list(dict.fromkeys(names))

    def keep_held_factors(self, worker: Worker) -> None:
        """Keep the factors of the owned linears that are probed, of the windows held aside."""
        of_linear = {}
        for name in self.probed(worker.layout):
            if name in worker.shard.linears and worker.owns(name):
                factors = worker.shard.own_factors(name)
                of_linear[name] = replace(factors, A=factors.A.copied(), G=factors.G.copied())
        worker.keep(_HeldFactors(of_linear))

    def costs_held_aside(self, worker: Worker, damping: Damping, share: float) -> list[float]:
        """Return what removals in the owned probed linears cost by the factors held aside.

        See `cost_held_aside`.
        """
        method = self.method
        costs = []
        for name, held in worker.kept(_HeldFactors).of_linear.items():
            linear = linear_of(worker, name, method.used_curvature)
            mask = worker.masks[name]
            if not isinstance(mask, StructuredMask):
                mask = StructuredMask.full(*linear.W.shape)
            prunes_rows = method.gathers is None
            costs.append(
                cost_held_aside(linear, mask, held, damping, share, prunes_rows=prunes_rows)
            )
        return costs

    def drop_held_factors(self, worker: Worker) -> None:
        """Keep the factors of the windows held aside no longer."""
        worker.drop(_HeldFactors)

    # On the coordinator

    def chosen(self, cluster: Cluster, shot: int) -> tuple[Method, dict[str, Any]]:
        """Return the method with the damping that costs least, and what the report says of it."""
        curvature = self.method.used_curvature
        has_G = curvature.kind != "activations"
        share = self.method.section.removed_in(shot)

        def cost_of(a: float, g: float) -> list[float]:
            damping = Damping(a, g if has_G else 0.0, curvature.as_damping.max)
            of_workers = cluster.run_all(self.costs_held_aside, damping, share)
            return [cost for of_worker in of_workers for cost in of_worker]

        of_G = G_CHOICES if has_G else (DampingSection().g,)
        a, g, tried = choose_damping(cost_of, A_CHOICES, of_G)
        cluster.run_all(self.drop_held_factors)
        changed = curvature.model_copy(update={"damping": DampingSection(a=a, g=g)})
        costs = [{"a": x, "g": y, "cost": z if isfinite(z) else None} for x, y, z in tried]
        return replace(self.method, curvature=changed), {"a": a, "g": g, "tried": costs}
