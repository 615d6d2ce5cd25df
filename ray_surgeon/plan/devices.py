"""The devices of workers: how fast they are, and how much room they have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Device:
    """How fast a worker's device is: what it reaches on the products here, not its peak."""

    name: str
    flops: Mapping[str, float]  # per second, by dtype of the weights
    float32_flops: float  # of factorisations and products of the costs
    host_bytes_per_s: float  # between host and device
    disk_bytes_per_s: float  # between disk and host
    memory_bytes: float = 0.0  # of its own; 0 for the CPU

    def times(self, factor: float) -> Device:
        """Return a device that computes so many times as fast."""
        flops = {dtype: factor * rate for dtype, rate in self.flops.items()}
        return replace(self, flops=flops, float32_flops=factor * self.float32_flops)


DEVICES = {
    "h100": Device(
        "h100", {"bfloat16": 4e14, "float16": 4e14, "float32": 4e13}, 4e13, 4e10, 3e9, 80e9
    ),
    "a100": Device(
        "a100", {"bfloat16": 1.5e14, "float16": 1.5e14, "float32": 1.5e13}, 1.5e13, 2e10, 3e9, 80e9
    ),
    "l40s": Device(
        "l40s", {"bfloat16": 1.5e14, "float16": 1.5e14, "float32": 4e13}, 4e13, 2e10, 3e9, 48e9
    ),
    "cpu": Device("cpu", {"bfloat16": 1.2e11, "float16": 2e10, "float32": 7e10}, 7e10, 1e10, 1e9),
}
"""Devices by name: about 0.4 of the published dense rates; of the CPU one core of a server."""


@dataclass(frozen=True)
class Room:
    """Bytes that one worker may use. On the CPU the device's memory is the host's."""

    device: float
    host: float
    disk: float
    device_is_host: bool
