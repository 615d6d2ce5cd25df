"""The mathematics works where nothing but torch is installed. Other rules of imports are in
pyproject.toml, for import-linter.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MATHS = Path(__file__).parent.parent / "ray_surgeon/maths"


def test_the_mathematics_needs_torch_only() -> None:
    modules = [
        ".".join(("ray_surgeon.maths", *path.relative_to(MATHS).with_suffix("").parts))
        for path in MATHS.rglob("*.py")
    ]
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(('ray', 'transformers', 'pydantic', "
        "'fsspec', 'accelerate'))); import importlib; "
    )
    names = [module.removesuffix(".__init__") for module in modules]
    subprocess.run(
        [sys.executable, "-c", blocked + f"[importlib.import_module(m) for m in {names!r}]"],
        check=True,
    )
