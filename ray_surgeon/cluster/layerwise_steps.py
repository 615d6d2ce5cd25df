"""The part of a worker that runs SparseGPT and Wanda."""

from __future__ import annotations

import torch
from torch import Tensor

from ray_surgeon.cluster.messages import LayerwiseOptions, LinearSummary, Wire
from ray_surgeon.cluster.state import ShardState
from ray_surgeon.cluster.transport import decode, encode
from ray_surgeon.models.layerwise import BlockByBlock
from ray_surgeon.surgery.layerwise import prune_linear
from ray_surgeon.surgery.masks import ElementMask


class LayerwiseSteps(ShardState):
    """Called in the order of `steps.prune_layerwise`."""

    _block_by_block: BlockByBlock | None = None

    def enter_blocks(self, micro_batch: int, inputs: Wire) -> None:
        """Take a micro-batch that will pass the shard block by block."""
        if self._block_by_block is None:
            self._block_by_block = BlockByBlock(self.shard)
        self._block_by_block.enter(micro_batch, decode(inputs, self.device))

    def prune_blocks(self, shard: int, options: LayerwiseOptions) -> tuple[LinearSummary, ...]:
        """Prune the blocks of one shard one after the other, each from the inputs that the pruned ones before give it.

        Args:
            shard: whose turn it is; workers of other shards do nothing.
            options: how.
        """
        if shard != self.index.shard:
            return ()
        way = self._block_by_block or BlockByBlock(self.shard)
        for block in range(self.shard.blocks.first, self.shard.blocks.last):
            for site in way.gather(block):
                assert site.A is not None
                num_tokens = torch.tensor(site.num_tokens, device=self.device)
                for total in (site.A, num_tokens):
                    self.replicas.reduce(total, self.owner(site.names[0]))
                if self.owner(site.names[0]) == self.replicas.rank:
                    for name in site.names:
                        self._prune_layerwise(name, site.A / int(num_tokens), options)
                site.A = None
            self.share_linears(name for site in way.sites(block) for name in site.names)
            way.advance(block)
        return tuple(self.summary(name, None, 0.0) for name in self.owned())

    def _prune_layerwise(self, name: str, A: Tensor, options: LayerwiseOptions) -> None:
        mask, W = self.masks[name], self.shard.weight(name)
        assert isinstance(mask, ElementMask)
        num_inputs = W.shape[1] - (self.shard.linears[name].bias is not None)
        damping = {"damping": options.damping_a, "max_damping": options.max_damping}
        fraction = options.sparsity * W.numel() / (len(W) * num_inputs)
        units = options.units
        W[:, :num_inputs], kept = prune_linear(
            W[:, :num_inputs], A[:num_inputs, :num_inputs], fraction, units.n, units.m, method=options.method, name=name, **damping
        )
        whole = torch.ones_like(W, dtype=torch.bool)
        whole[:, :num_inputs] = kept
        self.masks[name] = ElementMask(whole.cpu())
        self.shard.set_weight(name, W)

    def leave_blocks(self, micro_batch: int) -> Wire:
        """Hand over a micro-batch that has passed all blocks."""
        assert self._block_by_block is not None
        return encode(self._block_by_block.leave(micro_batch))

    def forget_blocks(self) -> None:
        """Free what the block-by-block pass kept."""
        self._block_by_block = None
