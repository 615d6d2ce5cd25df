"""Stores and waves give the same bits; scratch files are used and removed; jobs that do not fit are
refused.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.backends import mkldnn

from ray_surgeon import job as job_page
from ray_surgeon.distributed import processes
from ray_surgeon.distributed.cluster import WorkerFailureError
from ray_surgeon.distributed.memory_plan.device_resources import Resources, Room
from ray_surgeon.distributed.memory_plan.planner import DoesNotFitError
from ray_surgeon.distributed.placement import WorkerIndex
from ray_surgeon.distributed.worker import Worker
from ray_surgeon.evaluation import texts as evaluation
from ray_surgeon.maths.products import product
from ray_surgeon.memory import stores
from ray_surgeon.memory.stores import NO_SCRATCH, ReadAhead, Scratch
from ray_surgeon.pruning.rows_columns import RowsColumns
from ray_surgeon.run_state import RunState
from tests.conftest import HYBRIDS, Zygote, of_families
from tests.integration import runs
from tests.integration.runs import Done, Jobs, assert_same_shot

METHODS: dict[str, dict[str, Any]] = {
    "greedy": runs.GREEDY,
    "sampled": {"curvature__fisher": "sampled"},
    "activations": {"curvature__kind": "activations"},
    "two-terms": {"curvature__kind": "extended_kfac"},
    "element": runs.ELEMENT | runs.LORA,
    "n_m": runs.N_M,
    "sparsegpt": runs.SPARSEGPT,
    "groups": runs.GROUPS
    | runs.LORA
    | {"recovery__sequences_per_step": 2, "output__exports": ["per_block"]},
}
WAYS: list[dict[str, Any]] = [
    {"memory__activations": "recompute"},
    {"memory__activations": "keep", "memory__wave": 4},
    {"memory__weights": "host", "memory__factors": "host", "memory__wave": 1},
    {"memory__weights": "disk", "memory__factors": "disk", "memory__wave": 4},
    {"memory__weights": "disk", "memory__factors": "device", "memory__wave": 6},
    {"memory__weights": "device", "memory__factors": "disk", "memory__wave": 2},
]


FAMILY = "llama-biases"


def resident(job: Jobs, method: str) -> Done:
    """Return a run with everything on the device, on two shards."""
    return job.baseline(METHODS[method], model=FAMILY, cluster__num_shards=2)


@pytest.mark.parametrize(
    ("method", "way"),
    [
        pytest.param(method, way, marks=[pytest.mark.slow] * (number % len(WAYS) != way))
        for number, method in enumerate(METHODS)
        for way in range(len(WAYS))
    ],
)
def test_every_store_and_wave_gives_the_same_bits(
    method: str, way: int, job: Jobs
) -> None:
    """Each method is tested with one setting of stores by default, with all of them by `slow`."""
    expected = resident(job, method)
    scratch = {
        "memory__scratch": str(job.folder / "scratch"),
        "cluster__num_shards": 1 + way % 3,
    }
    other = job(METHODS[method] | WAYS[way] | scratch, model=FAMILY)
    planned_stores = other.report["plan"]["stores"]
    assert all(
        planned_stores[name.removeprefix("memory__")] == value
        for name, value in WAYS[way].items()
    )
    for shot in (1, 2):
        assert_same_shot(expected.uri, other.uri, shot)
    assert expected.shots[1]["perplexity"] == other.shots[1]["perplexity"]
    assert not list((job.folder / "scratch").rglob("*")), "scratch files are removed"


@pytest.mark.parametrize("family", of_families(["gpt2", "phi3", *sorted(HYBRIDS)]))
def test_other_families_with_weights_on_disk_and_replicas(family: str, job: Jobs) -> None:
    options = runs.ONE | {"model": family, "cluster__num_replicas": 2}
    one = job(options, folder="one")
    scratch = {"memory__wave": 3, "memory__scratch": str(job.folder / "scratch")}
    other = job(options | runs.DISK | scratch, folder="other")
    assert_same_shot(one.uri, other.uri, 1)


def test_killed_run_with_weights_on_disk_resumes(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It resumes with other stores, gives the same bits and removes the scratch files of the killed
    process.
    """
    expected = resident(job, "greedy")
    scratch = {"memory__scratch": str(job.folder / "scratch")}
    options = METHODS["greedy"] | runs.DISK | scratch | {"model": FAMILY}

    def killed(*arguments: object) -> None:
        raise WorkerFailureError("node", "after which nobody cleans up")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Evaluation, "check_limit", killed)
        patch.setattr("ray_surgeon.run.result.LocalCluster.close", lambda cluster: None)
        job(options, code=1)
    (left,) = (job.folder / "scratch").glob("ray_surgeon-*/*/*")
    assert list(left.iterdir())
    done = job(options | {"memory__factors": "host", "memory__wave": 6}, "--resume")
    assert not list((job.folder / "scratch").iterdir())
    assert_same_shot(expected.uri, done.uri, 2)


