"""The passes that find further Kronecker terms, by power iterations after the pass for A and G.

Each iteration is a forward and backward pass: one for A with G fixed, the next for G with A fixed.
Source: docs/method.md, section 1.
"""

from __future__ import annotations

from collections import ChainMap
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.microbatch import Labels, Tokens
from ray_surgeon.distributed.passes import forward_and_backward
from ray_surgeon.distributed.worker import Worker, collective
from ray_surgeon.experimental.extended_kfac.terms import (
    Term,
    power_iteration,
    quadratic_forms,
)
from ray_surgeon.maths.products import PackedSymmetric
from ray_surgeon.models.hooks import watch_pairs


class PowerIteration:
    """The Kronecker term that is being computed, for every linear of a shard.

    The sides of a term have the numbers 0 for G and 1 for A.
    """

    def __init__(self) -> None:
        """Start without factors."""
        # for G and for A: name -> the present factor, [R, R] or [C, C], of norm 1
        self.units = dict[str, Tensor](), dict[str, Tensor]()
        # name -> the sum of the current pass
        self.moments = dict[str, PackedSymmetric]()
        # name -> norm of the last factor, on its owner
        self.sigma = dict[str, float]()
        self.hooks = list[RemovableHandle]()


@dataclass
class FurtherTerms:
    """The further terms of a worker's linears."""

    found: dict[str, list[Term]] = field(default_factory=dict)
    """Owned linear -> its terms, from the curvature pass until the update"""
    power_iteration: PowerIteration = field(default_factory=PowerIteration)
    """The term that is being computed"""


def further_terms(worker: Worker, name: str) -> tuple[Term, ...]:
    """Return the further terms of a linear; empty before they are computed."""
    if worker.state.further_terms is None:
        return ()
    return tuple(_state(worker).found.get(name, ()))


def _state(worker: Worker) -> FurtherTerms:
    state = worker.state.further_terms
    assert isinstance(state, FurtherTerms)
    return state


def _start_terms(worker: Worker) -> None:
    worker.state.further_terms = FurtherTerms()


def _add_moments(
    power: PowerIteration, side: int, name: str, inputs: Tensor, gradients: Tensor
) -> None:
    """Add one pass to the moments of a side.

    That is (a^T A a) g g^T for side G, A being the opposite factor, and (g^T G g) a a^T for A.
    """
    pair = (gradients, inputs)
    weights = quadratic_forms(pair[1 - side], power.units[1 - side][name])
    power.moments[name].add(pair[side], weights)


def _start_iteration(worker: Worker, side: int) -> None:
    """Install the hooks of a pass that sums the moments of a side: 0 for G, 1 for A.

    A term begins with the identity as G: a known direction would find nothing new.
    """
    power = _state(worker).power_iteration
    opposites = power.units[1 - side]
    for name, module in worker.shard.gathered.items():
        shape = worker.layout.shapes[name]
        R = shape.num_rows
        if name not in opposites:
            opposites[name] = torch.eye(R, device=worker.device) / R**0.5
        size = R if side == 0 else shape.num_columns
        power.moments[name] = PackedSymmetric.zeros(size, worker.device)
        power.hooks.append(watch_pairs(module, partial(_add_moments, power, side, name)))


@collective
def _finish_iteration(worker: Worker, side: int) -> None:
    """Sum the moments to the owners, which subtract known terms and broadcast the factor."""
    power = _state(worker).power_iteration
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
            first = (factors.G / divisor, factors.A / n)
            known = [first, *further_terms(worker, name)]
            pairs = [(term[side], term[1 - side]) for term in known]
            unit, power.sigma[name] = power_iteration(unit / divisor, pairs, units[name])
        worker.replicas.broadcast(unit, owner)
        power.units[side][name] = unit


def _finish_term(worker: Worker) -> dict[str, float]:
    """Keep the term at the owners; return linear -> its size relative to the first term."""
    state = _state(worker)
    power = state.power_iteration
    state.power_iteration = PowerIteration()
    sizes = dict[str, float]()
    for name in worker.shard.gathered:
        if not worker.owns(name):
            continue
        sigma = power.sigma[name]
        factors = worker.shard.factors(name).dense(worker.device)
        norms = float(torch.linalg.norm(factors.A) * torch.linalg.norm(factors.G))
        size = norms / factors.num_tokens**2
        sizes[name] = sigma / size if size else 0.0
        units_of_G, units_of_A = power.units
        G = units_of_G[name] * sigma**0.5
        A = units_of_A[name] * sigma**0.5
        state.found.setdefault(name, []).append((G, A))
    return sizes


def gather_terms(
    cluster: Cluster,
    sequences: Tokens,
    num_terms: int,
    num_iterations: int,
    label_seed: int | None,
) -> list[dict[str, float]]:
    """Find the Kronecker terms beyond that of KFAC.

    Args:
        cluster: cluster with the factors of KFAC.
        sequences: the sequences that KFAC was gathered from.
        num_terms: terms to find, without that of KFAC.
        num_iterations: passes for each term, alternately for A and G.
        label_seed: the same seed as for KFAC, so that the labels are the same.

    Returns:
        For every further term, linear -> its size relative to the first term.
    """
    cluster.run_all(_start_terms)
    sizes = []
    for _ in range(num_terms):
        for number in range(num_iterations):
            side = (number + 1) % 2  # A first
            cluster.run_all(_start_iteration, side)
            forward_and_backward(cluster, sequences, Labels(label_seed))
            cluster.run_all(_finish_iteration, side)
        sizes.append(dict(ChainMap(*cluster.run_all(_finish_term))))
    return sizes
