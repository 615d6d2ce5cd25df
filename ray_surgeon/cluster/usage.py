"""What a process has used: CPU time and peak memory, from the operating system's own accounting."""

from __future__ import annotations

import os
import resource
import socket
import sys
import time
from pathlib import Path

import torch

from ray_surgeon.cluster.messages import Usage


def process_usage(device: torch.device) -> Usage:
    """Return what this process has used so far; `device` says whether GPU memory counts."""
    gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return Usage(f"{socket.gethostname()}:{os.getpid()}", time.process_time(), _peak_rss_bytes(), gpu)


def _peak_rss_bytes() -> int:
    """Return the peak resident memory of this process; ru_maxrss would also tell of the process it was forked from."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(next(lines, "VmHWM: 0 kB").split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
