from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from ray_surgeon.report.html_report import LivePage
from tests.integration.runs import Given, Jobs, in_memory


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out pages and plots of runs in this process, which take longer than a tiny run.

    tests/report/test_html_report.py tests them.
    """
    if not request.module.__name__.endswith("test_s3_faults"):
        monkeypatch.setattr(LivePage, "draw", lambda self, record, *, final: None)


@pytest.fixture(autouse=True)
def fork_what_reloads(request: pytest.FixtureRequest) -> None:
    """Fork the processes that reload exports, except for tests of tasks, which import other
    packages, and of SmolLM2, which test fresh processes.
    """
    if not request.module.__name__.endswith(("test_tasks", "test_smollm2")):
        request.getfixturevalue("forked")


@pytest.fixture
def job(model_folders: dict[str, Path], tmp_path: Path, shared_folder: Path) -> Jobs:
    return Jobs(model_folders, tmp_path, shared_folder / "runs")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Yield a Ray that the tests of a process share unless they need their own."""
    head = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False}
    )
    yield head
    head.shutdown()


@pytest.fixture(scope="session")
def llama(model_folders: dict[str, Path]) -> Path:
    return model_folders["llama"]


@pytest.fixture
def given(llama: Path) -> Given:
    return in_memory(llama)
