"""What a process has used: CPU time and peak memory, from the operating system's own accounting."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Usage:
    """What a worker's process has used since it started.

    Workers of one process report the same process.
    """

    process: str  # host and number
    cpu_s: float  # CPU time of all its threads
    peak_rss_bytes: int  # peak of its resident memory
    peak_gpu_bytes: int = 0  # peak of what torch allocated on its GPU since it was asked last
    # peak, since it was asked last, of the memory that is no file's: what could not be given back
    peak_anonymous_bytes: int = 0
    busy_s: float = 0.0  # wall clock that this worker itself spent inside its steps
    packing_s: float = (
        0.0  # of it, what it took to pack and unpack tensors from and for other workers
    )


class AnonymousPeak:
    """The peak of a process's anonymous memory, sampled every few milliseconds.

    The kernel does not keep it.
    """

    _EVERY_S = 0.02

    def __init__(self) -> None:
        """Start to look."""
        self._peak = 0
        self._file = Path("/proc/self/status")
        self._lock = threading.Lock()
        if self._file.exists():
            threading.Thread(target=self._look_on, daemon=True, name="anonymous-memory").start()

    def _look_on(self) -> None:
        while True:
            with self._lock:  # a peak that was taken meanwhile would come back
                self._peak = max(self._peak, self._now())
            time.sleep(self._EVERY_S)

    def _now(self) -> int:
        line = next(
            (line for line in self._file.read_text().splitlines() if line.startswith("RssAnon:")),
            "RssAnon: 0 kB",
        )
        return int(line.split()[1]) * 1024

    def take(self) -> int:
        """Return the peak so far, and begin anew."""
        if not self._file.exists():
            return 0
        with self._lock:
            now = self._now()
            peak = max(self._peak, now)
            self._peak = now
        return peak


@functools.cache
def anonymous_peak() -> AnonymousPeak:
    """Return the one of this process."""
    return AnonymousPeak()


def process_usage(device: torch.device, busy_s: float = 0.0, packing_s: float = 0.0) -> Usage:
    """Return what this process has used so far; `device` says whether GPU memory counts."""
    gpu = 0
    if device.type == "cuda":
        gpu = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    name = f"{socket.gethostname()}:{os.getpid()}"
    anonymous = anonymous_peak().take()
    return Usage(name, time.process_time(), _peak_rss_bytes(), gpu, anonymous, busy_s, packing_s)


def give_back() -> None:
    """Return to the system what the C library keeps of freed memory.

    So the next step's peak is its own.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _peak_rss_bytes() -> int:
    """Return the peak resident memory of this process.

    ru_maxrss also counts the process that it was forked from.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(next(lines, "VmHWM: 0 kB").split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
