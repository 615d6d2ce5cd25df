"""Further Kronecker terms of extended KFAC, by power iterations.

They run over shards and replicas after the curvature pass.

Source: docs/method.md, section 1. Each iteration is a forward and backward pass: one for A with G
held, the next for G with A held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ray_surgeon.maths.experts import own_divisor
from ray_surgeon.maths.extended.terms import power_iteration, quadratic_forms
from ray_surgeon.maths.kronecker import PackedSymmetric
from ray_surgeon.models.shard import ModelShard, watch_pairs
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.passes import forward_and_backward
from ray_surgeon.runtime.wave import Labels
from ray_surgeon.runtime.worker import Worker, collective

Side = Literal["g", "a"]


class PowerIteration:
    """The term that is being found, for every linear of a shard.

    Attributes:
        unit_G: name -> [R, R] of norm 1, and
        unit_A: name -> [C, C]: the present factors.
        moments: name -> the sum of the pass, of the side that is wanted.
        sigma: name -> the norm the last factor had, at its owner.
    """

    def __init__(self, shard: ModelShard) -> None:
        """Take a shard whose weights stay as they are."""
        self._shard = shard
        self.unit_G: dict[str, Tensor] = {}
        self.unit_A: dict[str, Tensor] = {}
        self.moments: dict[str, PackedSymmetric] = {}
        self.sigma: dict[str, float] = {}
        self._hooks: list[RemovableHandle] = []

    def start(self, side: Side) -> None:
        """Install the hooks of a pass: ``g`` sums (a^T A a) g g^T, ``a`` sums (g^T G g) a a^T."""
        assert not self._hooks
        units = self.unit_A if side == "g" else self.unit_G
        for name, module in self._shard.gathered.items():
            shape = self._shard.layout.shapes[name]
            self.moments[name] = PackedSymmetric.zeros(
                shape.num_columns if side == "a" else shape.num_rows, self._shard.device
            )
            self._hooks.append(
                watch_pairs(module, _add_moment(self.moments[name], units[name], side))
            )

    def stop(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _add_moment(
    total: PackedSymmetric, other: Tensor, side: Side
) -> Callable[[Tensor, Tensor], None]:
    def see(a: Tensor, g: Tensor) -> None:
        wanted, weighing = (g, a) if side == "g" else (a, g)
        total.add(wanted, quadratic_forms(weighing, other))

    return see


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
    """Sum the moments to owners, which take off known terms and send the factor on."""
    power = worker.kept(PowerIteration)
    power.stop()
    units, others = (power.unit_G, power.unit_A) if side == "g" else (power.unit_A, power.unit_G)
    for name, packed in power.moments.items():
        owner = worker.owner(name)
        worker.replicas.reduce(packed.flat, owner)
        moment = packed.dense()
        unit = torch.empty_like(moment)
        if worker.owns(name):
            factors = worker.shard.own_factors(name).dense(worker.device)
            n = max(1, factors.num_tokens)
            divisor = _divisor(worker, name, n)
            known = [(factors.G / divisor, factors.A / n), *factors.terms]
            same = [t[0] for t in known]
            opposite = [t[1] for t in known]
            if side == "a":
                same, opposite = opposite, same
            unit, power.sigma[name] = power_iteration(
                moment / divisor, same, opposite, others[name]
            )
        worker.replicas.broadcast(unit, owner)
        units[name] = unit


def _divisor(worker: Worker, name: str, num_tokens: int) -> float:
    """Return the divisor of a linear's sums over tokens.

    With that of an expert, further terms weigh what its own tokens do in the first.
    """
    shape = worker.layout.shapes[name]
    if shape.expert is None:
        return num_tokens
    return own_divisor(num_tokens, worker.shard.layer_mean(shape.block, shape.role))


def finish_term(worker: Worker) -> dict[str, float]:
    """Keep the term at the owners; return its size relative to the first one's, by linear."""
    power = worker.drop(PowerIteration)
    sizes = {}
    for name in worker.shard.gathered:
        if not worker.owns(name):
            continue
        scale = power.sigma[name] ** 0.5
        factors = worker.shard.factors(name).dense(worker.device)
        size = (
            float(torch.linalg.norm(factors.A) * torch.linalg.norm(factors.G))
            / factors.num_tokens**2
        )
        sizes[name] = power.sigma[name] / size if size else 0.0
        worker.shard.terms.setdefault(name, []).append(
            (power.unit_G[name] * scale, power.unit_A[name] * scale)
        )
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
        cluster.run_all(start_term)
        sides: list[Side] = ["g" if number % 2 else "a" for number in range(num_iterations)]
        for side in sides:
            cluster.run_all(start_iteration, side)
            forward_and_backward(cluster, sequences, Labels(label_seed))
            cluster.run_all(finish_iteration, side)
        sizes.append(
            {name: size for sums in cluster.run_all(finish_term) for name, size in sums.items()}
        )
    return sizes
