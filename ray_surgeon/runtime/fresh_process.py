"""Runs one of our modules in a process of its own.

The process sees the devices that the calling process sees, or one of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray_surgeon.memory.transfers import backend

if TYPE_CHECKING:  # the processes that read requests need no workers
    from ray_surgeon.runtime.worker import Worker


Request = Mapping[str, Any]
Reply = dict[str, Any]
"""Both travel as JSON."""


def run_module(
    module: str, request: Request, offline: bool = True, gpu: str | None = None
) -> Reply:
    """Return the answer of a module to a request.

    Args:
        module: dotted name; its function `answer` takes the request and returns the reply. On Linux
            its process is killed when this one ends.
        request: for it.
        offline: whether it may not ask the Hub.
        gpu: the one GPU that it sees, as in ``CUDA_VISIBLE_DEVICES``, or "" for none; those of this
            process if not given.

    Raises:
        RuntimeError: it fails; its last lines are shown.
    """
    with tempfile.TemporaryDirectory() as modules:
        env = os.environ | {"HF_MODULES_CACHE": modules, "OMP_WAIT_POLICY": "PASSIVE"}
        if offline:
            env["HF_HUB_OFFLINE"] = "1"
        if gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = gpu
        command = [sys.executable, "-m", f"{__package__}.die_with_parent", str(os.getpid()), module]
        # torch loads nothing in a folder that is gone, as when Ray unpacks the job's anew
        folder = None if os.stat(".").st_nlink else modules
        told: dict[str, Any] = {"input": json.dumps(request), "env": env, "cwd": folder}
        done = subprocess.run(command, **told, capture_output=True, text=True)
    if done.returncode:
        last_lines = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(last_lines or f"{module} ended with exit code {done.returncode}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def run_on_worker(worker: Worker, module: str, request: Request, offline: bool = True) -> Reply:
    """Run a module in a process beside a worker; see `run_module`.

    The process sees that worker's device alone, and no GPU if that is a CPU.
    """
    if worker.device.type == "cpu":
        return run_module(module, request, offline, "")
    # what torch keeps of freed memory is not there for the other process
    backend(worker.device).empty_cache()
    return run_module(module, request, offline, worker.gpu)
