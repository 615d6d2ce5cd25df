"""Runs downstream tasks of EleutherAI's harness on the dense model and exports."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ray_surgeon.config.base import refusing
from ray_surgeon.config.sections import ModelSection, TasksSection
from ray_surgeon.distributed import processes
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.errors import ConfigError
from ray_surgeon.export.folder import local_folder, run_beside
from ray_surgeon.run_state import RunState
from ray_surgeon.storage import files
from ray_surgeon.storage.sources import open_model

Scores = dict[str, dict[str, float]]
"""Task -> metric -> value."""


def check_tasks(options: TasksSection) -> None:
    """Refuse tasks that the harness does not know, before the run starts.

    Raises:
        ValueError: the harness is not installed, or does not know a task.
    """
    remedy = "pip install 'ray_surgeon[eval]', or correct the task definitions"
    with refusing("evaluation.tasks: the harness cannot be used", remedy, RuntimeError):
        reply = processes.run_module(
            __name__, {"options": options.model_dump(), "model": None}
        )
    if reply["unknown"]:
        unknown = ", ".join(reply["unknown"])
        raise ConfigError(
            field="evaluation.tasks.names",
            found=f"the harness has no {unknown}",
            remedy="see `lm_eval ls tasks`, or name a folder in evaluation.tasks.include",
        )


def evaluate_tasks(
    cluster: Cluster, model: ModelSection | str, options: TasksSection
) -> Scores:
    """Evaluate a model in a fresh process beside the first worker, on its GPU if it has one.

    Args:
        cluster: its first worker evaluates.
        model: the dense model, or the URI of an export, whose modeling code, if any, is ours.
        options: the tasks and their settings.

    Raises:
        RuntimeError: the process fails.
    """
    request: dict[str, Any] = {"options": options.model_dump(), "model": model}
    if isinstance(model, ModelSection):
        request["model"] = model.model_dump()
    return run_beside(cluster, __name__, request, offline=False)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among the harness's metrics.

    The filter ``none`` is left out of names, as in ``acc`` for ``acc,none``; other filters stay.
    """
    numbers = {}
    for name, value in metrics.items():
        if "," in name and isinstance(value, (int, float)):
            numbers[name.removesuffix(",none")] = float(value)
    return numbers


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores of a model, or the unknown tasks; see `processes.run_module`."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    options = TasksSection(**request["options"])
    model = request["model"]
    with contextlib.ExitStack() as stack:
        include_path = None
        if options.include is not None:
            copy = local_folder(options.include, weights=False)
            definitions, _ = stack.enter_context(copy)
            include_path = str(definitions)
        manager = TaskManager(include_path=include_path)
        if model is None:
            unknown = [name for name in options.names if name not in manager.all_tasks]
            return {"unknown": unknown}
        trusts_code = False
        if isinstance(model, str):
            folder, _ = stack.enter_context(local_folder(model))
            config = files.read_json(str(folder / "config.json"))
            trusts_code = "auto_map" in config
        else:
            source = open_model(ModelSection(**model))
            folder = source.small_files_folder(weights=True)
        results = simple_evaluate(
            "hf",
            model_args={"pretrained": str(folder), "trust_remote_code": trusts_code},
            tasks=list(options.names),
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size,
            limit=options.limit,
            device="cuda" if torch.cuda.is_available() else "cpu",
            bootstrap_iters=0,
            log_samples=False,
        )
    return {task: _numbers(metrics) for task, metrics in results["results"].items()}


@dataclass(frozen=True)
class Tasks:
    """Runs the tasks once, before the first shot."""

    section: TasksSection
    model: ModelSection | None = None  # a teacher; None for the model of the job

    def __post_init__(self) -> None:
        """Check that the tasks can run.

        Raises:
            ValueError: the harness is not installed, or does not know a task.
        """
        check_tasks(self.section)

    def measure_dense_model(self, run: RunState) -> None:
        """Run the tasks on the dense model."""
        model = self.model or run.model
        run.report.dense["tasks"] = evaluate_tasks(run.cluster, model, self.section)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The tasks, which must be the same for scores before and after."""
        return self.section.model_dump(mode="json", exclude={"batch_size"})
