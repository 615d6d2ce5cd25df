"""The curvature pass: A and G of every linear, and further Kronecker terms of extended KFAC.

Hooks in the shards gather A and G, which are summed over replicas to their owners. Further terms
come of power iterations after that. Each is a forward and backward pass: one for A with G held, the
next for G with A held. Source: docs/method.md, section 1.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ray_surgeon.maths.extended.terms import power_iteration, quadratic_forms
from ray_surgeon.maths.packed import PackedSymmetric
from ray_surgeon.models.hooks import watch_pairs
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.runtime import passes
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.dense_states import CALIBRATION
from ray_surgeon.runtime.pipelines import forward_and_backward
from ray_surgeon.runtime.wave import Counts, Labels, Tokens
from ray_surgeon.runtime.worker import Worker, collective
from ray_surgeon.runtime.worker_state import PowerIteration
from ray_surgeon.spec.curvature import ExtendedKfacSection


class SumsBeside:
    """What a pass sums beside A and G: here nothing; see `Method`."""

    options: ClassVar[Mapping[str, bool]] = {}  # of `ModelShard.start_curvature`

    def num_changes(self, layout: ModelLayout) -> int:
        """Return how many changes of a block's output are computed for a token."""
        return 0

    def weigh(self, worker: Worker, factor: float) -> None:
        """Multiply what follows from gradients by a factor, likewise for the tokens that count."""

    def reduce(self, worker: Worker) -> None:
        """Sum over the replicas to the owners; every replica calls this."""


def start_pass(worker: Worker, kind: str, only: frozenset[str] | None, beside: SumsBeside) -> None:
    """Start gathering; see `ModelShard.start_curvature`."""
    worker.shard.start_curvature(kind, only=only, **beside.options)


def not_finite(worker: Worker) -> list[str]:
    """Return the linears of this shard whose inputs in the pass were not finite, one of each A."""
    store = worker.shard.factor_store
    gathered = [group for group in worker.shard.gathering if group.key_of_A in store]
    return [g.names[0] for g in gathered if not store.get(g.key_of_A).isfinite().all()]


def weigh_gradients(worker: Worker, factor: float, beside: SumsBeside) -> None:
    """Multiply all sums of gradients by a factor: G, and what is summed beside."""
    store = worker.shard.factor_store
    for key in (key for group in worker.shard.gathering for key in group.keys_of_G.values()):
        total = store.on_device(key)
        total.mul_(factor)
        store.put(key, total)
    beside.weigh(worker, factor)


@collective
def finish_curvature(worker: Worker, beside: SumsBeside) -> None:
    """Stop gathering and sum the packed factors over the replicas to their owners.

    The other replicas free theirs.
    """
    shard = worker.shard
    store = shard.factor_store
    shard.stop_curvature()
    if worker.placement.num_replicas == 1:
        return
    beside.reduce(worker)
    num_tokens = torch.tensor([group.num_tokens for group in shard.gathering], device=worker.device)
    worker.replicas.reduce(num_tokens, 0)
    worker.replicas.broadcast(num_tokens, 0)
    for group, number in zip(shard.gathering, num_tokens.tolist(), strict=True):
        owner = worker.owner(group.names[0])
        group.num_tokens = number
        for key in group.sizes:
            total = store.on_device(key)
            worker.replicas.reduce(total, owner)
            if worker.replicas.rank == owner:
                store.put(key, total)
            else:
                store.drop(key)


NOTHING_BESIDE = SumsBeside()


@dataclass(frozen=True)
class WantedFactors:
    """The factors that a curvature pass gathers."""

    kind: str = "kfac"
    """See `ModelShard.start_curvature`; ``activations`` and ``identity`` need no backward pass"""
    label_seed: int | None = None
    """See `Labels`"""
    only: frozenset[str] | None = None
    """See `ModelShard.start_curvature`"""
    num_backward: int | None = None
    """Number of sequences that pass backward, too; None for all. G is the sum over these, scaled to
    the number of all sequences
    """


KFAC = WantedFactors()


