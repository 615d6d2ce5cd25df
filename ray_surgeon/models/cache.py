"""Keys and values of the tokens before, for text that is written token by token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

TOKENS_OF_ROOM = 128
"""By which the memory for keys and values grows."""


class ShardCache(DynamicCache):  # type: ignore[misc]
    """Keys and values of a shard's blocks, which count from the first block of the model.

    Where a layer keeps all tokens, there is room for more than it has: a copy of everything for
    every token would take a third of the time.
    """

    def __init__(self, config: Any, first: int) -> None:
        super().__init__(config=config)
        self._first = first
        # layer -> keys and values, [m, heads, at least as many tokens, head_dim]
        self._rooms: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values [m, heads, n, head_dim] of a block; see `DynamicCache`.

        Returns all of them.
        """
        number = layer_idx - self._first
        if type(self.layers[number]) is not DynamicLayer:
            keys, values = super().update(key_states, value_states, number, *args, **kwargs)
            return keys, values
        layer = self.layers[number]
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        before = layer.get_seq_length()
        rooms = self._rooms.get(number, (layer.keys, layer.values))
        keys, values = (
            _with_room(room, before, states)
            for room, states in zip(rooms, (key_states, value_states), strict=True)
        )
        self._rooms[number] = keys, values
        after = before + key_states.shape[-2]
        layer.keys = keys[:, :, :after]
        layer.values = values[:, :, :after]
        return layer.keys, layer.values


def _with_room(room: Tensor, before: int, states: Tensor) -> Tensor:
    """Return room [m, heads, more, head_dim] with the new states written into it.

    The new states are [m, heads, n, head_dim].
    """
    after = before + states.shape[-2]
    if before == 0 or room.shape[-2] < after:
        larger = states.new_empty(*states.shape[:2], after + TOKENS_OF_ROOM, states.shape[-1])
        if before:
            larger[:, :, :before] = room[:, :, :before]
        room = larger
    room[:, :, before:after] = states
    return room
