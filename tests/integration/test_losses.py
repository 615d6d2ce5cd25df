"""Processes and machines are lost during a run, and the result is the same, bit for bit."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import torch
from ray import cloudpickle
from ray.cluster_utils import Cluster
from ray.exceptions import RayTaskError

from ray_surgeon.report.directory import TakenOverError
from ray_surgeon.run.driver import connect, unwrapped
from ray_surgeon.runtime import ray_cluster
from ray_surgeon.runtime.cluster import NoRoomError, WorkerFailureError
from ray_surgeon.runtime.collectives import CollectiveError, ProcessReplica
from ray_surgeon.runtime.placement import WorkerIndex, place
from ray_surgeon.runtime.ray_cluster import RayCluster
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.spec.sections import RaySection
from ray_surgeon.stages.evaluation import CollapseError
from tests.conftest import LAYOUTS
from tests.integration.runs import LORA, ONE, Done, Jobs, assert_same_shot, wait_for

pytestmark = pytest.mark.ray

NUM_SHOTS = 4
OPTIONS: dict[str, Any] = {"pruning__num_shots": NUM_SHOTS}
TWO_SHARDS = {"cluster__num_shards": 2}
ON_RAY = {
    "cluster__backend": "ray",
    "cluster__ping_timeout_s": 6.0,
    "cluster__start_timeout_s": 40.0,
}
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


@pytest.mark.slow
def test_a_lost_coordinator(on_ray: dict[str, Any], undisturbed: Path, job: Jobs) -> None:
    """Stopped, not killed; a lost worker is in the test after this one, all of them in chaos."""
    assert_survived(job, on_ray, undisturbed, "Coordinator", STOPPED, 3)


@pytest.mark.slow
def test_a_worker_is_lost_in_a_recovery(on_ray: dict[str, Any], job: Jobs) -> None:
    """The run goes on after the steps that were committed, with the same bits."""
    trained = ONE | LORA | {"recovery__num_tokens": 2400, "recovery__learning_rate": 1e-3}
    expected = job(trained, folder="undisturbed")
    often = on_ray | trained | {"recovery__commit_minutes": 1e-6}
    uri = job.folder / "run"
    # the check of the start, and the one after a third of the steps
    checked = [event["step"] for event in expected.events].index("check") + 2
    with disturbed("Worker", KILLED, uri, checked) as disturber:
        done = job(often)
    disturber.result()
    assert_same_shot(expected.uri, done.uri, 1)
    assert retries(uri) == ["worker"]
    loads = [event["facts"] for event in done.events if event["step"] == "load"]
    resumed = re.fullmatch(r"1, after (\d+) steps of recovery", loads[-1]["resumed_in_shot"])
    assert resumed is not None
    assert int(resumed[1]) >= 19
    assert done.shots[0]["recovery_losses"] == expected.shots[0]["recovery_losses"]


def test_a_lost_machine(undisturbed: Path, job: Jobs) -> None:
    """Of two machines with a worker each one goes, and later another one comes."""
    soon = {"_system_config": {"health_check_period_ms": 500}}  # a loss is noticed after five
    two = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False, **soon})
    uri = job.folder / "run"
    try:
        # another address, or the driver might attach to it and be lost too
        lost = two.add_node(num_cpus=1, node_ip_address="127.0.0.2")
        two.wait_for_nodes()
        patience = {"cluster__start_timeout_s": 120.0, "cluster__ping_timeout_s": 40.0}
        spec = job.spec(OPTIONS | TWO_SHARDS | ON_RAY | patience, cluster__address=two.address)
        command = [sys.executable, "-m", "ray_surgeon.pipeline", str(spec)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
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


@pytest.mark.slow
def test_what_does_not_answer_is_a_worker_or_its_machine(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Stopped, not killed: no connection breaks."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    request.addfinalizer(lambda: cloudpickle.unregister_pickle_by_value(sys.modules[__name__]))
    layout = LAYOUTS["llama"]
    section = RaySection(ping_timeout_s=6.0, start_timeout_s=60.0)
    two = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    stopped: list[psutil.Process] = []
    try:
        node = two.add_node(num_cpus=1, node_ip_address="127.0.0.2")
        two.wait_for_nodes()
        connect(RaySection(address=two.address))
        workers = RayCluster(layout, place(layout, 1, 1), section)
        (raylet,) = workers.run_all(_hold, 0)
        assert raylet == node.all_processes["raylet"][0].process.pid
        machine = psutil.Process(raylet)
        (worker,) = [
            p for p in machine.children(recursive=True) if p.cmdline()[0].startswith("ray::Worker")
        ]
        whole = [machine, *machine.children(recursive=True)]
        for lost, cause, answer_s in (([worker], "worker", 30.0), (whole, "node", 2.0)):
            monkeypatch.setattr(ray_cluster, "_ANSWER_S", answer_s)
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


def test_replicas_that_do_not_meet() -> None:
    """Because another one is lost before it comes."""
    worker: Any = SimpleNamespace(
        index=WorkerIndex(0, 1), placement=place(LAYOUTS["llama"], 1, 2), device=torch.device("cpu")
    )
    with pytest.raises(CollectiveError, match="could not connect to each other"):
        ProcessReplica(worker, "tcp://127.0.0.1:1", 0.5)


@pytest.mark.chaos
@pytest.mark.parametrize("number", range(50))
def test_chaos(number: int, on_ray: dict[str, Any], undisturbed: Path, job: Jobs) -> None:
    chance = random.Random(number)
    kind = chance.choice(["Worker", "Worker", "Coordinator"])
    sent = chance.choice([KILLED, STOPPED])
    options = on_ray | TWO_SHARDS
    assert_survived(job, options, undisturbed, kind, sent, chance.randint(1, 6 * NUM_SHOTS - 8))


def test_a_run_gives_up_and_says_what_to_do(on_ray: dict[str, Any], job: Jobs) -> None:
    options = {"cluster__retries": {"worker": 0}, "pruning__num_shots": 100}
    with disturbed("Worker", KILLED, job.folder / "run", 4):
        error = job(on_ray | options, code=1).error
    assert "cluster.retries.worker allows 0" in error
    assert "--resume" in error


@pytest.mark.parametrize(
    "error",
    [TakenOverError("another try has begun"), NoRoomError("no room"), CollapseError("worse")],
)
def test_what_needs_no_traceback_is_told_in_one_line(error: Exception) -> None:
    assert unwrapped(RayTaskError("run", "Traceback ...", error)) is error
    defect = unwrapped(RayTaskError("run", "Traceback ...", AttributeError("a defect")))
    assert type(defect) is RuntimeError
