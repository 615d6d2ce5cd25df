"""Weights & Biases and MLflow, replaced by fakes."""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from ray_surgeon.report.events import Event, Trackers

SPEC = {"name": "mine", "output": {"uri": "runs/mine"}, "evaluation": [{"name": "docs"}]}
CHECK = Event("check", 2, 2, 1.0, {"steps": 3, "held_aside": 0.5})
SENT = {"steps": 3, "held_aside": 0.5, "shot": 2}
FAKES = {
    "wandb": ("Settings", "init", "define_metric", "log", "finish"),
    "mlflow": ("start_run", "log_params", "log_metrics", "end_run"),
}


class Fake:
    """Records calls and their arguments; the function named `broken` raises."""

    def __init__(self, package: str, broken: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.broken = broken
        self.info = SimpleNamespace(run_id="id")
        for name in FAKES[package]:
            setattr(self, name, partial(self.note, name))

    def note(self, *call: Any, **named: Any) -> Fake:
        self.calls.append((*call, named))
        if call[0] == self.broken:
            raise ConnectionError("no such server")
        return self

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    both = {package: Fake(package) for package in FAKES}
    for package, fake in both.items():
        monkeypatch.setitem(sys.modules, package, fake)
    for variable in ("WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///some.db")
    return both


def followed() -> list[str]:
    """Return the warnings of a run with two checks."""
    said = list[str]()
    with Trackers(SPEC, said.append) as trackers:
        for event in (CHECK, Event("commit", 2, 2, 1.0, {"parameters": 3}), CHECK):
            trackers(event)
    return said


def test_checks_are_sent_to_both_trackers(fakes: dict[str, Fake]) -> None:
    assert followed() == []
    wandb, mlflow = fakes["wandb"], fakes["mlflow"]
    assert [call[1] for call in wandb.calls if call[0] == "log"] == [SENT] * 2
    (init,) = (call[-1] for call in wandb.calls if call[0] == "init")
    assert (init["name"], init["config"]) == ("mine", SPEC)
    assert wandb.calls[-1] == ("finish", {"exit_code": 0})
    assert [call for call in mlflow.calls if call[0] == "log_metrics"] == [
        ("log_metrics", SENT, {"step": 3, "run_id": "id"})
    ] * 2
    parameters = {"name": "mine", "output.uri": "runs/mine", "evaluation.0.name": "docs"}
    assert ("log_params", parameters, {}) in mlflow.calls
    assert mlflow.calls[-1] == ("end_run", "FINISHED", {})


def test_failed_run_is_reported(fakes: dict[str, Fake]) -> None:
    with pytest.raises(ZeroDivisionError), Trackers(SPEC, print):
        raise ZeroDivisionError
    assert fakes["wandb"].calls[-1] == ("finish", {"exit_code": 1})
    assert fakes["mlflow"].calls[-1] == ("end_run", "FAILED", {})


@pytest.mark.parametrize("broken", ["start_run", "log_metrics", "end_run"])
def test_failing_tracker_is_not_used_again(broken: str, fakes: dict[str, Fake]) -> None:
    fakes["mlflow"].broken = broken
    (warning,) = followed()
    assert "mlflow" in warning
    assert "no such server" in warning
    assert fakes["mlflow"].names[-1] == broken
    assert fakes["mlflow"].names.count(broken) == 1
    assert fakes["wandb"].names.count("log") == 2, "the other one goes on"


def test_missing_package_gives_a_warning(
    fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    (warning,) = followed()
    assert "pip install 'ray-surgeon[wandb]'" in warning
    assert fakes["mlflow"].names.count("log_metrics") == 2


def test_no_tracker_is_used_unless_requested(
    fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable)
    assert followed() == []
    assert fakes["wandb"].calls == fakes["mlflow"].calls == []
