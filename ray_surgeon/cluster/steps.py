"""The steps of a shot that move activations: schedules of micro-batches over shards and replicas."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ray_surgeon.cluster.messages import LayerwiseOptions, LinearSummary, LowRankOptions, Wire, WorkerIndex
from ray_surgeon.cluster.protocol import Cluster
from ray_surgeon.cluster.transport import encode

Operation = tuple[int, Literal["forward", "backward"], int]
"""(shard, direction, micro-batch). On the last shard the backward pass belongs to the forward operation."""


def one_forward_one_backward(shard: int, num_shards: int, num_micro_batches: int) -> Iterator[Operation]:
    """Yield the operations of one shard in 1F1B order (Narayanan et al. 2019): at most ``num_shards - shard`` are in flight."""
    warm_up = min(num_shards - 1 - shard, num_micro_batches)
    for micro_batch in range(num_micro_batches + warm_up):
        if micro_batch < num_micro_batches:
            yield shard, "forward", micro_batch
        if shard != num_shards - 1 and micro_batch >= warm_up:
            yield shard, "backward", micro_batch - warm_up


def submission_order(num_shards: int, num_micro_batches: int) -> list[Operation]:
    """Merge the shards' 1F1B orders so that every operation comes after those whose results it needs."""
    queues = [deque(one_forward_one_backward(shard, num_shards, num_micro_batches)) for shard in range(num_shards)]
    done: set[Operation] = set()
    order: list[Operation] = []
    while any(queues):
        for queue in queues:
            while queue and _needs(queue[0], num_shards) <= done:
                order.append(queue[0])
                done.add(queue.popleft())
    return order


def _needs(operation: Operation, num_shards: int) -> set[Operation]:
    shard, direction, micro_batch = operation
    if direction == "forward":
        return {(shard - 1, "forward", micro_batch)} if shard else set()
    after: Operation = (shard + 1, "forward" if shard + 1 == num_shards - 1 else "backward", micro_batch)
    return {after}


def _token_wire(tokens: NDArray[np.int64]) -> Wire:
    return encode(torch.from_numpy(np.atleast_2d(tokens)))


@dataclass
class _Column:
    """One replica's pipeline in a curvature pass: what is on its way between its shards."""

    replica: int
    tokens: NDArray[np.int64]
    moving: dict[int, Any]
    losses: list[Any]
    finished: dict[int, Any]


def collect_curvature(
    cluster: Cluster,
    sequences: NDArray[np.int64],
    kind: str,
    sample_seed: int | None,
    *,
    with_gradient: bool = False,
    readers_only: bool = False,
) -> float:
    """Run every calibration sequence forward and backward and gather A and G where they belong.

    Replica r sees sequences r, r + D, ... . Activations go from worker to worker; of the coordinator's side only
    references and losses pass. Submission runs a bounded number of micro-batches ahead.

    Args:
        cluster: with loaded workers.
        sequences: [num_sequences, sequence_length] tokens; one is a micro-batch.
        kind: ``kfac``; ``activations``, for which a forward pass is enough; ``identity``, for which nothing has to be gathered.
        sample_seed: see `ShardWorker.forward_backward`.
        with_gradient: whether to gather the gradients of the weights too.
        readers_only: whether only the last linears of coupled groups are wanted.

    Returns:
        Mean NLL in nats per predicted token.

    Raises:
        FloatingPointError: a loss is not finite; names the first linear whose inputs are not.
    """
    cluster.run_all("start_curvature", kind, with_gradient, readers_only)
    try:
        losses = sequence_losses(cluster, sequences) if kind != "kfac" else _forward_and_backward(cluster, sequences, sample_seed)
        if not np.isfinite(losses).all():
            raise FloatingPointError("the loss of the calibration sequences is not finite; check the weights and the dtype")
    except FloatingPointError as error:
        names = [name for name in cluster.run_all("first_not_finite") if name is not None]
        raise FloatingPointError(f"{_own_words(error)}; inputs are not finite from {names[0] if names else 'the head'} on") from error
    cluster.run_all("finish_curvature", kind)
    num_predicted = int(sequences.shape[0]) * (int(sequences.shape[1]) - 1)
    return sum(losses) / num_predicted


def _own_words(error: FloatingPointError) -> str:
    """Return what the worker said, without the ways it came through Ray."""
    return str(getattr(error, "cause", error))


def collect_terms(
    cluster: Cluster, sequences: NDArray[np.int64], num_terms: int, num_passes: int, sample_seed: int | None, *, nearest: bool = False
) -> list[dict[str, float]]:
    """Find Kronecker terms by the power method, after `collect_curvature`.

    Args:
        cluster: with the factors of KFAC.
        sequences: as for those.
        num_terms: with the first.
        num_passes: over the sequences for each term, for A and G in turns.
        sample_seed: the same, so that the labels are.
        nearest: whether the first term becomes the nearest Kronecker product, too, in place of KFAC's.

    Returns:
        For every term that was found, its size relative to the first one's by linear.
    """
    sizes = []
    for term in range(0 if nearest else 1, num_terms):
        first = term == 0
        cluster.run_all("start_term", first)
        for side in (("a", "g") * num_passes)[:num_passes]:
            cluster.run_all("start_power", side)
            _forward_and_backward(cluster, sequences, sample_seed)
            cluster.run_all("finish_power", side, first)
        found: list[dict[str, float]] = cluster.run_all("finish_term", first)
        sizes.append({name: size for worker in found for name, size in worker.items()})
    return sizes


