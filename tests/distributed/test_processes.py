"""Processes beside a worker, and the memory that the processes of a run used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch

from ray_surgeon.distributed import processes
from ray_surgeon.distributed.processes import Usage
from ray_surgeon.export import folder
from ray_surgeon.report.events import largest_of_processes
from tests.integration.runs import wait_for

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("device", "gpu", "seen"),
    [("cpu", None, ""), ("cpu", "3", ""), ("cuda", "3", "3"), ("cuda", None, None)],
    ids=str,
)
def test_process_of_a_worker_sees_only_its_gpu(
    device: str, gpu: str | None, seen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_module = Mock(return_value={})
    monkeypatch.setattr(processes, "run_module", run_module)
    emptied = Mock()
    monkeypatch.setattr(torch.cuda, "empty_cache", emptied)
    worker: Any = SimpleNamespace(device=torch.device(device), gpu=gpu)
    folder.run_on_worker(worker, "module", {})
    assert run_module.call_args_list == [call("module", {}, True, seen)]
    assert emptied.called == (device != "cpu")


@pytest.mark.skipif(
    sys.platform != "linux", reason="others remove no folder that is in use"
)
def test_process_starts_in_a_removed_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Ray unpacks a job's folder again; torch cannot multiply in a removed folder."""
    product = "float(torch.ones(9, 9).mm(torch.ones(9, 9)).sum())"
    module = f"import torch\ndef answer(request): return {{'sum': {product}}}"
    (tmp_path / "asked.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert processes.run_module("asked", {}) == {"sum": 729.0}


@pytest.mark.skipif(sys.platform != "linux", reason="a request of the kernel of Linux")
def test_process_ends_with_its_parent(tmp_path: Path) -> None:
    where = tmp_path / "pid"
    request = {"path": str(where), "seconds": 100}
    code = "from ray_surgeon.distributed.processes import run_module; "
    code += f"run_module('tests.distributed.sleeper', {request})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as parent:
        wait_for(lambda: where.exists() or parent.poll() is not None)
        parent.kill()
    sleeper = Path("/proc", where.read_text(), "stat")
    # the process has ended, whether or not it was measured
    wait_for(
        lambda: (
            not sleeper.exists()
            or sleeper.read_text().rpartition(")")[2].split()[0] == "Z"
        )
    )


@pytest.mark.skipif(sys.platform != "linux", reason="a request of the kernel of Linux")
def test_process_does_nothing_if_its_parent_ended_before_it_started(
    tmp_path: Path,
) -> None:
    module = "ray_surgeon.distributed.die_with_parent"
    command = [
        sys.executable,
        "-m",
        module,
        str(os.getppid()),
        "tests.distributed.sleeper",
    ]
    request = json.dumps({"path": str(tmp_path / "pid"), "seconds": 0})
    done = subprocess.run(
        command, input=request, text=True, capture_output=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1
    assert "has ended" in done.stderr
    assert not (tmp_path / "pid").exists()


def test_peak_of_a_process_is_its_largest_reading() -> None:
    """Reading the peak resets it, so a second reading of the same process may be smaller."""
    sizes = [("a", 0, 900), ("a", 0, 100), ("b", 70, 200), ("b", 5, 200)]
    usages = [
        Usage(process, 1.0, 10, gpu, anonymous) for process, gpu, anonymous in sizes
    ]
    assert largest_of_processes(usages, "peak_anonymous_bytes") == {"a": 900, "b": 200}
    assert largest_of_processes(usages, "peak_gpu_bytes") == {"a": 0, "b": 70}
