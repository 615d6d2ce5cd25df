"""The report as a page: whole, self-contained, and drawn by a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from ray_surgeon.report.html_report import page
from ray_surgeon.report.plots import _short, by_block, by_expert, inline_svg, run_figures
from ray_surgeon.report.tables import main
from ray_surgeon.runtime import fresh_process
from tests.conftest import Zygote
from tests.integration.runs import report_of, run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)


class Reader(HTMLParser):
    """Collects what a page shows and what it points to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.points_to: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src", "xlink:href"):
                self.points_to.append(str(value))
        assert tag not in ("script", "link", "iframe", "img")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.split()


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path], zygote: Zygote
) -> dict[str, Path]:
    """Return a run of groups with exports, timed, and one of rows and columns whose factors need
    more damping.
    """
    folder = tmp_path_factory.mktemp("page")
    groups = {
        "name": "some-groups",
        "pruning__structure": "groups",
        "pruning__width_multiple": 8,
        "output__exports": ["per_block", "masked"],
        "output__speed": {"prompt_length": 16, "num_new_tokens": 2, "num_repeats": 1},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh_process, "run_module", zygote.run_module)
        assert run(folder / "groups", model_folders["llama"], **groups) == 0
    assert (
        run(
            folder / "rows",
            model_folders["opt"],
            name="some-rows",
            pruning__num_shots=3,
            cluster__num_shards=2,
        )
        == 0
    )
    return {"groups": folder / "groups/run", "rows": folder / "rows/run"}


def check_self_contained(html: str) -> Reader:
    reader = Reader(html)
    assert reader.open == []
    assert len(set(reader.ids)) == len(reader.ids)
    inside = [
        target for target in reader.points_to if not target.startswith("data:image/png;base64,")
    ]
    astray = [
        target for target in inside if not (target.startswith("#") and target[1:] in reader.ids)
    ]
    assert not astray
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    return reader


def test_page_of_a_run_says_everything(runs: dict[str, Path]) -> None:
    record = report_of(runs["groups"])
    html = (runs["groups"] / "report.html").read_text()
    reader = check_self_contained(html)
    text = " ".join(reader.words)
    for expected in (
        "some-groups",
        "shot 2 of 2, complete",
        "per_block",
        "trust_remote_code=True",
        "prefill, tokens per second",
        "Efficiency",
    ):
        assert expected in text
    for export in record["exports"]:
        assert export["load"] in text
        assert all(known in text for known in export["loaders"].values())
    assert record["fingerprints"]["model"] in text
    assert "width_multiple: 8" in text
    assert html.count("<svg") == len(run_figures(record)) == 4
    assert {p.name for p in (runs["groups"] / "plots").iterdir()} == {
        f"{n}.{s}" for n in run_figures(record) for s in ("svg", "png")
    }


def test_page_tells_of_damping_losses_and_unfinished_runs(runs: dict[str, Path]) -> None:
    record = report_of(runs["rows"])
    event = {
        "linear": "decoder.layers.1.fc1",
        "factor": "G",
        "asked": 0.1,
        "used": 1.0,
        "float64_retry": True,
    }
    lost = {"cause": "node", "message": "<b>gone & away</b>"}
    shots: list[dict[str, Any]] = record["shots"][:2]
    html = page(
        [record | {"shots": [shots[0] | {"damping_used": [event]}, shots[1]], "retries": [lost]}]
    )
    text = " ".join(check_self_contained(html).words)
    assert "shot 2 of 3, not complete" in text
    assert "decoder.layers.1.fc1 1 G 0.1 1 yes" in text
    assert "node <b>gone & away</b>" in text
    assert "1 retry after losses" in text
    assert "<b>gone" not in html
    text = " ".join(check_self_contained(page([record | {"shots": [], "linears": []}])).words)
    assert "shot 0 of 3, not complete" in text


