"""Reconstruction of feed-forward layers after their channels are pruned.

See `ray_surgeon.maths.reconstruction`.

The inputs of every layer are kept in the curvature pass, when the weights are those from before the
shot, and those of the windows held aside in a pass of their own. Then every layer is the work of
the owner of its consumer, which gets the inputs of all replicas, and trains it while other owners
train theirs. A layer that is no better on the windows held aside stays as the update left it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.reconstruction import FeedForward, Reconstructed, outputs_of, reconstruct
from ray_surgeon.models.groups import GroupSet
from ray_surgeon.models.hooks import LayerInputs
from ray_surgeon.run_state import CalibrationText, Facts, RunState
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.passes import pass_up_to_the_head
from ray_surgeon.runtime.wave import Tokens
from ray_surgeon.runtime.worker import Worker, collective
from ray_surgeon.spec.reconstruction import ReconstructionSection

RATES = (0.003, 0.006, 0.012)
"""Learning rates that are tried, relative to the root mean square of each weight.

The last one was the best on SmolLM2 with much text.
"""
TRIAL_PART = 0.25
"""Share of a pass over the calibration tokens that each of them is tried for, on two layers."""


def layer_errors(worker: Worker) -> dict[str, tuple[float, float]]:
    """Return, by the consumer of each layer that the worker trained, its mean loss held aside.

    That is before and after the training.
    """
    return worker.state.layer_errors


Arrivals = list[list[int]]
"""For each replica, when its sequences would come to a single replica.

