"""The same jobs on Ray: equal to the local cluster, bit for bit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.exceptions import OutOfDiskError, RayTaskError

import ray_surgeon
from ray_surgeon.config.parsing import parse_spec
from ray_surgeon.config.sections import ModelSection, RaySection
from ray_surgeon.distributed import ray_cluster
from ray_surgeon.distributed.cluster import NoRoomError, WorkerFailureError
from ray_surgeon.distributed.placement import WorkerIndex, place
from ray_surgeon.distributed.ray_cluster import RayCluster
from ray_surgeon.distributed.weights import ModelRecipe, load
from ray_surgeon.distributed.worker import Worker
from ray_surgeon.memory.stores import ScratchNames, Stores
from ray_surgeon.run.driver import connect
from ray_surgeon.storage.files import list_names
from tests.conftest import LAYOUTS
from tests.integration import runs
from tests.integration.runs import Jobs, assert_same_shot

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def no_foreign_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def on_ray(cluster: Cluster) -> dict[str, Any]:
    return {"cluster__backend": "ray", "cluster__address": cluster.address}


CORRECTED = runs.LORA | {"calibration__mix": [{"source": "self"}]}
TWO_REPLICAS = runs.ONE | {"cluster__num_replicas": 2}


def test_run_on_ray_matches_a_local_run(cluster: Cluster, job: Jobs) -> None:
    """Two shards of two replicas, on Ray from disk and in waves, with corrections and a text of the
    model's own.
    """
    options = runs.GREEDY | runs.FOUR | CORRECTED
    local = job(options, folder="local")
    others = runs.DISK | runs.MASKED | {"memory__wave": 2}
    there = job(options | others | on_ray(cluster), folder="ray")
    for shot in (1, 2):
        assert_same_shot(local.uri, there.uri, shot)
    assert [s["perplexity"] for s in there.shots] == [
        s["perplexity"] for s in local.shots
    ]
    assert there.report["exports"][0]["reload_max_logit_difference"] < 1e-4
    assert "model.safetensors.index.json" in list_names(str(there.uri / "export/masked"))
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def connected(cluster: Cluster) -> Iterator[None]:
    connect(RaySection(address=cluster.address))
    yield
    ray.shutdown()


FEATURES: dict[str, dict[str, Any]] = {
    "experts": runs.GROUPS
    | {"pruning__groups": ["expert_channels", "experts"], "model": "qwen3_moe"},
    "terms": {"curvature__kind": "extended_kfac"},
    "blocks": runs.SPARSEGPT,
    "depth": runs.GROUPS
    | {"pruning__groups": ["blocks", "ffn"], "pruning__depth": {"num_removed": 1}},
    "reconstruction": runs.GROUPS
    | {"pruning__reconstruction": {"tokens_per_step": 16}, "model": "phi3"},
}
"""What moves between replicas beside the curvature pass."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURES)
def test_runs_on_an_existing_connection_match_local_runs(
    name: str, connected: None, cluster: Cluster, job: Jobs
) -> None:
    """Equal to local runs, too; the connection stays."""
    options = FEATURES[name] | TWO_REPLICAS
    local = job(options, folder="local")
    spec = parse_spec(job.spec(options | on_ray(cluster), folder="ray").read_text())
    there = ray_surgeon.prune(spec=spec, progress=False)
    assert_same_shot(local.uri, Path(there.uri), 1)
    assert ray.get(ray.remote(num_cpus=0)(lambda: 3).remote()) == 3


