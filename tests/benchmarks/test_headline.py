"""The headline with several seeds: seeded settings, resuming, and means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ray_surgeon
from benchmarks import headline, tasks
from benchmarks.case_sets import Case
from ray_surgeon.config.job import parse_spec


def test_seed_determines_all_random_numbers(tmp_path: Path) -> None:
    document = {
        "version": 2,
        "name": "headline",
        "preset": "balanced",
        "model": {"source": "a/model"},
        "output": {"uri": str(tmp_path)},
        **headline.sections_of(7),
    }
    spec = parse_spec(json.dumps(document)).model_dump()
    assert spec["calibration"]["seed"] == 7
    assert spec["curvature"]["seed"] == 7
    assert spec["curvature"]["fisher"] == "sampled"
    assert spec["recovery"]["seed"] == 7
    assert spec["recovery"]["rank"] == 32
    assert spec["pruning"]["reconstruction"]["seed"] == 7
    assert spec["pruning"]["reconstruction"]["num_epochs"] == 1


def test_means_over_runs() -> None:
    def outcomes(passed: str) -> dict[str, dict[str, str]]:
        return {"s": {case: "passed" if case in passed else "failed" for case in "abcd"}}

    found = {
        "dense": outcomes("abc"),
        "seed-0": outcomes("a"),
        "seed-1": outcomes("bcd"),
    }
    last = headline.mean_table(found).splitlines()[-1]
    assert last == "| s | 4 | 3 | 2.0 ± 1.0 | 1, 3 | 1.5, 0.5 |"


def test_finished_runs_are_read(
    model_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Finished runs are not repeated, unfinished ones resume, and all are evaluated."""
    dense = model_folders["llama"]
    calls: list[tuple[str, bool]] = []

    def prune(*_: Any, resume: bool, output: dict[str, Any], **__: Any) -> None:
        calls.append((Path(output["uri"]).name, resume))
        export = Path(output["uri"]) / "export"
        export.mkdir(parents=True)
        (export / "uniform").symlink_to(dense)
        (export.parent / "report.json").write_text('{"exports": ["uniform"]}')

    (tmp_path / "seed-1").mkdir()
    cases = [Case(name="n", prompt="What is 1 + 1?", answer="2")]
    monkeypatch.setattr(headline, "fetch", lambda *_: dense)
    monkeypatch.setattr(ray_surgeon, "prune", prune)
    monkeypatch.setattr(tasks, "cases_of", lambda *_: cases)
    monkeypatch.setitem(tasks.NUM_NEW_TOKENS, "gsm8k", 2)
    arguments = [str(tmp_path), "--seeds", "0", "1", "--sets", "gsm8k", "--threads", "1"]
    assert headline.main(arguments) == 0
    assert calls == [("seed-0", False), ("seed-1", True)]
    printed = capsys.readouterr().out
    assert "| dense | seed-0 | lost, won | p | seed-1 | lost, won | p |" in printed
    assert "| gsm8k | 1 | 0 | 0.0 ± 0.0 | 0, 0 | 0.0, 0.0 |" in printed
    assert headline.main(arguments) == 0
    assert len(calls) == 2
    assert capsys.readouterr().out == printed


def test_one_seed_has_no_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    for seeds in (["0"], ["1", "1"]):
        with pytest.raises(SystemExit):
            headline.arguments_of(["out", "--seeds", *seeds, "--sets", "gsm8k"])
        assert "two different seeds or more" in capsys.readouterr().err
