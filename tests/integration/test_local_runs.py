"""Whole runs in this process: every family, options, faults, resuming, and where the files lie."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_surgeon.report.directory import RunDirectory
from ray_surgeon.report.tables import main as compare
from ray_surgeon.runtime.passes import Measured, remember
from ray_surgeon.stages import evaluation
from ray_surgeon.stages.curvature.gather import NOTHING_BESIDE, finish_curvature, gather_curvature
from ray_surgeon.stages.prune.rows_columns import RowsColumns
from ray_surgeon.storage import files, tensor_files
from tests.conftest import CONFIGS
from tests.integration import runs
from tests.integration.runs import (
    Jobs,
    assert_same_shot,
    difference,
    kept_of,
    loaded,
    overflowing_model,
    windows,
)

LIKE_LLAMA = ("llama-biases", "mistral", "qwen2", "qwen3")
LORA = {"correction__lora_rank": 2, "calibration__held_aside": 0}
EXTENDED = {"curvature__kind": "extended_kfac"}
WANDA = runs.ELEMENT | {"pruning__method": "wanda"}
PYTHON_DOCS = windows("python-docs", 2, name="docs", max_tokens=3000)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_runs_the_whole_pipeline(family: str, job: Jobs) -> None:
    """What is removed stays removed, the rest of the export is the dense model's, and the report
    says so.
    """
    costs = {} if family in LIKE_LLAMA else runs.GREEDY
    done = job(runs.MASKED | costs, model=family, cluster__num_shards=2)
    report = done.report
    assert [shot["index"] for shot in report["shots"]] == [1, 2]
    assert [shot["target_sparsity"] for shot in report["shots"]] == pytest.approx([0.15, 0.3])
    for shot in report["shots"]:
        assert 0 <= shot["sparsity"] - shot["target_sparsity"] < 0.02
        assert set(shot["perplexity"]) == {"docs", "again"}
        assert {"curvature", "costs", "threshold", "update", "evaluation"} <= set(
            shot["cpu_seconds"]
        ) & set(shot["seconds"])
        assert shot["peak_rss_bytes"] > 0
        assert shot["damping_used"] == []
    per_shot = ["curvature", "costs", "threshold", "update", "evaluation", "commit"]
    steps = [event["step"] for event in done.events]
    assert steps[:15] == ["plan", "load", "evaluation", *per_shot * 2]
    assert (done.uri / "spec.yaml").exists()

    first, second = (kept_of(done.tensors(shot), family) for shot in (1, 2))
    assert all((second[name] <= first[name]).all() for name in first), "something came back"
    linears = report["linears"]
    removed = sum(s["rows"] * s["columns"] - s["rows_kept"] * s["columns_kept"] for s in linears)
    assert removed / sum(s["rows"] * s["columns"] for s in linears) == pytest.approx(
        report["shots"][-1]["sparsity"]
    )
    model = AutoModelForCausalLM.from_pretrained(done.uri / "export/masked")
    dense = AutoModelForCausalLM.from_pretrained(job.models[family]).state_dict()
    pruned = model.state_dict()
    expected = dense | {k: v for k, v in done.tensors(2).items() if k in dense}
    assert all(torch.equal(pruned[name], expected[name]) for name in dense)
    assert report["parameters"]["before"] == sum(p.numel() for p in model.parameters())
    assert (
        sum(int(pruned[f"{s['name']}.weight"].count_nonzero()) for s in linears)
        <= report["parameters"]["nonzero_in_pruned_linears"]
    )
    (export,) = report["exports"]
    assert export["reload_max_logit_difference"] < 1e-4
    assert {"fingerprints", "environment", "spec", "dense"} <= set(report)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", runs.ELEMENT),
        ("opt", runs.ELEMENT | EXTENDED | LORA),
        ("gpt2", runs.N_M),
        ("gemma3", runs.N_M),
    ],
)
def test_elements_and_groups(family: str, options: dict[str, Any], job: Jobs) -> None:
    """Two shots to 40 %, on two shards, with and without replicas, resumed after the first: zeros
    stay, patterns hold.
    """
    target = {"pruning__target_sparsity": 0.4, "cluster__num_shards": 2}
    options = options | target | {"model": family}
    one = job(options, folder="one")
    two = job(options, folder="two", cluster__num_replicas=2)
    for shot in one.shots:
        assert shot["sparsity"] == pytest.approx(shot["target_sparsity"], abs=1e-3)
        assert difference(one.uri, two.uri, shot["index"]) < runs.MOST_BY_ORDER_OF_SUMS
        assert 0 <= shot["update_residual"]["median"] <= shot["update_residual"]["max"]
    first, second = (kept_of(one.tensors(shot), family) for shot in (1, 2))
    for name, kept in second.items():
        assert not (kept & ~first[name]).any(), "a removed element came back"
        if options["pruning__structure"] == "n_m":
            groups = kept[:, : kept.shape[1] // 4 * 4].reshape(len(kept), -1, 4).sum(dim=2)
            assert set(groups.unique().tolist()) <= {2, 4}
    shutil.copytree(one.uri, job.folder / "before")
    shutil.rmtree(one.uri / "shots/0002")
    job(options, "--resume", folder="one")
    assert_same_shot(one.uri, job.folder / "before", 2)


def test_a_resumed_run_has_the_same_bits(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another number of shards."""
    options = {"pruning__num_shots": 3, "cluster__num_shards": 2}
    whole = job(options, folder="whole")
    original = RunDirectory.add_event

    def stop(self: Any, event: dict[str, Any]) -> None:
        original(self, event)
        if event["shot"] == 2 and event["step"] == "evaluation":
            raise RuntimeError("the machine went away")

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "add_event", stop)
        job(options, folder="cut", code=1)
    assert RunDirectory(str(job.folder / "cut/run")).committed_indices() == [1]
    job(options, folder="cut", code=2)  # nothing is overwritten without --resume
    cut = job(options | {"cluster__num_shards": 3}, "--resume", folder="cut")
    for shot in (1, 2, 3):
        assert_same_shot(whole.uri, cut.uri, shot)
    assert [s["perplexity"] for s in cut.shots] == [s["perplexity"] for s in whole.shots]
    assert cut.report["dense"] == whole.report["dense"]


