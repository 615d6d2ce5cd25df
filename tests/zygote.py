"""A process that has imported everything and forks for each request, which takes milliseconds.

A request is a line of JSON on standard input; the answer is one with exit code, output, seconds and
peak memory. ``{"arguments": [...]}`` runs the command line. ``{"module": ..., "request": ...,
"environment": ...}`` runs a module like `processes.run_module`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import transformers.dynamic_module_utils
from transformers import LlamaForCausalLM  # noqa: F401 - so that forks need not import it

import ray_surgeon.pipeline
import ray_surgeon.run.command
from ray_surgeon.distributed.processes import process_usage

MODULES = ("ray_surgeon.export.folder", "ray_surgeon.export.speed")


def refuse(*args: object, **kwargs: object) -> None:
    raise AssertionError("a worker was started")


def run_command_line(arguments: list[str]) -> int:
    if "--workers-may-start" in arguments:
        arguments.remove("--workers-may-start")
    else:
        ray_surgeon.run.command.run = refuse  # type: ignore[assignment, attr-defined]
    return ray_surgeon.pipeline.main(arguments)


def run_module(asked: dict[str, Any]) -> int:
    os.environ.update(asked["environment"])
    transformers.dynamic_module_utils.HF_MODULES_CACHE = asked["environment"][
        "HF_MODULES_CACHE"
    ]
    print(
        "\n"
        + json.dumps(importlib.import_module(asked["module"]).answer(asked["request"]))
    )
    return 0


def child(asked: dict[str, Any], path: str) -> None:
    with (
        open(path, "w", encoding="utf-8") as file,
        redirect_stdout(file),
        redirect_stderr(file),
    ):
        try:
            code = run_module(asked) if "module" in asked else run_command_line(**asked)
        except BaseException:
            traceback.print_exc()
            code = 99
        file.flush()
    peak = process_usage(torch.device("cpu")).peak_rss_bytes
    Path(path + ".usage").write_text(json.dumps([code, peak]), encoding="utf-8")
    os._exit(0)


def main() -> None:
    for module in MODULES:
        importlib.import_module(module)
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/out"
            start = time.perf_counter()
            pid = os.fork()
            if not pid:
                child(json.loads(line), path)
            os.waitpid(pid, 0)
            seconds = time.perf_counter() - start
            code, peak = json.loads(Path(path + ".usage").read_text(encoding="utf-8"))
            text = Path(path).read_text(encoding="utf-8")
            said = {"code": code, "text": text, "seconds": seconds, "peak_bytes": peak}
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
