"""Runs sequences through the blocks of a shard, one block at a time.

Only the weights and factors of one block need to be on the device.

A *wave* of sequences passes a shard together: block b runs on every sequence before block b + 1
does. A GPU runs several sequences in one call, which launches as many kernels as one sequence does.
The other arguments of a block (masks, positions) are taken from the family's own forward, which
runs with blocks that only record their arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from ray_surgeon.models.build import cache_argument
from ray_surgeon.models.loss import Dense, Predicted, compare_with_dense, next_token_loss
from ray_surgeon.models.shard import ModelShard

TOKENS_OF_ROOM = 128
"""Number of tokens by which the memory for keys and values grows."""


Call = tuple[list[Any], dict[str, Any]]
"""Arguments of a block beside the hidden states."""


_Calls = dict[int, list[Call]]
"""Number of sequences in a call -> the arguments of every block."""


_Step = tuple[list[Tensor], list[Tensor]]
"""Inputs and outputs of a block for every part of a wave; no outputs unless activations are kept.
"""


class BlockRunner:
    """The passes over a shard, forward and backward."""

    def __init__(self, shard: ModelShard) -> None:
        """Create a runner for a shard, with or without its weights."""
        self._shard = shard
        self._blocks = shard.block_modules
        # waves between their forward and their backward pass
        self._waves: dict[int, tuple[_Calls, list[_Step]]] = {}
        # whether the current pass needs the keys and values of every block
        self._has_cache = False

    @torch.no_grad()
    def enter(
        self, inputs: Tensor, cache: DynamicCache | None = None
    ) -> tuple[Tensor, list[Call]]:
        """Return the hidden states that the first block reads, and the arguments of every block.

        The family's forward runs with blocks that do nothing.

        Args:
            inputs: tokens [n, T] int64 or hidden states [n, T, d].
            cache: keys and values of the preceding tokens, if the sequences continue.

        Returns:
            Hidden states [n, T, d], and the other arguments of every block.
        """
        calls: list[Call] = []
        hidden: list[Tensor] = []

        tuple_size = self._shard.layout.family.tuple_size

        def record(*args: Any, **kwargs: Any) -> Any:
            states, *rest = args or (kwargs.pop("hidden_states"),)
            hidden.append(states)
            calls.append((rest, kwargs))
            if tuple_size:
                return (hidden[0], *[None] * (tuple_size - 1))
            return hidden[0]  # a family may take the first item of the output

        base = self._shard.base
        arguments: dict[str, Any] = {"use_cache": cache is not None}
        if inputs.dtype == torch.int64:
            arguments["input_ids"] = inputs
        else:
            arguments["inputs_embeds"] = inputs
        if cache is not None:
            arguments[cache_argument(base)] = cache
        for block in self._blocks:
            block.forward = record
        try:
            base(**arguments)
        finally:
            for block in self._blocks:
                del block.forward
        return hidden[0], calls

    def through(self, place: int, hidden: Tensor, calls: list[Call]) -> Tensor:
        """Run one block, whose weights must be on the device, on sequences [n, T, d].

        A removed block does nothing, unless its activations are recorded or cached.
        """
        is_needed = self._has_cache or self._shard.is_watched
        if place in self._shard.blocks_gone and not is_needed:
            return hidden
        args, kwargs = calls[place]
        output = self._blocks[place](hidden, *args, **kwargs)
        first: Tensor = output
        if isinstance(output, tuple):
            first = output[0]
        return first

    def leave(self, hidden: Tensor) -> Tensor:
        """Run the modules after the last block; a shard that is not the last has none.

        A divisor of logits divides the result, so that the head gives the logits themselves.
        """
        layout = self._shard.layout
        for name in layout.family.final:
            module = getattr(self._shard.base, name, None)
            if module is not None:
                hidden = module(hidden)
        if self._shard.blocks.is_last and layout.logits_divisor != 1:
            hidden = hidden / layout.logits_divisor
        return hidden

    def new_cache(self) -> DynamicCache:
        """Return an empty cache of keys and values for this shard's blocks."""
        return ShardCache(self._shard.base.config, self._shard.blocks.first)

    @torch.no_grad()
    def infer(self, inputs: Tensor, cache: DynamicCache | None = None) -> list[Tensor]:
        """Run a wave without gradients.

        Args:
            inputs: tokens [m, T] or hidden states [m, T, d].
            cache: keys and values of the preceding tokens of these sequences, see `new_cache`. If
                it is given, the sequences run in one call, and the cache grows by their keys and
                values.

        Returns:
            Hidden states [1, T, d] of every sequence, or [m, T, d] of all if a cache is given.
        """
        hidden, calls = self._enter(inputs, cache)
        self._has_cache = cache is not None
        for place in range(len(self._blocks)):
            weights = self._shard.weights.block(place, place + 1)
            with weights, self._shard.gathering_in(place):
                for i, part in enumerate(hidden):
                    hidden[i] = self.through(place, part, calls[len(part)])
        if cache is not None:
            return [self.leave(part) for part in hidden]
        sequences: list[Tensor] = []
        for part in hidden:
            sequences.extend(torch.split(self.leave(part), 1))
        return sequences

    def forward(self, wave: int, inputs: Tensor) -> list[Tensor]:
        """Run the blocks on a wave, and keep what its backward pass needs.

        Args:
            wave: number of the wave.
            inputs: tokens [m, T] or hidden states [m, T, d].

        Returns:
            Hidden states [1, T, d] of every sequence, detached.
        """
        hidden, calls = self._enter(inputs, None)
        self._has_cache = False
        steps: list[_Step] = []
        self._waves[wave] = calls, steps
        keeps = self._shard.stores.activations == "keep"
        for place in range(len(self._blocks)):
            leaves: list[Tensor] = []
            outputs: list[Tensor] = []
            weights = self._shard.weights.block(place, place + 1)
            gathering: AbstractContextManager[None] = contextlib.nullcontext()
            if keeps:
                gathering = self._shard.gathering_in(place)
            with weights, gathering, torch.set_grad_enabled(keeps):
                for part in hidden:
                    leaves.append(part.detach().requires_grad_(keeps))
                for leaf in leaves:
                    outputs.append(self.through(place, leaf, calls[len(leaf)]))
            steps.append((leaves, outputs if keeps else []))
            hidden = [output.detach() for output in outputs]
        sequences: list[Tensor] = []
        for part in hidden:
            sequences.extend(torch.split(part, 1))
        return sequences

    def backward(self, wave: int, gradients: list[Tensor]) -> list[Tensor]:
        """Run a wave backward: gradients at the outputs -> gradients at the inputs.

        Gradients at the outputs are [1, T, d], one per sequence; gradients at the inputs are
        [n, T, d], one per call of a block.
        """
        calls, steps = self._waves.pop(wave)
        gradients = list(self._together(gradients))
        for place in reversed(range(len(self._blocks))):
            leaves, outputs = steps.pop()
            if outputs:
                for i, output in enumerate(outputs):
                    torch.autograd.backward(output, gradients[i])
                    gradients[i] = _gradient(leaves[i])
                continue
            weights = self._shard.weights.block(place, place - 1)
            with weights, self._shard.gathering_in(place):
                for i in range(len(leaves)):
                    leaf = leaves[i].requires_grad_()
                    output = self.through(place, leaf, calls[len(leaf)])
                    torch.autograd.backward(output, gradients[i])
                    del output
                    gradients[i] = _gradient(leaf)
                    # frees the inputs, which are no longer needed
                    leaves[i] = leaf = gradients[i]
        return gradients

    def loss(
        self, hidden: Tensor, predicted: Predicted, dense: Dense | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of a sequence after the last block, and its gradient there.

        Args:
            hidden: [1, T, d] detached.
            predicted: predicted tokens of the sequence.
            dense: the dense model; if it is given, the loss is the divergence from it.

        Returns:
            [1] float64 NLL of the data, or divergence, in nats, summed over the tokens that count;
            the gradient [1, T, d]; and the input of the head.
        """
        leaf = hidden.requires_grad_()
        output = self.leave(leaf)
        states = output.detach()
        head = self._shard.head_weight
        if dense is None:
            loss, gradient = next_token_loss(states, head, predicted, with_gradient=True)
        else:
            dense_states, dense_head = dense
            compared = compare_with_dense(
                hidden=states,
                dense=dense_states,
                predicted=predicted,
                head_weight=head,
                dense_head=dense_head,
                with_gradient=True,
            )
            loss = compared.divergence
            gradient = compared.gradient
        torch.autograd.backward(output, gradient)
        return loss, _gradient(leaf), states

    def _enter(
        self, inputs: Tensor, cache: DynamicCache | None
    ) -> tuple[list[Tensor], _Calls]:
        parts = [inputs]
        if cache is None:
            parts = list(torch.split(inputs, self._shard.stores.together))
        hidden: list[Tensor] = []
        calls_of: _Calls = {}
        for part in parts:
            states, calls = self.enter(part, cache)
            hidden.append(states)
            calls_of[len(states)] = calls
        return hidden, calls_of

    def _together(self, sequences: list[Tensor]) -> Iterator[Tensor]:
        """Yield sequences [1, T, d] as [n, T, d] for one call, and remove them from the list."""
        size = self._shard.stores.together
        while sequences:
            part = sequences[:size]
            del sequences[:size]
            yield torch.cat(part) if len(part) > 1 else part[0]


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


class ShardCache(DynamicCache):  # type: ignore[misc]
    """Keys and values of a shard's blocks, whose numbers count from the model's first block.

    A layer that keeps all tokens reserves memory for more tokens than it has: copying everything
    for every token would take a third of the time.
    """

    def __init__(self, config: Any, first: int) -> None:
        super().__init__(config=config)
        self._first = first
        # (layer, "keys" or "values") -> memory [m, heads, at least as many tokens, head_dim]
        self._rooms: dict[tuple[int, str], Tensor] = {}

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values [m, heads, n, d] of a block and return all; see `DynamicCache`."""
        number = self._own(layer_idx)
        if type(self.layers[number]) is not DynamicLayer:
            keys, values = super().update(
                key_states, value_states, number, *args, **kwargs
            )
            return keys, values
        layer = self.layers[number]
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        before = layer.get_seq_length()
        for name, states in (("keys", key_states), ("values", value_states)):
            room = self._rooms.get((number, name), getattr(layer, name))
            room = _with_room(room, before, states)
            self._rooms[number, name] = room
            setattr(layer, name, room[:, :, : before + states.shape[-2]])
        return layer.keys, layer.values

    def _own(self, layer_idx: int) -> int:
        """Return the number of a block's layer in this cache."""
        return layer_idx - self._first

    # of layers in place of an attention, e.g. with linear attention

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Return the last inputs of a convolution; see `DynamicCache`."""
        return super().get_conv_state(self._own(layer_idx), *args, **kwargs)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Add inputs of a convolution; see `DynamicCache`."""
        return super().update_conv_state(
            conv_states, self._own(layer_idx), *args, **kwargs
        )

    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Return a recurrent state; see `DynamicCache`."""
        return super().get_recurrent_state(self._own(layer_idx), *args, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Set a recurrent state; see `DynamicCache`."""
        return super().update_recurrent_state(
            recurrent_states, self._own(layer_idx), *args, **kwargs
        )

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return False: tokens are never taken back."""
        return False

    def increase_count(self, layer_idx: int, state_idx: int) -> None:
        """Count a token; see `DynamicCache`."""
        super().increase_count(self._own(layer_idx), state_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of keys, and the position of the first; see `DynamicCache`."""
        if all(self.is_linear):
            # no layer of the shard reads the mask, which transformers makes nevertheless
            return query_length + int(self.get_seq_length()), 0
        num_keys, first = super().get_mask_sizes(query_length, layer_idx)
        return num_keys, first

    def batch_select_indices(self, indices: Tensor) -> None:
        """Forget all sequences but these."""
        for layer in self.layers:
            if isinstance(layer, LinearAttentionLayer):
                layer.reorder_cache(indices)
            else:
                layer.batch_select_indices(indices)


def _with_room(room: Tensor, before: int, states: Tensor) -> Tensor:
    """Return memory [m, heads, more, d] with new states [m, heads, n, d] written into it."""
    after = before + states.shape[-2]
    if before == 0 or room.shape[-2] < after:
        num_sequences, num_heads, _, head_dim = states.shape
        num_tokens = after + TOKENS_OF_ROOM
        larger = states.new_empty(num_sequences, num_heads, num_tokens, head_dim)
        if before:
            larger[:, :, :before] = room[:, :, :before]
        room = larger
    room[:, :, before:after] = states
    return room