def test_several_runs_on_one_page(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all.html"
    assert (
        main(
            [
                str(runs["groups"]),
                str(runs["rows"]),
                "--html",
                str(out),
                "--plot",
                str(tmp_path / "all.svg"),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert str(out) in said
    assert "not complete" not in said
    text = " ".join(check_self_contained(out.read_text()).words)
    assert "2 runs of ray_surgeon" in text
    assert out.read_text().count("<svg") == 2 + 4 + 4


def test_a_run_that_has_not_ended_is_named_beside_one_that_has(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = report_of(runs["rows"])
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "report.json").write_text(
        json.dumps(record | {"shots": record["shots"][:2], "exports": []})
    )
    written = ["--html", str(tmp_path / "all.html"), "--plot", str(tmp_path / "all.svg")]
    assert main([str(runs["groups"]), str(begun), *written]) == 0
    assert "not complete: some-rows, 2 of 3 shots, 0 of 0 exports" in capsys.readouterr().out


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_the_page(dark: bool, runs: dict[str, Path], tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1280,2600",
        f"--user-data-dir={tmp_path}",
    ]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [
        str(CHROMIUM),
        *options,
        f"--screenshot={picture}",
        (runs["rows"] / "report.html").as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape == (2600, 1280, 3)
    background = pixels[5, 5].mean()
    assert background < 0.2 if dark else background > 0.9
    drawn = np.abs(pixels - pixels[5, 5]).max(-1) > 0.3
    assert drawn.mean() > 0.02, "the page is nearly empty"
    assert drawn[:, 1000:].any(), "nothing at the right"


def test_page_of_a_model_that_is_gone_and_of_a_method_without_costs(runs: dict[str, Path]) -> None:
    record = report_of(runs["rows"])
    infinite = dict.fromkeys(record["dense"]["perplexity"], float("inf"))
    shots = [shot | {"perplexity": infinite} for shot in record["shots"]]
    bare = ("predicted_loss_increase", "shrinkable", "terms", "update_residual")
    layerwise = [
        {k: v for k, v in shot.items() if k not in bare}
        | {"threshold": None, "calibration_loss": None}
        for shot in shots
    ]
    for change in (
        {"shots": shots},
        {"shots": layerwise},
        {"shots": shots, "dense": {"perplexity": infinite}},
    ):
        assert "inf" in check_self_contained(page([record | change])).words


def test_workers_are_busy_no_longer_than_their_steps(runs: dict[str, Path]) -> None:
    for shot in report_of(runs["rows"])["shots"]:
        assert all(len(busy) == 2 for busy in shot["worker_seconds"].values())
        assert 0 < sum(shot["worker_seconds"]["curvature"]) <= shot["seconds"]["curvature"] + 0.01


def test_depth_is_by_block_and_kind(runs: dict[str, Path]) -> None:
    linears = report_of(runs["rows"])["linears"]
    kinds, values = by_block(linears)
    assert len(kinds) == 6
    assert all(len(row) == 4 for row in values)
    by_name = {linear["name"]: linear["sparsity"] for linear in linears}
    assert (
        values[kinds.index("fc2")][3]
        == by_name[next(n for n in by_name if n.endswith("layers.3.fc2"))]
    )


def test_experts_have_a_map_of_their_own(model_folders: dict[str, Path], tmp_path: Path) -> None:
    options = {
        "pruning__structure": "groups",
        "pruning__groups": ["experts"],
        "pruning__num_shots": 1,
        "pruning__target_sparsity": 0.15,
    }
    assert run(tmp_path, model_folders["qwen2_moe"], **options) == 0
    report = report_of(tmp_path / "run")
    kinds, values = by_block(report["linears"])
    row = values[kinds.index("mlp.experts.*.down_proj")]
    assert np.isnan(row[0])
    assert 0 < row[1] < 1
    experts = by_expert(report["linears"])
    assert np.shape(experts) == (4, 4)
    gone = {
        name.removeprefix("model.layers.").removesuffix(".down_proj")
        for name in report["shots"][0]["experts_removed"]
    }
    assert {f"{b}.mlp.experts.{e}" for e in range(4) for b in (1, 3) if experts[e][b] == 1} == gone
    assert len(gone) == sum(value == 1 for row in experts for value in row)
    html = page([report])
    Reader(html)
    assert "1 is an expert that is gone" in html


def test_two_figures_of_a_page_share_no_identifier(runs: dict[str, Path]) -> None:
    figure = run_figures(json.loads((runs["rows"] / "report.json").read_text()))["depth"]
    ids = [set(re.findall(r'id="([^"]+)"', inline_svg(figure, name))) for name in ("a", "b")]
    assert not ids[0] & ids[1]


def test_linears_with_equal_last_names_have_their_whole_ones() -> None:
    assert _short(["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]) == [
        "c_attn",
        "attn.c_proj",
        "c_fc",
        "mlp.c_proj",
    ]


def test_a_run_whose_name_looks_like_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "[/a]")]) == 2
    assert "[/a]" in capsys.readouterr().err
