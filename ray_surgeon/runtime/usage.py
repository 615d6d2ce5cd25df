"""What a process is and has used: versions, and CPU time and memory, as the system counts them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import resource
import socket
import sys
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

import ray_surgeon
from ray_surgeon.memory.transfers import backend

_STATUS = Path("/proc/self/status")
_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "1"}
"""How many pieces of machine code oneDNN, and torch beside it, keep for products; else 1,024 each.

oneDNN has one or two a shape, of up to 0.4 MB each, and makes them anew in half a millisecond;
torch's are never looked at again. A pass over the blocks has a few dozen shapes. Those of the rows
and columns that are left in a shot do not come again: without a bound a dozen shots add 0.5 GB.
"""


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
    # of it, what it took to pack and unpack tensors from and for other workers
    packing_s: float = 0.0


class AnonymousPeak:
    """The peak of a process's anonymous memory, sampled every few milliseconds.

    The kernel does not keep it. It is 0 where there is no Linux.
    """

    _EVERY_S = 0.02

    def __init__(self) -> None:
        """Start to look."""
        self._peak = 0
        self._lock = threading.Lock()
        if _STATUS.exists():
            threading.Thread(target=self._look_on, daemon=True, name="anonymous-memory").start()

    def _look_on(self) -> None:
        while True:
            with self._lock:  # a peak that was taken meanwhile would come back
                self._peak = max(self._peak, _status_bytes("RssAnon"))
            time.sleep(self._EVERY_S)

    def take(self) -> int:
        """Return the peak so far, and begin anew."""
        with self._lock:
            now = _status_bytes("RssAnon")
            peak = max(self._peak, now)
            self._peak = now
        return peak


_peak_here = functools.cache(AnonymousPeak)
"""Returns the one of this process."""


def process_usage(device: torch.device, busy_s: float = 0.0, packing_s: float = 0.0) -> Usage:
    """Return what this process has used so far; `device` says whether GPU memory counts."""
    gpu = 0
    if device.type != "cpu":
        gpu = backend(device).max_memory_allocated(device)
        backend(device).reset_peak_memory_stats(device)
    name = f"{socket.gethostname()}:{os.getpid()}"
    # it also counts the process that this one was forked from
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rss = _status_bytes("VmHWM") or most * (1 if sys.platform == "darwin" else 1024)
    return Usage(name, time.process_time(), rss, gpu, _peak_here().take(), busy_s, packing_s)


def bound_shapes() -> None:
    """Bound what products leave in this process, before its first one.

    The libraries read the environment then. What a user has set there holds. Processes that are
    started with `os.environ` have no bound: an export may have more shapes.
    """
    for name in _SHAPES.keys() - os.environ.keys():
        os.putenv(name, _SHAPES[name])


def give_back() -> None:
    """Return to the system what the C library keeps of freed memory.

    So the next step's peak is its own.
    """
    with contextlib.suppress(OSError, AttributeError):  # of another system, or another library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status_bytes(field: str) -> int:
    """Return what Linux says of this process's memory; 0 where it says nothing."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    sizes = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(next(sizes, 0)) * 1024


def versions() -> dict[str, str]:
    """Return the machine's kind and the versions that results of this process depend on."""
    names = ("torch", "transformers", "ray", "numpy", "safetensors")
    machine = {"python": platform.python_version(), "machine": platform.machine()}
    own = {"ray_surgeon": ray_surgeon.__version__}
    return own | machine | {name: version(name) for name in names}
