"""Make large language models smaller with little loss of quality, over Ray workers.

The method is The LLM Surgeon (arXiv 2312.17244).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["JobSpec", "KroneckerFactors", "PruneResult"]
__all__ += ["curvature", "parse_spec", "prune", "recover"]

if TYPE_CHECKING:
    from ray_surgeon.api import curvature, parse_spec, prune, recover
    from ray_surgeon.maths.kronecker import KroneckerFactors
    from ray_surgeon.run.result import PruneResult
    from ray_surgeon.spec.job import JobSpec

_HOMES = {
    "JobSpec": "ray_surgeon.spec.job",
    "KroneckerFactors": "ray_surgeon.maths.kronecker",
    "PruneResult": "ray_surgeon.run.result",
    "curvature": "ray_surgeon.api",
    "parse_spec": "ray_surgeon.spec.parsing",
    "prune": "ray_surgeon.api",
    "recover": "ray_surgeon.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is used, so that ``ray_surgeon.maths`` needs torch only."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ray_surgeon' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return the public names, too, which are not here until they are used."""
    return sorted({*globals(), *_HOMES})
