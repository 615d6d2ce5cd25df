"""A run that goes on, or has ended, or has been begun once more: what another try finds, and leaves
alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_surgeon.report.directory import RunDirectory
from ray_surgeon.stages import evaluation
from ray_surgeon.stages.prune.rows_columns import RowsColumns
from tests.integration.runs import report_of, run


def test_a_try_that_slept_takes_nothing_from_the_one_that_went_on(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wakes up before a commit, when the other one has ended, on another number of shards."""
    slept = list[int]()

    def sleep(*arguments: Any) -> None:
        if not slept:
            slept.append(1)
            assert run(tmp_path, model_folders["llama"], "--resume", cluster__num_shards=2) == 0
        ended(*arguments)

    ended = evaluation.Evaluation.ended
    monkeypatch.setattr(evaluation.Evaluation, "ended", sleep)
    assert run(tmp_path, model_folders["llama"]) == 1
    assert slept
    directory = RunDirectory(str(tmp_path / "run"))
    for index in directory.committed_indices():
        directory.check_tensors(directory.read_shot(index))
    assert len(directory.committed_indices()) == 2


def test_a_run_that_has_ended_is_not_done_again(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"output__exports": ["masked"]}
    assert run(tmp_path, model_folders["llama"], **options) == 0
    weights = tmp_path / "run/export/masked/model.safetensors"
    report = (tmp_path / "run/report.json").read_text()
    before = weights.stat().st_mtime_ns
    capsys.readouterr()
    assert run(tmp_path, model_folders["llama"], "--resume", **options) == 0
    assert "nothing is done again" in capsys.readouterr().out
    assert weights.stat().st_mtime_ns == before
    assert (tmp_path / "run/report.json").read_text() == report
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run(tmp_path, model_folders["llama"], "--resume", **options) == 0
    assert weights.stat().st_mtime_ns != before, "a damaged export is written again"


@pytest.mark.parametrize("damage", ["report", "another report", "no shots", "config"])
def test_a_run_whose_end_is_damaged_ends_again(
    damage: str, model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, model_folders["llama"], output__exports=["masked"]) == 0
    if damage == "config":
        (tmp_path / "run/export/masked/config.json").unlink()
    else:
        spec_alone = json.dumps({"spec": report_of(tmp_path / "run")["spec"]})
        (tmp_path / "run/report.json").write_text(
            {"report": "{", "another report": "[]", "no shots": spec_alone}[damage]
        )
    capsys.readouterr()
    assert run(tmp_path, model_folders["llama"], "--resume", output__exports=["masked"]) == 0
    assert "nothing is done again" not in capsys.readouterr().out
    assert (tmp_path / "run/export/masked/config.json").exists()
    assert len(report_of(tmp_path / "run")["exports"]) == 1


def test_while_exports_are_written_again_the_report_has_none(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, model_folders["llama"], output__exports=["masked"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("ray_surgeon.stages.weights.export", lambda *_, **__: sys.exit("killed"))
        with pytest.raises(SystemExit):
            run(
                tmp_path,
                model_folders["llama"],
                "--resume",
                output__exports=["masked"],
                cluster__num_shards=2,
            )
    assert report_of(tmp_path / "run")["exports"] == []


@pytest.mark.parametrize("what", ["goes on", "fails"])
def test_another_try_in_the_same_folder_ends_this_one(
    what: str,
    model_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The last one that begins has the folder, and the events are its own from then on."""
    choose = RowsColumns.choose

    def begin_another(method: RowsColumns, cluster: Any, scores: Any, shot: int) -> Any:
        if shot == 2:
            RunDirectory(str(tmp_path / "run")).start("", {})
            if what == "fails":
                raise FileNotFoundError("what the other one took away")
        return choose(method, cluster, scores, shot)

    monkeypatch.setattr(RowsColumns, "choose", begin_another)
    assert run(tmp_path, model_folders["llama"], pruning__num_shots=3) == 1
    said = capsys.readouterr().err
    assert "another try of this run has begun" in said
    assert "--resume" not in said
    assert RunDirectory(str(tmp_path / "run")).committed_indices() == [1]
    monkeypatch.undo()
    assert run(tmp_path, model_folders["llama"], "--resume", pruning__num_shots=3) == 0
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [event["shot"] for event in events if event["step"] == "commit"] == [1, 2, 3]
