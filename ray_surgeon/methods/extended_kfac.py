"""Further Kronecker terms of extended KFAC, found by power iterations over shards and replicas after the curvature pass."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ray_surgeon.cluster.cluster import Cluster
from ray_surgeon.cluster.passes import forward_and_backward
from ray_surgeon.cluster.worker import Worker, collective
from ray_surgeon.models.power_iteration import PowerIteration, Side
from ray_surgeon.surgery.extended.terms import power_iteration


def start_term(worker: Worker) -> None:
    """Begin a term with the identity as G: a known direction would find nothing new."""
    power = PowerIteration(worker.shard)
    for name in worker.shard.gathered:
        R = worker.layout.shapes[name].num_rows
        power.unit_G[name] = torch.eye(R, device=worker.device) / R**0.5
    worker.keep(power)


def start_iteration(worker: Worker, side: Side) -> None:
    """Start a power iteration; see `PowerIteration.start`."""
    worker.kept(PowerIteration).start(side)


@collective
def finish_iteration(worker: Worker, side: Side) -> None:
    """Sum the moments to their owners, which take off the known terms, and send the new factor on."""
    power = worker.kept(PowerIteration)
    power.stop()
    units, others = (power.unit_G, power.unit_A) if side == "g" else (power.unit_A, power.unit_G)
    for name, moment in power.moments.items():
        owner = worker.owner(name)
        worker.replicas.reduce(moment, owner)
        unit = torch.empty_like(moment)
        if worker.owns(name):
            factors = worker.shard.factors(name)
            n = factors.num_tokens
            known = [(factors.G / n, factors.A / n), *factors.terms]
            same, opposite = ([t[0] for t in known], [t[1] for t in known])
            if side == "a":
                same, opposite = opposite, same
            unit, power.sigma[name] = power_iteration(moment / n, same, opposite, others[name])
        worker.replicas.broadcast(unit, owner)
        units[name] = unit


def finish_term(worker: Worker) -> dict[str, float]:
    """Keep the term at the owners; return its size relative to the first one's, by linear."""
    power, sizes = worker.drop(PowerIteration), {}
    for name in worker.shard.gathered:
        if not worker.owns(name):
            continue
        scale, factors = power.sigma[name] ** 0.5, worker.shard.factors(name)
        size = float(torch.linalg.norm(factors.A) * torch.linalg.norm(factors.G)) / factors.num_tokens**2
        sizes[name] = power.sigma[name] / size if size else 0.0
        worker.shard.terms.setdefault(name, []).append((power.unit_G[name] * scale, power.unit_A[name] * scale))
    return sizes


def gather_terms(
    cluster: Cluster, sequences: NDArray[np.int64], num_terms: int, num_iterations: int, label_seed: int | None
) -> list[dict[str, float]]:
    """Find the Kronecker terms after KFAC's.

    Args:
        cluster: with the factors of KFAC.
        sequences: those it was gathered from.
        num_terms: with the first.
        num_iterations: passes over the sequences for each term, for A and G in turns.
        label_seed: as for KFAC, so that the labels are the same.

    Returns:
        For every further term, its size relative to the first one's by linear.
    """
    sizes = []
    for _ in range(1, num_terms):
        cluster.run_all(start_term)
        sides: list[Side] = ["g" if number % 2 else "a" for number in range(num_iterations)]
        for side in sides:
            cluster.run_all(start_iteration, side)
            forward_and_backward(cluster, sequences, label_seed)
            cluster.run_all(finish_iteration, side)
        sizes.append({name: size for found in cluster.run_all(finish_term) for name, size in found.items()})
    return sizes
