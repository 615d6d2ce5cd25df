"""Memory of the host that is pinned for a GPU.

torch reserves a power of two for every pinned tensor, up to twice of what it needs. Tensors lie
together in larger pieces here, so that less is reserved for nothing. A piece is kept until `clear`,
and then goes when the last tensor in it does; torch keeps its memory for the next one of that size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_LARGEST_PIECE = 2**33
"""Bytes of a piece, unless one tensor has more.

Earlier ones have an eighth of all before them, so that no more is reserved for nothing.
"""
_ALIGNMENT = 64


class Pieces:
    """The places of tensors in pieces whose sizes are powers of two.

    Each tensor lies in the first piece with room for it.
    """

    def __init__(self) -> None:
        """Start without pieces."""
        self.sizes: list[int] = []
        self._used: list[int] = []

    def place(self, size: int) -> tuple[int, int]:
        """Return the piece and the first byte in it for a tensor of `size` bytes.

        The piece may be a new one.
        """
        room = -(-size // _ALIGNMENT) * _ALIGNMENT
        fitting = (i for i, used in enumerate(self._used) if used + room <= self.sizes[i])
        number = next(fitting, len(self.sizes))
        if number == len(self.sizes):
            least = min(_LARGEST_PIECE, sum(self.sizes) // 8)
            self.sizes.append(1 << max(6, (room - 1).bit_length(), least.bit_length() - 1))
            self._used.append(0)
        first = self._used[number]
        self._used[number] += room
        return number, first


def reserved_bytes(sizes: Iterable[int]) -> int:
    """Return how many bytes are reserved for tensors of these sizes."""
    pieces = Pieces()
    for size in sizes:
        pieces.place(size)
    return sum(pieces.sizes)


class HostMemory:
    """Gives tensors in the memory of the host, pinned if they go to a GPU."""

    def __init__(self, device: torch.device) -> None:
        """Reserve nothing yet."""
        self._pins = device.type == "cuda"
        self.clear()

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a tensor with whatever is there."""
        if not self._pins:
            return torch.empty(shape, dtype=dtype)
        size = math.prod(shape) * dtype.itemsize
        number, first = self._pieces.place(size)
        if number == len(self._memory):
            self._memory.append(self._reserve(self._pieces.sizes[number]))
        return self._memory[number][first : first + size].view(dtype).view(shape)

    def clear(self) -> None:
        """Begin with new pieces.

        The memory of earlier ones is free once nobody has a tensor in them.
        """
        self._pieces = Pieces()
        self._memory = list[Tensor]()

    @staticmethod
    def _reserve(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