def test_full_scratch_disk_is_reported_and_cleaned(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the disk, and the scratch files are removed."""
    replace = Path.replace

    def full(path: Path, target: Path) -> Path:
        if path.suffix == ".writing":
            raise OSError("No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    scratch = job.folder / "scratch"
    said = job({"memory__weights": "disk", "memory__scratch": str(scratch)}, code=1).error
    assert (
        "No space left on device; free space on that disk, or name another one in" in said
    )
    assert "--resume" in said
    assert not list(scratch.rglob("*"))


def test_interrupted_run_leaves_no_scratch_files(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupting a run removes its scratch files."""
    scratch = job.folder / "scratch"
    there: list[Path] = []

    def interrupt(*args: object) -> None:
        there.extend(scratch.rglob("*.factor"))
        raise KeyboardInterrupt

    monkeypatch.setattr(RowsColumns, "choose", interrupt)
    job({"memory__factors": "disk", "memory__scratch": str(scratch)}, code=130)
    assert there
    assert not list(scratch.rglob("*"))


def test_job_that_does_not_fit_is_refused_before_it_starts(job: Jobs) -> None:
    """Memory settings that contradict each other are refused, too."""
    options = {"cluster__gpus_per_worker": 1}
    job(options, "--dry-run", "--device-memory", "80GB")
    refused = job(options, "--dry-run", "--device-memory", "100kB", code=2)
    for part in ("does not fit", "of device memory", "times that memory"):
        assert part in refused.error
    assert not refused.uri.exists()
    job({"memory__activations": "keep", "memory__weights": "disk"}, "--dry-run", code=2)


def test_scratch_files_of_other_runs_are_kept(tmp_path: Path) -> None:
    names = list(itertools.product(("one", "two"), ("first", "second")))
    for run_name, attempt in names:
        Scratch(str(tmp_path), run_name, attempt, "0").path("x").touch()
    Scratch(str(tmp_path), "one", "third", "0").remove_earlier()
    assert sorted(path.parent.name for path in tmp_path.glob("*/*/0")) == [
        "first",
        "second",
    ]
    assert {path.parent.parent.name for path in tmp_path.glob("*/*/0")} == {
        "ray_surgeon-two"
    }


def test_plan_waits_for_memory_of_ended_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [
        DoesNotFitError("it is full"),
        DoesNotFitError("it is full"),
        "a plan",
    ]
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    clock.sleep = lambda s: setattr(clock, "now", clock.now + s)
    monkeypatch.setattr(job_page, "time", clock)
    found = [Resources("a", "cpu", "", Room(1e9, 1e9, 1e9, device_is_host=True))]
    workers: Any = SimpleNamespace(run_all=lambda *args: found)
    inputs: Any = mock.MagicMock(plan=mock.Mock(side_effect=answers))
    inputs.spec.cluster.cpus_per_worker = 1
    inputs.spec.cluster.device_speed = None
    with pytest.raises(DoesNotFitError):
        job_page._plan(inputs, workers, NO_SCRATCH, 0.0)
    assert job_page._plan(inputs, workers, NO_SCRATCH, 6.0) == answers[-1]
    assert clock.now == 105.0


def test_tensors_are_prefetched_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "ENTRIES_AHEAD", 10)
    names = ["a", "b", "c", "d", "mask"]
    begun = list[str]()
    shapes = {"a": (2, 3), "b": (2, 3), "c": (30,), "d": (1,)}

    def read(name: str) -> torch.Tensor:
        begun.append(name)
        return torch.zeros(shapes.get(name, (5,)))

    ahead = ReadAhead(read, names, shapes)
    for name, expected in zip(
        names, (["b", "c"], ["c"], ["d", "mask"], ["mask"], []), strict=True
    ):
        tensor = ahead(name)
        assert tensor.shape == shapes.get(name, (5,))
        assert set(begun) <= {*names[: names.index(name) + 1], *expected}
    assert sorted(begun) == sorted(names), "each tensor is read once"


