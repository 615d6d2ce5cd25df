"""Passes of text through the shards: losses, comparisons with the dense model, and block passes.

The coordinator schedules microbatches. Activations go from worker to worker; the coordinator sees
references, losses and, to compare exports, logits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from ray_surgeon.distributed import dense_states
from ray_surgeon.distributed import microbatch as on_worker
from ray_surgeon.distributed.cluster import Cluster, Future, Progress, at_hand, value_of
from ray_surgeon.distributed.collectives import TensorPayload
from ray_surgeon.distributed.microbatch import (
    Counts,
    Labels,
    Microbatch,
    Only,
    Pass,
    Tokens,
)
from ray_surgeon.distributed.placement import WorkerIndex
from ray_surgeon.distributed.worker import Worker, collective
from ray_surgeon.maths.products import PackedSymmetric
from ray_surgeon.models.hooks import SharedInput
from ray_surgeon.models.loss import perplexity_of

T = TypeVar("T")

_STEPS: dict[str, Callable[..., TensorPayload]] = {
    "forward": on_worker.forward,
    "backward": on_worker.backward,
    "infer": on_worker.infer,
}
"""Direction of an operation -> step of a shard that is not the last."""


def forward_and_backward(
    cluster: Cluster,
    sequences: Tokens,
    labels: Labels,
    only: Only = None,
    counts: Counts = None,
) -> list[float]:
    """Run sequences forward and backward, and return the loss of each in nats.

    A loss is summed over the sequence's tokens that count; gradients are those of this sum.

    Microbatches pass the shards in one-forward-one-backward order. A bounded number of them is
    submitted ahead.

    Args:
        cluster: with loaded workers, whose hooks gather statistics.
        sequences: [num_sequences, sequence_length] tokens.
        labels: targets of the predictions.
        only: numbers of the sequences to run; None for all.
        counts: [num_sequences, sequence_length], whether a token counts as a prediction; None if
            all do.
    """
    one_pass = Pass(
        tokens=sequences,
        counts=counts,
        only=only,
        text=dense_states.CALIBRATION if labels.remembers else None,
    )
    return run_pass(cluster, one_pass, labels)


def run_pass(
    cluster: Cluster,
    one_pass: Pass,
    work: Labels | on_worker.OfEach[T],
) -> list[T]:
    """Run sequences through the shards, and return the result of each sequence.

    Args:
        cluster: with loaded workers.
        one_pass: the sequences.
        work: the work at the end: labels, to go backward from the loss, or a function that turns
            the hidden states of each sequence into its result.
    """
    num_shards = cluster.placement.num_shards
    progress = cluster.progress
    if one_pass.of_teacher or (isinstance(work, Labels) and work.is_step):
        progress = Progress()  # the step that the pass is part of counts its own progress
    progress.begin(len(one_pass.numbers), "sequences", one_pass.tokens.shape[1])
    order, at_end = _SCHEDULES["train" if isinstance(work, Labels) else "infer"]
    microbatches = one_pass.microbatches(cluster.placement, cluster.stores)
    # (replica, number of its microbatch) -> result of the last operation, and of the sequences
    moving: dict[tuple[int, int], Future[TensorPayload]] = {}
    results: dict[tuple[int, int], Future[list[T]]] = {}
    for replica, (shard, direction, number) in _interleaved(
        order, num_shards, microbatches
    ):
        key = (replica, number)
        index = WorkerIndex(shard, replica)
        microbatch = microbatches[replica][number]
        if shard == 0 and direction != "backward":
            # at most num_shards + 1 microbatches of a replica are in flight
            earlier = (replica, number - num_shards - 1)
            if earlier in moving:
                cluster.get([moving.pop(earlier)])
                progress.reach(
                    progress.done + len(microbatches[replica][earlier[1]].numbers)
                )
            moving[key] = at_hand(microbatch.tokens)
        inputs = value_of(moving[key])
        if shard == num_shards - 1:
            pair = cluster.submit_pair(index, at_end, number, inputs, microbatch, work)
            moving[key], results[key] = pair
        elif direction == "infer":
            step = _STEPS[direction]
            moving[key] = cluster.submit(index, step, number, inputs, one_pass.of_teacher)
        else:
            moving[key] = cluster.submit(index, _STEPS[direction], number, inputs)
    values = cluster.get(list(results.values()))
    progress.reach(len(one_pass.numbers))
    if one_pass.text is not None:
        _share_states(cluster, one_pass.text, microbatches)
    result_of: dict[int, T] = {}
    for (replica, number), of_wave in zip(results, values, strict=True):
        result_of.update(zip(microbatches[replica][number].numbers, of_wave, strict=True))
    return [result_of[number] for number in one_pass.numbers]


def _share_states(
    cluster: Cluster, text: str, microbatches: list[list[Microbatch]]
) -> None:
    """Send the states of a text that each replica keeps to the other replicas.

    This follows the pass, because replicas would wait for each other during it.
    """
    if len(microbatches) == 1:
        return
    last_shard = cluster.placement.num_shards - 1
    owners = [WorkerIndex(last_shard, replica) for replica in range(len(microbatches))]
    futures = list[Future[None]]()
    for owner, own_waves in zip(owners, microbatches, strict=True):
        for microbatch in own_waves:
            sent = cluster.submit(
                owner, dense_states.kept_states, text, microbatch.numbers
            )
            states = value_of(sent)
            for receiver in owners:
                if receiver == owner:
                    continue
                futures.append(
                    cluster.submit(
                        receiver,
                        dense_states.receive_states,
                        text,
                        microbatch.numbers,
                        states,
                    )
                )
    cluster.get(futures)


Operation = tuple[int, Literal["forward", "backward", "infer"], int]
"""(shard, direction, number of a microbatch).

