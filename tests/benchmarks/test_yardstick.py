"""The rank correlation of a run's measures with HumanEval: ranks, signs, and measures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.yardstick import correlations, main, rank_correlation, ranks
from ray_surgeon.report.html_report import LivePage
from tests.integration.runs import report_of, run, windows


def test_correlation_depends_on_ranks_only() -> None:
    assert ranks([3.0, 1.0, 3.0, 7.0]).tolist() == [2.5, 1.0, 2.5, 4.0]
    assert rank_correlation([1, 2, 3, 40], [0.1, 0.2, 0.3, 0.31]) == 1
    assert rank_correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_signs_of_measures_agree_with_quality() -> None:
    """A divergence that falls is as good as an acceptance that rises."""
    measures = {"acceptance": 1, "divergence": -1, "perplexity a, relative": 1}
    entries: list[dict[str, Any]] = [
        {"family": "f", "name": str(n), "passed": n, "share of dense": n / 9}
        | {name: sign * n for name, sign in measures.items()}
        for n in range(3)
    ]
    assert correlations(entries) == {
        "acceptance": 1,
        "divergence": 1,
        "perplexity a, relative": -1,
    }


@pytest.mark.usefixtures("forked")
def test_measures_match_the_run(
    model_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(LivePage, "draw", lambda self, record, *, final: None)
    evaluation: dict[str, Any] = {"texts": [windows("python-docs", 2, name="help")]}
    evaluation["generation"] = {"num_prompts": 3, "max_new_tokens": 8}
    pruning: dict[str, Any] = {
        "structure": "groups",
        "groups": ["ffn"],
        "allocation": "uniform",
    }
    pruning |= {"target_sparsity": 0.1, "num_shots": 1, "width_multiple": 4}
    dense = model_folders["llama"]
    sections = {"pruning": pruning, "evaluation": evaluation}
    assert run(tmp_path, dense, **sections, output__exports=["uniform"]) == 0
    (shot,) = report_of(tmp_path / "run")["shots"]
    outcomes = {"a": "passed", "b": "failed", "c": "passed"}
    folders = {"dense": dense, "pruned": tmp_path / "run/export/uniform"}
    models: list[dict[str, Any]] = [
        {"name": name, "folder": str(folder)} for name, folder in folders.items()
    ]
    models[0]["outcomes"] = outcomes
    models[1]["outcomes"] = outcomes | {"a": "failed"}
    written = tmp_path / "tiny.json"
    written.write_text(json.dumps({"models": models}))
    out = str(tmp_path / "all.json")
    arguments = ["--out", out, "--dtype", "float32", "--threads", "1"]
    assert main([f"{written}={tmp_path / 'run'}", *arguments]) == 0
    first, second = json.loads(Path(out).read_text())["tiny"]
    assert (first["passed"], second["passed"], second["share of dense"]) == (2, 1, 0.5)
    assert (first["acceptance"], first["agreement"]) == (pytest.approx(1, abs=1e-6), 1)
    answers = shot["generation"]
    for name in ("acceptance", "agreement", "divergence"):
        assert second[name] == pytest.approx(answers[name], rel=1e-4)
    departure = answers["tokens_until_departure"]["mean"]
    assert second["tokens until departure"] == pytest.approx(departure)
    assert second["perplexity help"] == pytest.approx(
        shot["perplexity"]["help"], rel=1e-5
    )
    assert "| acceptance |" in capsys.readouterr().out
