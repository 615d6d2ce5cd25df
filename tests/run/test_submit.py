"""Messages and downloads of `ray-surgeon submit`, with a fake head.

tests/integration/test_jobs.py uses a real one.
"""

from __future__ import annotations

import base64
import gzip
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.job_submission

from ray_surgeon.run import submit

LOG = "running on head:6379 into s3://bucket/run\nfailed: no room\ncontinue with: python -m ..."


class Head:
    """Accepts jobs; one has failed and left a report."""

    def __init__(self, _: str | None) -> None:
        self.asked: list[str] = []

    def list_jobs(self) -> list[Any]:
        return []

    def submit_job(self, submission_id: str, entrypoint: str, **_: Any) -> None:
        self.asked.append(entrypoint)

    def get_job_status(self, job: str) -> Any:
        return SimpleNamespace(is_terminal=lambda: True)

    def get_job_logs(self, job: str) -> str:
        if not job.endswith("-report"):
            return LOG
        assert self.asked[-1].endswith(" s3://bucket/run")
        content = base64.b64encode(gzip.compress(b"so far")).decode()
        return "".join(f"report.{kind} {content}\n" for kind in ("html", "json"))

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(driver_exit_code=1)


# or in the environment
@pytest.mark.parametrize("where", [" --address http://head:8265", ""])
def test_failed_job_leaves_a_report_and_a_command_to_resume_it(
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", Head)
    spec = tmp_path / "job.yaml"
    spec.write_text("name: mine")
    command = [str(spec), *where.split(), "--set", "output.uri=s3://bucket/run"]
    assert submit.main([*command, "--report", str(tmp_path / "report")]) == 1
    assert (tmp_path / "report/report.html").read_bytes() == b"so far"
    said = capsys.readouterr().out
    again = f"ray-surgeon submit {spec} --set=output.uri=s3://bucket/run --resume"
    assert f"continue with: {again}{where}\n" in said
    assert f"ray job stop{where} ray-surgeon-" in said


def test_address_without_a_scheme_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "job.yaml"
    spec.write_text("name: mine")
    assert submit.main([str(spec), "--address", "head:8265"]) == 1
    assert "--address: got head:8265; give http://HOST:8265" in capsys.readouterr().err


def test_reason_of_an_unavailable_head_is_printed_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    clock.sleep = lambda s: setattr(clock, "now", clock.now + s)
    monkeypatch.setattr(submit, "time", clock)
    problem = "status code 500: No available agent"
    answers: list[Any] = [
        RuntimeError(problem),
        RuntimeError(problem),
        OSError("gone"),
        "taken",
    ]

    def ask() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert submit.patiently(ask) == "taken"
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"waiting for the head: {problem}", "waiting for the head: gone"]
    answers += [OSError("gone")] * 200
    with pytest.raises(RuntimeError, match="took no request for 300 s: gone"):
        submit.patiently(ask)
