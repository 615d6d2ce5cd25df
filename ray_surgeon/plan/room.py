"""How much memory and disk there is for a worker, asked on its machine."""

from __future__ import annotations

import gc
import os
import shutil
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ray_surgeon.memory.stores import Scratch, scratch_root
from ray_surgeon.plan.devices import DEVICES, Device, Room
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
    resources = resources_here(worker.device, root)
    return replace(
        resources,
        room=replace(
            resources.room,
            disk=resources.room.disk + Scratch(root, run, attempt, "").earlier_bytes(),
        ),
    )


def resources_here(device: torch.device, root: str | None) -> Resources:
    """Return what there is on this machine.

    The disk is that of the root of scratch folders, which may not exist yet.
    """
    folder = scratch_root(root)
    while not os.path.exists(folder):
        folder = folder.parent
    host = float(available_bytes())
    disk = float(shutil.disk_usage(folder).free)
    if device.type != "cuda":
        return Resources(
            socket.gethostname(), "cpu", "", Room(host, host, disk, device_is_host=True)
        )
    gc.collect()  # of earlier runs in this process
    torch.cuda.empty_cache()
    properties = torch.cuda.get_device_properties(device)
    (free, _) = torch.cuda.mem_get_info(device)
    return Resources(
        socket.gethostname(),
        str(properties.uuid),
        properties.name,
        Room(float(free), host, disk, device_is_host=False),
    )


def shared(resources: Sequence[Resources]) -> Room:
    """Return what every worker may use, where workers share machines and devices."""
    on_machine = Counter(f.machine for f in resources)
    on_device = Counter((f.machine, f.device) for f in resources)
    rooms = []
    for f in resources:
        machine = on_machine[f.machine]
        device = machine if f.room.device_is_host else on_device[f.machine, f.device]
        rooms.append(
            replace(
                f.room,
                device=f.room.device / device,
                host=f.room.host / machine,
                disk=f.room.disk / machine,
            )
        )
    return Room.smallest(rooms)


def device_of(resources: Sequence[Resources], num_threads: int) -> Device:
    """Return how fast the workers' devices are; of a GPU that is not known, an A100's figures."""
    name = resources[0].device_name.lower()
    if not name:
        return DEVICES["cpu"].times(num_threads)
    return next(
        (device for key, device in DEVICES.items() if key in name.replace(" ", "")), DEVICES["a100"]
    )


def available_bytes() -> int:
    """Return the memory that this machine, or this container, can still give."""
    meminfo = (
        dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        if Path("/proc/meminfo").exists()
        else {}
    )
    available = int(meminfo.get("MemAvailable", "8000000 kB").split()[0]) * 1024
    for folder, limit, used, prefix in _CGROUPS:
        if (
            Path(folder, limit).exists()
            and (text := Path(folder, limit).read_text().strip()) != "max"
        ):
            lines = (
                Path(folder, "memory.stat").read_text().splitlines()
                if Path(folder, "memory.stat").exists()
                else []
            )
            stat = dict(line.split() for line in lines)
            # go when memory is wanted
            files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
            available = min(available, int(text) - int(Path(folder, used).read_text()) + files)
    return max(1, available)  # a plan divides by it
