"""Experiment trackers: Weights & Biases and MLflow get the checks of a training.

Their environment variables configure them. Every process that runs a job begins a new run.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ray_surgeon.report.events import CHECK, Event
from ray_surgeon.report.record import leaves

_Run = tuple[Callable[[str], object], Callable[[dict[str, Any]], object]]
"""Functions that end a run as FINISHED or FAILED, and that log its numbers by name."""


def _wandb(wandb: Any, spec: Mapping[str, Any]) -> _Run:
    """Begin a run beside other runs of this process."""
    # do not capture the terminal's output, and do not wait long for a login
    settings = wandb.Settings(console="off", login_timeout=30)
    run = wandb.init(
        name=spec["name"], config=spec, settings=settings, reinit="create_new"
    )
    run.define_metric("*", step_metric="steps")

    def end(status: str) -> None:
        run.finish(exit_code=1 if status == "FAILED" else 0)

    return end, run.log


def _mlflow(mlflow: Any, spec: Mapping[str, Any]) -> _Run:
    """Begin a run, nested in the present one of this process if there is one."""
    run_id = mlflow.start_run(run_name=spec["name"], nested=True).info.run_id
    # old servers accept at most 500 characters
    mlflow.log_params({name: str(value)[:500] for name, value in leaves(spec).items()})

    def log(numbers: dict[str, Any]) -> None:
        mlflow.log_metrics(numbers, step=numbers["steps"], run_id=run_id)

    return mlflow.end_run, log


_TRACKERS = {
    "wandb": (("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE"), _wandb),
    "mlflow": (("MLFLOW_TRACKING_URI",), _mlflow),
}
"""Package -> variables, any of which enables it, and the function that begins a run."""


class Trackers(AbstractContextManager["Trackers"]):
    """``with Trackers(...) as trackers`` begins and ends runs; calls send them the checks.

    A tracker that is not installed, or that fails, causes one warning and is not used again.
    """

    def __init__(self, spec: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Begin the runs.

        Args:
            spec: the resolved job spec.
            say: shows a warning.
        """
        self._say = say
        self._runs: dict[str, _Run] = {}
        for package, (variables, begin) in _TRACKERS.items():
            with self._warning(package):
                if any(map(os.environ.get, variables)):
                    self._runs[package] = begin(importlib.import_module(package), spec)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for package, (end, _log) in list(self._runs.items()):
            with self._warning(package):
                end("FAILED" if kind else "FINISHED")

    def __call__(self, event: Event) -> None:
        """Send a check; other events are ignored."""
        if event.step != CHECK:
            return
        for package, (_end, log) in list(self._runs.items()):
            with self._warning(package):
                log({**event.facts, "shot": event.shot})

    @contextmanager
    def _warning(self, package: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a client raises must not end a run
            self._runs.pop(package, None)
            self._say(
                f"warning: {package} gets nothing more of this run: {error!r}; "
                f"pip install 'ray-surgeon[{package}]' brings its client"
            )
