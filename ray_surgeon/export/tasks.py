"""Downstream tasks of EleutherAI's harness, in a process of its own.

They run on the dense model and on exports.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from ray_surgeon.export.folder import local_folder, run_beside
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.fresh_process import run_module
from ray_surgeon.spec.base import refusing
from ray_surgeon.spec.evaluation import TasksSection
from ray_surgeon.spec.sections import ModelSection
from ray_surgeon.storage import files
from ray_surgeon.storage.sources import open_model

Scores = dict[str, dict[str, float]]
"""Task -> metric -> value."""


def check_tasks(options: TasksSection) -> None:
    """Refuse tasks that the harness does not know, before anything starts.

    Raises:
        ValueError: the harness is not installed, or names the tasks.
    """
    remedy = "pip install 'ray_surgeon[eval]', or correct the task definitions"
    with refusing("evaluation.tasks: the harness cannot be used", remedy, RuntimeError):
        reply = run_module(__name__, {"options": options.model_dump(), "model": None})
    if reply["unknown"]:
        unknown = ", ".join(reply["unknown"])
        remedy = "see `lm_eval ls tasks`, or name a folder in evaluation.tasks.include"
        raise ValueError(f"evaluation.tasks.names: the harness has no {unknown}; {remedy}")


def evaluate_tasks(cluster: Cluster, model: ModelSection | str, options: TasksSection) -> Scores:
    """Evaluate a model in a fresh process of the first worker, on its GPU if it has one.

    Args:
        cluster: its first worker evaluates.
        model: the dense model, or the URI of an export, whose modeling code, if any, is ours.
        options: what to evaluate.

    Raises:
        RuntimeError: the process fails.
    """
    named = model if isinstance(model, str) else model.model_dump()
    request = {"options": options.model_dump(), "model": named}
    return run_beside(cluster, __name__, request, offline=False)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the harness's numbers; ``acc,none`` is ``acc``, and another filter's name stays."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    return {name.removesuffix(",none"): float(n) for name, n in numbers.items() if "," in name}


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores, or the tasks that are not known; see `fresh_process.run_module`."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    options = TasksSection(**request["options"])
    model = request["model"]
    with contextlib.ExitStack() as held:
        definitions = None
        if options.include is not None:
            definitions, _ = held.enter_context(local_folder(options.include, weights=False))
        manager = TaskManager(include_path=definitions and str(definitions))
        if model is None:
            return {"unknown": [name for name in options.names if name not in manager.all_tasks]}
        is_export = isinstance(model, str)
        if is_export:
            folder, _ = held.enter_context(local_folder(model))
        else:
            folder = open_model(ModelSection(**model)).small_files_folder(weights=True)
        has_code = "auto_map" in files.read_json(str(folder / "config.json"))
        arguments = {"pretrained": str(folder), "trust_remote_code": is_export and has_code}
        settings = options.model_dump(include={"batch_size", "num_fewshot", "limit"})
        settings |= {"tasks": list(options.names), "task_manager": manager, "log_samples": False}
        settings |= {"device": "cuda" if torch.cuda.is_available() else "cpu", "bootstrap_iters": 0}
        results = simple_evaluate("hf", arguments, **settings)
    return {task: _numbers(metrics) for task, metrics in results["results"].items()}