def each(base: dict[str, Any], section: str, **values: Sequence[Any]) -> list[dict[str, Any]]:
    """Return settings with one value more than a base."""
    return [
        base | {f"{section}__{option}": value}
        for option, of_option in values.items()
        for value in of_option
    ]


SOLVERS: list[dict[str, Any]] = [{"solver": "single"}, {"solver": "none"}]
SOLVERS += [
    {"solver": "conjugate_gradients", option: value}
    for option, value in (("num_iterations", 3), ("precision", "float32"), ("tolerance", 0.5))
]
DAMPING = [{"a": 0.5}, {"g": 0.5}, "auto"]
HALF = {"pruning__target_sparsity": 0.5}
UNPLACED: dict[str, Any] = {"calibration__stride": None}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"pruning": {"target_sparsity": 0.3, "sparsities": [0.25, 0.3]}},
    *each({}, "pruning", structure=["rows", "columns"], rank_by=["cost"], num_shots=[2]),
    *each({}, "pruning", costs=["obd", "greedy"], update=["single", "none"]),
    *each({"pruning__num_shots": 2}, "pruning", schedule=["geometric"]),
    *each({}, "curvature", kind=["activations", "identity"], damping=DAMPING, fisher=["sampled"]),
    *each({"curvature__fisher": "sampled"}, "curvature", seed=[7]),
    *each({}, "calibration", held_aside=[0.3], num_sequences=[5], stride=[None]),
    *each(UNPLACED, "calibration", seed=[3], max_tokens=[3000]),
    *each({}, "model", dtype=["bfloat16"]),
    runs.ELEMENT,
    *each(runs.ELEMENT, "pruning", costs=["obd"], update=SOLVERS),
    runs.N_M,
    *each(runs.N_M, "pruning", n_m=[[4, 8]], costs=["obs_sum"]),
    EXTENDED,
    *each(EXTENDED, "curvature", num_kronecker_terms=[3], num_power_iterations=[3]),
    runs.SPARSEGPT,
    *each(runs.SPARSEGPT, "pruning", damping=[0.5]),
    runs.SPARSEGPT | runs.N_M | HALF,
    WANDA,
    *each(WANDA | runs.N_M | HALF, "pruning", n_m=[[2, 4], [4, 8]]),
    LORA,
    *each(LORA, "correction", loss=["cross_entropy"], lora_rank=[3], learning_rate=[1e-2]),
    *each(LORA, "correction", steps_per_shot=[2], sequences_per_step=[2], final_epochs=[1]),
    *each(LORA, "correction", seed=[1]),
]


