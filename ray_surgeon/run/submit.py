"""``ray-surgeon submit SPEC``: submits a job to a Ray cluster from a machine without torch.

The spec and this package are uploaded with the job. Its log is polled, because an open connection
breaks or hangs when a head restarts.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import re
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_PACKAGE = Path(__file__).resolve().parents[1]
_POLL_S = 2.0
_PATIENCE_S = 300.0
"""How long a head may not answer, for example while it restarts."""
_PRINT_REPORT = """
import base64, gzip, sys, fsspec
for name in ("report.html", "report.json"):
    with fsspec.open(f"{sys.argv[1]}/{name}", "rb") as file:
        print(name, base64.b64encode(gzip.compress(file.read())).decode(), flush=True)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Submit a job, follow it to its end, fetch its report, and return the job's exit code."""
    arguments, rest = _parser().parse_known_args(argv)  # the rest is for the pipeline
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        with fsspec.open(arguments.spec, "rb") as file:
            spec = file.read()
        if arguments.address and "://" not in arguments.address:
            raise ValueError(f"--address: got {arguments.address}; give http://HOST:8265")
        client = JobSubmissionClient(arguments.address)
        return _run(client, spec, arguments, rest)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        sys.stderr.write(f"failed: {error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "ray-surgeon submit",
        description=(
            "Run a job spec on a Ray cluster. Other options, as --resume, are the pipeline's."
        ),
    )
    parser.add_argument("spec", help="job spec: YAML or JSON, on any fsspec URI")
    parser.add_argument(
        "--address",
        help="of the head, as http://head:8265; RAY_API_SERVER_ADDRESS if not given",
    )
    parser.add_argument("--id", help="of the job; made if not given")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.field=value"
    )
    parser.add_argument(
        "--report", help="folder for the report; named like the job if not given"
    )
    parser.add_argument(
        "--runtime-env",
        type=json.loads,
        default={},
        metavar="JSON",
        help=(
            'of Ray, as {"uv": [...]} where the cluster\'s image has not what this package needs'
        ),
    )
    return parser


def _run(
    client: JobSubmissionClient,
    spec: bytes,
    arguments: argparse.Namespace,
    rest: Sequence[str],
) -> int:
    job = arguments.id or f"ray-surgeon-{secrets.token_hex(6)}"
    at = f" --address {arguments.address}" if arguments.address else ""
    options = [f"--set={change}" for change in arguments.set]
    words = ["python", "-m", "ray_surgeon.pipeline", "job.yaml", *options, *rest]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "job.yaml").write_bytes(spec)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(_PACKAGE, Path(folder, _PACKAGE.name), ignore=ignored)
        environment = {**arguments.runtime_env, "working_dir": folder}
        _submit(client, job, words, environment)
        _say(f"job {job}; to stop it: ray job stop{at} {job}")
        try:
            log = _follow(client, job, _say)
        except KeyboardInterrupt:
            _say(
                f"\nno longer followed; the job goes on: ray job logs{at} --follow {job}"
            )
            return 130
        uri = _report_uri(log)
        if uri is not None:
            report = Path(arguments.report or job)
            try:
                _fetch(client, f"{job}-report", uri, environment, report)
            except (OSError, RuntimeError) as error:
                _say(f"the report in {uri} could not be fetched: {error}")
    about = patiently(lambda: client.get_job_info(job))
    if "continue with: " in log:  # that command is for the job's machine
        words = ["ray-surgeon", "submit", arguments.spec, *options, "--resume"]
        _say(f"continue with: {shlex.join(words)}{at}")
    if about.driver_exit_code is None:
        _say(f"{about.status}: {about.message}")
        return 1
    return int(about.driver_exit_code)


def _report_uri(log: str) -> str | None:
    """Return the URI of the run directory in which a job has put its report, if it says so."""
    found = re.findall(
        r"(?m)^running on \S+ into (.+)$|^report +(.+)/report\.html$",
        log,
    )
    if not found:
        return None
    of_start, of_end = found[-1]  # one of them is empty
    return str(of_start or of_end)


def _submit(
    client: JobSubmissionClient,
    job: str,
    words: Sequence[str],
    environment: Any,
) -> None:
    """Submit a job exactly once, even if the head accepts it but its answer is lost."""
    is_again = False

    def ask() -> None:
        nonlocal is_again
        if any(known.submission_id == job for known in client.list_jobs()):
            if is_again:
                return
            raise ValueError(
                f"--id {job}: the cluster has a job of this name; give another one, and "
                "--resume to go on with its run"
            )
        is_again = True
        client.submit_job(
            entrypoint=shlex.join(words),
            submission_id=job,
            runtime_env=environment,
        )

    patiently(ask)


def _follow(client: JobSubmissionClient, job: str, say: Callable[[str], None]) -> str:
    """Print a job's log until the job ends, and return the whole log."""
    log = ""
    ended = False
    while not ended:
        ended = patiently(lambda: client.get_job_status(job)).is_terminal()
        now = patiently(lambda: client.get_job_logs(job))
        whole = now
        if not ended:  # without the last line, which may be incomplete
            whole = now[: now.rfind("\n") + 1]
        if len(whole) > len(log):
            say(whole[len(log) :].removesuffix("\n"))
            log = whole
        if not ended:
            time.sleep(_POLL_S)
    return log


def _fetch(
    client: JobSubmissionClient,
    job: str,
    uri: str,
    environment: Any,
    folder: Path,
) -> None:
    """Write a run's report to a folder; it is read by a job on the head, which has access."""
    _submit(client, job, ["python", "-c", _PRINT_REPORT, uri], environment)
    log = _follow(client, job, lambda _: None)
    files = dict(re.findall(r"(?m)^(report\.\w+) ([A-Za-z0-9+/=]+)$", log))
    if len(files) < 2:
        raise RuntimeError(log.strip()[-300:])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(gzip.decompress(base64.b64decode(content)))
    _say(f"report: {folder / 'report.html'}, with report.json beside it")


def patiently(ask: Callable[[], Any]) -> Any:
    """Return the head's answer to a request, and try again while it does not answer.

    Raises:
        RuntimeError: the head refuses, or has not answered for too long.
    """
    deadline = time.monotonic() + _PATIENCE_S
    said = ""
    while True:
        try:
            return ask()
        # errors of connections, and of Ray while a head starts or a proxy does not find it
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "status code 5" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"the head took no request for {_PATIENCE_S:g} s: {error}. A job "
                    "that it has goes on if it does"
                ) from error
            if said != str(error):
                said = str(error)
                _say(f"waiting for the head: {error}")
            time.sleep(_POLL_S)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
