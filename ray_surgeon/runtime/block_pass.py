"""The pass in which linears change block after block while all sequences wait.

Every block sees what the changed blocks before it give.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_surgeon.models.hooks import SharedInput
from ray_surgeon.models.runner import Call
from ray_surgeon.runtime.cluster import Cluster, at_hand, value_of
from ray_surgeon.runtime.collectives import TensorPayload
from ray_surgeon.runtime.placement import WorkerIndex
from ray_surgeon.runtime.wave import token_payload
from ray_surgeon.runtime.worker import Worker, collective


@dataclass
class _Passing:
    """Micro-batches, of one shape, on their way through a worker's shard."""

    hidden: dict[int, Tensor] = field(default_factory=dict)  # number -> states [n, T, d]
    calls: list[Call] = field(default_factory=list)  # of the blocks


class BlockPass(ABC):
    """What changes linears; an object travels to the workers, as methods do."""

    @abstractmethod
    def change(self, worker: Worker, name: str, A: Tensor) -> None:
        """Change a linear of a worker.

        A [C, C] is the mean second moment of its inputs, the bias's ones included.
        """

    # On a worker

    def enter(self, worker: Worker, micro_batch: int, inputs: TensorPayload) -> None:
        """Take a micro-batch that will pass the shard block by block."""
        passing = worker.keeping(_Passing)
        hidden, passing.calls = worker.runner.enter(worker.unpack(inputs))
        passing.hidden[micro_batch] = hidden

    @collective
    @torch.no_grad()
    def pass_shard(self, worker: Worker, shard: int) -> None:
        """Change the blocks of one shard in turn; workers of other shards do nothing."""
        if shard != worker.index.shard:
            return
        blocks = worker.shard.blocks
        passing = worker.kept(_Passing)
        for place in range(blocks.last - blocks.first):
            self._change_block(worker, _gathered(worker, place))
            with worker.shard.weights.block(place):
                for micro_batch, hidden in passing.hidden.items():
                    after = worker.runner.through(place, hidden, passing.calls)
                    passing.hidden[micro_batch] = after

    def _change_block(self, worker: Worker, groups: list[SharedInput]) -> None:
        store = worker.shard.factor_store
        for group in groups:
            key = group.key_of_A
            total = store.on_device(key, store.get(key).n)
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
        worker.share_linears(name for group in groups for name in group.names)

    def leave(self, worker: Worker, micro_batch: int) -> TensorPayload:
        """Hand over a micro-batch that has passed all blocks."""
        return worker.pack(worker.runner.leave(worker.kept(_Passing).hidden.pop(micro_batch)))

    def forget(self, worker: Worker) -> None:
        """Free what the pass kept."""
        worker.drop(_Passing)

    # On the coordinator

    def pass_all(self, cluster: Cluster, sequences: NDArray[np.int64]) -> None:
        """Change shard after shard, block after block, while the sequences pass once."""
        num_shards = cluster.placement.num_shards
        num_replicas = cluster.placement.num_replicas
        moving = [at_hand(token_payload(tokens)) for tokens in sequences]
        cluster.progress.begin(num_shards, "shards")
        for shard in range(num_shards):
            indices = [WorkerIndex(shard, i % num_replicas) for i in range(len(sequences))]
            cluster.get(
                [
                    cluster.submit(index, self.enter, i, value_of(moving[i]))
                    for i, index in enumerate(indices)
                ]
            )
            moving.clear()  # workers have taken them out of the object store
            cluster.run_all(self.pass_shard, shard)
            if shard < num_shards - 1:
                moving = [cluster.submit(index, self.leave, i) for i, index in enumerate(indices)]
            cluster.progress.reach(shard + 1)
        cluster.run_all(self.forget)


def _gathered(worker: Worker, place: int) -> list[SharedInput]:
    """Sum A of every shared input of a block over all micro-batches.

    See `ModelShard.start_curvature`, kind ``activations``.
    """
    shard = worker.shard
    passing = worker.kept(_Passing)
    shard.start_curvature("activations")
    with shard.weights.block(place), shard.gathering_in(place, wide=True):
        for hidden in passing.hidden.values():
            worker.runner.through(place, hidden, passing.calls)
    shard.stop_gathering()
    return [group for group in shard.gathering if group.place == place]
