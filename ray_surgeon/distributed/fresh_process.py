"""Runs a module of this package in a new process.

The process sees all devices of the calling process, or one of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

Request = Mapping[str, Any]
Reply = dict[str, Any]
"""Both travel as JSON."""


def run_module(
    module: str, request: Request, offline: bool = True, gpu: str | None = None
) -> Reply:
    """Return the answer of a module to a request.

    Args:
        module: dotted name; its function `answer` takes the request and returns the reply. On Linux
            its process is killed when this process ends.
        request: argument of `answer`.
        offline: whether the process may not access the Hub.
        gpu: the one GPU that the process sees, as in ``CUDA_VISIBLE_DEVICES``, or "" for none; None
            for the GPUs of this process.

    Raises:
        RuntimeError: the process fails; its last lines are shown.
    """
    with tempfile.TemporaryDirectory() as modules:
        env = {
            **os.environ,
            "HF_MODULES_CACHE": modules,
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        if offline:
            env["HF_HUB_OFFLINE"] = "1"
        if gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = gpu
        runner = f"{__package__}.die_with_parent"
        # torch loads nothing from a deleted folder, e.g. after Ray unpacks that of the job again
        is_deleted = os.stat(".").st_nlink == 0
        done = subprocess.run(
            [sys.executable, "-m", runner, str(os.getpid()), module],
            input=json.dumps(request),
            env=env,
            cwd=modules if is_deleted else None,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        last_lines = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(
            last_lines or f"{module} ended with exit code {done.returncode}"
        )
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))
