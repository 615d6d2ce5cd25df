"""What a process has used: CPU time and peak memory, from the operating system's own accounting."""

from __future__ import annotations

import os
import resource
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Usage:
    """What a worker's process has used since it started; workers of one process report the same process."""

    process: str  # host and number
    cpu_s: float  # CPU time of all its threads
    peak_rss_bytes: int  # peak of its resident memory
    peak_gpu_bytes: int = 0  # peak of what torch allocated on its GPU
    busy_s: float = 0.0  # wall clock that this worker itself spent inside its steps


def process_usage(device: torch.device, busy_s: float = 0.0) -> Usage:
    """Return what this process has used so far; `device` says whether GPU memory counts."""
    gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return Usage(f"{socket.gethostname()}:{os.getpid()}", time.process_time(), _peak_rss_bytes(), gpu, busy_s)


def _peak_rss_bytes() -> int:
    """Return the peak resident memory of this process; ru_maxrss also counts the process it was forked from."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(next(lines, "VmHWM: 0 kB").split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
