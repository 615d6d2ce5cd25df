"""The curvature pass: A and G of every linear.

Hooks in the shards gather A and G, which are summed over replicas to their owners. Source:
docs/method.md, section 1.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch

from ray_surgeon.config.curvature import AnyCurvature
from ray_surgeon.distributed import passes
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.dense_states import CALIBRATION
from ray_surgeon.distributed.microbatch import Counts, Labels, Tokens
from ray_surgeon.distributed.passes import forward_and_backward
from ray_surgeon.distributed.worker import Worker, collective
from ray_surgeon.errors import ConfigError
from ray_surgeon.maths.curvature import Linear
from ray_surgeon.models.layout import ModelLayout

_EXPERIMENTAL = {"extended_kfac": "ray_surgeon.experimental.extended_kfac.kind"}
"""`curvature.kind` of the job spec -> module with its `Kind`, a subclass of `CurvatureKind`."""


class CurvatureKind:
    """A kind of curvature that needs one pass over the text and A and G of every linear.

    Subclasses are in `ray_surgeon.experimental` and may need more.
    """

    @property
    def num_passes(self) -> int:
        """Number of passes over the calibration text."""
        return 1

    @property
    def num_copies(self) -> float:
        """Copies of A and G as whole float32 matrices that stay on the device until the update.

        They are in addition to the packed sums.
        """
        return 0.0

    def gather_further(
        self,
        cluster: Cluster,
        sequences: Tokens,
        label_seed: int | None,
    ) -> dict[str, Any]:
        """Run the further passes, after that for A and G.

        Args:
            cluster: cluster with A and G.
            sequences: sequences from which A and G were gathered.
            label_seed: the same seed as for G, so that the labels are the same.

        Returns:
            Entries for the report.
        """
        return {}

    def linear(self, worker: Worker, linear: Linear) -> Linear:
        """Return a linear of a worker with what the further passes found."""
        return linear


def kind_of(section: AnyCurvature) -> CurvatureKind:
    """Return the kind of curvature that a section of the job spec asks for."""
    if section.kind not in _EXPERIMENTAL:
        return CurvatureKind()
    # loaded by name, because the core must not depend on experiments
    module = importlib.import_module(_EXPERIMENTAL[section.kind])
    kind: CurvatureKind = module.Kind(section)
    return kind


class SumsBeside:
    """The sums of a pass beside A and G; this base class sums nothing. See `Method`."""

    options: ClassVar[
        Mapping[str, bool]
    ] = {}  # keyword arguments of `ModelShard.start_curvature`

    def num_changes(self, layout: ModelLayout) -> int:
        """Return the number of changes of a block's output that are computed for a token."""
        return 0

    def weigh(self, worker: Worker, factor: float) -> None:
        """Multiply the sums that follow from gradients by a factor; see `weigh_gradients`."""

    def reduce(self, worker: Worker) -> None:
        """Sum over the replicas to the owners; every replica calls this."""


def start_pass(
    worker: Worker,
    kind: str,
    only: frozenset[str] | None,
    beside: SumsBeside,
) -> None:
    """Start gathering; see `ModelShard.start_curvature`."""
    worker.shard.start_curvature(kind, only=only, **beside.options)


def not_finite(worker: Worker) -> list[str]:
    """Return the linears of this shard whose inputs in the pass were not finite.

    Of linears that share an A, only the first is returned.
    """
    store = worker.shard.factor_store
    names = list[str]()
    for group in worker.shard.gathering:
        if group.key_of_A in store and not store.get(group.key_of_A).isfinite().all():
            names.append(group.names[0])
    return names


def weigh_gradients(worker: Worker, factor: float, beside: SumsBeside) -> None:
    """Multiply all sums of gradients by a factor: G, and the sums beside."""
    store = worker.shard.factor_store
    for group in worker.shard.gathering:
        for key in group.keys_of_G.values():
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
    numbers = [group.num_tokens for group in shard.gathering]
    num_tokens = torch.tensor(numbers, device=worker.device)
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
    """See `ModelShard.start_curvature`; ``activations`` and ``identity`` need no backward pass."""
    label_seed: int | None = None
    """See `Labels`."""
    only: frozenset[str] | None = None
    """See `ModelShard.start_curvature`."""
    num_backward: int | None = None
    """Number of sequences that also pass backward; None for all.

    G is the sum over these, scaled to the number of all sequences.
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
    """Run every calibration sequence through the model and gather A and G at their owners.

    A is of all N tokens that pass, G of the loss of the M tokens that count. The mean loss of those
    M has the curvature ``1/M sum_t g_t g_t^T (x) a_t a_t^T``, with g_t the gradient of the summed
    loss at every position t that passes, counted or not. If gradients and activations are taken as
    independent, it is ``(1/M sum g g^T) (x) (1/N sum a a^T)``. Factors are sums that are divided by
    N later, so G is multiplied by the number of tokens that are predicted over the number of those
    that count, and costs are in nats per token that counts.

    Args:
        cluster: cluster with loaded workers.
        sequences: [num_sequences, sequence_length] tokens.
        wanted: which factors are gathered, and how.
        counts: [num_sequences, sequence_length] bool, whether a token counts in the loss when it is
            predicted; None if all do.
        beside: further sums of the pass.
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
    num_backward = wanted.num_backward or len(sequences)
    if wanted.kind in ("activations", "identity"):
        num_backward = 0
    both = drawn(len(sequences), num_backward)
    measured = both or range(len(sequences))
    num_tokens = passes.num_counted(sequences, counts, measured)
    if not num_tokens:
        raise ConfigError(
            field="calibration",
            found=f"in none of the {len(measured)} sequences whose loss is taken a token counts",
            remedy="use longer ones, or more, or raise curvature.num_backward",
        )
    cluster.run_all(start_pass, wanted.kind, wanted.only, beside)
    remembered = CALIBRATION if remembers else None
    try:
        if both:
            labels = Labels(wanted.label_seed, remembers=remembers)
            losses = forward_and_backward(
                cluster, sequences, labels, only=both, counts=counts
            )
            rest = sorted(set(range(len(sequences))) - set(both))
            if rest:
                whose = "the calibration sequences"
                passes.pass_up_to_the_head(cluster, sequences, rest, remembered, whose)
        else:
            losses = passes.sequence_losses(cluster, sequences, counts, remembered)
        num_predicted = passes.num_counted(sequences)
        if both and num_predicted != num_tokens:
            cluster.run_all(weigh_gradients, num_predicted / num_tokens, beside)
        total = passes.finite("the loss of the calibration sequences", sum(losses))
    except FloatingPointError as error:
        reason = getattr(error, "cause", error)  # unwrapped from Ray's task error
        names = list(chain.from_iterable(cluster.run_all(not_finite)))
        first = names[0] if names else "the head"
        raise FloatingPointError(
            f"{reason}; inputs are not finite from {first} on"
        ) from error
    cluster.run_all(finish_curvature, beside)
    return total / num_tokens


def drawn(num_sequences: int, count: int) -> list[int]:
    """Return the sorted numbers of `count` sequences, drawn without regard to their texts.

    Every text of a mix has its share in expectation. All sequences are returned if `count` is their
    number or more.
    """
    drawing = np.random.default_rng(0)
    return sorted(drawing.permutation(num_sequences)[:count].tolist())
