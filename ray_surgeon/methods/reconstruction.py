"""Reconstruction of feed-forward layers after their channels are pruned, see `ray_surgeon.surgery.reconstruction`.

The inputs of every layer are kept in the curvature pass, when the weights are those from before the shot. Then every layer is the work of
the owner of its consumer, which gets the inputs of all replicas, and trains it while other owners train theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.activations import ACT2FN

from ray_surgeon.cluster.worker import Worker, collective
from ray_surgeon.methods.groups_section import ReconstructionSection
from ray_surgeon.models.layer_inputs import LayerInputs
from ray_surgeon.models.layout import GroupSet
from ray_surgeon.sections.curvature import AnyCurvature
from ray_surgeon.surgery.masks import StructuredMask
from ray_surgeon.surgery.reconstruction import FeedForward, outputs_of, reconstruct


@dataclass
class Errors:
    """What reconstructions of a shot left on a worker for the report: consumer -> its mean loss before and after."""

    of_layer: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Arrivals:
    """In which order the calibration sequences pass, so that the number of replicas changes nothing: replicas take them in turns."""

    num_backward: int  # sequences that pass backward, too; they come first
    num_sequences: int  # all of them
    sequence_length: int
    num_replicas: int

    @staticmethod
    def in_pass(curvature: AnyCurvature, sequences: NDArray[np.int64], num_replicas: int) -> Arrivals:
        """Return that of a curvature pass over sequences [num_sequences, sequence_length]."""
        num_backward = 0 if curvature.kind == "activations" else curvature.sequences_backward or len(sequences)
        return Arrivals(num_backward, len(sequences), int(sequences.shape[1]), num_replicas)

    def of(self, replica: int) -> list[int]:
        """Return when the sequences of a replica would come if it were the only one, in the order in which they come to it."""
        first, N = self.num_backward, self.num_replicas
        return [*range(replica, first, N), *range(first + replica, self.num_sequences, N)]


@dataclass(frozen=True)
class Reconstruction:
    """The reconstruction of one run."""

    section: ReconstructionSection
    kinds: frozenset[str]  # of the groups whose layers are trained

    def start(self, worker: Worker, arrivals: Arrivals) -> None:
        """Let the next curvature pass keep the inputs of the layers."""
        shard = worker.shard
        layers = {
            groups.consumer: (groups.block - shard.blocks.first, shard.linears[groups.producers[0][0]])
            for groups in worker.group_sets
            if groups.kind in self.kinds
        }
        shard.layer_inputs = LayerInputs(layers, len(arrivals.of(worker.replicas.rank)) * arrivals.sequence_length)

    @collective
    def share(self, worker: Worker, arrivals: Arrivals) -> None:
        """Send the inputs of every layer to the owner of its consumer, after the pass, in the order that one replica has."""
        inputs, N, rank = worker.shard.layer_inputs, worker.placement.num_replicas, worker.replicas.rank
        assert inputs is not None
        for name in inputs.names if N > 1 else ():
            own, owner = inputs.take(name), worker.owner(name)
            own = own.view(-1, arrivals.sequence_length, own.shape[1])
            everything = own.new_empty(arrivals.num_sequences, *own.shape[1:]) if owner == rank else None
            for one in range(N):
                part = own if one == rank else own.new_empty(len(arrivals.of(one)), *own.shape[1:])
                if one != owner:
                    moving = part.to(worker.device)
                    worker.replicas.broadcast(moving.view(torch.uint8), one)
                    part = moving.cpu()
                if everything is not None:
                    everything[arrivals.of(one)] = part
            if everything is not None:
                inputs.put(name, everything.flatten(0, 1))
        worker.keep(Errors())

    def fitted(self, worker: Worker, groups: GroupSet, W: Tensor) -> Tensor:
        """Train an owned layer after groups were removed, set its producers, and return its consumer.

        Args:
            worker: whose weights are those from before, and whose mask of the consumer is the new one.
            groups: those of the layer.
            W: [R, C] the consumer after its update, zero in what is removed.
        """
        shard, name, section = worker.shard, groups.consumer, self.section
        assert shard.layer_inputs is not None
        kept = worker.mask(name, StructuredMask).columns[groups.columns].all(dim=1)
        if not kept.any():
            return W
        whole = _layer(worker, groups, shard.weight(name), torch.ones_like(kept))
        inputs = shard.layer_inputs.take(name).to(worker.device, shard.dtype)
        wanted = outputs_of(whole.to(shard.dtype), inputs)
        found = reconstruct(
            _layer(worker, groups, W, kept),
            inputs,
            wanted,
            learning_rate=section.learning_rate,
            tokens_per_step=section.tokens_per_step,
            num_epochs=section.num_epochs,
            generator=torch.Generator().manual_seed(section.seed + worker.layout.linear_numbers[name]),
        )
        worker.kept(Errors).of_layer[name] = found.before, found.after
        for (producer, rows), V in zip(groups.producers, found.layer.producers, strict=True):
            changed = shard.weight(producer)
            changed[rows[kept].flatten().to(changed.device)] = V
            shard.set_weight(producer, changed)
        return W.index_copy(1, _columns(groups, kept, W), found.layer.consumer)

    def end(self, worker: Worker, sets: Sequence[GroupSet]) -> None:
        """Send the producers of trained layers from the owners of their consumers to the other replicas, and keep inputs no longer.

        Every replica calls this, for the same layers.
        """
        for groups in sets if worker.placement.num_replicas > 1 else ():
            for name in dict.fromkeys(producer for producer, _ in groups.producers):
                V = worker.shard.weight(name)
                worker.replicas.broadcast(V, worker.owner(groups.consumer))
                worker.shard.set_weight(name, V)
        worker.shard.layer_inputs = None


def errors_of(worker: Worker) -> dict[str, tuple[float, float]]:
    """Return the errors of the layers that a worker owns, before and after."""
    return worker.kept(Errors).of_layer


def _layer(worker: Worker, groups: GroupSet, W: Tensor, kept: Tensor) -> FeedForward:
    """Return what is left of a layer if some of its groups are, with the producers that the worker has."""
    producers = []
    for name, rows in groups.producers:
        V = worker.shard.weight(name)
        producers.append(V[rows[kept].flatten().to(V.device)])
    return FeedForward(tuple(producers), W[:, _columns(groups, kept, W)], ACT2FN[worker.layout.activation])


def _columns(groups: GroupSet, kept: Tensor, W: Tensor) -> Tensor:
    """Return the columns of a consumer W [R, C] that are left, in the order of the producers' rows, its bias's last."""
    columns = groups.columns[kept].flatten().to(W.device)
    bias = torch.arange(int(groups.columns.max()) + 1, W.shape[1], device=W.device)
    return torch.cat([columns, bias])
