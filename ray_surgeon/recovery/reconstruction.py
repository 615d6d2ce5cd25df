"""Reconstruction of feed-forward layers after their channels are pruned.

See `ray_surgeon.maths.reconstruction`.

The inputs of every layer are kept in the curvature pass, while the weights are still those from
before the shot; the inputs for the windows held aside are kept in a separate pass. Then the owner
of each layer's consumer receives the inputs of all replicas and trains the layer, while other
owners train theirs. A layer that is no better on the windows held aside stays as the update left
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from ray_surgeon.config.groups import ReconstructionSection
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.microbatch import Tokens
from ray_surgeon.distributed.passes import pass_up_to_the_head
from ray_surgeon.distributed.worker import Worker, collective
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.reconstruction import (
    FeedForward,
    Reconstructed,
    outputs_of,
    reconstruct,
)
from ray_surgeon.models.hooks import LayerInputs
from ray_surgeon.models.layout import GroupSet
from ray_surgeon.run_state import CalibrationText, Facts, RunState

RATES = (0.003, 0.006, 0.012)
"""Learning rates that are tried, relative to the root mean square of each weight.

The last one was the best on SmolLM2 with much text.
"""
TRIAL_PART = 0.25
"""Fraction of an epoch for which each rate is tried, on two layers."""


def layer_errors(worker: Worker) -> dict[str, tuple[float, float]]:
    """Return the mean losses held aside of the layers that the worker trained.

    Returns:
        Name of a layer's consumer -> mean loss before and after the training.
    """
    return worker.state.layer_errors


Arrivals = list[list[int]]
"""For each replica, the positions that its sequences would have on a single replica.

