"""Machines that a plan is made for, as the command line tells of them."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from ray_surgeon.plan.room import DEVICES, Device, Room, resources_here
from ray_surgeon.run.inputs import Inputs


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _bytes(text: str) -> float:
    """Return a size such as 80GB or 1.5TiB in bytes."""
    try:
        size = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        size = ByteSize(0)
    if not size:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give one such as 80GB or 1.5TiB")
    return float(size)


_SIZES = {
    "--device-memory": ("80GB", "of each worker's device; the device's own if not given"),
    "--host-memory": ("1TB", "of each machine; this one's if not given"),
    "--disk": ("4TB", "free on each machine; this one's if not given"),
}
PLAN_OPTIONS: dict[str, dict[str, Any]] = {
    "--device": {
        "choices": sorted(DEVICES),
        "help": "what workers compute on; expected times are this device's; if not given, the CPU, "
        "or an h100 where the spec has gpus_per_worker, or with --device-memory",
    },
    **{o: {"type": _bytes, "metavar": size, "help": text} for o, (size, text) in _SIZES.items()},
    "--workers-per-machine": {
        "type": _positive,
        "metavar": "N",
        "help": "that share its memory and disk, at most; 8 if not given",
    },
}
"""Option -> settings of its argument: what other machines have that a plan is made for."""


def planned_for(arguments: argparse.Namespace, inputs: Inputs) -> tuple[Room, Device]:
    """Return what a worker has, as the command line says it, or else as it is here."""
    section = inputs.spec.cluster
    this_machine = resources_here(torch.device("cpu"), inputs.spec.memory.scratch).room
    name = arguments.device or (
        "h100" if section.gpus_per_worker or arguments.device_memory else "cpu"
    )
    device = DEVICES[name] if name != "cpu" else DEVICES[name].times(section.cpus_per_worker)
    together = max(1, min(section.num_workers, arguments.workers_per_machine or 8))
    host = (arguments.host_memory or this_machine.host) / together
    disk = (arguments.disk or this_machine.disk) / together
    if not device.memory_bytes:
        return Room(host, host, disk, device_is_host=True), device
    memory = arguments.device_memory or device.memory_bytes
    return Room(memory, host, disk, device_is_host=False), device
