"""Stores and waves give the same bits; scratch is used, taken over and removed; what does not fit
is refused.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import resource
import shutil
from collections.abc import Container
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray_surgeon.maths.kronecker import PackedSymmetric
from ray_surgeon.memory import weights
from ray_surgeon.memory.stores import NO_SCRATCH, FactorStore, Scratch
from ray_surgeon.memory.weights import ReadAhead, StreamedWeights
from ray_surgeon.pipeline import main
from ray_surgeon.plan.plan import DoesNotFitError
from ray_surgeon.plan.room import Resources, Room
from ray_surgeon.report.directory import RunDirectory
from ray_surgeon.run import loop
from ray_surgeon.runtime.cluster import WorkerFailureError
from ray_surgeon.stages import evaluation
from ray_surgeon.stages.prune.rows_columns import RowsColumns
from tests.integration.runs import assert_same_shot, report_of, run, tiny_spec

GROUPS = {"pruning__structure": "groups", "pruning__width_multiple": 8}
METHODS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"curvature__fisher": "sampled"},
    "activations": {"curvature__kind": "activations"},
    "two-terms": {"curvature__kind": "extended_kfac"},
    "element": {"pruning__structure": "element", "correction__lora_rank": 2},
    "n_m": {"pruning__structure": "n_m"},
    "sparsegpt": {"pruning__method": "sparsegpt", "pruning__structure": "element"},
    "groups": {
        **GROUPS,
        "correction__lora_rank": 2,
        "correction__sequences_per_step": 2,
        "output__exports": ["per_block"],
    },
}
WAYS: list[dict[str, Any]] = [
    {"memory__activations": "recompute"},
    {"memory__activations": "keep", "memory__wave": 4},
    {"memory__weights": "host", "memory__factors": "host", "memory__wave": 1},
    {"memory__weights": "disk", "memory__factors": "disk", "memory__wave": 4},
    {"memory__weights": "disk", "memory__factors": "device", "memory__wave": 6},
    {"memory__weights": "device", "memory__factors": "disk", "memory__wave": 2},
]


@pytest.fixture(scope="module")
def resident(
    model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Runs with everything on the device, on two shards."""
    found: dict[str, Path] = {}
    for method, options in METHODS.items():
        found[method] = tmp_path_factory.mktemp("resident") / method
        assert (
            run(found[method], model_folders["llama-biases"], cluster__num_shards=2, **options) == 0
        )
    return found


@pytest.mark.parametrize(
    ("method", "way"), [(method, way) for method in METHODS for way in range(len(WAYS))]
)
def test_every_store_and_wave_gives_the_same_bits(
    method: str, way: int, model_folders: dict[str, Path], resident: dict[str, Path], tmp_path: Path
) -> None:
    options = (
        METHODS[method]
        | WAYS[way]
        | {"memory__scratch": str(tmp_path / "scratch"), "cluster__num_shards": 1 + way % 3}
    )
    assert run(tmp_path / "other", model_folders["llama-biases"], **options) == 0
    stores = report_of(tmp_path / "other/run")["plan"]["stores"]
    assert all(stores[name.removeprefix("memory__")] == value for name, value in WAYS[way].items())
    for shot in (1, 2):
        assert_same_shot(resident[method] / "run", tmp_path / "other/run", shot)
    assert (
        report_of(resident[method] / "run")["shots"][1]["perplexity"]
        == report_of(tmp_path / "other/run")["shots"][1]["perplexity"]
    )
    assert not list((tmp_path / "scratch").rglob("*")), "scratch is removed"


