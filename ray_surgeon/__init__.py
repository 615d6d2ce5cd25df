"""Make large language models smaller with little loss of quality, over Ray workers.

The method is The LLM Surgeon (arXiv 2312.17244).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ray_surgeon.version import __version__ as __version__

__all__ = [
    "JobSpec",
    "KroneckerFactors",
    "PruneResult",
    "curvature",
    "parse_spec",
    "prune",
    "recover",
]

if TYPE_CHECKING:
    from ray_surgeon.api import (
        JobSpec,
        KroneckerFactors,
        PruneResult,
        curvature,
        parse_spec,
        prune,
        recover,
    )


def __getattr__(name: str) -> Any:
    """Import a public name when it is used, so that ``ray_surgeon.maths`` needs torch only."""
    if name not in __all__:
        raise AttributeError(f"module 'ray_surgeon' has no attribute {name!r}")
    return getattr(importlib.import_module("ray_surgeon.api"), name)


def __dir__() -> list[str]:
    """Return the public names, too, which are not here until they are used."""
    return sorted({*globals(), *__all__})
