"""A shard run block by block, so that every block sees the inputs that the pruned blocks before give it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ray_surgeon.models.shard import ModelShard, SharedInput, add_inputs_to
from ray_surgeon.surgery.kronecker import symmetrize


class _ReachedFirstBlockError(Exception):
    """Ends a forward pass when the first block has its inputs."""


class BlockByBlock:
    """Hidden states of all micro-batches on their way through a shard.

    What a block is called with beside the hidden states (masks, positions) depends on the length of the sequence only, and is taken
    from one forward pass of the family's own; all micro-batches must have one shape.
    """

    def __init__(self, shard: ModelShard) -> None:
        """Start with no micro-batches."""
        self._shard = shard
        blocks = shard.base.get_submodule(shard.layout.family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        self._blocks = list(blocks)
        self._others: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._hidden: dict[int, Tensor] = {}

    @torch.no_grad()
    def enter(self, micro_batch: int, inputs: Tensor) -> None:
        """Take a micro-batch: tokens [n, T] or hidden states [n, T, d]."""
        seen: list[Tensor] = []

        def take_hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])
            if self._others:
                raise _ReachedFirstBlockError

        others: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def take_others(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))

        hooks = [self._blocks[0].register_forward_pre_hook(take_hidden, with_kwargs=True)]
        hooks += [block.register_forward_pre_hook(take_others, with_kwargs=True) for block in self._blocks]
        try:
            self._shard.infer(inputs)
        except _ReachedFirstBlockError:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        self._others = self._others or others
        self._hidden[micro_batch] = seen[0]

    def shared_inputs(self, block: int) -> list[SharedInput]:
        """Return the shared-input groups of a block, which has its number in the whole model."""
        prefix = self._shard.layout.family.block_prefix(block)
        return [group for group in self._shard.shared_inputs if group.names[0].startswith(prefix)]

    def gather(self, block: int) -> list[SharedInput]:
        """Sum A of every shared input of a block over all micro-batches."""
        groups = self.shared_inputs(block)
        hooks = []
        for group in groups:
            group.num_tokens = 0
            C = self._shard.weight(group.names[0]).shape[1]
            group.A = torch.zeros(C, C, device=self._shard.device)
            hooks.append(group.modules[0].register_forward_pre_hook(add_inputs_to(group)))
        self._run(block, lambda micro_batch, hidden: None)
        for hook in hooks:
            hook.remove()
        for group in groups:
            assert group.A is not None
            symmetrize(group.A)
        return groups

    def advance(self, block: int) -> None:
        """Replace every micro-batch's hidden states by the outputs of a block."""
        self._run(block, self._hidden.__setitem__)

    @torch.no_grad()
    def _run(self, block: int, take: Callable[[int, Tensor], None]) -> None:
        place = block - self._shard.blocks.first
        args, kwargs = self._others[place]
        for micro_batch, hidden in list(self._hidden.items()):
            output = self._blocks[place](hidden, *args, **kwargs)
            take(micro_batch, output[0] if isinstance(output, tuple) else output)

    def leave(self, micro_batch: int) -> Tensor:
        """Hand a micro-batch's hidden states over."""
        return self._hidden.pop(micro_batch)
