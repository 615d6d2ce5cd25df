"""What keeps the house as it is: ceilings of its weight, and pages that name no feature."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.house import ROOT, files_with, too_large, weight, words, words_of_docs

CEILING = 17_540
"""Lines of the package. What comes in pushes something out; it is lowered when something leaves."""
MOST_FILES_WITH_EXPERTS = 15
FEATURES = {"answers", "recovery", "curvature", "elements", "experts", "groups", "latency"}
FEATURES |= {"layerwise", "quantise", "reconstruction", "search", "self_text", "tasks"}


def test_the_package_is_no_heavier_than_it_was() -> None:
    found = weight(ROOT / "ray_surgeon")
    assert found.num_lines <= CEILING
    assert found.num_long == 0
    assert found.num_packed <= 0.03 * found.num_assignments
    assert len(files_with("expert")) <= MOST_FILES_WITH_EXPERTS


def test_what_somebody_reads_is_no_longer_than_it_was() -> None:
    assert too_large(ROOT / "ray_surgeon") == []
    assert words(ROOT / "README.md") <= 900
    assert words_of_docs() <= 12_000


@pytest.mark.parametrize("page", ["run/loop.py", "plan/plan.py", "plan/needs.py"])
def test_pages_that_run_and_plan_name_no_feature(page: str) -> None:
    text = Path(ROOT, "ray_surgeon", page).read_text(encoding="utf-8")
    modules = re.findall(r"^from ray_surgeon\.stages\.(\w+)", text, flags=re.MULTILINE)
    names = re.findall(r"[A-Za-z_]+", text.lower())
    assert not FEATURES & {*modules, *names}


def test_contributors_find_the_tests_of_every_module() -> None:
    """By its name, or in the table, whose files exist."""
    table = Path(ROOT, "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Where")[2]
    cells = set(re.findall(r"`([\w/*]+)`", table))
    tests = {path.relative_to(ROOT / "tests") for path in Path(ROOT, "tests").rglob("test_*.py")}
    assert {Path(name) for name in re.findall(r"`([\w/]+\.py)`", table)} <= tests
    package = ROOT / "ray_surgeon"
    for path in package.rglob("*.py"):
        module = path.relative_to(package).with_suffix("")
        has_own = f"test_{path.stem}" in {test.stem for test in tests}
        places = {str(module), f"{module.parent}/*"} & cells
        assert has_own or places or path.stem == "__init__" or "shipped" in path.parts, module
