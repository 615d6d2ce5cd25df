"""Processes and machines are lost during a run, and the result is the same, bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster
from ray.exceptions import RayTaskError
from torch._C._distributed_c10d import TCPStore
from transformers import AutoConfig

from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.report.directory import TakenOverError
from ray_surgeon.run.driver import connect, unwrapped
from ray_surgeon.runtime import ray_cluster
from ray_surgeon.runtime.cluster import NoRoomError, WorkerFailureError
from ray_surgeon.runtime.collectives import ProcessReplica
from ray_surgeon.runtime.placement import place
from ray_surgeon.runtime.ray_cluster import RayCluster
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.spec.sections import RaySection
from ray_surgeon.stages.evaluation import CollapseError
from tests.integration.runs import (
    assert_same_shot,
    overflowing_model,
    report_of,
    run,
    tiny_spec,
    wait_for,
)

pytestmark = pytest.mark.ray

NUM_SHOTS = 6
OPTIONS: dict[str, Any] = {
    "cluster__num_shards": 2,
    "pruning__num_shots": NUM_SHOTS,
    "evaluation": [
        {
            "name": "docs",
            "source": "python-docs",
            "num_sequences": 2,
            "sequence_length": 32,
            "max_tokens": 3000,
        }
    ],
}
ON_RAY = {
    "cluster__backend": "ray",
    "cluster__ping_timeout_s": 6.0,
    "cluster__start_timeout_s": 40.0,
}


def processes_of_the_run() -> dict[str, list[psutil.Process]]:
    """Return the coordinator's and the workers' processes of Ray below this process."""
    found: dict[str, list[psutil.Process]] = {"Coordinator": [], "Worker": []}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = (process.cmdline() or [""])[0]
            for kind in found:
                if title.startswith(f"ray::{kind}"):
                    found[kind].append(process)
    return found


class Disturber(threading.Thread):
    """Waits until a run has so many events, and sends a process of it a signal."""

    def __init__(self, kind: str, sent: signal.Signals, uri: Path, num_events: int) -> None:
        super().__init__(daemon=True)
        self.kind = kind
        self.sent = sent
        self.events = uri / "events.jsonl"
        self.num_events = num_events
        # of a run that has ended, on their way out
        self.before = {process.pid for process in processes_of_the_run()[kind]}
        self.hit: psutil.Process | None = None

    def run(self) -> None:
        wait_for(
            lambda: (
                self.events.exists()
                and len(self.events.read_text().splitlines()) >= self.num_events
            )
        )
        self.hit = next(
            process
            for process in reversed(processes_of_the_run()[self.kind])
            if process.pid not in self.before
        )
        self.hit.send_signal(self.sent)


MIXTURE = OPTIONS | {
    "pruning__structure": "groups",
    "pruning__width_multiple": 8,
    "pruning__groups": ["attention", "ffn", "experts"],
    "pruning__target_sparsity": 0.3,
}


def disturb(
    kind: str,
    sent: signal.Signals,
    num_events: int,
    folder: Path,
    cluster: Cluster,
    model: Path,
    undisturbed: Path,
    options: dict[str, Any] = OPTIONS,
) -> None:
    """Run with one loss for certain, which the run must have seen, and compare the result."""
    disturber = Disturber(kind, sent, folder / "run", num_events)
    disturber.start()
    assert run(folder, model, **options, **ON_RAY, cluster__address=cluster.address) == 0
    disturber.join()
    assert disturber.hit is not None, "the run was over before the loss"
    for shot in range(1, NUM_SHOTS + 1):
        assert_same_shot(undisturbed, folder / "run", shot)
    assert len(report_of(folder / "run")["shots"]) == NUM_SHOTS
    if sent == signal.SIGSTOP:
        gone, alive = psutil.wait_procs([disturber.hit], timeout=30)
        assert gone, f"{alive} is stopped and still there: it could go on and write"
    assert retries(folder / "run") == ["worker" if kind == "Worker" else "coordinator"]


def retries(uri: Path) -> list[str]:
    """Return the causes of the retries of a run."""
    lines = (
        (uri / "events.jsonl").read_text().splitlines() if (uri / "events.jsonl").exists() else []
    )
    return [event["facts"]["cause"] for event in map(json.loads, lines) if event["step"] == "retry"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(folder, model_folders["llama"], **OPTIONS) == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("Worker", signal.SIGKILL),
        ("Coordinator", signal.SIGSTOP),
        pytest.param("Worker", signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param("Coordinator", signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_lost_process(
    kind: str,
    sent: signal.Signals,
    cluster: Cluster,
    undisturbed: Path,
    model_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    disturb(kind, sent, 4, tmp_path, cluster, model_folders["llama"], undisturbed)


@pytest.mark.slow
def test_a_lost_worker_of_a_mixture(
    cluster: Cluster, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Heads, channels and experts go; routers go around the same experts after the loss."""
    assert run(tmp_path / "undisturbed", model_folders["qwen2_moe"], **MIXTURE) == 0
    assert any(shot["experts_removed"] for shot in report_of(tmp_path / "undisturbed/run")["shots"])
    disturb(
        "Worker",
        signal.SIGKILL,
        9,
        tmp_path,
        cluster,
        model_folders["qwen2_moe"],
        tmp_path / "undisturbed/run",
        MIXTURE,
    )


