"""Further Kronecker terms of extended KFAC, by power iterations.

They run over shards and replicas after the curvature pass.

Source: docs/method.md, section 1. Each iteration is a forward and backward pass: one for A with G
held, the next for G with A held.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ray_surgeon.maths.extended.terms import power_iteration, quadratic_forms
from ray_surgeon.maths.kronecker import PackedSymmetric
from ray_surgeon.models.hooks import watch_pairs
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.pipelines import forward_and_backward
from ray_surgeon.runtime.wave import Labels
from ray_surgeon.runtime.worker import Worker, collective


@dataclass
class PowerIteration:
    """The term that is being found, for every linear of a shard.

    The sides of a term have the numbers 0 for G and 1 for A.
    """

    # for G and for A: name -> the present factor, [R, R] or [C, C], of norm 1
    units: tuple[dict[str, Tensor], dict[str, Tensor]] = field(default_factory=lambda: ({}, {}))
    # name -> the sum of the pass, of the side that is wanted
    moments: dict[str, PackedSymmetric] = field(default_factory=dict)
    # name -> the norm that the last factor had, at its owner
    sigma: dict[str, float] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)


def _add_moment(
    total: PackedSymmetric, opposite: Tensor, side: int, inputs: Tensor, gradients: Tensor
) -> None:
    """Add (a^T A a) g g^T for side G, with A the opposite factor; (g^T G g) a a^T for side A."""
    pair = (gradients, inputs)
    total.add(pair[side], quadratic_forms(pair[1 - side], opposite))


def start_iteration(worker: Worker, side: int) -> None:
    """Install the hooks of a pass that sums the moments of a side.

    A term begins with the identity as G: a known direction would find nothing new.
    """
    power = worker.keeping(PowerIteration)
    opposites = power.units[1 - side]
    for name, module in worker.shard.gathered.items():
        shape = worker.layout.shapes[name]
        sizes = (shape.num_rows, shape.num_columns)
        if name not in opposites:
            opposites[name] = torch.eye(sizes[0], device=worker.device) / sizes[0] ** 0.5
        moment = PackedSymmetric.zeros(sizes[side], worker.device)
        power.moments[name] = moment
        see = partial(_add_moment, moment, opposites[name], side)
        power.hooks.append(watch_pairs(module, see))


@collective
def finish_iteration(worker: Worker, side: int) -> None:
    """Sum the moments to owners, which take off known terms and send the factor on."""
    power = worker.kept(PowerIteration)
    for hook in power.hooks:
        hook.remove()
    power.hooks.clear()
    units = power.units[1 - side]
    for name, packed in power.moments.items():
        owner = worker.owner(name)
        worker.replicas.reduce(packed.flat, owner)
        unit = packed.dense()
        if worker.owns(name):
            factors = worker.shard.own_factors(name).dense(worker.device)
            n = max(1, factors.num_tokens)
            divisor = worker.shard.own_divisor(name, n)
            known = [(factors.G / divisor, factors.A / n), *factors.terms]
            same = [term[side] for term in known]
            opposite = [term[1 - side] for term in known]
            unit, power.sigma[name] = power_iteration(unit / divisor, same, opposite, units[name])
        worker.replicas.broadcast(unit, owner)
        power.units[side][name] = unit


def finish_term(worker: Worker) -> dict[str, float]:
    """Keep the term at the owners; return its size relative to the first one's, by linear."""
    power = worker.drop(PowerIteration)
    sizes = {}
    for name in filter(worker.owns, worker.shard.gathered):
        sigma = power.sigma[name]
        factors = worker.shard.factors(name).dense(worker.device)
        norms = float(torch.linalg.norm(factors.A) * torch.linalg.norm(factors.G))
        size = norms / factors.num_tokens**2
        sizes[name] = sigma / size if size else 0.0
        G, A = (units[name] * sigma**0.5 for units in power.units)
        worker.shard.terms.setdefault(name, []).append((G, A))
    return sizes


def gather_terms(
    cluster: Cluster,
    sequences: NDArray[np.int64],
    num_terms: int,
    num_iterations: int,
    label_seed: int | None,
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
        for number in range(num_iterations):
            side = (number + 1) % 2  # A first
            cluster.run_all(start_iteration, side)
            forward_and_backward(cluster, sequences, Labels(label_seed))
            cluster.run_all(finish_iteration, side)
        of_workers = cluster.run_all(finish_term)
        sizes.append({name: size for part in of_workers for name, size in part.items()})
    return sizes
