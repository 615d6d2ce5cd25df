"""Tensors to and from the object store: numpy arrays are shared without a copy, pickled torch tensors are not."""

from __future__ import annotations

import torch
from torch import Tensor

from ray_surgeon.cluster.messages import Wire


def encode(tensor: Tensor) -> Wire:
    """Return a tensor as it travels. A view becomes a copy of its own, or its whole storage would travel."""
    dense = tensor.detach().cpu().contiguous()
    if dense.untyped_storage().nbytes() != dense.nbytes:
        dense = dense.clone()
    if dense.dtype == torch.bfloat16:
        return Wire(dense.view(torch.int16).numpy(), "bfloat16")
    return Wire(dense.numpy(), str(dense.dtype).removeprefix("torch."))


def decode(wire: Wire, device: torch.device) -> Tensor:
    """Return a tensor that may be written to: what lies in the object store is shared with other readers."""
    tensor = torch.tensor(wire.array)
    if wire.dtype == "bfloat16":
        tensor = tensor.view(torch.bfloat16)
    return tensor.to(device)