They are in the order in which they come to it. Replicas take sequences in turns, first those that
pass backward, too; so the number of replicas changes nothing.
"""


@dataclass(frozen=True)
class Reconstruction:
    """The reconstruction of one run."""

    section: ReconstructionSection
    kinds: frozenset[str]  # of the groups whose layers are trained
    # sequences that pass backward in the curvature pass, 0 if none do, None if all do
    num_backward: int | None

    # On a worker

    def start(self, worker: Worker, arrivals: Arrivals, length: int) -> None:
        """Let the next pass keep the inputs of the layers for sequences of a length."""
        shard = worker.shard
        first = shard.blocks.first
        sets = (groups for groups in worker.group_sets if groups.kind in self.kinds)
        layers = {g.consumer: (g.block - first, shard.linears[g.producers[0][0]]) for g in sets}
        num_tokens = length * len(arrivals[worker.replicas.rank])
        shard.layer_inputs = LayerInputs(layers, num_tokens, shard.device)
        worker.state.layer_errors = {}

    @collective
    def share(self, worker: Worker, arrivals: Arrivals, length: int) -> None:
        """Send the inputs of every layer to the owner of its consumer, after a pass.

        They come in the order that one replica has.

        Args:
            worker: of any replica; all of them call this.
            arrivals: of the sequences of the pass.
            length: of a sequence.
        """
        inputs = worker.shard.layer_inputs
        assert inputs is not None
        rank = worker.replicas.rank
        for name in list(inputs.kept) if len(arrivals) > 1 else ():
            own = inputs.kept.pop(name)
            own = own.view(-1, length, own.shape[1])
            owner = worker.owner(name)
            everything = own.new_empty(sum(map(len, arrivals)) * (owner == rank), *own.shape[1:])
            for replica, places in enumerate(arrivals):
                part = own if replica == rank else own.new_empty(len(places), *own.shape[1:])
                if replica != owner and places:
                    moving = part.to(worker.device)
                    worker.replicas.broadcast(moving.view(torch.uint8), replica)
                    part = moving.cpu()
                if owner == rank:
                    everything[places] = part
            if owner == rank:
                inputs.kept[name] = everything.flatten(0, 1)
        worker.shard.layer_inputs = None
        worker.state.layer_inputs.append(inputs)

    def tried(
        self, worker: Worker, groups: GroupSet, W: Tensor, kept: Tensor
    ) -> list[tuple[float, float]]:
        """Train an owned layer shortly with every rate of `RATES`; nothing changes.

        Args:
            worker: whose weights are those from before.
            groups: those of the layer.
            W: [R, C] the consumer after its update, zero in what is removed.
            kept: [num_groups] bool, the groups that stay.

        Returns:
            Each rate, and the error held aside after it as a share of the error before.
        """
        every = self._trained(worker, groups, W, kept, RATES)
        errors = (each.after / each.before if each.before else 1.0 for each in every)
        return list(zip(RATES, errors, strict=True))

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
        (trained,) = self._trained(worker, groups, W, kept, [rate])
        worker.state.layer_errors[name] = trained.before, trained.after
        *producers, consumer = trained.layer.weights
        for (producer, rows), V in zip(groups.producers, producers, strict=True):
            changed = shard.weight(producer)
            changed[rows[kept].flatten().to(changed.device)] = V
            shard.set_weight(producer, changed)
        return W.index_copy(1, _columns(groups, kept, W), consumer)

    def _trained(
        self, worker: Worker, groups: GroupSet, W: Tensor, kept: Tensor, rates: Sequence[float]
    ) -> Iterator[Reconstructed]:
        """Yield an owned layer trained with each rate, shortly if there are several to try."""
        is_trial = len(rates) > 1
        shard = worker.shard
        name = groups.consumer
        whole = _layer(worker, groups, shard.weight(name), torch.ones_like(kept)).to(shard.dtype)
        left = _layer(worker, groups, W, kept)

        def pairs(stored: LayerInputs) -> tuple[Tensor, Tensor]:
            inputs = stored.kept[name] if is_trial else stored.kept.pop(name)
            inputs = inputs.to(worker.device, shard.dtype)
            return inputs, outputs_of(whole, inputs)

        seed = self.section.seed + worker.layout.linear_numbers[name]
        fitted, *held = map(pairs, worker.state.layer_inputs)
        for rate in rates:
            yield reconstruct(
                left,
                *fitted,
                *held,
                learning_rate=rate,
                tokens_per_step=self.section.tokens_per_step,
                num_epochs=TRIAL_PART if is_trial else self.section.num_epochs,
                generator=torch.Generator().manual_seed(seed),
            )

    def end(self, worker: Worker, sets: Iterable[GroupSet]) -> None:
        """Send the producers of trained layers from their owners, and drop all inputs.

        Every replica calls this, for the same layers.
        """
        producers = ((name, groups) for groups in sets for name, _ in groups.producers)
        worker.share_weights({name: worker.owner(groups.consumer) for name, groups in producers})
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

        After it they are sent to the layers' owners, and those for the windows held aside.
        """
        with self._keeping(cluster, text.tokens, self.num_backward):
            yield
        held = text.held
        if len(held):
            with self._keeping(cluster, held, 0):
                pass_up_to_the_head(cluster, held, None, None, "the windows held aside")

    @contextmanager
    def _keeping(self, cluster: Cluster, tokens: Tokens, backward: int | None) -> Iterator[None]:
        """Let workers keep inputs in a pass over tokens; `backward` is as `num_backward`."""
        count, length = tokens.shape
        first = count if backward is None else min(backward, count)
        N = cluster.placement.num_replicas
        arrivals = [[*range(i, first, N), *range(first + i, count, N)] for i in range(N)]
        cluster.run_all(self.start, arrivals, length)
        yield
        cluster.run_all(self.share, arrivals, length)

    @staticmethod
    def best_rate(tried: Sequence[tuple[float, float]]) -> float:
        """Return the learning rate with the smallest mean of relative errors, one at each trial.

        A mean that is no number counts as no gain.
        """
        means = {rate: np.mean([e for r, e in tried if r == rate] or np.inf) for rate in RATES}
        return min(RATES, key=lambda rate: (not np.isfinite(means[rate]), means[rate]))


def _layer(worker: Worker, groups: GroupSet, W: Tensor, kept: Tensor) -> FeedForward:
    """Return what is left of a layer if some of its groups are.

    The producers are those that the worker has.
    """
    weights = [(worker.shard.weight(name), rows[kept].flatten()) for name, rows in groups.producers]
    producers = (V[rows.to(V.device)] for V, rows in weights)
    consumer = W[:, _columns(groups, kept, W)]
    return FeedForward((*producers, consumer), ACT2FN[worker.layout.activation])


def _columns(groups: GroupSet, kept: Tensor, W: Tensor) -> Tensor:
    """Return the columns of a consumer W [R, C] that are left.

    They come in the order of the producers' rows, the bias's last.
    """
    columns = groups.columns[kept].flatten().to(W.device)
    bias = torch.arange(int(groups.columns.max()) + 1, W.shape[1], device=W.device)
    return torch.cat([columns, bias])
