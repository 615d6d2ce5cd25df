from __future__ import annotations

import pytest

from ray_surgeon import coordinator


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out pages and plots of runs in this process: tests/test_page.py has them, and they take longer than a tiny run."""
    if not request.module.__name__.endswith("test_s3_faults"):
        monkeypatch.setattr(coordinator, "_draw", lambda run, report, last_page_s: 0.0)