They are listed in the order in which the replica sees them. Replicas take sequences in turns, first
those that also pass backward; so results do not depend on the number of replicas.
"""


@dataclass(frozen=True)
class Reconstruction:
    """The reconstruction of one run."""

    section: ReconstructionSection
    kinds: frozenset[str]  # kinds of groups whose layers are trained
    # sequences that pass backward in the curvature pass, 0 if none do, None if all do
    num_backward: int | None

    # On a worker

    def start(self, worker: Worker, arrivals: Arrivals, length: int) -> None:
        """Let the next pass keep the inputs of the layers for sequences of a length."""
        shard = worker.shard
        layers = {}
        for groups in worker.group_sets:
            if groups.kind in self.kinds:
                first_producer, _ = groups.producers[0]
                block = groups.block - shard.blocks.first
                layers[groups.consumer] = (block, shard.linears[first_producer])
        num_tokens = length * len(arrivals[worker.replicas.rank])
        shard.layer_inputs = LayerInputs(layers, num_tokens, shard.device)
        worker.state.layer_errors = {}

    @collective
    def share(self, worker: Worker, arrivals: Arrivals, length: int) -> None:
        """Send the inputs of every layer to the owner of its consumer, after a pass.

        The owner arranges them in the order of a single replica.

        Args:
            worker: worker of any replica; all replicas call this.
            arrivals: arrivals of the sequences of the pass.
            length: tokens of a sequence.
        """
        inputs = worker.shard.layer_inputs
        assert inputs is not None
        if len(arrivals) > 1:
            for name in list(inputs.kept):
                own = inputs.kept.pop(name)
                own = own.view(-1, length, own.shape[1])
                shared = _sent_to_owner(worker, own, arrivals, worker.owner(name))
                if shared is not None:
                    inputs.kept[name] = shared.flatten(0, 1)
        worker.shard.layer_inputs = None
        worker.state.layer_inputs.append(inputs)

    def tried(
        self, worker: Worker, groups: GroupSet, W: Tensor, kept: Tensor
    ) -> list[tuple[float, float]]:
        """Train an owned layer briefly with every rate of `RATES`; its weights do not change.

        Args:
            worker: worker with the weights from before the shot.
            groups: groups of the layer.
            W: [R, C] the consumer after its update, zero in removed columns.
            kept: [num_groups] bool, the groups that stay.

        Returns:
            Pairs of a rate and the error held aside after it, relative to the error before.
        """
        tried = []
        trained = self._trained(worker, groups, W, kept, RATES)
        for rate, result in zip(RATES, trained, strict=True):
            error = 1.0
            if result.before:
                error = result.after / result.before
            tried.append((rate, error))
        return tried

    def fitted(self, worker: Worker, groups: GroupSet, W: Tensor, rate: float) -> Tensor:
        """Train an owned layer after groups were removed, and set its producers.

        Args:
            worker: worker with the weights from before the shot and the consumer's new mask.
            groups: groups of the layer.
            W: [R, C] the consumer after its update, zero in removed columns.
            rate: the learning rate.

        Returns:
            [R, C], the trained consumer.
        """
        shard = worker.shard
        name = groups.consumer
        kept = worker.mask(name, StructuredMask).columns[groups.columns].all(dim=1)
        if not kept.any():
            return W
        (trained,) = self._trained(worker, groups, W, kept, [rate])
        worker.state.layer_errors[name] = trained.before, trained.after
        *producers, consumer = trained.layer.weights
        for (producer, rows), V in zip(groups.producers, producers, strict=True):
            changed = shard.weight(producer)
            changed[rows[kept].flatten().to(changed.device)] = V
            shard.set_weight(producer, changed)
        return W.index_copy(1, _columns(groups, kept, W), consumer)

    def _trained(
        self,
        worker: Worker,
        groups: GroupSet,
        W: Tensor,
        kept: Tensor,
        rates: Sequence[float],
    ) -> Iterator[Reconstructed]:
        """Yield an owned layer trained with each rate, briefly if there are several to try."""
        is_trial = len(rates) > 1
        shard = worker.shard
        name = groups.consumer
        everything = torch.ones_like(kept)
        whole = _layer(worker, groups, shard.weight(name), everything).to(shard.dtype)
        left = _layer(worker, groups, W, kept)

        def pairs(stored: LayerInputs) -> tuple[Tensor, Tensor]:
            inputs = stored.kept[name] if is_trial else stored.kept.pop(name)
            inputs = inputs.to(worker.device, shard.dtype)
            return inputs, outputs_of(whole, inputs)

        num_epochs: float = self.section.num_epochs
        if is_trial:
            num_epochs = TRIAL_PART
        seed = self.section.seed + worker.layout.linear_numbers[name]
        stored = worker.state.layer_inputs  # of the calibration and of held-out windows
        inputs, outputs = pairs(stored[0])
        held = pairs(stored[1]) if len(stored) > 1 else None
        for rate in rates:
            yield reconstruct(
                left,
                inputs=inputs,
                outputs=outputs,
                held=held,
                learning_rate=rate,
                tokens_per_step=self.section.tokens_per_step,
                num_epochs=num_epochs,
                generator=torch.Generator().manual_seed(seed),
            )

    def end(self, worker: Worker, sets: Iterable[GroupSet]) -> None:
        """Broadcast the producers of trained layers from their owners, and drop all inputs.

        Every replica calls this, for the same layers.
        """
        owners = {}
        for groups in sets:
            owner = worker.owner(groups.consumer)
            for name, _ in groups.producers:
                owners[name] = owner
        worker.share_weights(owners)
        worker.state.layer_inputs = []

    # On the coordinator

    def report(self, run: RunState, facts: Facts) -> None:
        """Report which layers the update trained, and their errors held aside."""
        workers = run.cluster.run_all(layer_errors)
        errors = {name: pair for own in workers for name, pair in own.items()}
        rate = run.record["reconstruction_rate"] if errors else 0.0
        run.record["reconstruction"] = errors
        run.record["reconstruction_rate"] = rate
        trained = [(before, after) for before, after in errors.values() if before > 0]
        better = [after / before for before, after in trained if after < before]
        undone = len(trained) - len(better)
        ratio = (sum(better) + undone) / len(trained) if trained else 1.0
        facts["rate"] = rate
        facts["layers"] = len(trained)
        facts["layers undone"] = undone
        facts["error held aside"] = ratio

    @contextmanager
    def around_pass(self, cluster: Cluster, text: CalibrationText) -> Iterator[None]:
        """Let workers keep the inputs of the layers in the curvature pass over a text.

        After the pass, the inputs are sent to the layers' owners. So are those for the windows held
        aside, after a pass over these.
        """
        with self._keeping(cluster, text.tokens, self.num_backward):
            yield
        held = text.held
        if len(held):
            with self._keeping(cluster, held, 0):
                pass_up_to_the_head(cluster, held, None, None, "the windows held aside")

    @contextmanager
    def _keeping(
        self,
        cluster: Cluster,
        tokens: Tokens,
        backward: int | None,
    ) -> Iterator[None]:
        """Let workers keep inputs in a pass over tokens; for `backward` see `num_backward`."""
        count, length = tokens.shape
        num_backward = count
        if backward is not None:
            num_backward = min(backward, count)
        N = cluster.placement.num_replicas
        arrivals = []
        for i in range(N):
            own = [*range(i, num_backward, N), *range(num_backward + i, count, N)]
            arrivals.append(own)
        cluster.run_all(self.start, arrivals, length)
        yield
        cluster.run_all(self.share, arrivals, length)

    @staticmethod
    def best_rate(tried: Sequence[tuple[float, float]]) -> float:
        """Return the learning rate with the smallest mean of relative errors over the trials.

        A mean that is not finite counts as no gain.
        """
        best = RATES[0]
        best_mean = np.inf
        for rate in RATES:
            errors = [error for tried_rate, error in tried if tried_rate == rate]
            if not errors:
                continue
            mean = float(np.mean(errors))
            if np.isfinite(mean) and mean < best_mean:
                best = rate
                best_mean = mean
        return best


def _sent_to_owner(
    worker: Worker,
    own: Tensor,
    arrivals: Arrivals,
    owner: int,
) -> Tensor | None:
    """Send a layer's inputs to its owner.

    Args:
        worker: worker of any replica; all replicas call this.
        own: [n, T, C] inputs of the worker's sequences.
        arrivals: arrivals of the sequences of all replicas.
        owner: rank of the replica that owns the layer.

    Returns:
        [N, T, C] for all sequences, in the order of `arrivals`; None if the worker is not the
        owner.
    """
    rank = worker.replicas.rank
    received = None
    if owner == rank:
        received = own.new_empty(sum(map(len, arrivals)), *own.shape[1:])
    for replica, places in enumerate(arrivals):
        part = own
        if replica != rank:
            part = own.new_empty(len(places), *own.shape[1:])
        if replica != owner and places:
            moving = part.to(worker.device)
            worker.replicas.broadcast(moving.view(torch.uint8), replica)
            part = moving.cpu()
        if received is not None:
            received[places] = part
    return received


def _layer(worker: Worker, groups: GroupSet, W: Tensor, kept: Tensor) -> FeedForward:
    """Return a layer reduced to its kept groups, with the producers' weights on the worker."""
    weights = []
    for name, rows in groups.producers:
        V = worker.shard.weight(name)
        weights.append(V[rows[kept].flatten().to(V.device)])
    weights.append(W[:, _columns(groups, kept, W)])
    return FeedForward(tuple(weights), ACT2FN[worker.layout.activation])


def _columns(groups: GroupSet, kept: Tensor, W: Tensor) -> Tensor:
    """Return the indices of the kept columns of a consumer W [R, C].

    They are in the order of the producers' rows; the bias's column is last.
    """
    columns = groups.columns[kept].flatten().to(W.device)
    bias = torch.arange(int(groups.columns.max()) + 1, W.shape[1], device=W.device)
    return torch.cat([columns, bias])
