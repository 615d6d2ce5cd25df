"""Passes of text through the shards: losses, comparisons with the dense model, and block passes.

Activations go from worker to worker. The coordinator sees references, losses and, to compare
exports, logits.
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

from ray_surgeon.distributed import microbatch as on_worker
from ray_surgeon.distributed.cluster import Cluster, at_hand, value_of
from ray_surgeon.distributed.collectives import TensorPayload
from ray_surgeon.distributed.microbatch import Counts, Only, Pass, Tokens
from ray_surgeon.distributed.pipelines import run_pass
from ray_surgeon.distributed.placement import WorkerIndex
from ray_surgeon.distributed.worker import Worker, collective
from ray_surgeon.maths.packed import PackedSymmetric
from ray_surgeon.models.hooks import SharedInput
from ray_surgeon.models.loss import perplexity_of


def num_counted(sequences: Tokens, counts: Counts = None, only: Only = None) -> int:
    """Return the number of predicted tokens that count; first tokens are not predicted.

    Args:
        sequences: [num_sequences, sequence_length] tokens.
        counts: [num_sequences, sequence_length], whether a token counts; None if all do.
        only: numbers of the sequences to include; None for all.
    """
    numbers = Pass(sequences, only=only).numbers
    if counts is None:
        return len(numbers) * (int(sequences.shape[1]) - 1)
    return int(counts[numbers, 1:].sum())


def sequence_losses(
    cluster: Cluster, sequences: Tokens, counts: Counts = None, text: str | None = None
) -> list[float]:
    """Return the NLL of each sequence in nats, summed over its tokens that count.

    Args:
        cluster: with loaded workers.
        sequences: [num_sequences, sequence_length] tokens.
        counts: [num_sequences, sequence_length], whether a token counts; None if all do.
        text: name under which the last shards of all replicas keep the hidden states before the
            head; None if they do not.
    """
    one_pass = Pass(tokens=sequences, counts=counts, text=text)
    return run_pass(cluster, one_pass, on_worker.nll)


def pass_up_to_the_head(
    cluster: Cluster,
    sequences: Tokens,
    only: Only,
    text: str | None,
    whose: str,
    of_teacher: bool = False,
) -> None:
    """Run sequences forward without the head, which costs as much as several blocks.

    Args:
        cluster: with loaded workers, whose hooks gather statistics.
        sequences: [num_sequences, sequence_length] tokens.
        only: numbers of the sequences to run; None for all.
        text: name under which the last shards of all replicas keep the hidden states before the
            head; None if they do not.
        whose: origin of the sequences, for the error.
        of_teacher: whether the sequences pass the teacher's blocks.

    Raises:
        FloatingPointError: a hidden state before the head is not finite.
    """
    one_pass = Pass(tokens=sequences, only=only, text=text, of_teacher=of_teacher)
    if not all(run_pass(cluster, one_pass, on_worker.is_finite)):
        finite(f"a hidden state of {whose}", math.nan)


@dataclass(frozen=True)
class Measured:
    """Results of an evaluation on one text."""

    perplexity: float  # exp of the mean NLL of the predicted tokens that count
    divergence: float  # mean divergence from the dense model over these tokens, in nats


def remember(
    cluster: Cluster,
    text: str,
    windows: Tokens,
    counts: Counts = None,
) -> float:
    """Return the dense model's perplexity on a text, and keep its hidden states.

    See `sequence_losses` for the arguments.

    Raises:
        FloatingPointError: the perplexity is not finite.
    """
    losses = sequence_losses(cluster, windows, counts, text)
    perplexity = perplexity_of(sum(losses) / num_counted(windows, counts))
    return finite(f"the perplexity on {text}, or its divergence,", perplexity)


def measure(cluster: Cluster, text: str, windows: Tokens) -> Measured:
    """Measure the present weights on a text that was remembered.

    Args:
        cluster: with loaded workers.
        text: name of the text.
        windows: [num_sequences, sequence_length] tokens; ``sequence_length - 1`` are predicted in
            each window.

    Raises:
        FloatingPointError: the perplexity or the divergence is not finite.
    """
    comparisons = compared(cluster, text, windows)
    num_tokens = num_counted(windows)
    # `sum` of floats is more exact than a loop with += from Python 3.12 on
    loss = sum(sums["nll"] for sums in comparisons) / num_tokens
    divergence = sum(sums["divergence"] for sums in comparisons) / num_tokens
    quantity = f"the perplexity on {text}, or its divergence,"
    return Measured(
        perplexity=finite(quantity, perplexity_of(loss)),
        divergence=finite(quantity, divergence),
    )


def divergences_of(cluster: Cluster, text: str, windows: Tokens) -> list[float]:
    """Return the divergence from the dense model on every window of a remembered text.

    Values are in nats per predicted token.

    Raises:
        FloatingPointError: a divergence is not finite.
    """
    quantity = f"the divergence from the dense model on {text}"
    num_tokens = windows.shape[1] - 1
    comparisons = compared(cluster, text, windows)
    return [finite(quantity, sums["divergence"] / num_tokens) for sums in comparisons]


def compared(
    cluster: Cluster,
    text: str,
    windows: Tokens,
    counts: Counts = None,
    *,
    acceptance: bool = False,
) -> list[on_worker.Compared]:
    """Compare the present weights with the dense ones on windows of a remembered text.

    Args:
        cluster: with loaded workers.
        text: name of the text.
        windows: [num_sequences, sequence_length] tokens.
        counts: [num_sequences, sequence_length], whether a token counts; None if all do.
        acceptance: whether to compute acceptance and agreement.

    Returns:
        The result of `on_worker.comparison` for every window.
    """
    comparison = partial(on_worker.comparison, text=text, with_acceptance=acceptance)
    return run_pass(cluster, Pass(windows, counts), comparison)


def finite(what: str, value: float) -> float:
    """Return a value that must be finite.

    Args:
        what: name of the quantity, for the error.
        value: the value.

    Raises:
        FloatingPointError: the value is not finite.
    """
    if not math.isfinite(value):
        raise FloatingPointError(f"{what} is not finite; check the weights and the dtype")
    return value


def logits(cluster: Cluster, tokens: Sequence[int]) -> TensorPayload:
    """Return the logits [1, T, vocabulary] of one sequence."""
    one_pass = Pass(np.array([tokens], dtype=np.int64))
    (of_sequence,) = run_pass(cluster, one_pass, on_worker.logits)
    cluster.progress.begin()  # the rest of the step is not counted
    return of_sequence


class BlockPass(ABC):
    """Changes linears block after block, while all sequences wait.

    Every block receives the outputs of the changed blocks before it. The object is sent to the
    workers, like a method.
    """

    anew: ClassVar[bool] = True
    """Whether factors of an earlier pass are freed; if not, they have no A."""
    changes: ClassVar[bool] = True
    """Whether linears change, so that replicas have to share them."""

    @abstractmethod
    def change(self, worker: Worker, name: str, A: Tensor) -> None:
        """Change a linear of a worker.

        Args:
            worker: owns the linear.
            name: name of the linear.
            A: [C, C] mean second moment of its inputs, including the ones of the bias.
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
                    waiting[micro_batch] = worker.runner.through(
                        place, hidden, worker.state.calls
                    )

    def _change_block(self, worker: Worker, place: int) -> None:
        """Sum A of every shared input of a block over all micro-batches, and change its linears.

        See `ModelShard.start_curvature`, kind ``activations``.
        """
        shard = worker.shard
        # on CPUs the precision of products is a setting of all threads of the process
        on_cpu = worker.device.type == "cpu"
        shard.start_curvature("activations", anew=self.anew)
        with shard.weights.block(place), shard.gathering_in(place, wide=on_cpu):
            for hidden in worker.state.waiting.values():
                worker.runner.through(place, hidden, worker.state.calls)
        shard.stop_gathering()
        changed: list[str] = []
        for group in shard.gathering:
            if group.place == place:
                self._change_group(worker, group)
                changed.extend(group.names)
        if self.changes:
            worker.share_linears(changed)

    def _change_group(self, worker: Worker, group: SharedInput) -> None:
        """Sum A of a shared input over replicas, and change its linears on their owner."""
        store = worker.shard.factor_store
        owner = worker.owner(group.names[0])
        key = group.key_of_A
        total = PackedSymmetric(group.sizes[key], store.on_device(key))
        num_tokens = torch.tensor(group.num_tokens, device=worker.device)
        worker.replicas.reduce(total.flat, owner)
        worker.replicas.reduce(num_tokens, owner)
        store.drop(key)
        if not worker.owns(group.names[0]):
            return
        A = total.dense().div_(max(1, int(num_tokens)))
        if not num_tokens:
            # no token reached the linears: zeros would say that none of their weights matters
            A.fill_diagonal_(1.0)
        for name in group.names:
            self.change(worker, name, A)

    def leave(self, worker: Worker, micro_batch: int) -> TensorPayload:
        """Return a micro-batch that has passed all blocks, and free it."""
        return worker.pack(worker.runner.leave(worker.state.waiting.pop(micro_batch)))

    def forget(self, worker: Worker) -> None:
        """Free the state of the pass."""
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
            workers = [
                WorkerIndex(shard, i % num_replicas) for i in range(len(sequences))
            ]
            cluster.get(
                [
                    cluster.submit(worker, self.enter, i, value_of(moving[i]))
                    for i, worker in enumerate(workers)
                ]
            )
            moving.clear()  # frees the inputs in the object store, which the workers have copied
            cluster.run_all(self.pass_shard, shard)
            if shard < num_shards - 1:
                moving = [cluster.submit(w, self.leave, i) for i, w in enumerate(workers)]
            cluster.progress.reach(shard + 1)
        cluster.run_all(self.forget)
