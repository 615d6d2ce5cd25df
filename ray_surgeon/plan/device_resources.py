"""How much memory and disk there is for a worker, asked on its machine."""

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

from ray_surgeon.memory.stores import Scratch, scratch_root
from ray_surgeon.memory.transfers import backend
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.spec.base import refusing

_CGROUPS = [("/sys/fs/cgroup", "memory.max", "memory.current", "")]
_CGROUPS += [("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")]
"""Folder, limit, use and prefix in memory.stat, of cgroup versions 2 and 1."""
_DISK = "RAY_SURGEON_DISK"
"""Variable: the bytes of a pod's temporary folder; its file system shows those of the node."""


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
    if root is None and _DISK in os.environ:
        disk = min(disk, max(0.0, float(os.environ[_DISK]) - _size_of(Path(tempfile.gettempdir()))))
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
    if named.endswith(".json"):
        failure = f"cluster.device_speed: {named} has no figures of a device"
        kinds = (OSError, AttributeError, KeyError, TypeError, ValueError)
        with refusing(failure, "those of plan/devices.yaml are an example", kinds):
            measured = json.loads(Path(named).read_text())
            figures = vars(DEVICES[measured.pop("like", "h100")]) | {"name": Path(named).stem}
            rates = {"flops": figures["flops"] | measured.get("flops", {})}
            return _CHECK.validate_python({named: figures | measured | rates})[named]
    if named not in DEVICES:
        names = ", ".join(sorted(DEVICES))
        raise ValueError(f"cluster.device_speed: {named} is none of {names}, nor a JSON file")
    return DEVICES["cpu"].times(num_threads) if named == "cpu" else DEVICES[named]


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


def _size_of(folder: Path) -> float:
    """Return the bytes of all files below a folder; links count as such.

    Files that other processes remove meanwhile count nothing.
    """
    total = 0
    for parent, _, names in os.walk(folder):  # which passes over folders that vanish
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return float(total)


def available_cpus() -> int:
    """Return how many CPUs this process may use: those it is bound to, or fewer by its cgroup."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota, period = (_read("/sys/fs/cgroup", "cpu.max") or "max 100000").split()
    of_container = math.inf if quota == "max" else math.ceil(int(quota) / int(period))
    return int(max(1, min(bound or 1, of_container)))


def _read(*parts: str) -> str:
    """Return the text of a file; "" if there is none."""
    path = Path(*parts)
    return path.read_text() if path.exists() else ""


@dataclass(frozen=True)
class Device:
    """How fast a worker's device is: what it reaches on the products here, not its peak."""

    name: str
    flops: Mapping[str, Rate]  # per second, by dtype of the weights
    float32_flops: Rate  # of factorisations and products of the costs
    host_bytes_per_s: Rate  # between host and device
    disk_bytes_per_s: Rate  # between disk and host
    memory_bytes_per_s: Rate  # of its own memory, read or written
    network_bytes_per_s: Rate  # between workers
    launch_s: NonNegativeFloat  # host's time for an operator
    call_s: NonNegativeFloat  # until a worker that waits has its next step
    memory_bytes: NonNegativeFloat = 0.0  # of its own; 0 for the CPU
    sync_s: NonNegativeFloat = 0.0  # until the host goes on after it waited for the device
    # as its maker publishes them, dense, by dtype; none of CPUs, which have none of their own
    peak_flops: Mapping[str, Rate] = field(default_factory=dict)

    def times(self, factor: float) -> Device:
        """Return a device that computes so many times as fast."""
        flops = {dtype: factor * rate for dtype, rate in self.flops.items()}
        wide = factor * self.float32_flops
        moving = factor * self.memory_bytes_per_s
        return replace(self, flops=flops, float32_flops=wide, memory_bytes_per_s=moving)


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