def gather_curvature(
    cluster: Cluster,
    sequences: Tokens,
    wanted: WantedFactors = KFAC,
    *,
    counts: Counts = None,
    beside: SumsBeside = NOTHING_BESIDE,
    remembers: bool = False,
) -> float:
    """Run every calibration sequence through the model and gather A and G where they belong.

    A is of all N tokens that pass, G of the loss of the M tokens that count. The mean loss of those
    M has the curvature ``1/M sum_t g_t g_t^T (x) a_t a_t^T``, with g_t the gradient of the summed
    loss at every position t that passes, counted or not. As if gradients and activations were
    independent, that is ``(1/M sum g g^T) (x) (1/N sum a a^T)``. Factors are sums that are divided
    by N, so G is multiplied by the number of tokens that are predicted over the number of those
    that count, and costs are in nats per token that counts.

    Args:
        cluster: with loaded workers.
        sequences: [num_sequences, sequence_length] tokens.
        wanted: which factors are gathered, and how.
        counts: [num_sequences, sequence_length], whether a token counts as something that is
            predicted; None if all do.
        beside: what is summed beside A and G.
        remembers: whether last shards keep the hidden states of these sequences, because the
            weights are the dense model's.

    Returns:
        Mean NLL in nats per predicted token that counts, of the sequences that pass backward, or of
        all if none does.

    Raises:
        ValueError: no token counts in the sequences that pass backward, or in all if none does.
        FloatingPointError: a loss or a hidden state is not finite; names the first linear whose
            inputs are not.
    """
    count = wanted.num_backward or len(sequences)
    if wanted.kind in ("activations", "identity"):
        count = 0
    both = drawn(len(sequences), count)
    measured = both or range(len(sequences))
    num_tokens = passes.num_counted(sequences, counts, measured)
    if not num_tokens:
        problem = f"in none of the {len(measured)} sequences whose loss is taken a token counts"
        remedy = "use longer ones, or more, or raise curvature.num_backward"
        raise ValueError(f"calibration: {problem}; {remedy}")
    cluster.run_all(start_pass, wanted.kind, wanted.only, beside)
    remembered = CALIBRATION if remembers else None
    try:
        if both:
            labels = Labels(wanted.label_seed, remembers=remembers)
            losses = forward_and_backward(cluster, sequences, labels, only=both, counts=counts)
            if rest := sorted(set(range(len(sequences))) - set(both)):
                whose = "the calibration sequences"
                passes.pass_up_to_the_head(cluster, sequences, rest, remembered, whose)
        else:
            losses = passes.sequence_losses(cluster, sequences, counts, remembered)
        if both and passes.num_counted(sequences) != num_tokens:
            cluster.run_all(weigh_gradients, passes.num_counted(sequences) / num_tokens, beside)
        total = passes.finite("the loss of the calibration sequences", sum(losses))
    except FloatingPointError as error:
        reason = getattr(error, "cause", error)  # unwrapped from Ray's task error
        first = next(chain(*cluster.run_all(not_finite)), "the head")
        raise FloatingPointError(f"{reason}; inputs are not finite from {first} on") from error
    cluster.run_all(finish_curvature, beside)
    return total / num_tokens


def drawn(num_sequences: int, count: int) -> list[int]:
    """Return the numbers of `count` sequences, drawn without regard to their texts.

    Every text of a mix has its share by chance. All sequences are returned if `count` is their
    number or more.
    """
    return sorted(np.random.default_rng(0).permutation(num_sequences)[:count].tolist())


# Further Kronecker terms


def _add_moments(
    power: PowerIteration, side: int, name: str, inputs: Tensor, gradients: Tensor
) -> None:
    """Add (a^T A a) g g^T for side G, A being the opposite factor; (g^T G g) a a^T for A."""
    pair = (gradients, inputs)
    weights = quadratic_forms(pair[1 - side], power.units[1 - side][name])
    power.moments[name].add(pair[side], weights)


def _power_iteration(worker: Worker) -> PowerIteration:
    assert worker.state.power_iteration is not None
    return worker.state.power_iteration


def start_iteration(worker: Worker, side: int) -> None:
    """Install the hooks of a pass that sums the moments of a side.

    A term begins with the identity as G: a known direction would find nothing new.
    """
    if worker.state.power_iteration is None:
        worker.state.power_iteration = PowerIteration()
    power = worker.state.power_iteration
    opposites = power.units[1 - side]
    for name, module in worker.shard.gathered.items():
        shape = worker.layout.shapes[name]
        R = shape.num_rows
        if name not in opposites:
            opposites[name] = torch.eye(R, device=worker.device) / R**0.5
        power.moments[name] = PackedSymmetric.zeros((R, shape.num_columns)[side], worker.device)
        power.hooks.append(watch_pairs(module, partial(_add_moments, power, side, name)))


@collective
def finish_iteration(worker: Worker, side: int) -> None:
    """Sum the moments to owners, which take off known terms and send the factor on."""
    power = _power_iteration(worker)
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
            pairs = [(term[side], term[1 - side]) for term in known]
            unit, power.sigma[name] = power_iteration(unit / divisor, pairs, units[name])
        worker.replicas.broadcast(unit, owner)
        power.units[side][name] = unit


def finish_term(worker: Worker) -> dict[str, float]:
    """Keep the term at the owners; return its size relative to the first one's, by linear."""
    power = _power_iteration(worker)
    worker.state.power_iteration = None
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
    cluster: Cluster, sequences: Tokens, section: ExtendedKfacSection, label_seed: int | None
) -> list[dict[str, float]]:
    """Find the Kronecker terms after KFAC's.

    Args:
        cluster: with the factors of KFAC.
        sequences: those it was gathered from.
        section: says how many terms, and how many passes for each, for A and G in turns.
        label_seed: as for KFAC, so that the labels are the same.

    Returns:
        For every further term, its size relative to the first one's by linear.
    """
    sizes = []
    for _ in range(1, section.num_kronecker_terms):
        for number in range(section.num_power_iterations):
            side = (number + 1) % 2  # A first
            cluster.run_all(start_iteration, side)
            forward_and_backward(cluster, sequences, Labels(label_seed))
            cluster.run_all(finish_iteration, side)
        sizes.append(dict(ChainMap(*cluster.run_all(finish_term))))
    return sizes