On the last shard the forward operation includes the backward pass.
"""


def one_forward_one_backward(num_shards: int, num_waves: int) -> list[Operation]:
    """Return the operations of all shards in 1F1B order (Narayanan et al. 2019).

    Operations are sorted by the time at which they would start if all took equally long. At most
    ``num_shards - shard`` microbatches are in flight on a shard.
    """
    last = num_shards - 1
    starts: dict[Operation, int] = {}
    for microbatch in range(num_waves):
        for shard in range(num_shards):
            starts[shard, "forward", microbatch] = 2 * microbatch + shard
    for microbatch in range(num_waves):
        for shard in range(last):
            starts[shard, "backward", microbatch] = 2 * (microbatch + last) - shard
    # the sort is stable: a forward operation precedes a backward one of the same time
    return sorted(starts, key=starts.__getitem__)


def one_by_one(num_shards: int, num_waves: int) -> list[Operation]:
    """Return the operations of microbatches that pass forward only, one after the other."""
    operations: list[Operation] = []
    for microbatch in range(num_waves):
        for shard in range(num_shards):
            operations.append((shard, "infer", microbatch))
    return operations


_Order = Callable[[int, int], list[Operation]]
_SCHEDULES: dict[str, tuple[_Order, Callable[..., Any]]] = {
    "infer": (one_by_one, on_worker.infer_each),
    "train": (one_forward_one_backward, on_worker.forward_backward),
}
"""Kind of a pass -> order of its operations, and step of the last shard."""


def _interleaved(
    order: _Order, num_shards: int, microbatches: list[list[Microbatch]]
) -> Iterator[tuple[int, Operation]]:
    """Yield (replica, operation) for the microbatches of all replicas, which take turns."""
    turns: list[tuple[int, int, Operation]] = []
    for replica, own_waves in enumerate(microbatches):
        for turn, operation in enumerate(order(num_shards, len(own_waves))):
            turns.append((turn, replica, operation))
    for _, replica, operation in sorted(turns):
        yield replica, operation


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