def prune_layerwise(cluster: Cluster, sequences: NDArray[np.int64], options: LayerwiseOptions) -> list[LinearSummary]:
    """Prune shard after shard, block after block, while the calibration sequences [num_sequences, sequence_length] pass once."""
    num_shards, num_replicas = cluster.placement.num_shards, cluster.placement.num_replicas
    moving: list[Any] = [_token_wire(tokens) for tokens in sequences]
    summaries: list[LinearSummary] = []
    for shard in range(num_shards):
        cluster.get([cluster.submit(WorkerIndex(shard, i % num_replicas), "enter_blocks", i, wire) for i, wire in enumerate(moving)])
        summaries += [summary for worker in cluster.run_all("prune_blocks", shard, options) for summary in worker]
        if shard < num_shards - 1:
            moving = [cluster.submit(WorkerIndex(shard, i % num_replicas), "leave_blocks", i) for i in range(len(sequences))]
    cluster.run_all("forget_blocks")
    return summaries


def train_corrections(
    cluster: Cluster, sequences: NDArray[np.int64], batches: Sequence[Sequence[int]], options: LowRankOptions
) -> list[float]:
    """Train low-rank corrections of all linears, one step of the optimizer a batch, and absorb them.

    Args:
        cluster: with masks.
        sequences: [num_sequences, sequence_length] tokens.
        batches: which sequences every step sees.
        options: of the corrections.

    Returns:
        The mean NLL in nats per predicted token of each step's batch, before the step.
    """
    cluster.run_all("start_corrections", options)
    losses = []
    for batch in batches:
        num_tokens = len(batch) * (sequences.shape[1] - 1)
        losses.append(sum(_forward_and_backward(cluster, sequences[list(batch)], None)) / num_tokens)
        cluster.run_all("step_corrections", num_tokens)
    cluster.run_all("absorb_corrections")
    return losses


def _forward_and_backward(cluster: Cluster, sequences: NDArray[np.int64], sample_seed: int | None) -> list[float]:
    num_shards, num_replicas = cluster.placement.num_shards, cluster.placement.num_replicas
    columns = [_Column(r, sequences[r::num_replicas], {}, [], {}) for r in range(num_replicas)]
    orders = [submission_order(num_shards, len(column.tokens)) for column in columns]
    for operations in zip_longest(*orders):
        for column, operation in zip(columns, operations, strict=True):
            if operation is not None:
                _submit(cluster, column, operation, sample_seed)
    return [float(loss) for loss in cluster.get([loss for column in columns for loss in column.losses])]


def _submit(cluster: Cluster, column: _Column, operation: Operation, sample_seed: int | None) -> None:
    shard, direction, micro_batch = operation
    num_shards = cluster.placement.num_shards
    index = WorkerIndex(shard, column.replica)
    number = column.replica + micro_batch * cluster.placement.num_replicas
    if shard == 0 and direction == "forward":
        column.moving[micro_batch] = _token_wire(column.tokens[micro_batch])
        ahead = column.finished.pop(micro_batch - num_shards - 1, None)
        if ahead is not None:
            cluster.get([ahead])
    moving = column.moving.pop(micro_batch)
    if shard == num_shards - 1:
        labels = _token_wire(column.tokens[micro_batch])
        moving, loss = cluster.submit(index, "forward_backward", number, moving, labels, sample_seed, num_returns=2)
        column.losses.append(loss)
        finished = loss
    else:
        moving = cluster.submit(index, direction, number, moving)
        finished = moving
    if shard == 0 and (direction == "backward" or num_shards == 1):
        column.finished[micro_batch] = finished
    else:
        column.moving[micro_batch] = moving


def _through_shards(cluster: Cluster, replica: int, tokens: NDArray[np.int64], last_method: str, *last_args: object) -> Any:
    moving: Any = _token_wire(tokens)
    last = cluster.placement.num_shards - 1
    for shard in range(last):
        moving = cluster.submit(WorkerIndex(shard, replica), "infer", moving)
    return cluster.submit(WorkerIndex(last, replica), last_method, moving, *last_args)


def sequence_losses(cluster: Cluster, sequences: NDArray[np.int64]) -> list[float]:
    """Return the summed NLL in nats of each sequence [num_sequences, sequence_length]; forward only."""
    num_replicas = cluster.placement.num_replicas
    in_flight = num_replicas * (cluster.placement.num_shards + 1)
    futures: list[Any] = []
    for i, tokens in enumerate(sequences):
        if i >= in_flight:
            cluster.get([futures[i - in_flight]])
        futures.append(_through_shards(cluster, i % num_replicas, tokens, "infer_loss", _token_wire(tokens)))
    return [nll for losses in cluster.get(futures) for nll in losses]


def logits(cluster: Cluster, tokens: Sequence[int]) -> Wire:
    """Return the logits [1, T, vocabulary] of one sequence."""
    wire = cluster.get([_through_shards(cluster, 0, np.asarray(tokens, dtype=np.int64), "infer_logits")])[0]
    assert isinstance(wire, Wire)
    return wire
