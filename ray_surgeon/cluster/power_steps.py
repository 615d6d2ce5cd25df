"""The part of a worker that finds further Kronecker terms by the power method."""

from __future__ import annotations

import torch

from ray_surgeon.cluster.state import ShardState
from ray_surgeon.models.power import PowerPasses, Side
from ray_surgeon.surgery.extended import power_step


class PowerSteps(ShardState):
    """Called in the order of `steps.collect_terms`, between the curvature pass and the costs."""

    _power: PowerPasses | None = None

    def start_term(self, first: bool) -> None:
        """Begin a term: the first one with KFAC's G, further ones with the identity, since known directions would give nothing."""
        self._power = PowerPasses(self.shard)
        for name in self.shard.gathered:
            R, owner = len(self.shard.weight(name)), self.owner(name)
            unit = torch.eye(R, device=self.device) / R**0.5
            if first and owner == self.replicas.rank:
                G = self.shard.factors(name).G
                unit = G / torch.linalg.norm(G).clamp(min=torch.finfo(G.dtype).tiny)
            if first:
                self.replicas.broadcast(unit, owner)
            self._power.unit_G[name] = unit

    def start_power(self, side: Side) -> None:
        """Start a pass of the power method; see `PowerPasses.start`."""
        assert self._power is not None
        self._power.start(side)

    def finish_power(self, side: Side, first: bool) -> None:
        """Sum the moments to their owners, which take off the known terms, if this is not the first, and send the new factor on."""
        power = self._power
        assert power is not None
        power.stop()
        units, others = (power.unit_G, power.unit_A) if side == "g" else (power.unit_A, power.unit_G)
        for name, moment in power.moments.items():
            owner = self.owner(name)
            self.replicas.reduce(moment, owner)
            unit = torch.empty_like(moment)
            if owner == self.replicas.rank:
                factors = self.shard.factors(name)
                n = factors.num_tokens
                known = [] if first else [(factors.G / n, factors.A / n), *factors.terms]
                same, opposite = ([t[0] for t in known], [t[1] for t in known])
                if side == "a":
                    same, opposite = opposite, same
                unit, power.sigma[name] = power_step(moment / n, same, opposite, others[name])
            self.replicas.broadcast(unit, owner)
            units[name] = unit

    def finish_term(self, first: bool) -> dict[str, float]:
        """Keep the term at the owners, the first one in the place of KFAC's; return its size relative to the first one's, by linear."""
        power, sizes = self._power, {}
        assert power is not None
        for name in self.shard.gathered:
            if self.owner(name) != self.replicas.rank:
                continue
            scale, factors = power.sigma[name] ** 0.5, self.shard.factors(name)
            G, A = power.unit_G[name] * scale, power.unit_A[name] * scale
            size = float(torch.linalg.norm(factors.A) * torch.linalg.norm(factors.G)) / factors.num_tokens**2
            sizes[name] = power.sigma[name] / size if size else 0.0
            if first:
                self.shard.nearest[name] = G * factors.num_tokens, A * factors.num_tokens
            else:
                self.shard.terms.setdefault(name, []).append((G, A))
        self._power = None
        return sizes