@pytest.mark.parametrize(
    ("message", "times"),
    [
        ("Initialization failure from server:\nZombieProcess", 4),
        ("ray client connection timeout", 1),
    ],
)
def test_connecting_to_ray_is_retried(
    message: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a cluster cannot start what serves a client."""
    asked = list[str]()

    def fail(address: str, **options: Any) -> None:
        asked.append(address)
        raise ConnectionError(message)

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(ValueError, match=r"cannot reach Ray at 'ray://192.0.2.1:1'"):
        connect(RaySection(address="ray://192.0.2.1:1"))
    assert asked == ["ray://192.0.2.1:1"] * times


def of_llama(num_shards: int = 1, **options: Any) -> RayCluster:
    layout = LAYOUTS["llama"]
    return RayCluster(layout, place(layout, num_shards, 1), RaySection(**options))


def leave_something(worker: Worker) -> None:
    assert worker.scratch is not None
    worker.scratch.path("left").touch()


def sleep(worker: Worker, seconds: float) -> None:
    time.sleep(seconds)


def slowly(worker: Worker) -> None:
    for _ in worker.each(["a", "b", "c", "d"]):
        time.sleep(0.5)


class Link:
    """One of two actors of which the second takes what the first was to give."""

    def give(self) -> int:
        time.sleep(60)
        return 1

    def take(self, given: int) -> int:
        return given


def test_ray_workers_report_errors_progress_and_losses(
    connected: None, job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room, an error of theirs, how far a step is, and what is lost."""
    with pytest.raises(NoRoomError, match=r"^no room for 2 workers.*CPU \d+ free of \d+"):
        of_llama(2, cpus_per_worker=1000, start_timeout_s=0.5)
    workers = of_llama(2, cpus_per_worker=2, ping_timeout_s=5)
    with pytest.raises(ValueError, match="absent"):
        workers.run_all(
            load, ModelRecipe(ModelSection(source="/absent/folder")), False, Stores()
        )
    usage = workers.run_all(Worker.usage)
    assert len({u.process for u in usage}) == 2
    assert all(u.peak_rss_bytes > 50 * 2**20 for u in usage)
    assert workers.run_all(lambda worker: torch.get_num_threads()) == [2, 2]

    seen: list[tuple[int, int]] = []
    progress = workers.progress
    with monkeypatch.context() as patched:
        patched.setattr(ray_cluster, "LOOK_S", 0.2)
        progress.listener = lambda: seen.append((progress.done, progress.total))
        progress.begin(unit="linears")
        workers.run_all(slowly)
    assert any(0 < done < total == 8 for done, total in seen), seen

    # what fails is the task of an actor that lives; what is lost is the other one
    actor_class: Any = ray.remote(num_cpus=0)(Link)
    first, second = (actor_class.remote() for _ in range(2))
    waiting = second.take.remote(first.give.remote())
    time.sleep(1)
    ray.kill(first)
    with pytest.raises(RayTaskError) as failed:
        ray.get(waiting)
    found = workers.as_failure(failed.value)
    assert isinstance(found, WorkerFailureError)
    assert found.cause == "worker"

    # cleaning does not wait for one inside of a step, as one that waits for a failed replica
    names = ScratchNames(str(job.folder), "run", "try")
    recipe = ModelRecipe(ModelSection(source=str(job.models["llama"])), scratch=names)
    workers.run_all(load, recipe, False, Stores())
    workers.run_all(leave_something)
    workers.submit(WorkerIndex(0, 0), sleep, 200)
    workers.clean_up()
    assert len(list(job.folder.rglob("left"))) == 1

    os.kill(int(usage[1].process.rpartition(":")[2]), signal.SIGKILL)
    with pytest.raises(WorkerFailureError) as caught:
        workers.get([workers.submit(WorkerIndex(1, 0), Worker.usage)])
    assert caught.value.cause == "worker"
    workers.close()


def test_failed_gpu_counts_as_a_lost_worker_but_a_full_disk_does_not() -> None:
    nobody = object.__new__(RayCluster)
    broken = RayTaskError(
        "step", "", torch.AcceleratorError("CUDA error: unspecified launch failure")
    )
    found = RayCluster.as_failure(nobody, broken)
    assert isinstance(found, WorkerFailureError)
    assert found.cause == "worker"
    assert "unspecified launch failure" in found.message
    for said in ("CUDA error: out of memory", "CUDA error: device-side assert triggered"):
        again = RayTaskError("step", "", torch.AcceleratorError(said))
        assert RayCluster.as_failure(nobody, again) is again
    full = OutOfDiskError("no space")
    assert RayCluster.as_failure(nobody, full) is full
    wrong = RayTaskError("step", "", torch.OutOfMemoryError("CUDA out of memory"))
    assert RayCluster.as_failure(nobody, wrong) is wrong
