from __future__ import annotations

from pathlib import Path

import torch

from ray_surgeon.cluster.devices import DEVICES, Room
from ray_surgeon.cluster.room import Found, available_bytes, device_of, found_here, shared

GPU = Room(80.0, 1000.0, 4000.0, device_is_host=False)
CPU = Room(1000.0, 1000.0, 4000.0, device_is_host=True)


def test_workers_share_a_machine_but_not_its_gpus() -> None:
    found = [Found("a", "0", "NVIDIA H100 80GB HBM3", GPU), Found("a", "1", "NVIDIA H100 80GB HBM3", GPU)]
    assert shared(found) == Room(80.0, 500.0, 2000.0, device_is_host=False)
    assert device_of(found, 1) is DEVICES["h100"]


def test_workers_that_share_a_gpu_or_a_cpu() -> None:
    assert shared([Found("a", "0", "NVIDIA L40S", GPU)] * 2).device == 40.0
    assert shared([Found("a", "cpu", "", CPU)] * 4) == Room(250.0, 250.0, 1000.0, device_is_host=True)


def test_the_smallest_machine_decides() -> None:
    small = Room(40.0, 100.0, 4000.0, device_is_host=False)
    found = [Found("a", "0", "NVIDIA A100", GPU), Found("b", "0", "NVIDIA A100", small)]
    assert shared(found) == Room(40.0, 100.0, 4000.0, device_is_host=False)


def test_what_is_here(tmp_path: Path) -> None:
    found = found_here(torch.device("cpu"), str(tmp_path / "not" / "yet"))
    assert found.room.device_is_host
    assert 2**28 < found.room.host <= available_bytes() * 2
    assert found.room.disk > 0
    assert device_of([found], 3).float32_flops == 3 * DEVICES["cpu"].float32_flops
