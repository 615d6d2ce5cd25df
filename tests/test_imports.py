"""Imports go one way: pipeline -> coordinator -> cluster -> models -> surgery."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ray_surgeon"
ALLOWED = {
    "surgery": {"surgery"},
    "text_sections": set(),
    "sections": {"text_sections"},
    "spec": {"idle_fields", "sections", "text_sections"},
    "idle_fields": {"spec"},
    "storage": {"retrying"},
    "retrying": set(),
    "sources": {"storage"},
    "data": {"storage", "sources"},
    "models": {"surgery", "models"},
    "cluster": {"surgery", "models", "storage", "sources", "cluster"},
    "evaluate": {"cluster"},
    "checkpoint": {"storage", "cluster"},
    "report": {"cluster", "page", "plots", "storage"},
    "page": {"plots"},
    "plots": {"storage"},
    "fisher_error": {"cluster", "job", "models", "plots", "preflight", "report", "spec", "storage", "surgery"},
    "plan": {"cluster", "models"},
    "export": {"storage", "sources", "cluster", "models", "export"},
    "job": {"cluster", "export", "models", "report", "sections", "sources", "spec", "surgery"},
    "metrics": {"job"},
    "methods": {"cluster", "job", "models", "surgery"},
    "coordinator": {"checkpoint", "cluster", "evaluate", "export", "job", "methods", "page", "plots", "report", "storage"},
    "preflight": {"checkpoint", "cluster", "data", "export", "job", "models", "sources", "spec", "storage", "text_sections"},
    "pipeline": {"checkpoint", "cluster", "coordinator", "job", "metrics", "models", "plan", "preflight", "report", "spec", "storage"},
}


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.parent.name == "shipped", f"{path}: relative import"
            names = [alias.name for alias in node.names]
            found += [f"{node.module}.{name}" for name in names] if node.module == "ray_surgeon" else [str(node.module)]
    return found


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("ray_surgeon.")}
    assert ours <= ALLOWED[part(path)], f"{path} imports {ours - ALLOWED[part(path)]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_ray_and_surgery_stay_in_their_places(path: Path) -> None:
    packages = {name.split(".")[0] for name in imports(path)}
    if path.relative_to(ROOT).as_posix() not in ("pipeline.py", "cluster/ray_cluster.py"):
        assert "ray" not in packages
    if part(path) == "surgery":
        assert packages - set(sys.stdlib_module_names) - {"torch", "ray_surgeon"} == set()


def test_surgery_works_without_ray_and_transformers() -> None:
    block = "import sys; sys.modules['ray'] = sys.modules['transformers'] = None; import importlib; "
    modules = [f"ray_surgeon.surgery.{path.stem}" for path in (ROOT / "surgery").glob("*.py") if path.stem != "__init__"]
    code = block + f"[importlib.import_module(m) for m in {modules!r}]"
    subprocess.run([sys.executable, "-c", code], check=True)
