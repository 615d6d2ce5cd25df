"""The display of a running job."""

from __future__ import annotations

import io
import json
import time

import pytest
from rich.console import Console

from ray_surgeon.report import display as display_module
from ray_surgeon.report.display import Display
from ray_surgeon.report.events import Event, ProgressReport, readings

EVENT = Event(
    "curvature", 1, 3, 61.25, {"loss": 2.5, "tokens": 12, "unit": "nats"}, [1.0]
)
REPORT = ProgressReport("curvature", 1, 3, 12, 64, "sequences", 512, 48.0)


def test_lines_of_events_and_progress() -> None:
    assert EVENT.line == "shot 1/3   curvature     61.2 s  loss=2.5  tokens=12  unit=nats"
    assert REPORT.line.endswith("  12 of 64 sequences, 128 tokens/s, 208 s left")
    start = ProgressReport("load", 0, 3, 0, 0, "", 0, 1.0)
    assert start.line == "start      load       ..."


def test_log_lines_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SURGEON_LOG", "json")
    assert json.loads(EVENT.line) == vars(EVENT)


def test_metrics_of_a_check_have_their_own_names() -> None:
    """They do not overwrite those of passes over the calibration text."""
    check = Event(
        "check", 1, 3, 2.0, {"held_aside": 0.5, "tokens_per_s": 9.0, "rate": 1e-3}
    )
    values = {name: value for name, value, _ in readings(check)}
    assert (values["training_held_aside"], values["training_tokens_per_s"]) == (0.5, 9.0)
    assert not {"tokens_per_s", "rate", "training_rate"} & values.keys()


def test_terminal_shows_progress_bars() -> None:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=160), "my-run") as display:
        display(Event("load", 1, 3, 1.0, {}))
        display(REPORT)
        display.refresh()
        display(Event("commit", 2, 3, 1.0, {}))
        display.refresh()
    expected = ("my-run", "1/3", "2/3", "12/64", "128 tokens/s", "208 s left")
    assert not [part for part in expected if part not in out.getvalue()]


def test_log_gets_occasional_lines_without_cursor_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = io.StringIO()
    with Display(Console(file=out, width=140), "my-run") as display:
        display(EVENT)
        display(REPORT)
        assert "12 of 64" not in out.getvalue(), "the last line was written just now"
        later = time.monotonic() + 60
        monkeypatch.setattr(time, "monotonic", lambda: later)
        display(REPORT)
    assert out.getvalue().splitlines() == [EVENT.line, REPORT.line]


def test_notebook_shows_bars_if_widgets_are_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for widgets in (True, False):
        monkeypatch.setattr(
            display_module, "find_spec", lambda _, widgets=widgets: widgets
        )
        assert Display(Console(force_jupyter=True), "my-run").disable is not widgets
