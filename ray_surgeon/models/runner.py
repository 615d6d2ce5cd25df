"""Runs sequences through the blocks of a shard, one block at a time.

So weights and factors of one block are enough on the device.

A *wave* of sequences passes a shard together: block b runs on every one of them before block b + 1,
on a GPU several in one call, each of which launches as many kernels as one sequence's would.
What a block is called with beside the hidden states (masks, positions) is taken from the family's
own forward, which sees blocks that only note what they are given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ray_surgeon.models.build import cache_argument
from ray_surgeon.models.loss import Dense, Predicted, compare_with_dense, next_token_loss
from ray_surgeon.models.shard import ModelShard

TOKENS_OF_ROOM = 128
"""By which the memory for keys and values grows."""


Call = tuple[list[Any], dict[str, Any]]
"""What a block is called with beside the hidden states."""


_Calls = dict[int, list[Call]]
"""Number of sequences that pass together -> what every block is called with."""


_Step = tuple[list[Tensor], list[Tensor]]
"""Inputs and outputs of a block, of every part of a wave; no outputs if activations are not kept.
"""


class BlockRunner:
    """The passes over a shard, forward and backward."""

    def __init__(self, shard: ModelShard) -> None:
        """Take a shard, with or without its weights."""
        self._shard = shard
        self._blocks = shard.block_modules
        # of each wave between its forward and its backward pass
        self._waves: dict[int, tuple[_Calls, list[_Step]]] = {}
        self._has_cache = False  # whether the present pass needs keys and values of every block

    @torch.no_grad()
    def enter(self, inputs: Tensor, cache: DynamicCache | None = None) -> tuple[Tensor, list[Call]]:
        """Take a sequence up to the first block.

        It is the family's forward, with blocks that do nothing.

        Args:
            inputs: tokens [n, T] int64 or hidden states [n, T, d].
            cache: keys and values of the tokens before, if these go on.

        Returns:
            Hidden states [n, T, d], and with what every block is called beside them.
        """
        calls: list[Call] = []
        hidden: list[Tensor] = []

        def note(*args: Any, **kwargs: Any) -> Tensor:
            states, *rest = args or (kwargs.pop("hidden_states"),)
            hidden.append(states)
            calls.append((rest, kwargs))
            return hidden[0]  # of which a family may take the first item

        key = "input_ids" if inputs.dtype == torch.int64 else "inputs_embeds"
        going_on = {} if cache is None else {cache_argument(self._shard.base): cache}
        for block in self._blocks:
            block.forward = note
        try:
            self._shard.base(**{key: inputs}, **going_on, use_cache=cache is not None)
        finally:
            for block in self._blocks:
                del block.forward
        return hidden[0], calls

    def through(self, place: int, hidden: Tensor, calls: list[Call]) -> Tensor:
        """Run one block, whose weights must be there, on sequences [n, T, d].

        A block that is gone does nothing, unless something is to see what it would do.
        """
        args, kwargs = calls[place]
        if place in self._shard.blocks_gone and not (self._has_cache or self._shard.is_watched):
            return hidden
        output = self._blocks[place](hidden, *args, **kwargs)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first

    def leave(self, hidden: Tensor) -> Tensor:
        """Run what comes after the last block; nothing in a shard that is not the last."""
        for name in self._shard.layout.family.final:
            module = getattr(self._shard.base, name, None)
            hidden = hidden if module is None else module(hidden)
        return hidden

    def new_cache(self) -> DynamicCache:
        """Return an empty cache of keys and values for this shard's blocks."""
        return ShardCache(self._shard.base.config, self._shard.blocks.first)

    @torch.no_grad()
    def infer(self, inputs: Tensor, cache: DynamicCache | None = None) -> list[Tensor]:
        """Run a wave without gradients.

        Args:
            inputs: tokens [m, T] or hidden states [m, T, d].
            cache: of these sequences, see `new_cache`, if they go on after what it holds, all
                together; it grows by what they bring.

        Returns:
            Hidden states [1, T, d] of every sequence, or [m, T, d] of all that go on.
        """
        hidden, calls = self._enter(inputs, cache)
        self._has_cache = cache is not None
        for place in range(len(self._blocks)):
            with self._shard.weights.block(place, place + 1), self._shard.gathering_in(place):
                for i, h in enumerate(hidden):
                    hidden[i] = self.through(place, h, calls[len(h)])
        if cache is not None:
            return [self.leave(h) for h in hidden]
        return [sequence for h in hidden for sequence in torch.split(self.leave(h), 1)]

    def forward(self, wave: int, inputs: Tensor) -> list[Tensor]:
        """Run the blocks on a wave, and keep what its backward pass needs.

        Args:
            wave: its number.
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
            weights = self._shard.weights.block(place, place + 1)
            gathering = self._shard.gathering_in(place) if keeps else contextlib.nullcontext()
            with weights, gathering, torch.set_grad_enabled(keeps):
                leaves = [h.detach().requires_grad_(keeps) for h in hidden]
                outputs = [self.through(place, leaf, calls[len(leaf)]) for leaf in leaves]
            steps.append((leaves, outputs if keeps else []))
            hidden = [output.detach() for output in outputs]
        return [sequence for part in hidden for sequence in torch.split(part, 1)]

    def backward(self, wave: int, gradients: list[Tensor]) -> list[Tensor]:
        """Run a wave backward: gradients at the outputs -> gradients at the inputs.

        They are [1, T, d] of every sequence, and [n, T, d] of those that pass together.
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
            with self._shard.weights.block(place, place - 1), self._shard.gathering_in(place):
                for i in range(len(leaves)):
                    leaf = leaves[i].requires_grad_()
                    output = self.through(place, leaf, calls[len(leaf)])
                    torch.autograd.backward(output, gradients[i])
                    del output
                    gradients[i] = _gradient(leaf)
                    leaves[i] = leaf = gradients[i]  # the inputs are not needed any more
        return gradients

    def loss(
        self, hidden: Tensor, predicted: Predicted, dense: Dense | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of a sequence after the last block, and its gradient there.

        Args:
            hidden: [1, T, d] detached.
            predicted: tokens of the sequence.
            dense: the dense model, from which the loss is the divergence, if it is given.

        Returns:
            [1] float64 NLL of the data, or divergence, in nats, summed over the tokens that count;
            the gradient [1, T, d]; and what the head reads.
        """
        leaf = hidden.requires_grad_()
        output = self.leave(leaf)
        states = output.detach()
        head = self._shard.head_weight
        if dense is None:
            loss, gradient = next_token_loss(states, head, predicted, with_gradient=True)
        else:
            wanted, own = dense
            compared = compare_with_dense(states, wanted, predicted, head, own, with_gradient=True)
            loss = compared.divergence
            gradient = compared.gradient
        torch.autograd.backward(output, gradient)
        return loss, _gradient(leaf), states

    def _enter(self, inputs: Tensor, cache: DynamicCache | None) -> tuple[list[Tensor], _Calls]:
        parts = [inputs]
        if cache is None:
            parts = list(torch.split(inputs, self._shard.stores.together))
        entered = [self.enter(part, cache) for part in parts]
        return [h for h, _ in entered], {len(h): calls for h, calls in entered}

    def _together(self, sequences: list[Tensor]) -> Iterator[Tensor]:
        """Yield those [n, T, d] that pass together of sequences [1, T, d], which are forgotten."""
        size = self._shard.stores.together
        while sequences:
            part = sequences[:size]
            del sequences[:size]
            yield torch.cat(part) if len(part) > 1 else part[0]


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


class ShardCache(DynamicCache):  # type: ignore[misc]
    """Keys and values of a shard's blocks, which count from the first block of the model.

    Where a layer keeps all tokens, there is room for more than it has: a copy of everything for
    every token would take a third of the time.
    """

    def __init__(self, config: Any, first: int) -> None:
        super().__init__(config=config)
        self._first = first
        # of a layer the "keys" or "values", [m, heads, at least as many tokens, head_dim]
        self._rooms: dict[tuple[int, str], Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values [m, heads, n, d] of a block, and return all; see `DynamicCache`."""
        number = layer_idx - self._first
        if type(self.layers[number]) is not DynamicLayer:
            keys, values = super().update(key_states, value_states, number, *args, **kwargs)
            return keys, values
        layer = self.layers[number]
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        before = layer.get_seq_length()
        for name, states in (("keys", key_states), ("values", value_states)):
            room = self._rooms.get((number, name), getattr(layer, name))
            room = self._rooms[number, name] = _with_room(room, before, states)
            setattr(layer, name, room[:, :, : before + states.shape[-2]])
        return layer.keys, layer.values


def _with_room(room: Tensor, before: int, states: Tensor) -> Tensor:
    """Return room [m, heads, more, d] with new states [m, heads, n, d] written into it."""
    after = before + states.shape[-2]
    if before == 0 or room.shape[-2] < after:
        larger = states.new_empty(*states.shape[:2], after + TOKENS_OF_ROOM, states.shape[-1])
        if before:
            larger[:, :, :before] = room[:, :, :before]
        room = larger
    room[:, :, before:after] = states
    return room