@pytest.mark.parametrize("family", ["opt", "gpt2", "gemma3", "phi3"])
def test_other_families_from_disk_with_replicas(
    family: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    replicas = {"cluster__num_replicas": 2, "memory__scratch": str(tmp_path / "scratch")}
    assert run(tmp_path / "one", model_folders[family], **replicas) == 0
    assert (
        run(
            tmp_path / "other",
            model_folders[family],
            memory__weights="disk",
            memory__factors="disk",
            memory__wave=3,
            **replicas,
        )
        == 0
    )
    for shot in (1, 2):
        assert_same_shot(tmp_path / "one/run", tmp_path / "other/run", shot)


def test_a_run_from_disk_is_resumed_with_the_same_bits_and_takes_over_what_a_killed_one_left(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "memory__weights": "disk",
        "memory__factors": "disk",
        "memory__wave": 6,
        "memory__scratch": str(tmp_path / "scratch"),
    }
    assert run(tmp_path / "whole", model_folders["llama"], **options) == 0

    def killed(*arguments: object) -> None:
        raise WorkerFailureError("node", "after which nobody cleans up")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "check_for_collapse", killed)
        patch.setattr("ray_surgeon.run.result.LocalCluster.close", lambda cluster: None)
        assert run(tmp_path / "cut", model_folders["llama"], **options) == 1
    left = list((tmp_path / "scratch").glob("ray_surgeon-*/*/*"))
    assert len(left) == 1
    assert list(left[0].iterdir())
    assert run(tmp_path / "cut", model_folders["llama"], "--resume", **options) == 0
    assert not list((tmp_path / "scratch").iterdir())
    assert_same_shot(tmp_path / "whole/run", tmp_path / "cut/run", 2)


def test_a_run_that_fails_leaves_no_scratch(model_folders: dict[str, Path], tmp_path: Path) -> None:
    options = {
        "memory__weights": "disk",
        "memory__factors": "disk",
        "memory__scratch": str(tmp_path / "scratch"),
    }
    evaluation = {
        "texts": [
            {
                "name": "docs",
                "source": str(tmp_path / "text.txt"),
                "num_sequences": 2,
                "sequence_length": 40,
                "max_tokens": 4000,
            }
        ]
    }
    stops = {"evaluation": evaluation | {"stop_above": 1.0001}, "pruning__target_sparsity": 0.8}
    assert run(tmp_path, model_folders["llama"], **options, **stops) == 1
    assert not list((tmp_path / "scratch").rglob("*"))


