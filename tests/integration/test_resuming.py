"""Runs that are resumed, repeated, or started twice."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from ray_surgeon.checkpointing import RunDirectory
from ray_surgeon.pruning.rows_columns import RowsColumns
from tests.integration.runs import MASKED, ONE, Jobs

EXPORTED = MASKED | ONE


def test_finished_run_is_repeated_only_if_its_outputs_are_damaged(
    job: Jobs,
) -> None:
    done = job(EXPORTED)
    before = done.report
    export = done.uri / "export/masked"
    written = (export / "model.safetensors").stat().st_mtime_ns
    again = job(EXPORTED, "--resume")
    assert "nothing is done again" in again.out
    assert again.report == before
    assert (export / "model.safetensors").stat().st_mtime_ns == written
    weights = (export / "model.safetensors").read_bytes()
    for path, damaged in (
        (done.uri / "report.json", b"{"),
        (done.uri / "report.json", json.dumps({"spec": before["spec"]}).encode()),
        (export / "config.json", None),
        (export / "model.safetensors", weights[:-1]),
    ):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        again = job(EXPORTED, "--resume")
        assert "nothing is done again" not in again.out
        assert (export / "config.json").exists()
        assert (export / "model.safetensors").read_bytes() == weights
        assert len(again.report["exports"]) == 1


def test_report_lists_no_exports_while_they_are_rewritten(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old entries are removed before the exports are rewritten."""
    done = job(EXPORTED)
    monkeypatch.setattr(
        "ray_surgeon.export.exports.export", lambda *_, **__: sys.exit("killed")
    )
    with pytest.raises(SystemExit):
        job(EXPORTED, "--resume", cluster__num_shards=2)
    assert done.report["exports"] == []


@pytest.mark.parametrize("what", ["goes on", "fails"])
def test_newer_attempt_ends_the_older_one(
    what: str, job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest attempt owns the run directory and its events."""
    choose = RowsColumns.choose
    directory = RunDirectory(str(job.folder / "run"))

    def begin_another(method: RowsColumns, cluster: Any, scores: Any, shot: int) -> Any:
        if shot == 2:
            RunDirectory(directory.uri).start("", {})
            if what == "fails":
                raise FileNotFoundError("what the other one took away")
        return choose(method, cluster, scores, shot)

    with monkeypatch.context() as patch:
        patch.setattr(RowsColumns, "choose", begin_another)
        said = job(code=1).error
    assert "another try of this run has begun" in said
    assert "--resume" not in said
    assert directory.committed_indices() == [1]
    done = job({}, "--resume")
    assert [event["shot"] for event in done.events if event["step"] == "commit"] == [1, 2]
