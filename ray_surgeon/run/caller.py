"""What a caller's process has of torch, settings and modes, and has again after a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_backends: Any = torch.backends
_PRODUCTS = (_backends.mkldnn.matmul, _backends.cuda.matmul)
"""Where torch keeps with what precision float32 is multiplied."""


@contextmanager
def _whole_products() -> Iterator[None]:
    """Multiply float32 as float32 meanwhile, in all threads of the process."""
    precisions = [products.fp32_precision for products in _PRODUCTS]
    for products in _PRODUCTS:
        products.fp32_precision = "ieee"
    try:
        yield
    finally:
        for products, precision in zip(_PRODUCTS, precisions, strict=True):
            products.fp32_precision = precision


@contextmanager
def _num_threads() -> Iterator[None]:
    """Give back the number of threads of products."""
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def own_modes() -> Iterator[None]:
    """Leave outside what the caller's process and thread are in, and give it back.

    These are torch's number of threads, the precision of products
    (``torch.set_float32_matmul_precision``), a default device, `no_grad`, `inference_mode` and
    `autocast`.
    """
    with ExitStack() as stack:
        stack.enter_context(_num_threads())
        stack.enter_context(_whole_products())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
