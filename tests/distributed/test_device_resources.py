from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch

from ray_surgeon.distributed.memory_plan import device_resources
from ray_surgeon.distributed.memory_plan.device_resources import (
    DEVICES,
    Resources,
    Room,
    available_bytes,
    device_of,
    named_device,
    shared,
)

GPU = Room(80.0, 1000.0, 4000.0, device_is_host=False)
CPU = Room(1000.0, 1000.0, 4000.0, device_is_host=True)


def test_workers_share_a_machine_but_not_its_gpus() -> None:
    found = [Resources("a", gpu, "NVIDIA H100 80GB HBM3", GPU) for gpu in ("0", "1")]
    assert shared(found) == Room(80.0, 500.0, 2000.0, device_is_host=False)
    assert device_of(found, 1) is DEVICES["h100"]
    assert shared([Resources("a", "0", "NVIDIA L40S", GPU)] * 2).device == 40.0
    on_cpu = Room(250.0, 250.0, 1000.0, device_is_host=True)
    assert shared([Resources("a", "cpu", "", CPU)] * 4) == on_cpu


def test_smallest_machine_limits_all_workers() -> None:
    small = Room(40.0, 100.0, 4000.0, device_is_host=False)
    assert (
        shared([Resources(name, "0", "", r) for name, r in (("a", GPU), ("b", small))])
        == small
    )


def test_resources_of_this_machine(tmp_path: Path) -> None:
    found = device_resources.resources_here(
        torch.device("cpu"), str(tmp_path / "not" / "yet")
    )
    assert found.room.device_is_host
    assert 2**28 < found.room.host <= available_bytes() * 2
    assert found.room.disk > 0
    assert device_of([found], 3).float32_flops == 3 * DEVICES["cpu"].float32_flops


def test_limits_of_a_pod_are_below_those_of_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_SURGEON_DISK", "1000")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "downloaded").write_bytes(bytes(300))
    assert device_resources.resources_here(torch.device("cpu"), None).room.disk == 700
    elsewhere = device_resources.resources_here(
        torch.device("cpu"), str(tmp_path)
    ).room.disk
    assert elsewhere > 1000, "a place of its own has its own size"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    for quota, expected in (
        ("max 100000", 64),
        ("150000 100000", 2),
        ("", 64),
        ("1 100000", 1),
    ):
        monkeypatch.setattr(device_resources, "_read", lambda *_, quota=quota: quota)
        assert device_resources.available_cpus() == expected


@pytest.mark.parametrize(
    ("limit", "used", "prefix"),
    [("memory.max", "memory.current", ""), ("limit", "usage", "total_")],
)
def test_cached_files_of_a_container_count_as_available_memory(
    limit: str, used: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        device_resources, "CGROUPS", ((str(tmp_path), limit, used, prefix),)
    )
    here = available_bytes()
    statistics = f"anon 100\n{prefix}inactive_file 3000\n{prefix}active_file 400\n"
    (tmp_path / "memory.stat").write_text(statistics)
    (tmp_path / used).write_text("10000\n")
    (tmp_path / limit).write_text("max")
    assert available_bytes() == pytest.approx(here, rel=0.5)
    for text, expected in (
        ("12000\n", 12000 - 10000 + 3400),
        ("6601\n", 1),
        ("6000\n", 1),
    ):
        (tmp_path / limit).write_text(text)
        assert available_bytes() == expected


def test_device_is_identified_by_the_longest_matching_name() -> None:
    def found(name: str) -> str:
        return device_of([Resources("a", "0", name, GPU)], 1).name

    names = (
        "NVIDIA H200",
        "NVIDIA B200",
        "NVIDIA GB200",
        "AMD Instinct MI325X",
        "another",
    )
    assert [found(name) for name in names] == ["h200", "b200", "gb200", "mi325x", "a100"]
    assert (
        device_of([Resources("a", "0", "NVIDIA H200", GPU)], 1, "l40s") is DEVICES["l40s"]
    )


def test_measured_figures_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(
        json.dumps({"like": "h200", "flops": {"bfloat16": 5e14}, "disk_bytes_per_s": 4e9})
    )
    device = named_device(str(path), 1)
    assert (device.name, device.disk_bytes_per_s, device.flops["bfloat16"]) == (
        "own",
        4e9,
        5e14,
    )
    assert device.flops["float32"] == DEVICES["h200"].flops["float32"]
    assert device.memory_bytes_per_s == DEVICES["h200"].memory_bytes_per_s
    assert named_device("cpu", 3).float32_flops == 3 * DEVICES["cpu"].float32_flops


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"dusk_bytes_per_s": 1}', "dusk_bytes_per_s Unexpected"),
        ('{"disk_bytes_per_s": "slow"}', "disk_bytes_per_s"),
        ('{"disk_bytes_per_s": -1}', "disk_bytes_per_s Input should be greater"),
        ('{"like": "h900"}', "h900"),
        ("[]", "figures"),
    ],
)
def test_invalid_device_file_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=rf"cluster\.device_speed: .*own\.json.*{reason}"
    ):
        named_device(str(path), 1)
    with pytest.raises(ValueError, match=r"h900 is none of a100, .*, nor a JSON file"):
        named_device("h900", 1)


def test_files_that_vanish_while_a_folder_is_measured_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_SURGEON_DISK", "1000")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "kept").write_bytes(b"12345")
    walked: list[tuple[str, list[str], list[str]]] = [
        (str(tmp_path), [], ["kept", "gone"])
    ]
    monkeypatch.setattr(os, "walk", lambda _: walked)
    assert (
        device_resources.resources_here(torch.device("cpu"), None).room.disk == 1000 - 5
    )
