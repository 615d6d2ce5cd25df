"""Tensors to and from the object store, as numpy arrays.

Arrays are shared without a copy; pickled torch tensors are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class TensorPayload:
    """A tensor on its way: a numpy array, int16 where it stands for bfloat16."""

    array: NDArray[np.generic]
    is_bfloat16: bool


def encode(tensor: Tensor) -> TensorPayload:
    """Return a tensor as it travels.

    A view becomes a copy of its own, or its whole storage would travel.
    """
    dense = tensor.detach().cpu().contiguous()
    if dense.untyped_storage().nbytes() != dense.nbytes:
        dense = dense.clone()
    is_bfloat16 = dense.dtype == torch.bfloat16
    return TensorPayload((dense.view(torch.int16) if is_bfloat16 else dense).numpy(), is_bfloat16)


def decode(payload: TensorPayload, device: torch.device) -> Tensor:
    """Return a tensor that may be written to.

    What lies in the object store is shared with other readers.
    """
    tensor = torch.tensor(payload.array)
    if payload.is_bfloat16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.to(device)
