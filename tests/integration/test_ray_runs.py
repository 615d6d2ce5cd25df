"""The same jobs on Ray: equal to the local cluster, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.exceptions import OutOfDiskError, RayError, RayTaskError

import ray_surgeon
from ray_surgeon.memory.stores import ScratchNames, Stores
from ray_surgeon.run.driver import connect
from ray_surgeon.runtime import ray_cluster
from ray_surgeon.runtime.cluster import NoRoomError, WorkerFailureError
from ray_surgeon.runtime.loading import ModelRecipe, load
from ray_surgeon.runtime.placement import WorkerIndex, place
from ray_surgeon.runtime.ray_cluster import RayCluster
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.spec.parsing import parse_spec
from ray_surgeon.spec.sections import ModelSection, RaySection
from ray_surgeon.storage.files import list_names
from tests.conftest import LAYOUTS
from tests.integration.runs import assert_same_shot, report_of, run, tiny_spec

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def no_foreign_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def on_ray(cluster: Cluster) -> dict[str, Any]:
    return {"cluster__backend": "ray", "cluster__address": cluster.address}


def test_ray_equals_local(cluster: Cluster, model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Three shards, on Ray from disk and in waves; two replicas are in the test after this one."""
    options: dict[str, Any] = {"cluster__num_shards": 3}
    assert run(tmp_path / "local", model_folders["llama"], **options) == 0
    others = {
        "output__exports": ["masked"],
        "memory__weights": "disk",
        "memory__factors": "disk",
        "memory__wave": 2,
    }
    assert (
        run(tmp_path / "ray", model_folders["llama"], **options, **others, **on_ray(cluster)) == 0
    )
    for shot in (1, 2):
        assert_same_shot(tmp_path / "local/run", tmp_path / "ray/run", shot)
    local = report_of(tmp_path / "local/run")
    there = report_of(tmp_path / "ray/run")
    assert [s["perplexity"] for s in there["shots"]] == [s["perplexity"] for s in local["shots"]]
    assert there["exports"][0]["reload_max_logit_difference"] < 1e-4
    assert "model.safetensors.index.json" in list_names(str(tmp_path / "ray/run/export/masked"))
    assert not ray.is_initialized()


GROUPS = {"pruning__structure": "groups", "pruning__width_multiple": 8}
FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "corrections": (
        "llama",
        {
            "curvature__kind": "extended_kfac",
            "correction__lora_rank": 2,
            "calibration__mix": [{"source": "self"}],
        },
    ),
    "blocks": ("llama", {"pruning__method": "sparsegpt", "pruning__structure": "element"}),
    "experts": ("qwen3_moe", GROUPS | {"pruning__groups": ["expert_channels", "experts"]}),
    "search": ("llama", GROUPS | {"pruning__search": {"num_sequences": 3}}),
    "reconstruction": ("phi3", GROUPS | {"pruning__reconstruction": {"tokens_per_step": 16}}),
}
"""Everything that moves between replicas beside the curvature pass: family and options."""


