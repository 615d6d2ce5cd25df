"""The HTML report is complete and self-contained."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_surgeon.distributed import processes
from ray_surgeon.report.display import main
from ray_surgeon.report.findings import verdict
from ray_surgeon.report.html_report import LivePage, page
from ray_surgeon.report.plots import by_block, run_figures
from tests.conftest import Zygote, make_once
from tests.integration.runs import report_of, run


@pytest.fixture
def runs(
    shared_folder: Path, model_folders: dict[str, Path], request: pytest.FixtureRequest
) -> dict[str, Path]:
    """Return a run of groups with timed exports, and a run of rows and columns."""

    def run_both(folder: Path) -> None:
        run_groups_and_rows(folder, model_folders, request.getfixturevalue("zygote"))

    folder = make_once(shared_folder / "reports", run_both)
    return {"groups": folder / "groups/run", "rows": folder / "rows/run"}


def run_groups_and_rows(
    folder: Path, model_folders: Mapping[str, Path], zygote: Zygote
) -> None:
    groups: dict[str, Any] = {
        "pruning": {"structure": "groups", "target_sparsity": 0.3, "num_shots": 1},
        "pruning__width_multiple": 8,
        "output__exports": ["per_block"],
        "output__speed": {"prompt_length": 16, "num_new_tokens": 2, "num_repeats": 1},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "run_module", zygote.run_module)
        assert (
            run(folder / "groups", model_folders["llama"], name="some-groups", **groups)
            == 0
        )
        patch.setattr(LivePage, "draw", lambda *_, **__: None)
        rows = {"name": "some-rows", "cluster__num_shards": 2, "pruning__costs": "obs"}
        assert run(folder / "rows", model_folders["opt"], **rows) == 0


def check_self_contained(html: str) -> str:
    """Check that a page needs no other files; return its text."""
    assert not re.findall("<(script|link|iframe|img)", html)
    opened, closed = (
        Counter(re.findall(tag, html)) for tag in (r"<(\w+)[^<>]*(?<!/)>", r"</(\w+)>")
    )
    assert {*(opened - closed)} <= {"meta", "br"}
    assert not closed - opened
    ids = re.findall(r'\sid="([^"]*)"', html)
    assert len(set(ids)) == len(ids), "figures share no identifier"
    allowed = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= allowed
    for target in re.findall(r'\s(?:href|src|xlink:href)="([^"]*)"', html):
        is_here = target.startswith("#") and target[1:] in ids
        assert is_here or target.startswith("data:image/png;base64,"), target
    return " ".join(unescape(re.sub("<[^>]*>", " ", html)).split())


def test_page_of_a_run_is_complete(runs: dict[str, Path]) -> None:
    record = report_of(runs["groups"])
    html = (runs["groups"] / "report.html").read_text()
    text = check_self_contained(html).replace("\xa0", " ")
    expected = ["some-groups", "pruning round 1 of 1, complete", "per_block export"]
    expected += [*verdict(record), "How far could I go?", "prompts, tokens per second"]
    expected += ["width_multiple: 8", record["fingerprints"]["model"]]
    for export in record["exports"]:
        expected += [export["load"], *export["loaders"].values()]
    assert not [part for part in expected if part not in text]
    figures = run_figures(record)
    assert figures.keys() == {"reach", "widths", "time"}
    assert html.count("<svg") == len(figures)
    plots = {path.name for path in (runs["groups"] / "plots").iterdir()}
    assert plots == {f"{name}.{kind}" for name in figures for kind in ("svg", "png")}


def test_page_shows_damping_losses_and_unfinished_runs(runs: dict[str, Path]) -> None:
    """Also for a model that no longer exists, and a method without costs."""
    record = report_of(runs["rows"])
    event = {"linear": "decoder.layers.1.fc1", "factor": "G", "asked": 0.1, "used": 1.0}
    event["float64_retry"] = True
    lost = {"cause": "node", "message": "<b>gone & away</b>"}
    shot = record["shots"][0] | {"damping_used": [event]}
    html = page([record | {"shots": [shot], "retries": [lost]}])
    text = check_self_contained(html)
    assert "pruning round 1 of 2, not complete" in text
    assert "decoder.layers.1.fc1 1 G 0.1 1 yes" in text
    assert "node <b>gone & away</b>" in text
    assert "1 retry after losses" in text
    assert "<b>gone" not in html
    bare = ("predicted_loss_increase", "shrinkable", "terms", "update_residual")
    layerwise = {k: v for k, v in shot.items() if k not in bare}
    infinite = {"perplexity": dict.fromkeys(record["dense"]["perplexity"], float("inf"))}
    layerwise |= infinite | {"threshold": None, "calibration_loss": None}
    html = page([record | {"shots": [layerwise], "dense": infinite}])
    assert "inf" in check_self_contained(html).split()


def test_several_runs_on_one_page(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = report_of(runs["rows"])
    begun = json.dumps(record | {"shots": record["shots"][:1]})
    (tmp_path / "report.json").write_text(begun)
    out = tmp_path / "all.html"
    written = ["--html", str(out), "--plot", str(tmp_path / "all.svg")]
    assert main([str(runs["groups"]), str(tmp_path), *written]) == 0
    said = capsys.readouterr().out
    assert "not complete: some-rows, 1 of 2 rounds, 0 of 0 exports" in said
    assert said.count("not complete") == 1
    html = out.read_text()
    assert "2 runs of ray_surgeon" in check_self_contained(html)
    num_figures = len(run_figures(report_of(runs["groups"])))
    num_figures += len(run_figures(json.loads(begun)))
    assert html.count("<svg") == 2 + num_figures


def test_page_shows_finished_and_unfinished_training(runs: dict[str, Path]) -> None:
    """The first training diverged on the way; the second one has no acceptance."""
    record = report_of(runs["rows"])
    checks = [
        {
            "steps": 10 * i,
            "tokens": 1000 * i,
            "value": value,
            "acceptance": 0.8,
            "loss": 0.5,
        }
        for i, value in enumerate((0.5, None, 0.25))
    ]
    trained = {"recovery_held_aside": checks, "recovery_losses": [0.5] * 10}
    present = trained | {
        "recovery_held_aside": [check | {"acceptance": None} for check in checks]
    }
    first = record | {"shots": [record["shots"][0] | trained], "present": present}
    begun = record | {"shots": [], "linears": [], "present": present}
    figures = [run_figures(each)["training"] for each in (first, begun)]
    assert [len(figure.axes) for figure in figures] == [2, 1]
    lines = [np.asarray(line.get_xdata()).tolist() for line in figures[0].axes[1].lines]
    assert lines == [[0, 1000, 2000], [2000, 3000, 4000]], "one after the other"
    assert figures[0].axes[0].get_ylim()[1] < 0.6
    for records, number in ([begun], 1), ([first, begun], 3):
        text = check_self_contained(page(records))
        assert (
            text.count("Training after pruning, measured on validation windows") == number
        )


def test_report_has_seconds_of_workers_and_sparsity_by_block(
    runs: dict[str, Path],
) -> None:
    record = report_of(runs["rows"])
    for shot in record["shots"]:
        assert all(len(busy) == 2 for busy in shot["worker_seconds"].values())
        assert (
            0
            < sum(shot["worker_seconds"]["curvature"])
            <= shot["seconds"]["curvature"] + 0.01
        )
    kinds = by_block(record["linears"])
    assert (len(kinds), {len(row) for row in kinds.values()}) == (6, {4})
    (sparsity,) = (
        x["sparsity"] for x in record["linears"] if x["name"].endswith("layers.3.fc2")
    )
    assert kinds["fc2"][3] == sparsity


def test_experts_of_a_block_are_shown_together() -> None:
    names = [f"model.layers.1.mlp.experts.{number}.down_proj" for number in range(2)]
    names.append("model.layers.0.mlp.down_proj")
    kinds = by_block([{"name": name, "sparsity": i / 2} for i, name in enumerate(names)])
    assert kinds["mlp.experts.*.down_proj"][1] == 0.25
    assert np.isnan(kinds["mlp.experts.*.down_proj"][0])
    assert kinds["mlp.down_proj"][0] == 1.0


def test_run_name_that_looks_like_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "[/a]")]) == 2
    assert "[/a]" in capsys.readouterr().err
