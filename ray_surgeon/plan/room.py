"""How much memory and disk there is for a worker, asked on its machine."""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter

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
    gc.collect()  # of earlier runs in this process
    host = float(available_bytes())
    disk = float(shutil.disk_usage(folder).free + to_go)
    if device.type == "cpu":
        return Resources(machine, "cpu", "", Room(host, host, disk, device_is_host=True))
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


def device_of(resources: Sequence[Resources], num_threads: int, named: str | None = None) -> Device:
    """Return how fast the workers' devices are; of a GPU that is not known, an A100's figures.

    Args:
        resources: of the workers.
        num_threads: of a worker on the CPU.
        named: `cluster.device_speed` of the job spec, which then says it.
    """
    if named is not None:
        return named_device(named, num_threads)
    name = resources[0].device_name.lower().replace(" ", "")
    if not name:
        return DEVICES["cpu"].times(num_threads)
    known = (key for key in DEVICES if key in name)
    return DEVICES[max(known, key=len, default="a100")]  # a gb200 is no b200


def named_device(named: str, num_threads: int) -> Device:
    """Return a device by its name, or as a JSON file says; the CPU with so many threads.

    A file has fields of `Device`, and may have ``like``, the name of a device that all others are
    of (h100 if not given).

    Raises:
        ValueError: there is no such device or file, or the file says something else.
    """
    if not named.endswith(".json"):
        if named not in DEVICES:
            names = ", ".join(sorted(DEVICES))
            raise ValueError(f"cluster.device_speed: {named} is none of {names}, nor a JSON file")
        return DEVICES["cpu"].times(num_threads) if named == "cpu" else DEVICES[named]
    try:
        measured = json.loads(Path(named).read_text())
        if not isinstance(measured, dict):
            raise ValueError("they are an object with the figures' names")
        figures = vars(DEVICES[measured.pop("like", "h100")]) | {"name": Path(named).stem}
        if unknown := measured.keys() - figures.keys():
            raise ValueError(f"no figures are {', '.join(sorted(unknown))}")
        rates = {"flops": figures["flops"] | measured.get("flops", {})}
        device = _FIGURES.validate_python(figures | measured | rates)
        numbers = {**device.flops, **{n: x for n, x in vars(device).items() if n in measured}}
        if bad := [n for n, x in numbers.items() if isinstance(x, int | float) and not x > 0]:
            raise ValueError(f"{', '.join(bad)} must be above 0")
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cluster.device_speed: {named} has no figures of a device: {reason}"
        ) from error
    return device


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
    memory_bytes_per_s: float = 1.0  # of its own memory, read or written
    network_bytes_per_s: float = 1.0  # between workers
    launch_s: float = 0.0  # host's time for an operator
    sync_s: float = 0.0  # until the host goes on after it waited for the device
    call_s: float = 0.0  # until a worker that waits has its next step

    def times(self, factor: float) -> Device:
        """Return a device that computes so many times as fast."""
        flops = {dtype: factor * rate for dtype, rate in self.flops.items()}
        return replace(
            self,
            flops=flops,
            float32_flops=factor * self.float32_flops,
            memory_bytes_per_s=factor * self.memory_bytes_per_s,
        )


_FIGURES = TypeAdapter(Device)


def _gpu(
    name: str, half: float, float32: float, host: float, memory: tuple[float, float]
) -> Device:
    """Return a GPU; `memory` are its bytes, and how many of them pass in a second."""
    flops = {"bfloat16": half, "float16": half, "float32": float32}
    # seven microseconds a launch of PyTorch are usual; a network of 400 Gb/s
    return Device(name, flops, float32, host, 3e9, *memory, 5e10, 7e-6, 15e-6, 2e-3)


DEVICES = {
    "h100": _gpu("h100", 4e14, 4e13, 4e10, (80e9, 2.7e12)),
    "h200": _gpu("h200", 4e14, 4e13, 4e10, (141e9, 3.8e12)),
    "b200": _gpu("b200", 9e14, 4.5e13, 4e10, (180e9, 6.4e12)),
    "gb200": _gpu("gb200", 1e15, 4.8e13, 2e11, (186e9, 6.4e12)),
    "mi325x": _gpu("mi325x", 5.2e14, 6.5e13, 4e10, (256e9, 4.8e12)),
    "a100": _gpu("a100", 1.5e14, 1.5e13, 2e10, (80e9, 1.6e12)),
    "l40s": _gpu("l40s", 1.5e14, 4e13, 2e10, (48e9, 6.9e11)),
    "cpu": Device(
        "cpu",
        {"bfloat16": 1.7e11, "float16": 2e10, "float32": 8e10},
        8e10,
        1e10,
        1e9,
        memory_bytes_per_s=1e10,
        network_bytes_per_s=1.5e9,
        launch_s=5e-6,
        call_s=0.1,
    ),
}
"""Devices by name: about 0.4 of the published dense rates and 0.8 of the bandwidth; of the CPU one
core of a server, as measured, whose workers share all cores with what calls them.

Published are, in TFLOP/s of bfloat16 and float32, and TB/s: H100 SXM 989, 67, 3.35 and H200 989,
67, 4.8 (NVIDIA's data sheets of H100 and H200); B200 2250, 75, 8 and GB200 2500, 80, 8 with 900
GB/s to Grace, whose memory passes 512 GB/s for two GPUs (of DGX B200 and GB200 NVL72); MI325X 1307,
163, 6 (AMD's data sheet); A100 80GB SXM 312, 19.5, 2.04; L40S 362, 92, 0.86. Hosts are linked by
PCI Express 5 with 64 GB/s, those of the last two by 4 with 32.
"""


@dataclass(frozen=True)
class Room:
    """Bytes that one worker may use. On the CPU the device's memory is the host's."""

    device: float
    host: float
    disk: float
    device_is_host: bool
