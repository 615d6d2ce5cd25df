from __future__ import annotations

import pytest

from ray_surgeon.run.html_report import LivePage


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out pages and plots of runs in this process: tests/test_html_report.py has them, and they take longer than a tiny run."""
    if not request.module.__name__.endswith("test_s3_faults"):
        monkeypatch.setattr(LivePage, "draw", lambda self, record, *, final: None)
