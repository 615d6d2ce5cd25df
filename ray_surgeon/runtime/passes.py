"""Passes of text through the shards, and what is measured by them.

Activations go from worker to worker; the coordinator sees references, losses and, for a comparison
of exports, logits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ray_surgeon.maths.packed import PackedSymmetric
from ray_surgeon.models.loss import perplexity_of
from ray_surgeon.runtime import wave as on_worker
from ray_surgeon.runtime.cluster import Cluster, at_hand, value_of
from ray_surgeon.runtime.collectives import TensorPayload
from ray_surgeon.runtime.pipelines import run_pass
from ray_surgeon.runtime.placement import WorkerIndex
from ray_surgeon.runtime.wave import Counts, Only, Passage, Tokens
from ray_surgeon.runtime.worker import Worker, collective


def num_counted(sequences: Tokens, counts: Counts = None, only: Only = None) -> int:
    """Return how many tokens are predicted and count; the first of a sequence is not predicted.

    Args:
        sequences: [num_sequences, sequence_length] tokens.
        counts: [num_sequences, sequence_length], whether a token counts; None if all do.
        only: numbers of the sequences that are meant; all if not given.
    """
    numbers = Passage(sequences, only=only).numbers
    if counts is None:
        return len(numbers) * (int(sequences.shape[1]) - 1)
    return int(counts[numbers, 1:].sum())


def sequence_losses(
    cluster: Cluster, sequences: Tokens, counts: Counts = None, text: str | None = None
) -> list[float]:
    """Return the NLL in nats of sequences, summed over the tokens that count.

    Args:
        cluster: with loaded workers.
        sequences: [num_sequences, sequence_length] tokens.
        counts: [num_sequences, sequence_length], whether a token counts; None if all do.
        text: as whose states those before the head are kept by the last shards of all replicas;
            None if they are not.
    """
    return run_pass(cluster, Passage(sequences, counts, text=text), on_worker.nll)


def pass_up_to_the_head(
    cluster: Cluster,
    sequences: Tokens,
    only: Only,
    text: str | None,
    whose: str,
    of_teacher: bool = False,
) -> None:
    """Run sequences forward without the head.

    The head costs as much as several blocks.

    Args:
        cluster: with loaded workers, whose hooks gather what is wanted.
        sequences: [num_sequences, sequence_length] tokens.
        only: numbers of the sequences to run; None for all.
        text: as whose states those before the head are kept by the last shards of all replicas;
            None if they are not.
        whose: states they are, for the error.
        of_teacher: whether they pass the teacher's blocks.

    Raises:
        FloatingPointError: a state before the head is not finite.
    """
    passage = Passage(sequences, None, only, text, of_teacher)
    if not all(run_pass(cluster, passage, on_worker.is_finite)):
        finite(f"a hidden state of {whose}", math.nan)


@dataclass(frozen=True)
class Measured:
    """What an evaluation finds on one text."""

    perplexity: float  # exp of the mean NLL of the predicted tokens that count
    divergence: float  # mean over them of the divergence from the dense model, in nats


def remember(cluster: Cluster, text: str, windows: Tokens, counts: Counts = None) -> float:
    """Return the dense model's perplexity, and keep its hidden states.

    See `sequence_losses`.

    Raises:
        FloatingPointError: the loss is not a number.
    """
    losses = sequence_losses(cluster, windows, counts, text)
    perplexity = perplexity_of(sum(losses) / num_counted(windows, counts))
    return finite(f"the perplexity on {text}, or its divergence,", perplexity)


def measure(cluster: Cluster, text: str, windows: Tokens) -> Measured:
    """Measure the present weights on a text that was remembered.

    Args:
        cluster: with loaded workers.
        text: its name.
        windows: [num_sequences, sequence_length] tokens; ``sequence_length - 1`` are predicted in
            each.

    Raises:
        FloatingPointError: the loss is not a number.
    """
    comparisons = compared(cluster, text, windows)
    num_tokens = num_counted(windows)
    loss = sum(sums["nll"] for sums in comparisons) / num_tokens
    divergence = sum(sums["divergence"] for sums in comparisons) / num_tokens
    what = f"the perplexity on {text}, or its divergence,"
    return Measured(finite(what, perplexity_of(loss)), finite(what, divergence))


def divergences_of(cluster: Cluster, text: str, windows: Tokens) -> list[float]:
    """Return the divergence from the dense model of every window of a remembered text.

    Values are in nats per predicted token.

    Raises:
        FloatingPointError: one is not a number.
    """
    what = f"the divergence from the dense model on {text}"
    num_tokens = windows.shape[1] - 1
    comparisons = compared(cluster, text, windows)
    return [finite(what, sums["divergence"] / num_tokens) for sums in comparisons]


def compared(
    cluster: Cluster, text: str, windows: Tokens, counts: Counts = None, *, acceptance: bool = False
) -> list[on_worker.Compared]:
    """Compare the present weights with the dense ones on windows of a remembered text.

    Returned is, for every window, what `on_worker.comparison` returns.

    Args:
        cluster: with loaded workers.
        text: its name.
        windows: [num_sequences, sequence_length] tokens.
        counts: [num_sequences, sequence_length], whether a token counts; None if all do.
        acceptance: whether to compute acceptance and agreement.
    """
    comparison = partial(on_worker.comparison, text=text, with_acceptance=acceptance)
    return run_pass(cluster, Passage(windows, counts), comparison)


def finite(what: str, value: float) -> float:
    """Return a value.

    Raises:
        FloatingPointError: it is not finite; says what it is.
    """
    if not math.isfinite(value):
        raise FloatingPointError(f"{what} is not finite; check the weights and the dtype")
    return value


def logits(cluster: Cluster, tokens: Sequence[int]) -> TensorPayload:
    """Return the logits [1, T, vocabulary] of one sequence."""
    passage = Passage(np.array([tokens], dtype=np.int64))
    (of_sequence,) = run_pass(cluster, passage, on_worker.logits)
    cluster.progress.begin()  # what the step does next is not counted
    return of_sequence


class BlockPass(ABC):
    """Changes linears block after block, while all sequences wait.

    Every block sees what the changed blocks before it give. The object travels to the workers, as
    methods do.
    """

    anew: ClassVar[bool] = True
    """Whether factors of an earlier pass are freed; if not, they have no A."""
    changes: ClassVar[bool] = True
    """Whether linears change, so that replicas have to share them."""

    @abstractmethod
    def change(self, worker: Worker, name: str, A: Tensor) -> None:
        """Change a linear of a worker.

        A [C, C] is the mean second moment of its inputs, the bias's ones included.
        """

    # On a worker

    def enter(self, worker: Worker, micro_batch: int, inputs: TensorPayload) -> None:
        """Take a micro-batch that will pass the shard block by block."""
        hidden, worker.state.calls = worker.runner.enter(worker.unpack(inputs))
        worker.state.waiting[micro_batch] = hidden

    @collective
    @torch.no_grad()
    def pass_shard(self, worker: Worker, shard: int) -> None:
        """Change the blocks of one shard in turn; workers of other shards do nothing."""
        if shard != worker.index.shard:
            return
        waiting = worker.state.waiting
        for place in range(len(worker.shard.block_modules)):
            self._change_block(worker, place)
            with worker.shard.weights.block(place):
                for micro_batch, hidden in waiting.items():
                    waiting[micro_batch] = worker.runner.through(place, hidden, worker.state.calls)

    def _change_block(self, worker: Worker, place: int) -> None:
        """Sum A of every shared input of a block over all micro-batches, and change its linears.

        See `ModelShard.start_curvature`, kind ``activations``.
        """
        shard = worker.shard
        on_cpu = worker.device.type == "cpu"  # where the products of all threads change at once
        shard.start_curvature("activations", anew=self.anew)
        with shard.weights.block(place), shard.gathering_in(place, wide=on_cpu):
            for hidden in worker.state.waiting.values():
                worker.runner.through(place, hidden, worker.state.calls)
        shard.stop_gathering()
        groups = [group for group in shard.gathering if group.place == place]
        store = shard.factor_store
        for group in groups:
            key = group.key_of_A
            total = PackedSymmetric(group.sizes[key], store.on_device(key))
            num_tokens = torch.tensor(group.num_tokens, device=worker.device)
            for tensor in (total.flat, num_tokens):
                worker.replicas.reduce(tensor, worker.owner(group.names[0]))
            store.drop(key)
            if worker.owns(group.names[0]):
                A = total.dense().div_(max(1, int(num_tokens)))
                # which no token reached: zeros would say that no weight of it matters
                if not num_tokens:
                    A.fill_diagonal_(1.0)
                for name in group.names:
                    self.change(worker, name, A)
        if self.changes:
            worker.share_linears(name for group in groups for name in group.names)

    def leave(self, worker: Worker, micro_batch: int) -> TensorPayload:
        """Hand over a micro-batch that has passed all blocks."""
        return worker.pack(worker.runner.leave(worker.state.waiting.pop(micro_batch)))

    def forget(self, worker: Worker) -> None:
        """Free what the pass kept."""
        worker.state.waiting = {}
        worker.state.calls = []

    # On the coordinator

    def pass_all(self, cluster: Cluster, sequences: Tokens) -> None:
        """Change shard after shard, block after block, while the sequences pass once."""
        num_shards = cluster.placement.num_shards
        num_replicas = cluster.placement.num_replicas
        moving = [at_hand(tokens[None]) for tokens in sequences]
        cluster.progress.begin(num_shards, "shards")
        for shard in range(num_shards):
            workers = [(i, WorkerIndex(shard, i % num_replicas)) for i in range(len(sequences))]
            cluster.get([cluster.submit(w, self.enter, i, value_of(moving[i])) for i, w in workers])
            moving.clear()  # workers have taken them out of the object store
            cluster.run_all(self.pass_shard, shard)
            if shard < num_shards - 1:
                moving = [cluster.submit(w, self.leave, i) for i, w in workers]
            cluster.progress.reach(shard + 1)
        cluster.run_all(self.forget)