def test_options_do_something(job: Jobs) -> None:
    """Each option changes the weights of the result."""
    results = dict[tuple[float, ...], dict[str, Any]]()
    for options in OPTIONS:
        shots = {} if "pruning" in options else runs.ONE
        done = job({"evaluation": [PYTHON_DOCS]} | shots | options, folder=str(len(results)))
        tensors = done.tensors(len(done.shots))
        weights = [tensors[name] for name in sorted(tensors) if name.endswith("weight")]
        result = tuple(float(weight.double().sum()) for weight in weights)
        assert result not in results, f"{options} is as {results[result]}"
        results[result] = options


def test_bfloat16_and_a_sentencepiece_file_stay(job: Jobs) -> None:
    """In the export, as they are. Llama-2 has its tokenizer as a binary file too."""
    model = Path(shutil.copytree(job.models["llama"], job.folder / "model"))
    (model / "tokenizer.model").write_bytes(b"\xff\xfe\x00binary")
    done = job(runs.MASKED, model=model, model__dtype="bfloat16", cluster__num_shards=2)
    export = done.uri / "export/masked"
    assert {t.dtype for name, t in done.tensors(2).items() if name.endswith("weight")} == {
        torch.bfloat16
    }
    assert json.loads((export / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(export, dtype="auto").dtype == torch.bfloat16
    assert (export / "tokenizer.model").read_bytes() == b"\xff\xfe\x00binary"


@pytest.mark.parametrize(("kind", "num_shards"), [("kfac", 3), ("activations", 1)])
def test_overflow_names_the_linear(kind: str, num_shards: int, job: Jobs) -> None:
    """It stops the shot. Only the pass itself can tell."""
    broken = overflowing_model(job.models["llama"], job.folder / "model")
    options = {"model": broken, "cluster__num_shards": num_shards}
    with pytest.raises(
        FloatingPointError, match=r"inputs are not finite from model\.layers\.1\.mlp\.down_proj on"
    ):
        gather_curvature(loaded(broken, num_shards), job.inputs(options).calibration, kind)
    assert "not a number" in job(options, code=1).error


def test_a_collapse_keeps_the_shots_before(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops the run. A tiny model of random weights does not become worse, so its perplexity is
    made up.
    """
    values = iter([19.0, 21.0])
    monkeypatch.setattr(
        evaluation, "measure", lambda cluster, text, windows: Measured(next(values), 0.1)
    )
    monkeypatch.setattr(
        evaluation,
        "remember",
        lambda cluster, text, windows: remember(cluster, text, windows) and 10.0,
    )
    stops = {"texts": [PYTHON_DOCS], "stop_above": 2}
    done = job({"pruning__num_shots": 3, "evaluation": stops}, code=1)
    assert (
        "failed: after shot 2 the perplexity on docs is 21, 2.1 times the dense model's; "
        "evaluation.stop_above allows 2" in done.error
    )
    assert [shot["index"] for shot in done.shots] == [1]
    assert not (done.uri / "shots/0002/manifest.json").exists()


def test_a_dry_run_says_what_would_be_done(job: Jobs) -> None:
    done = job({"cluster__num_shards": 2}, "--dry-run", "--set", "pruning.num_shots=7")
    assert "7 shots to 30.0%, 240 calibration tokens each" in done.out
    assert "0-" in done.out
    assert not done.uri.exists()


def test_leftovers_of_a_killed_process_go(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a shot from before it was killed, and a file that it was writing; only the last
    shots keep theirs.
    """
    options = {"pruning__num_shots": 5, "output__keep_shots": 2}
    folder = job.folder / "run"
    with monkeypatch.context() as patched:
        patched.setattr(
            RunDirectory,
            "drop_tensors",
            lambda *_: sys.exit("killed") if (folder / "shots/0003").exists() else None,
        )
        with pytest.raises(SystemExit):
            job(options)
    (folder / ".writing-x").mkdir()
    (folder / ".writing-x/file").write_text("half")
    done = job(options, "--resume")
    names = [files.list_names(str(folder / f"shots/{shot:04d}")) for shot in range(1, 6)]
    assert names[:3] == [["manifest.json"]] * 3
    assert [len(of_shot) for of_shot in names[3:]] == [3, 3]
    assert [shot["index"] for shot in done.shots] == [1, 2, 3, 4, 5]
    assert not (folder / ".writing-x").exists()


def test_a_resumed_run_keeps_its_tasks(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those it began with: the dense model's scores are from then."""
    monkeypatch.setattr("ray_surgeon.stages.evaluation.check_tasks", lambda options: None)
    exported = {"output__exports": ["per_block"], "evaluation": {"texts": [PYTHON_DOCS]}}
    options = runs.GROUPS | runs.ONE | exported
    done = job(options)
    asked = {"texts": [PYTHON_DOCS], "tasks": {"names": ["piqa"], "limit": 3}}
    refused = job(options | {"evaluation": asked}, "--resume", code=2)
    assert "holds another run: different tasks (evaluation.tasks" in refused.error
    record = json.loads((done.uri / "run.json").read_text())
    record["fingerprints"]["tasks"] = {"names": ["piqa"]}
    (done.uri / "run.json").write_text(json.dumps(record))
    job(options, "--resume")  # without tasks that failed


def test_commits_without_appending_events(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event of a commit is kept, also if the process is killed then."""
    choose = RowsColumns.choose
    there = list[str]()

    def steps() -> list[str]:
        lines = files.read_text("memory://stopped/events.jsonl").splitlines()
        return [json.loads(line)["step"] for line in lines]

    def stop(method: RowsColumns, cluster: Any, scores: Any, shot: int) -> Any:
        if shot == 2:
            there.extend(steps())
            raise KeyboardInterrupt
        return choose(method, cluster, scores, shot)

    monkeypatch.setattr(RowsColumns, "choose", stop)
    job({"output__uri": "memory://stopped"}, code=130)
    assert there[-1] == "commit"
    assert steps()[-3:] == ["commit", "curvature", "costs"]


def test_a_gap_in_the_shots_is_repeated(job: Jobs) -> None:
    """In an empty folder, whatever a process that was killed left there."""
    options = {"pruning__num_shots": 3}
    done = job(options)
    shutil.copytree(done.uri, job.folder / "before")
    folder = done.uri / "shots/0002"
    names = sorted(path.name for path in folder.iterdir())
    (folder / "manifest.json").unlink()
    (folder / "weights-00-of-03.safetensors").touch()
    (folder / ".writing-abc").mkdir()
    (folder / ".writing-abc/file").write_text("half")
    again = job(options, "--resume")
    assert_same_shot(job.folder / "before", again.uri, 3)
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [shot["index"] for shot in again.shots] == [1, 2, 3]


def test_replica_that_fails_is_named_and_not_waited_for(model_folders: dict[str, Path]) -> None:
    cluster = loaded(model_folders["llama"], 1, 2)
    with pytest.raises(AssertionError):
        cluster.run_all(finish_curvature, NOTHING_BESIDE)


def test_magnitude_is_identity_curvature_without_updates(job: Jobs) -> None:
    options = {"curvature__kind": "identity", "pruning__costs": "obd"}
    half = runs.ELEMENT | runs.ONE | {"pruning__target_sparsity": 0.5}
    pruned = job(half | options, pruning__update={"solver": "none"}).tensors(1)
    dense = AutoModelForCausalLM.from_pretrained(job.models["llama"]).state_dict()
    names = [name for name in pruned if name.endswith(".weight")]
    size = torch.cat([dense[name].flatten().abs() for name in names])
    border = float(size.sort().values[len(size) // 2 - 1])
    for name in names:
        assert torch.equal(pruned[name], dense[name] * (dense[name].abs() > border))


def test_runs_are_compared_in_one_table(
    job: Jobs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = job.folder
    monkeypatch.chdir(folder)  # where comparison.html goes
    one = job({"name": "one", "pruning__num_shots": 1}, folder="one")
    shutil.copytree(one.uri, folder / "two/run")
    (folder / "two/run/report.json").write_text(
        json.dumps(one.report | {"spec": one.report["spec"] | {"name": "two"}})
    )

    def compared(*arguments: str, code: int = 0) -> str:
        assert compare([*arguments]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    runs = [str(folder / "one/run"), str(folder / "two/run")]
    compared(*runs, "--plot", "plot.svg")
    assert "<svg" in (folder / "plot.svg").read_text()
    table = compared(*runs, "--plot", "plot.png", "--text", "again")
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    lines = [line for line in table.splitlines() if "rows_columns" in line]
    assert len(lines) == 4
    assert sum("dense" in line for line in lines) == 2
    compared(*runs, "--plot", "plot.xyz", code=2)
    absent = compared(*runs, "--plot", "x.png", "--text", "absent", code=2)
    assert "they have docs, again" in absent
    assert "report.json" in compared("absent", code=2)
    (folder / "report.json").write_text('{"dense": 3}')
    assert "report.json is no report of this program" in compared(str(folder), code=2)


def test_model_text_and_run_on_s3(job: Jobs, s3: None, cache: Path) -> None:
    """Everything in a bucket: two shots, a resume after the first, and an export that reloads;
    equal to the run on disk.
    """
    filesystem, _ = files.open_filesystem("s3://bucket/x")
    filesystem.put(f"{job.models['llama']}/", "bucket/models/llama/", recursive=True)
    expected = job({"cluster__num_shards": 2}, folder="disk").tensors(2)
    filesystem.put_file(str(job.folder / "disk/text.txt"), "bucket/text.txt")
    options = runs.MASKED | {
        "cluster__num_shards": 2,
        "model__source": "s3://bucket/models/llama",
        "output__uri": "s3://bucket/run",
        "calibration__source": "s3://bucket/text.txt",
    }
    for arguments in ((), ("--resume",)):
        job(options, *arguments, folder="s3")
        for shard in (1, 2):
            found = tensor_files.read(f"s3://bucket/run/shots/0002/shard-{shard:04d}.safetensors")
            assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        filesystem.rm("bucket/run/shots/0002", recursive=True)
    assert {"spec.yaml", "run.json", "events.jsonl", "report.json", "export"} <= set(
        files.list_names("s3://bucket/run")
    )
    stopping = {"texts": [PYTHON_DOCS], "stop_above": 1.00001}
    stopped = {"output__uri": "s3://bucket/stopped", "evaluation": stopping}
    job(options | stopped, folder="s3", code=1)
    events = files.read_text("s3://bucket/stopped/events.jsonl").splitlines()
    assert "evaluation" in json.loads(events[-1])["step"], "what ended it"
