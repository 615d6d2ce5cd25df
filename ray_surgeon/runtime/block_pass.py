"""The pass in which linears change block after block while all sequences wait.

Every block sees what the changed blocks before it give.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_surgeon.models.block_by_block import BlockByBlock
from ray_surgeon.runtime.cluster import Cluster, at_hand, value_of
from ray_surgeon.runtime.placement import WorkerIndex
from ray_surgeon.runtime.transport import TensorPayload
from ray_surgeon.runtime.wave import token_payload
from ray_surgeon.runtime.worker import Worker, collective


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
        if micro_batch < worker.placement.num_replicas:
            worker.keep(BlockByBlock(worker.shard, worker.runner))
        worker.kept(BlockByBlock).enter(micro_batch, worker.unpack(inputs))

    @collective
    def pass_shard(self, worker: Worker, shard: int) -> None:
        """Change the blocks of one shard in turn; workers of other shards do nothing."""
        if shard != worker.index.shard:
            return
        way = worker.kept(BlockByBlock)
        blocks = worker.shard.blocks
        store = worker.shard.factor_store
        for place in range(blocks.last - blocks.first):
            groups = way.gather(place)
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
            way.advance(place)

    def leave(self, worker: Worker, micro_batch: int) -> TensorPayload:
        """Hand over a micro-batch that has passed all blocks."""
        return worker.pack(worker.kept(BlockByBlock).leave(micro_batch))

    def forget(self, worker: Worker) -> None:
        """Free what the pass kept."""
        worker.drop(BlockByBlock)

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
