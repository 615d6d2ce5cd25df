"""Processes and machines are lost during a run, and the result is the same, bit for bit."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
    GROUPS,
    Done,
    Jobs,
    assert_same_shot,
    overflowing_model,
    wait_for,
    windows,
)

pytestmark = pytest.mark.ray

NUM_SHOTS = 4
OPTIONS: dict[str, Any] = {
    "cluster__num_shards": 2,
    "pruning__num_shots": NUM_SHOTS,
    "evaluation": [windows("python-docs", 2, name="docs")],
}
ON_RAY = {
    "cluster__backend": "ray",
    "cluster__ping_timeout_s": 6.0,
    "cluster__start_timeout_s": 40.0,
}


KINDS = ["attention", "ffn", "experts"]
MIXTURE = OPTIONS | GROUPS | {"model": "qwen2_moe", "pruning__groups": KINDS}
KILLED = signal.SIGKILL
STOPPED = signal.SIGSTOP


def processes_of_the_run(kind: str) -> list[psutil.Process]:
    """Return the processes of Ray below this one that are a `Coordinator` or a `Worker`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            if process.cmdline()[0].startswith(f"ray::{kind}"):
                found.append(process)
    return found


def events_of(uri: Path) -> list[dict[str, Any]]:
    return Done(uri, "", "").events if (uri / "events.jsonl").exists() else []


def retries(uri: Path) -> list[str]:
    """Return the causes of the retries of a run."""
    return [event["facts"]["cause"] for event in events_of(uri) if event["step"] == "retry"]


@contextlib.contextmanager
def disturbed(
    kind: str, sent: signal.Signals, uri: Path, num_events: int
) -> Iterator[Future[psutil.Process]]:
    """Send one process of the run that is made meanwhile a signal, when it has so many events."""
    earlier = processes_of_the_run(kind)  # of a run that has ended, on their way out

    def disturb() -> psutil.Process:
        wait_for(lambda: len(events_of(uri)) >= num_events)
        hit = [process for process in processes_of_the_run(kind) if process not in earlier][-1]
        hit.send_signal(sent)
        return hit

    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(disturb)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path]) -> Path:
    return Jobs(model_folders, tmp_path_factory.mktemp("undisturbed"))(OPTIONS).uri


def assert_survived(
    job: Jobs,
    options: dict[str, Any],
    expected: Path,
    kind: str,
    sent: signal.Signals,
    num_events: int,
) -> None:
    """Run with one loss for certain, which the run must have seen, and compare the result."""
    with disturbed(kind, sent, job.folder / "run", num_events) as disturber:
        done = job(options)
    hit = disturber.result()
    for shot in range(1, NUM_SHOTS + 1):
        assert_same_shot(expected, done.uri, shot)
    assert len(done.shots) == NUM_SHOTS
    if sent == STOPPED:
        gone, alive = psutil.wait_procs([hit], timeout=30)
        assert gone, f"{alive} is stopped and still there: it could go on and write"
    assert retries(done.uri) == [kind.lower()]


@pytest.fixture
def on_ray(cluster: Cluster) -> dict[str, Any]:
    return OPTIONS | ON_RAY | {"cluster__address": cluster.address}


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("Worker", KILLED),
        ("Coordinator", STOPPED),
        pytest.param("Worker", STOPPED, marks=pytest.mark.slow),
        pytest.param("Coordinator", KILLED, marks=pytest.mark.slow),
    ],
)
def test_a_lost_process(
    kind: str, sent: signal.Signals, on_ray: dict[str, Any], undisturbed: Path, job: Jobs
) -> None:
    assert_survived(job, on_ray, undisturbed, kind, sent, 4)


@pytest.mark.slow
def test_a_lost_worker_of_a_mixture(on_ray: dict[str, Any], job: Jobs) -> None:
    """Heads, channels and experts go; routers go around the same experts after the loss."""
    expected = job(MIXTURE, folder="undisturbed")
    assert any(shot["experts_removed"] for shot in expected.shots)
    assert_survived(job, on_ray | MIXTURE, expected.uri, "Worker", KILLED, 9)


def test_a_lost_machine(undisturbed: Path, job: Jobs) -> None:
    """Of two machines with a worker each one goes, and later another one comes."""
    two = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    uri = job.folder / "run"
    try:
        # another address, or the driver might attach to it and be lost too
        lost = two.add_node(num_cpus=1, node_ip_address="127.0.0.2")
        two.wait_for_nodes()
        patience = {"cluster__start_timeout_s": 120.0, "cluster__ping_timeout_s": 40.0}
        spec = job.spec(OPTIONS | ON_RAY | patience, cluster__address=two.address)
        process = subprocess.Popen(
            [sys.executable, "-m", "ray_surgeon.pipeline", str(spec)],
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: len(processes_of_the_run("Worker")) == 2)
        time.sleep(1.0)
        two.remove_node(lost, allow_graceful=False)
        wait_for(lambda: retries(uri))
        two.add_node(num_cpus=1, node_ip_address="127.0.0.3")
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    finally:
        two.shutdown()
    for shot in range(1, NUM_SHOTS + 1):
        assert_same_shot(undisturbed, uri, shot)
    assert retries(uri) == ["node"]


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
def test_chaos(number: int, on_ray: dict[str, Any], undisturbed: Path, job: Jobs) -> None:
    chance = random.Random(number)
    kind = chance.choice(["Worker", "Worker", "Coordinator"])
    sent = chance.choice([KILLED, STOPPED])
    assert_survived(job, on_ray, undisturbed, kind, sent, chance.randint(1, 6 * NUM_SHOTS - 8))


def test_a_run_gives_up_and_says_what_to_do(on_ray: dict[str, Any], job: Jobs) -> None:
    options = {"cluster__retries": {"worker": 0}, "pruning__num_shots": 100}
    with disturbed("Worker", KILLED, job.folder / "run", 4):
        error = job(on_ray | options, code=1).error
    assert "cluster.retries.worker allows 0" in error
    assert "--resume" in error


def test_errors_of_the_work_are_not_retried(on_ray: dict[str, Any], job: Jobs) -> None:
    broken = overflowing_model(job.models["llama"], job.folder / "model")
    failed = job(on_ray, model=broken, code=1)
    assert "continuing from" not in failed.out
    assert "failed: the loss on the evaluation text is not a number" in failed.error


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
