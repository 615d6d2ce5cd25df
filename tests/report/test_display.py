"""The display of a running job."""

from __future__ import annotations

import io
import json
import logging
import time
from dataclasses import replace

import pytest
from rich.console import Console

from ray_surgeon.report import display as display_module
from ray_surgeon.report.display import Display
from ray_surgeon.report.events import Event, ProgressReport, readings

UPDATE = Event(
    "update", 1, 3, 61.25, {"sparsity": 0.188, "predicted_loss_increase": 0.324}, [1.0]
)
REPORT = ProgressReport("curvature", 1, 3, 12, 64, "sequences", 512, 48.0)
CHECKED = Event("check", 1, 3, 2.0, {"tokens": 120, "held_aside": 0.5})


def test_lines_of_events_and_progress() -> None:
    assert UPDATE.line == (
        "round 1/3  update            61.2 s  "
        "18.8 % of the linears' parameters removed, predicted loss increase 0.324"
    )
    assert REPORT.line == (
        "round 1/3  curvature      12 of 64 sequences, 128 tokens/s, 208 s left"
    )
    start = ProgressReport("load", 0, 3, 0, 0, "", 0, 1.0)
    assert start.line == "start      load           ..."


def test_log_lines_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SURGEON_LOG", "json")
    assert json.loads(UPDATE.line) == vars(UPDATE)
    assert not Display(Console(force_terminal=True), "my-run").is_live


def test_metrics_of_a_check_have_their_own_names() -> None:
    """Their lines do not overwrite those of passes over the calibration text."""
    check = Event(
        "check", 1, 3, 2.0, {"held_aside": 0.5, "tokens_per_s": 9.0, "rate": 1e-3}
    )
    values = {name: value for name, value, _ in readings(check)}
    assert (values["training_held_aside"], values["training_tokens_per_s"]) == (0.5, 9.0)
    assert not {"tokens_per_s", "rate", "training_rate"} & values.keys()


def on_terminal(*news: Event | ProgressReport, height: int = 40) -> tuple[str, str]:
    """Return the lines above the live table on a terminal after some news, and the table."""
    console = Console(
        file=io.StringIO(), record=True, force_terminal=True, width=120, height=height
    )
    display = Display(console, "my-run")
    for one in news:
        display(one)
    lines = console.export_text()
    console.print(display._live_table())
    return lines, console.export_text()


def test_terminal_shows_finished_running_and_future_steps() -> None:
    to_come = (("costs", 1), ("update", 1), ("curvature", 2))
    lines, table = on_terminal(UPDATE, replace(REPORT, to_come=to_come))
    assert lines.split() == [
        "[x]",
        *UPDATE.line.replace("1/3  ", "1/3 ").split(),
    ]
    rows = [" ".join(row.split()) for row in table.splitlines()]
    assert rows[0].startswith("[>] round 1/3 curvature ")
    assert rows[0].endswith(" 12 of 64 sequences, 128 tokens/s, 208 s left")
    assert rows[1:4] == [
        "[ ] round 1/3 costs",
        "[ ] round 1/3 update",
        "[ ] round 2/3 curvature",
    ]
    assert rows[4].startswith("my-run: step 2 of 5, ")


def test_terminal_names_only_the_next_steps() -> None:
    to_come = tuple(("costs", shot) for shot in range(2, 32))
    _, table = on_terminal(replace(REPORT, to_come=to_come), height=14)
    assert len(table.splitlines()) == 8
    assert "24 more steps; my-run: step 1 of 31" in table


def test_terminal_shows_the_last_check_beside_the_bar() -> None:
    lines, table = on_terminal(REPORT, CHECKED)
    assert not lines
    assert "after 120 tokens: loss on validation text 0.5000" in table
    _, table = on_terminal(REPORT, CHECKED, replace(REPORT, step="commit"))
    assert "after 120" not in table


def test_live_table_is_removed_at_the_end() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Display(console, "my-run") as display:
        display(REPORT)
        display._live.refresh()
        display(UPDATE)
        assert "128 tokens/s" in out.getvalue()
    assert not display._live.is_started


def test_log_gets_occasional_lines_without_cursor_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = io.StringIO()
    with Display(Console(file=out, width=140), "my-run") as display:
        display(UPDATE)
        display(REPORT)
        assert "12 of 64" not in out.getvalue(), "the last line was written just now"
        later = time.monotonic() + 60
        monkeypatch.setattr(time, "monotonic", lambda: later)
        display(REPORT)
    assert out.getvalue().splitlines() == [UPDATE.line, REPORT.line]


def test_logger_takes_lines_in_place_of_the_terminal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = io.StringIO()
    with caplog.at_level(logging.INFO, logger="ray_surgeon"):
        with Display(Console(file=out, force_terminal=True), "my-run") as display:
            display.note("a note")
            display(REPORT)
            display(UPDATE)
        with Display(None, "silent") as display:
            display.note("another")
    assert caplog.messages == ["a note", UPDATE.line, "another"]
    assert not out.getvalue()


def test_notebook_shows_the_table_if_widgets_are_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for widgets in (True, False):
        monkeypatch.setattr(
            display_module, "find_spec", lambda _, widgets=widgets: widgets
        )
        assert Display(Console(force_jupyter=True), "my-run").is_live is widgets