def test_a_lost_machine(undisturbed: Path, model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Of two machines with a worker each one goes, and later another one comes."""
    two = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        # another address, or the driver might attach to it and be lost too
        lost = two.add_node(num_cpus=1, node_ip_address="127.0.0.2")
        two.wait_for_nodes()
        options = {
            **OPTIONS,
            **ON_RAY,
            "cluster__address": two.address,
            "cluster__start_timeout_s": 120.0,
            "cluster__ping_timeout_s": 40.0,
        }
        spec = tiny_spec(tmp_path, model_folders["llama"], **options)
        process = subprocess.Popen(
            [sys.executable, "-m", "ray_surgeon.pipeline", str(spec)],
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: len(processes_of_the_run()["Worker"]) == 2)
        time.sleep(1.0)
        two.remove_node(lost, allow_graceful=False)
        wait_for(lambda: retries(tmp_path / "run"))
        two.add_node(num_cpus=1, node_ip_address="127.0.0.3")
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    finally:
        two.shutdown()
    for shot in range(1, NUM_SHOTS + 1):
        assert_same_shot(undisturbed, tmp_path / "run", shot)
    assert retries(tmp_path / "run") == ["node"]


def _hold(worker: Worker, seconds: float) -> int:
    time.sleep(seconds)
    return os.getppid()


def _lost_before_all_meet(worker: Worker, address: str, timeout_s: float) -> None:
    """Take the place where workers meet, and go away."""
    if worker.placement.rank(worker.index) == 0:
        host, port = address.removeprefix("tcp://").rsplit(":", 1)
        store = TCPStore(host, int(port), 2, is_master=True, wait_for_workers=False)
        time.sleep(2)
        del store
        os._exit(1)
    ProcessReplica(worker, address, timeout_s)


def test_what_does_not_answer_is_a_worker_or_its_machine(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Stopped, not killed: no connection breaks. And a worker that is lost while replicas meet is a
    loss like others.
    """
    monkeypatch.setattr(ray_cluster, "_ANSWER_S", 12.0)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    request.addfinalizer(lambda: cloudpickle.unregister_pickle_by_value(sys.modules[__name__]))
    layout = ModelLayout.of(AutoConfig.from_pretrained(model_folders["llama"]))
    section = RaySection(ping_timeout_s=6.0, start_timeout_s=60.0)
    two = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    stopped: list[psutil.Process] = []
    try:
        node = two.add_node(num_cpus=2, node_ip_address="127.0.0.2")
        two.wait_for_nodes()
        connect(two.address, 0)
        with monkeypatch.context() as patched:
            patched.setattr(ray_cluster, "_join_replicas", _lost_before_all_meet)
            with pytest.raises(WorkerFailureError):
                RayCluster(layout, place(layout, 1, 2), section)
        workers = RayCluster(layout, place(layout, 1, 1), section)
        (raylet,) = workers.run_all(_hold, 0)
        assert raylet == node.all_processes["raylet"][0].process.pid
        machine = psutil.Process(raylet)
        (worker,) = [
            p for p in machine.children(recursive=True) if p.cmdline()[0].startswith("ray::Worker")
        ]
        for lost, cause in (
            ([worker], "worker"),
            ([machine, *machine.children(recursive=True)], "node"),
        ):
            for process in lost:
                process.suspend()
                stopped.append(process)
            with pytest.raises(WorkerFailureError) as caught:
                workers.run_all(_hold, 1)
            assert caught.value.cause == cause
    finally:
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        ray.shutdown()
        two.shutdown()


@pytest.mark.chaos
@pytest.mark.parametrize("number", range(50))
def test_chaos(
    number: int, cluster: Cluster, undisturbed: Path, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    chance = random.Random(number)
    kind = chance.choice(["Worker", "Worker", "Coordinator"])
    sent = chance.choice([signal.SIGKILL, signal.SIGSTOP])
    disturb(
        kind,
        sent,
        chance.randint(1, 6 * NUM_SHOTS - 8),
        tmp_path,
        cluster,
        model_folders["llama"],
        undisturbed,
    )


def test_a_run_gives_up_and_says_what_to_do(
    cluster: Cluster,
    model_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disturber = Disturber("Worker", signal.SIGKILL, tmp_path / "run", 4)
    disturber.start()
    options = {
        **OPTIONS,
        **ON_RAY,
        "cluster__address": cluster.address,
        "cluster__retries": {"worker": 0},
        "pruning__num_shots": 100,
    }
    assert run(tmp_path, model_folders["llama"], **options) == 1
    error = capsys.readouterr().err
    assert "cluster.retries.worker allows 0" in error
    assert "--resume" in error
    disturber.join()


def test_errors_of_the_work_are_not_retried(
    cluster: Cluster,
    model_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = overflowing_model(model_folders["llama"], tmp_path / "model")
    assert run(tmp_path, broken, **OPTIONS, **ON_RAY, cluster__address=cluster.address) == 1
    captured = capsys.readouterr()
    assert "continuing from" not in captured.out
    assert "failed: the loss on the evaluation text is not a number" in captured.err


@pytest.mark.parametrize(
    "error",
    [TakenOverError("another try has begun"), NoRoomError("no room"), CollapseError("worse")],
)
def test_what_needs_no_traceback_is_told_in_one_line(error: Exception) -> None:
    assert unwrapped(RayTaskError("run", "Traceback ...", error)) is error
    assert (
        type(unwrapped(RayTaskError("run", "Traceback ...", AttributeError("a defect"))))
        is RuntimeError
    )
