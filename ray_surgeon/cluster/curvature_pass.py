"""The curvature pass: A and G of every linear, gathered by hooks in the shards and summed over replicas to their owners."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from ray_surgeon.cluster.cluster import Cluster
from ray_surgeon.cluster.passes import forward_and_backward, sequence_losses
from ray_surgeon.cluster.worker import Worker, collective


def start_curvature(worker: Worker, kind: str, consumers_only: bool) -> None:
    """Zero the factors and start gathering; see `ModelShard.start_curvature`."""
    worker.shard.start_curvature(kind, consumers_only=consumers_only)


def first_not_finite(worker: Worker) -> str | None:
    """Return the first linear of this shard whose inputs were not finite; see `ModelShard.first_not_finite`."""
    return worker.shard.first_not_finite()


@collective
def finish_curvature(worker: Worker, kind: str) -> None:
    """Stop gathering and sum the factors over the replicas to their owners; the others free theirs."""
    assert worker.shard.gathering, "no curvature pass has been made"
    worker.shard.stop_curvature(kind)
    for group in worker.shard.gathering:
        owner = worker.owner(group.names[0])
        assert group.A is not None
        num_tokens = torch.tensor(group.num_tokens, device=worker.device)
        for total in (group.A, *group.G, num_tokens):
            worker.replicas.reduce(total, owner)
        group.num_tokens = int(num_tokens)
        if owner != worker.replicas.rank:
            group.A, group.G = None, ()


def gather_curvature(
    cluster: Cluster, sequences: NDArray[np.int64], kind: str, label_seed: int | None = None, *, consumers_only: bool = False
) -> float:
    """Run every calibration sequence through the model and gather A and G where they belong.

    Args:
        cluster: with loaded workers.
        sequences: [num_sequences, sequence_length] tokens; one is a micro-batch.
        kind: see `ModelShard.start_curvature`; a forward pass is enough for ``activations`` and ``identity``.
        label_seed: see `forward_backward`.
        consumers_only: whether only the consumers of coupled groups are wanted.

    Returns:
        Mean NLL in nats per predicted token.

    Raises:
        FloatingPointError: a loss is not finite; names the first linear whose inputs are not.
    """
    cluster.run_all(start_curvature, kind, consumers_only)
    try:
        forward_only = kind in ("activations", "identity")
        losses = sequence_losses(cluster, sequences) if forward_only else forward_and_backward(cluster, sequences, label_seed)
        if not all(map(math.isfinite, losses)):
            raise FloatingPointError("the loss of the calibration sequences is not finite; check the weights and the dtype")
    except FloatingPointError as error:
        names = [name for name in cluster.run_all(first_not_finite) if name is not None]
        reason = getattr(error, "cause", error)  # unwrapped from Ray's task error
        raise FloatingPointError(f"{reason}; inputs are not finite from {names[0] if names else 'the head'} on") from error
    cluster.run_all(finish_curvature, kind)
    num_predicted = int(sequences.shape[0]) * (int(sequences.shape[1]) - 1)
    return sum(losses) / num_predicted
