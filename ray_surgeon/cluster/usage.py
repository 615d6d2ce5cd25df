"""What a process has used: CPU time and peak memory, from the operating system's own accounting; what a worker has been busy."""

from __future__ import annotations

import functools
import inspect
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ray_surgeon.cluster.messages import Usage

Worker = TypeVar("Worker", bound=type)


def counts_busy_time(worker_class: Worker) -> Worker:
    """Let the public methods of a worker add their wall clock to its `busy_s`, all but those that answer while another one runs."""
    for name, method in inspect.getmembers(worker_class, inspect.isfunction):
        if not name.startswith("_") and name not in ("ping", "usage"):
            setattr(worker_class, name, _timed(method))
    return worker_class


def _timed(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        start, before = time.perf_counter(), self.busy_s
        try:
            return method(self, *args, **kwargs)
        finally:
            self.busy_s = before + time.perf_counter() - start  # what methods inside this one have added is in it

    return timed


def process_usage(device: torch.device, busy_s: float = 0.0) -> Usage:
    """Return what this process has used so far; `device` says whether GPU memory counts."""
    gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return Usage(f"{socket.gethostname()}:{os.getpid()}", time.process_time(), _peak_rss_bytes(), gpu, busy_s)


def _peak_rss_bytes() -> int:
    """Return the peak resident memory of this process; ru_maxrss would also tell of the process it was forked from."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(next(lines, "VmHWM: 0 kB").split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