@pytest.mark.parametrize(
    ("error", "cleans"),
    [
        (RuntimeError("an export failed"), True),
        (WorkerFailureError("node", "a machine was lost"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_scratch_goes_where_there_are_workers_that_can_remove_it(
    error: BaseException, cleans: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleaned: list[bool] = []
    workers: Any = SimpleNamespace(clean_up=lambda: cleaned.append(True))
    nothing: Any = None

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(loop, "_run_stages", fail)
    with pytest.raises(type(error)):
        loop.run_shots(nothing, workers, RunDirectory(str(tmp_path)), print)
    assert cleaned == [True] * cleans


def test_a_full_scratch_disk_is_named_and_what_is_on_it_removed(
    model_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replace = Path.replace

    def full(path: Path, target: Path) -> Path:
        if path.suffix == ".writing":
            raise OSError("No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    assert (
        run(
            tmp_path,
            model_folders["llama"],
            memory__weights="disk",
            memory__scratch=str(tmp_path / "scratch"),
        )
        == 1
    )
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "No space left on device; free space on that disk, or name another one in memory.scratch"
        in said
    )
    assert "--resume" in said
    assert not list((tmp_path / "scratch").rglob("*"))


def test_factors_that_have_no_room_on_the_scratch_disk_are_named(tmp_path: Path) -> None:
    store = FactorStore("disk", torch.device("cpu"), Scratch(str(tmp_path), "run", "try", "0"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"a\.A\.factor: cannot write: .* free space on that disk"
        ):
            store.put("a.A", PackedSymmetric.zeros(300))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_interrupted_run_leaves_nothing_on_the_scratch_disk(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[int] = []

    def interrupt(*args: object) -> None:
        there.append(len(list((tmp_path / "scratch").rglob("*.factor"))))
        raise KeyboardInterrupt

    monkeypatch.setattr(RowsColumns, "choose", interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        run(
            tmp_path,
            model_folders["llama"],
            memory__factors="disk",
            memory__scratch=str(tmp_path / "scratch"),
        )
    assert there[0] > 0
    assert not list((tmp_path / "scratch").rglob("*"))


def test_a_run_goes_on_with_less_memory(model_folders: dict[str, Path], tmp_path: Path) -> None:
    assert run(tmp_path, model_folders["llama"]) == 0
    assert (
        run(
            tmp_path,
            model_folders["llama"],
            "--resume",
            memory__weights="disk",
            memory__scratch=str(tmp_path),
        )
        == 0
    )


def test_weights_come_from_the_last_shot_where_that_is_local(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    before = StreamedWeights.continue_from

    def seen(store: StreamedWeights, read: Any, names: Container[str]) -> None:
        moved.append(len(list(store.kept._scratch.folder.glob("*.safetensors"))))
        before(store, read, names)
        assert not list(store.kept._scratch.folder.glob("*.safetensors"))

    monkeypatch.setattr(StreamedWeights, "continue_from", seen)
    assert run(tmp_path, model_folders["llama"], memory__weights="disk") == 0
    assert moved == [28, 28]


def test_a_job_that_cannot_fit_is_refused_before_anything_starts(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = str(tiny_spec(tmp_path, model_folders["llama"], cluster__gpus_per_worker=1))
    assert main([spec, "--dry-run", "--device-memory", "80GB"]) == 0
    assert main([spec, "--dry-run", "--device-memory", "100kB"]) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert "does not fit" in text
    assert "of device memory" in text
    assert "times that memory" in text
    assert not (tmp_path / "run").exists()


def test_what_the_spec_fixes_is_kept_and_a_contradiction_is_refused(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert (
        run(
            tmp_path,
            model_folders["llama"],
            "--dry-run",
            memory__activations="keep",
            memory__weights="disk",
        )
        == 2
    )


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_factors_come_back_from_every_store(place: Any, tmp_path: Path) -> None:
    store = FactorStore(place, torch.device("cpu"), Scratch(str(tmp_path), "run", "try", "0"))
    x = torch.randn(5, 300)
    for part in (x[:2], x[2:]):
        total = store.on_device("a.A", 300)
        total.add(part)
        store.put("a.A", total)
    expected = PackedSymmetric.zeros(300)
    for part in (x[:2], x[2:]):
        expected.add(part)
    assert torch.equal(store.get("a.A").dense(), expected.dense())
    assert "a.A" in store
    store.clear()
    assert "a.A" not in store
    assert not list(tmp_path.rglob("*.factor"))


def test_scratch_of_other_runs_is_left_alone(tmp_path: Path) -> None:
    names = list(itertools.product(("one", "two"), ("first", "second")))
    for run_name, attempt in names:
        Scratch(str(tmp_path), run_name, attempt, "0").path("x").touch()
    Scratch(str(tmp_path), "one", "third", "0").remove_earlier()
    assert sorted(path.parent.name for path in tmp_path.glob("*/*/0")) == ["first", "second"]
    assert {path.parent.parent.name for path in tmp_path.glob("*/*/0")} == {"ray_surgeon-two"}


def test_memory_that_ended_workers_still_hold_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[Any] = [DoesNotFitError("it is full"), DoesNotFitError("it is full"), "a plan"]

    def plan(*args: object) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    clock.sleep = lambda s: setattr(clock, "now", clock.now + s)
    monkeypatch.setattr(loop, "time", clock)
    found = [Resources("a", "cpu", "", Room(1e9, 1e9, 1e9, device_is_host=True))]
    workers: Any = SimpleNamespace(run_all=lambda *args: found)
    inputs: Any = SimpleNamespace(
        plan=plan, spec=SimpleNamespace(cluster=SimpleNamespace(cpus_per_worker=1))
    )
    with pytest.raises(DoesNotFitError):
        loop._plan(inputs, workers, NO_SCRATCH, 100.0)
    found_plan: Any = loop._plan(inputs, workers, NO_SCRATCH, 106.0)
    assert found_plan == "a plan"
    assert clock.now == 105.0


def test_tensors_are_read_ahead_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "ENTRIES_AHEAD", 10)
    names = ["a", "b", "c", "d", "mask"]
    begun = list[str]()
    shapes = {"a": (2, 3), "b": (2, 3), "c": (30,), "d": (1,)}

    def read(name: str) -> torch.Tensor:
        begun.append(name)
        return torch.zeros(shapes.get(name, (5,)))

    ahead = ReadAhead(read, names, shapes)
    for name, expected in zip(names, (["b", "c"], ["c"], ["d", "mask"], ["mask"], []), strict=True):
        tensor = ahead(name)
        assert tensor.shape == shapes.get(name, (5,))
        assert set(begun) <= {*names[: names.index(name) + 1], *expected}
    assert sorted(begun) == sorted(names), "once each"


def test_scratch_of_an_earlier_try_counts_as_free_and_goes(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "run")
    root = tmp_path / "scratch"
    left = Scratch(str(root), loop._key(uri), "earlier", "0-0").path("x.factor")
    left.write_bytes(bytes(5 * 2**20))
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=0))
    options = {"memory__weights": "disk", "memory__factors": "disk", "memory__scratch": str(root)}
    assert run(tmp_path, model_folders["llama"], **options, memory__limit_gib=0.001) == 2
    assert left.exists(), "a job that is refused takes nothing from another"
    assert run(tmp_path, model_folders["llama"], **options) == 0
    assert not left.exists()
    assert run(tmp_path / "full", model_folders["llama"], **options) == 2


def test_files_of_shots_are_closed_when_none_reads_them(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is removed and still mapped takes its space. Attention is never changed, and is
    in the shot that a run goes on from.
    """
    seen = dict[int, set[str]]()
    interrupted = list[int]()

    def look(measured: object, before: object, limit: object, shot: int) -> None:
        mapped = {
            line.split()[5]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if str(tmp_path) in line
        }
        seen[shot] = {
            name.rpartition("shots/")[2].partition("/")[0] for name in mapped if "/shots/" in name
        }
        if shot == 3 and not interrupted:
            interrupted.append(shot)
            raise FloatingPointError("ends here")

    monkeypatch.setattr(evaluation, "check_for_collapse", look)
    options: dict[str, Any] = {
        **GROUPS,
        "pruning__groups": ["ffn"],
        "pruning__num_shots": 5,
        "memory__weights": "disk",
    }
    options |= {"output__keep_shots": 1, "pruning__target_sparsity": 0.2}
    assert run(tmp_path, model_folders["llama"], **options) == 1
    gc.collect()  # the frames of the error hold the run that ended
    assert run(tmp_path, model_folders["llama"], "--resume", **options) == 0
    assert seen == {1: set(), 2: {"0001"}, 3: {"0002"}, 4: {"0003"}, 5: {"0004"}}, (
        "of the shot before alone"
    )


def test_a_limit_makes_weights_stream(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process itself needs 358 MiB; the largest of the rest is the step over linears."""
    assert run(tmp_path, model_folders["llama"], memory__limit_gib=1.0) == 0
    assert report_of(tmp_path / "run")["plan"]["stores"]["weights"] == "device"
    assert run(tmp_path / "small", model_folders["llama"], memory__limit_gib=0.1) == 2
    assert "memory: the job does not fit" in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "small/run").iterdir())


def test_an_export_that_does_not_fit_in_memory_is_reloaded_from_disk(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_surgeon.export import folder
    from ray_surgeon.runtime import fresh_process

    asked: list[Any] = []
    run_module = fresh_process.run_module

    def noted(module: str, request: Any) -> Any:
        asked.append(request)
        return run_module(module, request)

    monkeypatch.setattr(fresh_process, "run_module", noted)
    monkeypatch.setattr(folder, "available_bytes", lambda: 100_000)
    assert (
        run(tmp_path, model_folders["llama"], output__exports=["masked", "per_block"], **GROUPS)
        == 0
    )
    assert [request["max_memory"] for request in asked] == [50_000, 50_000]
    assert all(
        export["reload_max_logit_difference"] < 1e-3
        for export in report_of(tmp_path / "run")["exports"]
    )
