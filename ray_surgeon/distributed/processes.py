"""Processes: their versions, CPU time and memory, and modules that run in a new process."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ray_surgeon.memory.transfers import backend
from ray_surgeon.version import __version__

_STATUS = Path("/proc/self/status")
_SHAPES = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "1",
}
"""Numbers of compiled kernels that oneDNN and torch cache for products; the default is 1,024 each.

oneDNN has one or two kernels per shape, of up to 0.4 MB each, and compiles them in half a
millisecond; torch never uses its cached ones again. A pass over the blocks has a few dozen shapes.
Shapes of pruned linears change in every shot: without a bound a dozen shots add 0.5 GB.
"""


@dataclass(frozen=True)
class Usage:
    """Resources that a worker's process has used since it started.

    Workers in one process report the same process.
    """

    process: str  # host and process id
    cpu_s: float  # CPU time of all threads
    peak_rss_bytes: int  # peak of the resident memory
    peak_gpu_bytes: int = 0  # peak of torch's memory on the GPU since the last report
    # peak since the last report of anonymous memory, which the system cannot reclaim
    peak_anonymous_bytes: int = 0
    busy_s: float = 0.0  # wall-clock time of this worker inside its steps
    # part of `busy_s` to pack and unpack tensors for and from other workers
    packing_s: float = 0.0


class AnonymousPeak:
    """The peak of a process's anonymous memory, sampled every 20 milliseconds.

    The kernel does not record this peak. It is 0 on other systems than Linux.
    """

    _EVERY_S = 0.02

    def __init__(self) -> None:
        """Start to sample."""
        self._peak = 0
        self._lock = threading.Lock()
        if _STATUS.exists():
            thread = threading.Thread(
                target=self._sample, daemon=True, name="anonymous-memory"
            )
            thread.start()

    def _sample(self) -> None:
        while True:
            with self._lock:  # `take` may reset the peak meanwhile
                self._peak = max(self._peak, _status_bytes("RssAnon"))
            time.sleep(self._EVERY_S)

    def take(self) -> int:
        """Return the peak since the last call, and reset it."""
        with self._lock:
            now = _status_bytes("RssAnon")
            peak = max(self._peak, now)
            self._peak = now
        return peak


_peak_here = functools.cache(AnonymousPeak)
"""Returns the sampler of this process."""


def process_usage(
    device: torch.device,
    busy_s: float = 0.0,
    packing_s: float = 0.0,
) -> Usage:
    """Return the resources that this process has used so far.

    Args:
        device: the worker's device, whose memory is reported if it is a GPU.
        busy_s: time of the worker inside its steps.
        packing_s: part of this time to pack and unpack tensors.
    """
    peak_gpu_bytes = 0
    if device.type != "cpu":
        peak_gpu_bytes = backend(device).max_memory_allocated(device)
        backend(device).reset_peak_memory_stats(device)
    return Usage(
        process=f"{socket.gethostname()}:{os.getpid()}",
        cpu_s=time.process_time(),
        peak_rss_bytes=_peak_rss_bytes(),
        peak_gpu_bytes=peak_gpu_bytes,
        peak_anonymous_bytes=_peak_here().take(),
        busy_s=busy_s,
        packing_s=packing_s,
    )


def _peak_rss_bytes() -> int:
    peak_bytes = _status_bytes("VmHWM")
    if peak_bytes > 0:
        return peak_bytes
    # this also counts the process that this one was forked from
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak
    return peak * 1024


def bound_shapes() -> None:
    """Bound the kernels that this process caches; must be called before its first product.

    The libraries read the environment at the first product. Variables that the user has set are
    kept. `os.environ` does not change, so child processes have no bound: an export may have more
    shapes.
    """
    for name, value in _SHAPES.items():
        if name not in os.environ:
            os.putenv(name, value)


def give_back() -> None:
    """Return freed memory that the C library caches to the system.

    Otherwise it would count in the peak of the next step.
    """
    # other systems have no such library, and other C libraries no such function
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status_bytes(field: str) -> int:
    """Return a size from Linux's status of this process; 0 if there is none."""
    if not _STATUS.exists():
        return 0
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            size_kib = line.split()[1]
            return int(size_kib) * 1024
    return 0


def versions() -> dict[str, str]:
    """Return the machine's kind and the versions that results of this process depend on."""
    found = {
        "ray_surgeon": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    for name in ("torch", "transformers", "ray", "numpy", "safetensors"):
        found[name] = version(name)
    return found


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
