"""Jobs submitted to a running cluster: logs, exit codes, stopping, resuming, metrics and
concurrency.
"""

from __future__ import annotations

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobSubmissionClient
from ray.util import get_node_ip_address

from tests.integration.runs import (
    ONE,
    Done,
    Jobs,
    assert_same_shot,
    overflowing_model,
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
    """A cluster of one machine with a dashboard, Ray clients and metrics on its own ports."""

    jobs: JobSubmissionClient
    address: str
    client: str
    metrics: str
    environment: Mapping[str, str]

    def submit(self, name: str, spec: Path, *arguments: str) -> None:
        """Submit a job as `ray job submit` in the README does."""
        self.jobs.submit_job(
            submission_id=name,
            entrypoint=" ".join(
                ["python -m ray_surgeon.pipeline", str(spec), *arguments]
            ),
            runtime_env={"working_dir": str(ROOT)},
        )

    def followed(self, *arguments: str) -> tuple[int, str]:
        """Return the exit code and output of `ray-surgeon submit`."""
        program = "import sys; from ray_surgeon.pipeline import cli; sys.exit(cli())"
        command = [
            sys.executable,
            "-c",
            program,
            "submit",
            "--address",
            self.address,
            *arguments,
        ]
        options: dict[str, Any] = {
            "env": self.environment,
            "text": True,
            "capture_output": True,
        }
        done = subprocess.run(command, check=False, **options)
        return done.returncode, done.stdout + done.stderr

    def ended(self, name: str) -> tuple[str, str]:
        """Wait for the end of a job and return its status and message, and its logs."""
        wait_for(lambda: self.jobs.get_job_status(name).is_terminal(), seconds=300)
        message = (
            f"{self.jobs.get_job_status(name)} {self.jobs.get_job_info(name).message}"
        )
        return message, self.jobs.get_job_logs(name)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    gcs, dashboard, client, metrics, agent = free_ports(5)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    # as Ray does by default
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    environment |= token | {"RAY_metrics_report_interval_ms": "500"}
    # as docs/clusters.md requires for Ray clients
    environment["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    options = {
        "port": gcs,
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "metrics-export-port": metrics,
        "dashboard-agent-listen-port": agent,
        "num-cpus": 4,
        "include-dashboard": "true",
        # Jobs find the cluster by its temporary folder; with a shared one they would connect
        # to the cluster that started last. The path is short because it contains sockets.
        "temp-dir": tempfile.mkdtemp(prefix="ray-", dir="/tmp"),
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
    command += [f"--{name}={value}" for name, value in options.items()]
    log = tmp_path_factory.mktemp("head") / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    host = get_node_ip_address()
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(lambda: answers(f"{address}/api/version") or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in token.items():
                patch.setenv(name, value)
            headers = {"Authorization": f"Bearer {token['RAY_AUTH_TOKEN']}"}
            jobs = JobSubmissionClient(address, headers=headers)
        places = (f"ray://{host}:{client}", f"http://{host}:{metrics}/metrics")
        yield Head(jobs, address, *places, environment)
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(str(options["temp-dir"]), ignore_errors=True)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:  # the server asks for Ray's token
        return True
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_concurrent_jobs_are_independent(head: Head, job: Jobs) -> None:
    """Two jobs fail, and the third gives the shots of a local run."""
    broken = overflowing_model(job.models["llama"], job.folder / "model")
    head.submit("bad-spec", job.spec(ON_RAY, "bad-spec", pruning__target_sparsity=3))
    head.submit("fails", job.spec(ON_RAY, "fails", model=broken))
    head.submit("succeeds", job.spec(ON_RAY, "succeeds", output__exports=["masked"]))
    ended, logs = head.ended("succeeds")
    assert "SUCCEEDED" in ended
    assert re.search(r"round 2/2 +commit", logs)
    assert re.search(r"report +.*/report.html", logs)
    here = job({"cluster__num_shards": 2}, folder="here")
    for shot in (1, 2):
        assert_same_shot(here.uri, job.folder / "succeeds/run", shot)
    ended, logs = head.ended("fails")
    assert "failed: the loss on the evaluation text is not a number" in logs
    assert "--resume" in logs
    assert "exit code 1" in ended
    ended, logs = head.ended("bad-spec")
    assert "pruning.target_sparsity: expected a fraction below 1" in logs
    assert "exit code 2" in ended
    code, logs = head.followed(str(job.spec(ONE)), "--set", "pruning.target_sparsity=3")
    assert code == 2
    assert "pruning.target_sparsity: expected a fraction below 1" in logs


def metrics_of(head: Head, run: str) -> dict[str, float]:
    """Return the metrics of a run as Prometheus reads them: name and own tags -> value."""
    with urllib.request.urlopen(head.metrics, timeout=10) as reply:
        lines = [
            line for line in reply.read().decode().splitlines() if f'run="{run}"' in line
        ]
    values = {}
    for line in lines:
        name, _, rest = line.removeprefix("ray_surgeon_").partition("{")
        own = re.findall(r'\b(text|step|worker)="([^"]+)"', rest)
        values[" ".join([name, *(value for _, value in own)])] = float(
            rest.rpartition(" ")[2]
        )
    return values


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stopped_job_reports_metrics_and_resumes(head: Head, job: Jobs) -> None:
    """`ray-surgeon submit` resumes the job, follows it and fetches the report."""
    changes = ON_RAY | {"name": "watched", "pruning__num_shots": 20}
    head.submit("stops", job.spec(changes))

    values = dict[str, float]()

    def has_two_shots() -> bool:
        assert not head.jobs.get_job_status("stops").is_terminal(), head.ended("stops")
        values.update(metrics_of(head, "watched"))
        return values.get("shot", 0) >= 2 and "perplexity docs" in values

    # with many shots the job is stopped before the last one.
    wait_for(has_two_shots, seconds=300)
    with pytest.raises(urllib.error.HTTPError, match="401"):  # the token is required
        urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=10)
    head.jobs.stop_job("stops")
    ended, logs = head.ended("stops")
    assert "STOPPED" in ended
    assert "interrupted; continue with: python -m ray_surgeon.pipeline" in logs
    cursor_codes = re.findall(r"\x1b\[[0-9;?]*[A-Za-ln-z]", logs)
    assert not cursor_codes, "the only escape codes are Ray's colours"

    events = Done(job.folder / "run", "", "").events
    told = [
        event["facts"]["perplexity docs"]
        for event in events
        if event["step"] == "evaluation"
    ]
    assert any(
        values["perplexity docs"] == pytest.approx(perplexity) for perplexity in told
    )
    assert values["num_shots"] == 20
    assert {
        "sparsity",
        "tokens_per_s",
        "parameters",
        "peak_rss_bytes",
        "steps_total curvature",
        "step_seconds update",
        "efficiency curvature",
        "worker_busy_seconds curvature 0",
        "worker_busy_seconds curvature 1",
    } <= values.keys()

    spec = str(job.spec(changes | {"cluster__backend": "local"}))
    fetched = job.folder / "fetched"
    variables = {"env_vars": {"RAY_SURGEON_DISK": "1e12"}}
    options = [
        "--id",
        "goes-on",
        "--report",
        str(fetched),
        "--runtime-env",
        json.dumps(variables),
    ]
    code, out = head.followed(spec, *options, "--resume")
    assert code == 0, out
    again, said = head.followed(spec, "--id", "goes-on")
    assert again == 1
    assert (
        "failed: --id goes-on: the cluster has a job of this name; give another one"
        in said
    )
    assert re.search(r"continuing (after|in) round [1-9]", out)
    assert len(re.findall("round 20/20 +commit", out)) == 1
    runtime = head.jobs.get_job_info("goes-on").runtime_env
    assert runtime is not None
    assert runtime["env_vars"] == variables["env_vars"]
    done = Done(job.folder / "run", "", "")
    assert len(done.shots) == 20
    for name in ("report.html", "report.json"):
        assert (fetched / name).read_bytes() == (done.uri / name).read_bytes()


@pytest.mark.slow
def test_driver_outside_of_the_cluster_uses_a_ray_client(head: Head, job: Jobs) -> None:
    """Jobs find the cluster by RAY_ADDRESS, and test_losses.py uses the address of the GCS."""
    spec = job.spec(ON_RAY | ONE, cluster__address=head.client)
    command = [sys.executable, "-m", "ray_surgeon.pipeline", str(spec)]
    printed = subprocess.check_output(command, cwd=ROOT, env=head.environment, text=True)
    assert f"running on {head.client}" in printed
    assert Done(job.folder / "run", "", "").report["retries"] == []
