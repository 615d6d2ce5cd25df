"""What a caller's process has of torch, settings and modes, and has again after a run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_backends: Any = torch.backends
_PRODUCTS = (_backends.mkldnn.matmul, _backends.cuda.matmul)
"""Where torch keeps with what precision float32 is multiplied."""


class _Settings:
    """What all threads of the process share.

    While there is a run, float32 is multiplied as float32; afterwards all is as it was.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_runs = 0
        self._num_threads = 0
        self._for_all = ""
        self._precisions = list[str]()

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_runs:
                self._num_threads = torch.get_num_threads()
                self._precisions = [of.fp32_precision for of in _PRODUCTS]
                try:
                    self._for_all = torch.get_float32_matmul_precision()
                except RuntimeError:  # the two ways to set it disagree
                    self._for_all = ""
                torch.set_float32_matmul_precision("highest")
            self._num_runs += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_runs -= 1
            # this thread's, and of threads that use torch from now on
            torch.set_num_threads(self._num_threads)
            if not self._num_runs:
                if self._for_all:
                    torch.set_float32_matmul_precision(self._for_all)
                for of, precision in zip(_PRODUCTS, self._precisions, strict=True):
                    of.fp32_precision = "none"  # which takes what is set for all of torch
                    if of.fp32_precision != precision:
                        of.fp32_precision = precision


_settings = _Settings()


@contextmanager
def own_modes() -> Iterator[None]:
    """Leave outside what the caller's process and thread are in, and give it back.

    These are torch's number of threads, the precision of products
    (``torch.set_float32_matmul_precision``), a default device, `no_grad`, `inference_mode` and
    `autocast`.
    """
    with ExitStack() as held:
        held.enter_context(_settings)
        if torch.get_default_device().type != "cpu":
            held.enter_context(torch.device("cpu"))
        held.enter_context(torch.inference_mode(False))
        held.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                held.enter_context(torch.autocast(kind, enabled=False))
        yield
