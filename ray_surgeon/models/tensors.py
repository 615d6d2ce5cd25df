"""Which tensors a shard holds, and where they belong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from accelerate.utils import set_module_tensor_to_device

from ray_surgeon.memory.weights import Read, Slot
from ray_surgeon.models.checkpoint import check_finite

if TYPE_CHECKING:
    from ray_surgeon.models.shard import ModelShard


def slots_of(shard: ModelShard) -> list[dict[str, Slot]]:
    """Return, for each block, global name -> where a tensor belongs."""
    family = shard.layout.family
    slots = []
    for number, block in enumerate(shard.block_modules, shard.blocks.first):
        of_block = {}
        for name in block.state_dict():
            owner, _, leaf = name.rpartition(".")
            dtype = torch.float32 if name.endswith(family.float32) else shard.dtype
            slot = Slot(block.get_submodule(owner), leaf, dtype)
            of_block[family.block_prefix(number) + name] = slot
        slots.append(of_block)
    return slots


def names_of_ends(shard: ModelShard) -> list[str]:
    """Return the names of a shard's tensors outside of its blocks.

    A head tied to an embedding that is here is left out.
    """
    tied = _tied(shard)
    names = (name for name in shard.model.state_dict() if shard.layout.block_of(name) is None)
    return [name for name in names if name not in tied]


def load_ends(shard: ModelShard, read: Read) -> None:
    """Load a shard's tensors outside of its blocks, and bring all buffers to its device.

    Raises:
        BadWeightsError: a weight is not finite.
    """
    device = shard.device
    for name in names_of_ends(shard):
        value = read(name)
        check_finite(name, value)
        # the file's memory would stay mapped
        own = torch.empty_like(value, dtype=shard.dtype, device=device).copy_(value)
        set_module_tensor_to_device(shard.model, name, device, value=own)
    for embedding in _tied(shard).values():
        head = shard.model.get_submodule(shard.layout.family.head)
        # a typed attribute would not be a Parameter
        setattr(head, "weight", shard.model.get_parameter(embedding))  # noqa: B010
    for module in shard.model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[leaf] = buffer.to(device)


def _tied(shard: ModelShard) -> dict[str, str]:
    """Return {head weight: embedding weight} if the head is tied to an embedding that is here."""
    return shard.layout.tied if shard.blocks.is_first and shard.blocks.is_last else {}
