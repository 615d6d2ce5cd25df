"""What a caller's process has of torch, threads and modes, and has again after a run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


class _Threads:
    """Gives the process, and the thread of each of several runs at once, back as many threads of torch as the process had."""

    def __init__(self) -> None:
        self._lock, self._num_runs, self._before = threading.Lock(), 0, 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_runs:
                self._before = torch.get_num_threads()
            self._num_runs += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_runs -= 1
            torch.set_num_threads(self._before)  # this thread's, and of threads that use torch from now on


own_threads = _Threads()


@contextmanager
def own_modes() -> Iterator[None]:
    """Leave outside what the caller's thread is in: `no_grad`, `inference_mode`, `autocast`."""
    with ExitStack() as held:
        held.enter_context(torch.inference_mode(False))
        held.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                held.enter_context(torch.autocast(kind, enabled=False))
        yield
