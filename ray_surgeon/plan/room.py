"""How much memory and disk there is for a worker, asked on its machine."""

from __future__ import annotations

import gc
import os
import shutil
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ray_surgeon.memory.stores import Scratch, scratch_root
from ray_surgeon.memory.transfers import backend
from ray_surgeon.runtime.worker import Worker

_CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", ""),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
"""Folder, limit, use and prefix in memory.stat, of cgroup versions 2 and 1."""


@dataclass(frozen=True)
class Resources:
    """What there is on the machine of a worker, which others may share."""

    machine: str
    device: str  # which one on it
    device_name: str  # e.g. "NVIDIA H100 80GB HBM3"; "" for the CPU
    room: Room


def look_around(worker: Worker, root: str | None, run: str, attempt: str) -> Resources:
    """Return what there is, if what earlier tries of the run left on the disk goes; see `Scratch`.

    Runs on the worker.
    """
    return resources_here(worker.device, root, Scratch(root, run, attempt, "").earlier_bytes())


def resources_here(device: torch.device, root: str | None, to_go: float = 0.0) -> Resources:
    """Return what there is on this machine.

    The disk is that of the root of scratch folders, which may not exist yet; `to_go` are bytes
    there that others will give back.
    """
    folder = scratch_root(root)
    while not os.path.exists(folder):
        folder = folder.parent
    machine = socket.gethostname()
    host = float(available_bytes())
    disk = float(shutil.disk_usage(folder).free + to_go)
    if device.type == "cpu":
        return Resources(machine, "cpu", "", Room(host, host, disk, device_is_host=True))
    gc.collect()  # of earlier runs in this process
    gpus = backend(device)
    gpus.empty_cache()
    properties = gpus.get_device_properties(device)
    room = Room(float(gpus.mem_get_info(device)[0]), host, disk, device_is_host=False)
    return Resources(machine, str(properties.uuid), properties.name, room)


def shared(resources: Sequence[Resources]) -> Room:
    """Return what every worker may use, where workers share machines and devices."""
    on_machine = Counter(worker.machine for worker in resources)
    on_device = Counter((worker.machine, worker.device) for worker in resources)
    return Room(
        min(worker.room.device / on_device[worker.machine, worker.device] for worker in resources),
        min(worker.room.host / on_machine[worker.machine] for worker in resources),
        min(worker.room.disk / on_machine[worker.machine] for worker in resources),
        any(worker.room.device_is_host for worker in resources),
    )


def device_of(resources: Sequence[Resources], num_threads: int) -> Device:
    """Return how fast the workers' devices are; of a GPU that is not known, an A100's figures."""
    name = resources[0].device_name.lower().replace(" ", "")
    if not name:
        return DEVICES["cpu"].times(num_threads)
    return next((device for key, device in DEVICES.items() if key in name), DEVICES["a100"])


def available_bytes() -> int:
    """Return the memory that this machine, or this container, can still give."""
    meminfo = dict(line.split(":") for line in _read("/proc/meminfo").splitlines())
    available = int(meminfo.get("MemAvailable", "8000000 kB").split()[0]) * 1024
    for folder, limit, used, prefix in _CGROUPS:
        allowed = _read(folder, limit).strip()
        if allowed in ("", "max"):
            continue
        stat = dict(line.split() for line in _read(folder, "memory.stat").splitlines())
        # go when memory is wanted
        files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
        available = min(available, int(allowed) - int(_read(folder, used)) + files)
    return max(1, available)  # a plan divides by it


def _read(*parts: str) -> str:
    """Return the text of a file; "" if there is none."""
    path = Path(*parts)
    return path.read_text() if path.exists() else ""


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


def _gpu(name: str, half: float, float32: float, host: float, memory: float) -> Device:
    flops = {"bfloat16": half, "float16": half, "float32": float32}
    return Device(name, flops, float32, host, 3e9, memory)


DEVICES = {
    "h100": _gpu("h100", 4e14, 4e13, 4e10, 80e9),
    "a100": _gpu("a100", 1.5e14, 1.5e13, 2e10, 80e9),
    "l40s": _gpu("l40s", 1.5e14, 4e13, 2e10, 48e9),
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
