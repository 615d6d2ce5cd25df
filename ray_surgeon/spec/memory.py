"""Where a worker keeps what it does not use at the moment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, field_validator

from ray_surgeon.spec.base import Positive, Section


class MemorySection(Section):
    """Where a worker keeps weights and factors, and how sequences pass through it.

    The plan chooses what is auto or not given.

    Every choice gives the same weights, bit for bit on a CPU; they differ in memory and time.
    """

    weights: Literal["auto", "device", "host", "disk"] = "auto"
    """Where the blocks' weights are. device: all stay there; host: in the host's memory, copied
    block by block; disk: read block by block from the files of the model or the last shot if they
    are local; otherwise, and once changed, from scratch
    """
    factors: Literal["auto", "device", "host", "disk"] = "auto"
    """A and G of all linears: device, host, or disk (files in scratch)"""
    activations: Literal["auto", "keep", "recompute"] = "auto"
    """Activations of a block between its forward and backward pass. keep: they stay, which needs
    weights and factors on the device; recompute: they are computed again from the block's inputs
    """
    wave: Positive | None = None
    """Sequences that pass a block before the next block runs; a larger wave means fewer copies and
    more memory
    """
    limit_gib: float | None = Field(None, gt=0)
    """GiB of memory that a worker may use at most: its device's, or on a CPU the host's. null: nine
    tenths of its share of the free memory; this option can only lower that
    """
    scratch: str | None = None
    """Local folder for what is on disk; the folder for temporary files if not given"""

    @field_validator("scratch")
    @classmethod
    def _is_local(cls, scratch: str | None) -> str | None:
        if scratch is not None and "://" in scratch:
            raise ValueError(
                f"{scratch} is not on a local disk; give a folder of the workers' machines"
            )
        return scratch

    def problems(self) -> Iterator[str]:
        """Yield what cannot be kept where it is to be."""
        for name in ("weights", "factors") if self.activations == "keep" else ():
            if getattr(self, name) in ("host", "disk"):
                yield (
                    f"activations: keep needs {name} on the device; set activations: recompute, "
                    f"or {name}: device"
                )
