"""Stores of packed factors."""

from __future__ import annotations

import torch

from ray_surgeon.maths.kronecker import PackedSymmetric
from ray_surgeon.memory.stores import HostMemory, Place, Scratch


class FactorStore:
    """Packed sums by key.

    A block's sums are on the device while the block runs; between that they are where the plan
    says.
    """

    def __init__(self, place: Place, device: torch.device, scratch: Scratch) -> None:
        """Start empty."""
        self._place = place
        self._device = device
        self._scratch = scratch
        self._kept: dict[str, PackedSymmetric] = {}
        self._memory = HostMemory(device)

    def __contains__(self, key: str) -> bool:
        """Whether there is such a sum."""
        return key in self._kept

    def get(self, key: str) -> PackedSymmetric:
        """Return a sum where it lies. It is not to be written to: on disk it is a private copy."""
        return self._kept[key]

    def on_device(self, key: str, n: int) -> PackedSymmetric:
        """Return a sum [n, n] that may be added to, zeros if there is none.

        `put` keeps what was added.
        """
        if key not in self._kept:
            return PackedSymmetric.zeros(n, self._device)
        kept = self._kept[key]
        if self._place == "device":
            return kept
        return PackedSymmetric(n, kept.flat.to(self._device, copy=True))

    def put(self, key: str, total: PackedSymmetric) -> None:
        """Keep a sum in place of the one there was."""
        if self._place == "device":
            self._kept[key] = total
            return
        flat = total.flat
        if self._place == "disk":
            name = f"{key}.factor"
            with self._scratch.replacing(name) as path:
                flat.cpu().numpy().tofile(path)
            file = str(self._scratch.path(name))
            flat = torch.from_file(file, shared=False, size=len(flat), dtype=flat.dtype)
            self._kept[key] = PackedSymmetric(total.n, flat)
        elif key in self._kept:
            self._kept[key].flat.copy_(flat)
        else:
            own = self._memory.empty(flat.shape, flat.dtype).copy_(flat)
            self._kept[key] = PackedSymmetric(total.n, own)

    def drop(self, key: str) -> None:
        """Forget a sum."""
        del self._kept[key]
        if not self._kept:
            self._memory.clear()
        if self._place == "disk":
            self._scratch.path(f"{key}.factor").unlink()

    def clear(self) -> None:
        """Forget everything."""
        for key in list(self._kept):
            self.drop(key)
