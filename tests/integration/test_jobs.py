"""Jobs on a running cluster, as users submit them: their logs, their exit codes, stop and resume,
metrics, two at once.
"""

from __future__ import annotations

import functools
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient
from ray.util import get_node_ip_address

from tests.integration.runs import (
    assert_same_shot,
    overflowing_model,
    report_of,
    run,
    tiny_spec,
    wait_for,
)

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent.parent
ON_RAY = {"cluster__backend": "ray", "cluster__num_shards": 2}


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@dataclass(frozen=True)
class Head:
    """A cluster of one machine with a dashboard, a Ray client server and metrics, on ports of its
    own.
    """

    gcs: str
    dashboard: str
    client: str
    metrics: str
    environment: Mapping[str, str]

    @functools.cached_property
    def jobs(self) -> JobSubmissionClient:
        """What the command line uses too, without a process for each question."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
                patch.setenv(name, self.environment[name])
            return JobSubmissionClient(
                self.dashboard,
                headers={"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"},
            )

    def ended(self, name: str) -> str:
        """Wait for the end of a job and return its status and message."""
        wait_for(lambda: self.jobs.get_job_status(name).is_terminal())
        return f"{self.jobs.get_job_status(name)} {self.jobs.get_job_info(name).message}"

    def call(
        self, command: Sequence[str], timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run a program with what it needs to reach this cluster."""
        return subprocess.run(
            command,
            cwd=ROOT,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            str(Path(sys.executable).parent / "ray"),
            *arguments[:2],
            "--address",
            self.dashboard,
            *arguments[2:],
        ]
        return self.call(command)

    def submit(
        self, name: str, spec: Path, *arguments: str, wait: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Submit as README says, and follow the logs."""
        options = ["--submission-id", name, *([] if wait else ["--no-wait"])]
        entrypoint = ["--", "python", "-m", "ray_surgeon.pipeline", str(spec), *arguments]
        return self.ray("job", "submit", *options, "--working-dir", ".", *entrypoint)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    gcs, dashboard, client, metrics, agent = free_ports(5)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    # as Ray itself does on a user's machine
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    environment["RAY_metrics_report_interval_ms"] = "500"
    environment["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # as docs/clusters.md says for Ray clients
    options = {
        "port": gcs,
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "metrics-export-port": metrics,
        "dashboard-agent-listen-port": agent,
        "num-cpus": 4,
    }
    command = [
        str(Path(sys.executable).parent / "ray"),
        "start",
        "--head",
        "--block",
        "--include-dashboard=true",
    ]
    command += [f"--{name}={value}" for name, value in options.items()]
    # Jobs find the cluster in its temporary folder: in a shared one they would go to whichever
    # cluster of a test started last.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, because sockets lie in it
    command.append(f"--temp-dir={folder}")
    log = tmp_path_factory.mktemp("head") / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    host = get_node_ip_address()
    addresses = (
        f"{host}:{gcs}",
        f"http://127.0.0.1:{dashboard}",
        f"ray://{host}:{client}",
        f"http://{host}:{metrics}/metrics",
    )
    try:
        wait_for(
            lambda: (
                answers(f"http://127.0.0.1:{dashboard}/api/version") or process.poll() is not None
            )
        )
        assert process.poll() is None, log.read_text()
        yield Head(*addresses, environment)
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:  # it wants Ray's token
        return True
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_two_jobs_at_once_do_not_disturb_each_other(
    head: Head, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """One fails, the other one succeeds, and its shots are those of a run in this process."""
    broken = overflowing_model(model_folders["llama"], tmp_path / "model")
    assert (
        head.submit("fails", tiny_spec(tmp_path / "fails", broken, **ON_RAY), wait=False).returncode
        == 0
    )
    done = head.submit(
        "succeeds",
        tiny_spec(
            tmp_path / "succeeds", model_folders["llama"], **ON_RAY, output__exports=["masked"]
        ),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"shot 2/2 +commit", done.stdout)
    assert "report.html and report.json" in done.stdout
    assert "Job 'succeeds' succeeded" in done.stdout
    assert run(tmp_path / "here", model_folders["llama"], cluster__num_shards=2) == 0
    for shot in (1, 2):
        assert_same_shot(tmp_path / "here/run", tmp_path / "succeeds/run", shot)
    ended = head.ended("fails")
    logs = head.jobs.get_job_logs("fails")
    assert "failed: the loss on the evaluation text is not a number" in logs
    assert "--resume" in logs
    assert "exit code 1" in ended


def test_a_job_with_a_bad_spec(head: Head, model_folders: dict[str, Path], tmp_path: Path) -> None:
    done = head.submit(
        "bad-spec",
        tiny_spec(tmp_path, model_folders["llama"], **ON_RAY, pruning__target_sparsity=3),
    )
    assert done.returncode == 1
    assert "pruning.target_sparsity: Input should be less than 1 (got 3)" in done.stdout
    assert "exit code 2" in head.ended("bad-spec")


def metrics_of(head: Head, run: str) -> dict[str, float]:
    """Return what Prometheus would read of a run: name and own tags -> value."""
    with urllib.request.urlopen(head.metrics, timeout=10) as reply:
        lines = [line for line in reply.read().decode().splitlines() if f'run="{run}"' in line]
    values = {}
    for line in lines:
        name, _, rest = line.removeprefix("ray_surgeon_").partition("{")
        own = re.findall(r'\b(text|step|worker)="([^"]+)"', rest)
        values[" ".join([name, *(value for _, value in own)])] = float(rest.rpartition(" ")[2])
    return values


def test_a_job_that_is_watched_and_stopped_and_goes_on(
    head: Head, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    spec = tiny_spec(
        tmp_path, model_folders["llama"], **ON_RAY, name="watched", pruning__num_shots=8
    )
    assert head.submit("stops", spec, wait=False).returncode == 0
    wait_for(lambda: metrics_of(head, "watched").get("shot", 0) >= 2)
    values = metrics_of(head, "watched")
    head.ray("job", "stop", "stops")
    assert "STOPPED" in head.ended("stops")
    assert "interrupted; continue with: python -m ray_surgeon.pipeline" in head.jobs.get_job_logs(
        "stops"
    )

    assert values["num_shots"] == 8
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    told = [event["facts"]["perplexity docs"] for event in events if event["step"] == "evaluation"]
    assert any(values["perplexity docs"] == pytest.approx(perplexity) for perplexity in told)
    assert {
        "sparsity",
        "tokens_per_s",
        "parameters",
        "peak_rss_bytes",
        "steps_total curvature",
    } <= values.keys()
    assert {"step_seconds update", "efficiency curvature"} <= values.keys()
    assert {"worker_busy_seconds curvature 0", "worker_busy_seconds curvature 1"} <= values.keys()

    done = head.submit("goes-on", spec, "--resume")
    assert done.returncode == 0, done.stdout
    assert re.search(r"resumed_after_shot=[1-9]", done.stdout)
    assert len(report_of(tmp_path / "run")["shots"]) == 8


@pytest.mark.slow
def test_a_driver_outside_of_the_cluster(
    head: Head, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """By a Ray client. Jobs find the cluster by RAY_ADDRESS, and the tests of losses by the address
    of the GCS.
    """
    spec = tiny_spec(
        tmp_path,
        model_folders["llama"],
        **ON_RAY,
        cluster__address=head.client,
        pruning__num_shots=1,
    )
    command = [sys.executable, "-m", "ray_surgeon.pipeline", str(spec)]
    done = head.call(command, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"running on {head.client}" in done.stdout
    assert json.loads((tmp_path / "run/report.json").read_text())["retries"] == []