@pytest.mark.parametrize(
    "name",
    [
        "corrections",
        "experts",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("blocks", "search", "reconstruction")),
    ],
)
def test_features_on_ray_equal_local(
    name: str, cluster: Cluster, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    family, options = FEATURES[name]
    workers = {"cluster__num_shards": 2, "cluster__num_replicas": 2, "pruning__num_shots": 1}
    assert run(tmp_path / "local", model_folders[family], **options, **workers) == 0
    workers |= on_ray(cluster)
    assert run(tmp_path / "ray", model_folders[family], **options, **workers) == 0
    assert_same_shot(tmp_path / "local/run", tmp_path / "ray/run", 1)


@pytest.fixture
def connected(cluster: Cluster) -> Iterator[None]:
    connect(cluster.address, 4)
    yield
    ray.shutdown()


def test_a_connection_that_was_there_before_stays(
    connected: None, cluster: Cluster, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    spec = parse_spec(
        tiny_spec(
            tmp_path, model_folders["llama"], **on_ray(cluster), pruning__num_shots=1
        ).read_text()
    )
    assert ray_surgeon.prune(spec=spec, progress=False).report["shots"]
    assert ray.is_initialized()
    assert ray.get(ray.remote(num_cpus=0)(lambda: 3).remote()) == 3


@pytest.mark.parametrize(
    ("message", "times"),
    [
        ("Initialization failure from server:\nZombieProcess", 4),
        ("ray client connection timeout", 1),
    ],
)
def test_a_cluster_that_cannot_start_what_serves_a_client_is_asked_again(
    message: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()

    def fail(address: str, **options: Any) -> None:
        asked.append(address)
        raise ConnectionError(message)

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(ValueError, match=r"cannot reach Ray at 'ray://192.0.2.1:1'"):
        connect("ray://192.0.2.1:1", 1)
    assert asked == ["ray://192.0.2.1:1"] * times


def test_failures_are_seen_and_named(connected: None, model_folders: dict[str, Path]) -> None:
    """No room, a worker's error, a killed worker: each is raised where the coordinator waits."""
    layout = LAYOUTS["llama"]
    placement = place(layout, 2, 1)
    with pytest.raises(NoRoomError, match=r"^no room for 2 workers.*CPU \d+ free of \d+"):
        RayCluster(layout, placement, RaySection(cpus_per_worker=1000, start_timeout_s=0.5))
    workers = RayCluster(layout, placement, RaySection())
    with pytest.raises(ValueError, match="absent"):
        workers.run_all(load, ModelRecipe(ModelSection(source="/absent/folder")), False, Stores())
    workers.run_all(
        load, ModelRecipe(ModelSection(source=str(model_folders["llama"]))), False, Stores()
    )
    usage = workers.usages()
    assert len({u.process for u in usage}) == 2
    assert all(u.peak_rss_bytes > 50 * 2**20 for u in usage)
    os.kill(int(usage[1].process.rpartition(":")[2]), signal.SIGKILL)
    with pytest.raises(WorkerFailureError) as caught:
        workers.get([workers.submit(WorkerIndex(1, 0), Worker.usage)])
    assert caught.value.cause == "worker"
    workers.close()


def leave_something(worker: Worker) -> None:
    assert worker.scratch is not None
    worker.scratch.path("left").touch()


def sleep(worker: Worker, seconds: float) -> None:
    time.sleep(seconds)


def test_cleaning_does_not_wait_for_a_worker_inside_of_a_step(
    connected: None, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """As one that waits for a failed replica. It has a file left, the other none."""
    layout = LAYOUTS["llama"]
    workers = RayCluster(layout, place(layout, 2, 1), RaySection(ping_timeout_s=3))
    recipe = ModelRecipe(
        ModelSection(source=str(model_folders["llama"])),
        scratch=ScratchNames(str(tmp_path), "run", "try"),
    )
    workers.run_all(load, recipe, False, Stores())
    workers.run_all(leave_something)
    workers.submit(WorkerIndex(0, 0), sleep, 200)
    workers.clean_up()
    left = list(tmp_path.rglob("left"))
    workers.close()
    assert len(left) == 1


class Link:
    """One of two actors of which the second takes what the first was to give."""

    def give(self) -> int:
        time.sleep(60)
        return 1

    def take(self, given: int) -> int:
        return given


def test_a_loss_is_seen_through_tasks_that_needed_it(connected: None) -> None:
    """What fails is the task of a worker that lives; what is lost is the other one."""
    actor_class: Any = ray.remote(num_cpus=0)(Link)
    first, second = (actor_class.remote() for _ in range(2))
    waiting = second.take.remote(first.give.remote())
    time.sleep(1)
    ray.kill(first)
    with pytest.raises(RayError) as caught:
        ray.get(waiting)
    assert isinstance(caught.value, RayTaskError)
    workers = RayCluster(LAYOUTS["llama"], place(LAYOUTS["llama"], 1, 1), RaySection())
    found = workers._as_failure(caught.value)
    workers.close()
    assert isinstance(found, WorkerFailureError)
    assert found.cause == "worker"


def test_a_gpu_that_fails_is_a_lost_worker_and_a_full_disk_is_none() -> None:
    nobody: Any = SimpleNamespace()
    broken = RayTaskError(
        "step", "", torch.AcceleratorError("CUDA error: unspecified launch failure")
    )
    found = RayCluster._as_failure(nobody, broken)
    assert isinstance(found, WorkerFailureError)
    assert found.cause == "worker"
    assert "unspecified launch failure" in found.message
    for said in ("CUDA error: out of memory", "CUDA error: device-side assert triggered"):
        again = RayTaskError("step", "", torch.AcceleratorError(said))
        assert RayCluster._as_failure(nobody, again) is again
    full = OutOfDiskError("no space")
    assert RayCluster._as_failure(nobody, full) is full
    wrong = RayTaskError("step", "", torch.OutOfMemoryError("CUDA out of memory"))
    assert RayCluster._as_failure(nobody, wrong) is wrong


def test_workers_get_their_threads_and_no_more(connected: None) -> None:
    workers = RayCluster(
        LAYOUTS["llama"], place(LAYOUTS["llama"], 1, 1), RaySection(cpus_per_worker=2)
    )
    threads = ray.get(
        workers._actors[WorkerIndex(0, 0)].__ray_call__.remote(
            lambda worker: torch.get_num_threads()
        )
    )
    assert threads == 2
    workers.close()


def test_sigterm_ends_the_run_and_says_how_to_go_on(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    spec = tiny_spec(
        tmp_path,
        model_folders["llama"],
        cluster__backend="ray",
        pruning__num_shots=500,
        pruning__target_sparsity=0.5,
    )
    command = [sys.executable, "-m", "ray_surgeon.pipeline", str(spec)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = ""
    while "shot 1/500 commit" not in output:
        line = process.stdout.readline()
        assert line, "the run ended before its first shot"
        output += line
    process.send_signal(signal.SIGTERM)
    rest, errors = process.communicate(timeout=60)
    output += rest
    assert process.returncode == 130, output + errors
    assert "interrupted; continue with: python -m ray_surgeon.pipeline" in errors
    assert "\x1b[" not in output, "a log has no cursor codes"


def test_progress_of_linears_is_seen_while_they_are_done(
    connected: None, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "_LOOK_S", 0.2)
    workers = RayCluster(LAYOUTS["llama"], place(LAYOUTS["llama"], 2, 1), RaySection())
    seen: list[tuple[int, int]] = []
    workers.progress.listener = lambda: seen.append((workers.progress.done, workers.progress.total))
    workers.progress.begin(unit="linears")

    def slowly(worker: Worker) -> None:
        for _ in worker.each(["a", "b", "c", "d"]):
            time.sleep(0.5)

    workers.run_all(slowly)
    workers.close()
    assert any(0 < done < total == 8 for done, total in seen), seen
