"""Reconstruction of feed-forward layers after their channels are pruned.

See `ray_surgeon.maths.reconstruction`.

The inputs of every layer are kept in the curvature pass, when the weights are those from before the
shot, and those of the windows held aside in a pass of their own. Then every layer is the work of
the owner of its consumer, which gets the inputs of all replicas, and trains it while other owners
train theirs. A layer that is no better on the windows held aside stays as the update left it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.activations import ACT2FN

from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.reconstruction import FeedForward, Reconstructed, outputs_of, reconstruct
from ray_surgeon.models.layer_inputs import LayerInputs
from ray_surgeon.models.layout import GroupSet
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.passes import pass_up_to_the_head
from ray_surgeon.runtime.worker import Worker, collective
from ray_surgeon.stages.curvature.section import AnyCurvature
from ray_surgeon.stages.reconstruction.section import ReconstructionSection

RATES = (0.003, 0.006, 0.012)
"""Learning rates that are tried, relative to the root mean square of each weight.

The last one was the best on SmolLM2 with much text.
"""
TRIAL_PART = 0.25
"""Share of a pass over the calibration tokens that each of them is tried for, on two layers."""


@dataclass
class Errors:
    """What reconstructions of a shot left on a worker for the report."""

    # consumer -> its mean loss held aside before and after
    of_layer: dict[str, tuple[float, float]] = field(default_factory=dict)
    rate: float = 0.0  # the learning rate; 0 if the worker trained nothing


@dataclass
class KeptInputs:
    """Inputs of layers on a worker, from the curvature pass until the layers are trained."""

    fitted: LayerInputs | None = None  # of the windows that layers are trained on
    held: LayerInputs | None = None  # of the windows held aside


@dataclass(frozen=True)
class Arrivals:
    """The order in which sequences pass: replicas take them in turns.

    So the number of replicas changes nothing.
    """

    num_backward: int  # sequences that pass backward, too; they come first
    num_sequences: int  # all of them
    sequence_length: int
    num_replicas: int

    @staticmethod
    def in_pass(
        curvature: AnyCurvature, sequences: NDArray[np.int64], num_replicas: int
    ) -> Arrivals:
        """Return that of a curvature pass over sequences [num_sequences, sequence_length]."""
        num_backward = (
            0
            if curvature.kind == "activations"
            else min(curvature.sequences_backward or len(sequences), len(sequences))
        )
        return Arrivals(num_backward, len(sequences), int(sequences.shape[1]), num_replicas)

    def of(self, replica: int) -> list[int]:
        """Return when the sequences of a replica would come to a single replica.

        They are in the order in which they come to it.
        """
        first = self.num_backward
        N = self.num_replicas
        return [*range(replica, first, N), *range(first + replica, self.num_sequences, N)]


@dataclass(frozen=True)
class Reconstruction:
    """The reconstruction of one run."""

    section: ReconstructionSection
    kinds: frozenset[str]  # of the groups whose layers are trained

    # On a worker

    def start(self, worker: Worker, arrivals: Arrivals) -> None:
        """Let the next pass keep the inputs of the layers."""
        shard = worker.shard
        layers = {
            groups.consumer: (
                groups.block - shard.blocks.first,
                shard.linears[groups.producers[0][0]],
            )
            for groups in worker.group_sets
            if groups.kind in self.kinds
        }
        shard.layer_inputs = LayerInputs(
            layers, len(arrivals.of(worker.replicas.rank)) * arrivals.sequence_length
        )

    @collective
    def share(self, worker: Worker, arrivals: Arrivals, are_held: bool) -> None:
        """Send the inputs of every layer to the owner of its consumer, after a pass.

        They come in the order that one replica has.

        Args:
            worker: of any replica; all of them call this.
            arrivals: of the sequences of the pass.
            are_held: whether the pass was over the windows held aside.
        """
        inputs = worker.shard.layer_inputs
        N = worker.placement.num_replicas
        rank = worker.replicas.rank
        assert inputs is not None
        for name in inputs.names if N > 1 else ():
            own = inputs.take(name)
            owner = worker.owner(name)
            own = own.view(-1, arrivals.sequence_length, own.shape[1])
            everything = (
                own.new_empty(arrivals.num_sequences, *own.shape[1:]) if owner == rank else None
            )
            for replica in range(N):
                part = (
                    own
                    if replica == rank
                    else own.new_empty(len(arrivals.of(replica)), *own.shape[1:])
                )
                if replica != owner and len(part):
                    moving = part.to(worker.device)
                    worker.replicas.broadcast(moving.view(torch.uint8), replica)
                    part = moving.cpu()
                if everything is not None:
                    everything[arrivals.of(replica)] = part
            if everything is not None:
                inputs.put(name, everything.flatten(0, 1))
        worker.shard.layer_inputs = None
        if are_held:
            worker.keeping(KeptInputs).held = inputs
        else:
            worker.keep(KeptInputs(inputs))
            worker.keep(Errors())

    def tried(
        self, worker: Worker, groups: GroupSet, W: Tensor, kept: Tensor, rate: float
    ) -> float:
        """Return the error held aside of an owned layer after a short training.

        It is a share of the error before; nothing changes.

        Args:
            worker: whose weights are those from before.
            groups: those of the layer.
            W: [R, C] the consumer after its update, zero in what is removed.
            kept: [num_groups] bool, the groups that stay.
            rate: the learning rate.
        """
        trained = self._trained(
            worker, groups, W, kept, rate, num_epochs=TRIAL_PART, keeps_inputs=True
        )
        return trained.after / trained.before if trained.before else 1.0

    def fitted(self, worker: Worker, groups: GroupSet, W: Tensor, rate: float) -> Tensor:
        """Train an owned layer after groups were removed.

        Its producers are set, and its consumer is returned.

        Args:
            worker: whose weights are those from before, and whose mask of the consumer is the new
                one.
            groups: those of the layer.
            W: [R, C] the consumer after its update, zero in what is removed.
            rate: the learning rate.
        """
        shard = worker.shard
        name = groups.consumer
        kept = worker.mask(name, StructuredMask).columns[groups.columns].all(dim=1)
        if not kept.any():
            return W
        trained = self._trained(
            worker, groups, W, kept, rate, num_epochs=self.section.num_epochs, keeps_inputs=False
        )
        errors = worker.kept(Errors)
        errors.of_layer[name] = trained.before, trained.after
        errors.rate = rate
        for (producer, rows), V in zip(groups.producers, trained.layer.producers, strict=True):
            changed = shard.weight(producer)
            changed[rows[kept].flatten().to(changed.device)] = V
            shard.set_weight(producer, changed)
        return W.index_copy(1, _columns(groups, kept, W), trained.layer.consumer)

    def _trained(
        self,
        worker: Worker,
        groups: GroupSet,
        W: Tensor,
        kept: Tensor,
        rate: float,
        *,
        num_epochs: float,
        keeps_inputs: bool,
    ) -> Reconstructed:
        shard = worker.shard
        name = groups.consumer
        inputs_of = worker.kept(KeptInputs)
        assert inputs_of.fitted is not None
        whole = _layer(worker, groups, shard.weight(name), torch.ones_like(kept)).to(shard.dtype)

        def pairs(kept_inputs: LayerInputs) -> tuple[Tensor, Tensor]:
            stored_inputs = kept_inputs.look_at(name) if keeps_inputs else kept_inputs.take(name)
            inputs = stored_inputs.to(worker.device, shard.dtype)
            return inputs, outputs_of(whole, inputs)

        return reconstruct(
            _layer(worker, groups, W, kept),
            *pairs(inputs_of.fitted),
            None if inputs_of.held is None else pairs(inputs_of.held),
            learning_rate=rate,
            tokens_per_step=self.section.tokens_per_step,
            num_epochs=num_epochs,
            generator=torch.Generator().manual_seed(
                self.section.seed + worker.layout.linear_numbers[name]
            ),
        )

    def end(self, worker: Worker, sets: Sequence[GroupSet]) -> None:
        """Send the producers of trained layers from their owners, and drop all inputs.

        Every replica calls this, for the same layers.
        """
        for groups in sets if worker.placement.num_replicas > 1 else ():
            for name in dict.fromkeys(producer for producer, _ in groups.producers):
                V = worker.shard.weight(name)
                worker.replicas.broadcast(V, worker.owner(groups.consumer))
                worker.shard.set_weight(name, V)
        worker.drop(KeptInputs)

    # On the coordinator

    def keep_held(self, cluster: Cluster, held: NDArray[np.int64]) -> None:
        """Let owners keep the inputs of their layers for the windows held aside."""
        if not len(held):
            return
        arrivals = Arrivals(0, len(held), int(held.shape[1]), cluster.placement.num_replicas)
        cluster.run_all(self.start, arrivals)
        if not pass_up_to_the_head(cluster, held, range(len(held)), None):
            raise FloatingPointError(
                "the hidden states of the windows held aside are not finite; check the weights and "
                "the dtype"
            )
        cluster.run_all(self.share, arrivals, are_held=True)

    @staticmethod
    def best_rate(errors: Mapping[float, Sequence[float]]) -> float:
        """Return the learning rate with the smallest mean of relative errors.

        Errors that are no number count as no gain.
        """
        means = {
            rate: float(np.mean([e if np.isfinite(e) else np.inf for e in of_rate]))
            for rate, of_rate in errors.items()
        }
        return min(means, key=lambda rate: means[rate])


def errors_of(worker: Worker) -> Errors:
    """Return what reconstructions of a shot left on a worker."""
    return worker.kept(Errors)


def summary_of(errors: Mapping[str, tuple[float, float]]) -> dict[str, float | int]:
    """Return what one line says of a shot's layers.

    That is how many were trained and undone, and the mean of their relative errors.
    """
    trained = {name: pair for name, pair in errors.items() if pair[0] > 0}
    better = [after / before for before, after in trained.values() if after < before]
    undone = len(trained) - len(better)
    ratio = (sum(better) + undone) / len(trained) if trained else 1.0
    return {"layers": len(trained), "layers undone": undone, "error held aside": ratio}


def _layer(worker: Worker, groups: GroupSet, W: Tensor, kept: Tensor) -> FeedForward:
    """Return what is left of a layer if some of its groups are.

    The producers are those that the worker has.
    """
    producers = []
    for name, rows in groups.producers:
        V = worker.shard.weight(name)
        producers.append(V[rows[kept].flatten().to(V.device)])
    return FeedForward(
        tuple(producers), W[:, _columns(groups, kept, W)], ACT2FN[worker.layout.activation]
    )


def _columns(groups: GroupSet, kept: Tensor, W: Tensor) -> Tensor:
    """Return the columns of a consumer W [R, C] that are left.

    They come in the order of the producers' rows, the bias's last.
    """
    columns = groups.columns[kept].flatten().to(W.device)
    bias = torch.arange(int(groups.columns.max()) + 1, W.shape[1], device=W.device)
    return torch.cat([columns, bias])