def test_scratch_files_of_an_earlier_attempt_count_as_free_space(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scratch files of an earlier attempt count as free space; the next attempt removes them."""
    root = job.folder / "scratch"
    key = hashlib.sha256(str(job.folder / "run").encode()).hexdigest()[:16]
    left = Scratch(str(root), key, "earlier", "0-0").path("x.factor")
    left.write_bytes(bytes(5 * 2**20))
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=0))
    options = runs.DISK | {"memory__scratch": str(root)}
    job(options, memory__limit_gib=0.001, code=2)
    assert left.exists(), "a refused job does not remove files of an earlier attempt"
    job(options)
    assert not left.exists()
    job(options, folder="full", code=2)


def test_files_of_earlier_shots_are_closed(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A removed file that is still mapped takes its space. Attention is never pruned here, so its
    weights stay in the shot from which the run resumed.
    """
    seen = list[tuple[int, set[str]]]()

    def look(stage: object, run: RunState) -> None:
        maps = Path("/proc/self/maps").read_text()
        seen.append((run.shot, set(re.findall(rf"{job.folder}.*/shots/(\d+)/", maps))))
        if len(seen) == 3:
            raise FloatingPointError("ends here")

    monkeypatch.setattr(evaluation.Evaluation, "check_limit", look)
    options = runs.GROUPS | {
        "pruning__groups": ["ffn"],
        "pruning__num_shots": 4,
        "memory__weights": "disk",
        "output__keep_shots": 1,
    }
    job(options, code=1)
    gc.collect()  # the traceback refers to the failed run
    job(options, "--resume")
    before = [(1, set()), (2, {"0001"}), (3, {"0002"})]
    assert seen == [*before, before[-1], (4, {"0003"})], (
        "only files of the previous shot are open"
    )


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the memory of a worker process after products of ever new shapes, in bytes."""
    torch.set_num_threads(1)
    without_mixtures: Any = SimpleNamespace(linears=[])
    worker = Worker(without_mixtures, without_mixtures, WorkerIndex(0, 0), "cpu")
    sizes = list[int]()
    for number in range(max(asked["after"])):
        product(torch.ones(128 + number // 20, 128), torch.ones(128, 128 + number % 20))
        if number + 1 in asked["after"]:
            worker.usage()  # releases free memory
            sizes.append(worker.usage().peak_anonymous_bytes)
    return {"bytes": sizes, "inherited": dict(os.environ)}


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells of anonymous memory"
)
@pytest.mark.skipif(not mkldnn.is_available(), reason="no oneDNN")
def test_memory_of_past_product_shapes_is_released(zygote: Zygote) -> None:
    """Every shot leaves other shapes. If memory of past shapes were kept, 300 shapes would take 180
    MB.
    """
    request = {"after": [100, 400]}
    of_worker = zygote.run_module("tests.integration.test_memory", request)
    few, many = of_worker["bytes"]
    assert many - few < 0.02 * few
    assert not processes._SHAPES.keys() & of_worker["inherited"], (
        "processes of exports do not inherit the setting"
    )


def test_large_export_is_reloaded_from_disk(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    run_module = processes.run_module

    def noted(module: str, request: Any) -> Any:
        asked.append(request)
        return run_module(module, request)

    monkeypatch.setattr(processes, "run_module", noted)
    monkeypatch.setattr("ray_surgeon.export.folder.available_bytes", lambda: 100_000)
    done = job(runs.GROUPS | runs.ONE | {"output__exports": ["per_block"]})
    assert [request["max_memory"] for request in asked] == [50_000]
    (export,) = done.report["exports"]
    assert export["reload_max_logit_difference"] < 1e-3
