"""The mathematics works where nothing but torch is installed. Other rules of imports are in
pyproject.toml, for import-linter.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MATHS = Path(__file__).parent.parent / "ray_surgeon/maths"


def test_the_mathematics_needs_torch_only() -> None:
    paths = [path.relative_to(MATHS.parent.parent) for path in MATHS.rglob("*.py")]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
    code = (
        "import importlib, sys; sys.modules.update(dict.fromkeys("
        "('ray', 'transformers', 'pydantic', 'fsspec', 'accelerate'))); "
        f"[importlib.import_module(name) for name in {names!r}]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
