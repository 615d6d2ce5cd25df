"""Files, names and tests that are mentioned in documentation pages exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from ray_surgeon.config.job import JobSpec
from ray_surgeon.run.result import PruneResult

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ray_surgeon"
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]
OLD = {"negative-results.md", "results.md"}
"""Pages with figures of removed features."""
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
}
FILES = {".py", ".yaml", ".json", ".jsonl", ".html"}
"""Suffixes of file names, which are not dotted names."""
FIELDS = {
    field
    for section in JobSpec.model_json_schema()["$defs"].values()
    for field in section.get("properties", {})
}


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if module in MODULES:
            found = importlib.import_module(module)
            for attribute in parts[length:]:
                if hasattr(found, attribute):
                    found = getattr(found, attribute)
                else:  # a field of a dataclass has no value
                    return attribute in getattr(found, "__annotations__", {})
            return True
    return False


def is_of_the_spec(name: str) -> bool:
    """Whether a dotted name is a field of the job spec."""
    first, *rest = name.split(".")
    return first in JobSpec.model_fields and all(
        part in FIELDS or part.isdigit() for part in rest
    )


def candidates(name: str) -> list[str]:
    """Return the full dotted names that a short name may stand for."""
    first = name.partition(".")[0]
    ends = [module for module in MODULES if module.rpartition(".")[2] == first]
    rest = name.partition(".")[2]
    return [f"{module}.{rest}" if rest else module for module in ends]


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in OLD], ids=lambda p: p.name
)
def test_files_and_names_in_pages_exist(page: Path) -> None:
    """Files, and dotted names that begin with one of our modules."""
    for name in set(re.findall(r"`([\w./*]+)`", page.read_text(encoding="utf-8"))):
        if re.fullmatch(r"(ray_surgeon/)?[\w/]+\.(py|yaml)", name) and "/" in name:
            inside = name.removeprefix("ray_surgeon/")
            places = [ROOT / name, PACKAGE / inside, ROOT / "tests" / name]
            assert any(place.exists() for place in places), f"{page.name} names {name}"
        elif name.startswith("result."):
            assert hasattr(PruneResult, name.removeprefix("result.")), (
                f"{page.name} names {name}"
            )
        elif re.fullmatch(r"[a-z_]+(\.\w+)+", name) and Path(name).suffix not in FILES:
            known = candidates(name)
            if name.startswith("ray_surgeon"):
                known = [name]
            if known and not is_of_the_spec(name):
                assert any(map(resolves, known)), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_and_functions_cited_in_pages_exist(page: Path) -> None:
    """Citations are ``FILE.py::name``; ``::name`` is in the file that was cited last."""
    text = page.read_text(encoding="utf-8")
    paths = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    file = ""
    for cited, name in re.findall(r"`([\w/]+\.py)?::(\w+)`", text):
        file = cited or file
        assert file, f"{page.name} names ::{name} before any file"
        sources = []
        for path in paths:
            if path.as_posix().endswith(f"/{file}"):
                sources.append(path.read_text(encoding="utf-8"))
        assert any(f"def {name}(" in source for source in sources), (
            f"{page.name} names {file}::{name}"
        )
