"""Memory and disk available to a worker, measured on its machine, and the speed of devices."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import yaml
from pydantic import ConfigDict, NonNegativeFloat, TypeAdapter
from pydantic import PositiveFloat as Rate

from ray_surgeon.config.base import refusing
from ray_surgeon.distributed.worker import Worker
from ray_surgeon.memory.stores import Scratch, scratch_root
from ray_surgeon.memory.transfers import backend

CGROUPS = [
    ("/sys/fs/cgroup", "memory.max", "memory.current", ""),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
]
"""Folder, limit, use and prefix in memory.stat, of cgroup versions 2 and 1."""
_DISK = "RAY_SURGEON_DISK"
"""Variable with the bytes of a pod's temporary folder; its file system reports the node's disk."""


@dataclass(frozen=True)
class Resources:
    """Resources on the machine of a worker, which other workers may share."""

    machine: str
    device: str  # its identifier on the machine
    device_name: str  # e.g. "NVIDIA H100 80GB HBM3"; "" for the CPU
    room: Room


def look_around(worker: Worker, root: str | None, run: str, attempt: str) -> Resources:
    """Return the resources of a worker once earlier tries of the run are removed from the disk.

    Runs on the worker; see `Scratch`.
    """
    earlier_bytes = Scratch(root, run, attempt, "").earlier_bytes()
    return resources_here(worker.device, root, to_go=earlier_bytes)


def resources_here(
    device: torch.device, root: str | None, to_go: float = 0.0
) -> Resources:
    """Return the resources of this machine.

    Args:
        device: of the worker.
        root: of scratch folders, which may not exist yet; its disk is measured.
        to_go: bytes there that will be freed.
    """
    folder = scratch_root(root)
    while not os.path.exists(folder):
        folder = folder.parent
    machine = socket.gethostname()
    gc.collect()  # of earlier runs in this process
    host = float(available_bytes())
    disk = float(shutil.disk_usage(folder).free + to_go)
    if root is None and _DISK in os.environ:
        used = _size_of(Path(tempfile.gettempdir()))
        disk = min(disk, max(0.0, float(os.environ[_DISK]) - used))
    if device.type == "cpu":
        room = Room(device=host, host=host, disk=disk, device_is_host=True)
        return Resources(machine, device="cpu", device_name="", room=room)
    gpus = backend(device)
    gpus.empty_cache()
    properties = gpus.get_device_properties(device)
    free = float(gpus.mem_get_info(device)[0])
    room = Room(device=free, host=host, disk=disk, device_is_host=False)
    uuid = str(properties.uuid)
    return Resources(machine, device=uuid, device_name=properties.name, room=room)


def shared(resources: Sequence[Resources]) -> Room:
    """Return the bytes that every worker may use, where workers share machines and devices."""
    on_machine = Counter(worker.machine for worker in resources)
    on_device = Counter((worker.machine, worker.device) for worker in resources)
    device = host = disk = math.inf
    device_is_host = False
    for worker in resources:
        room = worker.room
        device = min(device, room.device / on_device[worker.machine, worker.device])
        host = min(host, room.host / on_machine[worker.machine])
        disk = min(disk, room.disk / on_machine[worker.machine])
        device_is_host = device_is_host or room.device_is_host
    return Room(device=device, host=host, disk=disk, device_is_host=device_is_host)


def device_of(
    resources: Sequence[Resources], num_threads: int, named: str | None = None
) -> Device:
    """Return the speed of the workers' devices; for an unknown GPU, that of an A100.

    Args:
        resources: of the workers.
        num_threads: of a worker on the CPU.
        named: `cluster.device_speed` of the job spec, which takes precedence.
    """
    if named is not None:
        return named_device(named, num_threads)
    name = resources[0].device_name.lower().replace(" ", "")
    if not name:
        return DEVICES["cpu"].times(num_threads)
    known = [key for key in DEVICES if key in name]
    # the longest name, because a GB200 is no B200
    return DEVICES[max(known, key=len, default="a100")]


def named_device(named: str, num_threads: int) -> Device:
    """Return a device by its name, or with the figures of a JSON file.

    A file has fields of `Device`, and may have ``like``, the name of a device from which all other
    fields are taken (h100 if not given).

    Args:
        named: a name in devices.yaml, or the path of a JSON file.
        num_threads: of a worker on the CPU.

    Raises:
        ValueError: there is no such device or file, or the file has other content.
    """
    if named.endswith(".json"):
        return _measured_device(named)
    if named not in DEVICES:
        names = ", ".join(sorted(DEVICES))
        raise ValueError(
            f"cluster.device_speed: {named} is none of {names}, nor a JSON file"
        )
    if named == "cpu":
        return DEVICES["cpu"].times(num_threads)
    return DEVICES[named]


def _measured_device(path: str) -> Device:
    failure = f"cluster.device_speed: {path} has no figures of a device"
    kinds = (OSError, AttributeError, KeyError, TypeError, ValueError)
    with refusing(
        failure, "those of distributed/memory_plan/devices.yaml are an example", kinds
    ):
        measured = json.loads(Path(path).read_text())
        like = vars(DEVICES[measured.pop("like", "h100")])
        figures = {
            **like,
            "name": Path(path).stem,
            **measured,
            "flops": {**like["flops"], **measured.get("flops", {})},
        }
        return _CHECK.validate_python({path: figures})[path]


def available_bytes() -> int:
    """Return the bytes of memory that are available on this machine, or in this container."""
    meminfo = dict(line.split(":") for line in _read("/proc/meminfo").splitlines())
    available = int(meminfo.get("MemAvailable", "8000000 kB").split()[0]) * 1024
    for folder, limit, used, prefix in CGROUPS:
        allowed = _read(folder, limit).strip()
        if allowed in ("", "max"):
            continue
        stat = dict(line.split() for line in _read(folder, "memory.stat").splitlines())
        # cached files, which are dropped when memory is needed
        files = int(stat.get(f"{prefix}inactive_file", 0))
        files += int(stat.get(f"{prefix}active_file", 0))
        available = min(available, int(allowed) - int(_read(folder, used)) + files)
    return max(1, available)  # a plan divides by it


def _size_of(folder: Path) -> float:
    """Return the bytes of all files below a folder; links are not followed.

    Files that other processes remove meanwhile are not counted.
    """
    total = 0
    for parent, _, names in os.walk(folder):  # skips folders that vanish
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return float(total)


def available_cpus() -> int:
    """Return the number of CPUs that affinity and cgroup allow this process to use."""
    if hasattr(os, "sched_getaffinity"):
        number = len(os.sched_getaffinity(0))
    else:
        number = os.cpu_count() or 1
    quota, period = (_read("/sys/fs/cgroup", "cpu.max") or "max 100000").split()
    if quota != "max":
        number = min(number, math.ceil(int(quota) / int(period)))
    return max(1, number)


def _read(*parts: str) -> str:
    """Return the text of a file; "" if there is none."""
    path = Path(*parts)
    if not path.exists():
        return ""
    return path.read_text()


@dataclass(frozen=True)
class Device:
    """Speed of a worker's device: rates reached on the products of a job, not peaks."""

    name: str
    flops: Mapping[str, Rate]  # per second, by dtype of the weights
    float32_flops: Rate  # per second, of factorisations and products of the costs
    host_bytes_per_s: Rate  # between host and device
    disk_bytes_per_s: Rate  # between disk and host
    memory_bytes_per_s: Rate  # of its own memory, read or written
    network_bytes_per_s: Rate  # between workers
    memory_bytes: NonNegativeFloat = 0.0  # of the device's own memory; 0 for the CPU
    # per second, dense, by dtype, as published by its maker; empty for CPUs
    peak_flops: Mapping[str, Rate] = field(default_factory=dict)

    def times(self, factor: float) -> Device:
        """Return a device that computes faster by a factor."""
        return replace(
            self,
            flops={dtype: factor * rate for dtype, rate in self.flops.items()},
            float32_flops=factor * self.float32_flops,
            memory_bytes_per_s=factor * self.memory_bytes_per_s,
        )


_CHECK = TypeAdapter(dict[str, Device], config=ConfigDict(extra="forbid"))
_DOCUMENT = Path(__file__).with_name("devices.yaml").read_text(encoding="utf-8")
DEVICES = _CHECK.validate_python(yaml.safe_load(_DOCUMENT))
"""Devices by name."""


@dataclass(frozen=True)
class Room:
    """Bytes that one worker may use. On the CPU the device's memory is the host's."""

    device: float
    host: float
    disk: float
    device_is_host: bool
