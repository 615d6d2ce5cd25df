"""Sequences that pass a shard block by block while the blocks are pruned.

Every block sees the inputs that the pruned blocks give it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ray_surgeon.models.hooks import SharedInput
from ray_surgeon.models.runner import BlockRunner, Call
from ray_surgeon.models.shard import ModelShard


class BlockByBlock:
    """Hidden states of all micro-batches, of one shape, on their way through a shard."""

    def __init__(self, shard: ModelShard, runner: BlockRunner) -> None:
        """Start with no micro-batches."""
        self._shard = shard
        self._runner = runner
        self._calls: list[Call] = []
        self._hidden: dict[int, Tensor] = {}

    def enter(self, micro_batch: int, inputs: Tensor) -> None:
        """Take a micro-batch: tokens [n, T] or hidden states [n, T, d]."""
        self._hidden[micro_batch], self._calls = self._runner.enter(inputs)

    @torch.no_grad()
    def gather(self, place: int) -> list[SharedInput]:
        """Sum A of every shared input of a block over all micro-batches.

        See `ModelShard.start_curvature`, kind ``activations``.
        """
        self._shard.start_curvature("activations")
        with self._shard.weights.block(place), self._shard.gathering_in(place, wide=True):
            for hidden in self._hidden.values():
                self._runner.through(place, hidden, self._calls)
        self._shard.stop_gathering()
        return [group for group in self._shard.gathering if group.place == place]

    @torch.no_grad()
    def advance(self, place: int) -> None:
        """Replace every micro-batch's hidden states by the outputs of a block."""
        with self._shard.weights.block(place):
            for micro_batch, hidden in self._hidden.items():
                self._hidden[micro_batch] = self._runner.through(place, hidden, self._calls)

    def leave(self, micro_batch: int) -> Tensor:
        """Hand a micro-batch's hidden states over."""
        return self._runner.leave(self._hidden.pop(micro_batch))
