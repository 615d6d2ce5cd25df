"""Whole runs in this process: families, options, faults, resuming, and files."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_surgeon.checkpointing import RunDirectory
from ray_surgeon.distributed.passes import Measured, remember
from ray_surgeon.evaluation import texts as evaluation
from ray_surgeon.factors.collector import (
    NOTHING_BESIDE,
    WantedFactors,
    finish_curvature,
    gather_curvature,
)
from ray_surgeon.report.display import main as compare
from ray_surgeon.report.events import Steps
from tests.conftest import CONFIGS
from tests.integration import runs
from tests.integration.runs import (
    Done,
    Jobs,
    assert_same_shot,
    loaded,
    overflowing_model,
    windows,
)

GREEDY_FAMILIES = ("gpt2", "llama", "opt")
FAMILIES = [
    pytest.param(
        family,
        marks=[] if family in {*GREEDY_FAMILIES, "gemma3", "phi3"} else pytest.mark.slow,
    )
    for family in sorted(CONFIGS)
]
LORA = runs.LORA | {"calibration__held_aside": 0}
EXTENDED = {"curvature__kind": "extended_kfac"}
STEPS = ["curvature", "costs", "threshold", "update", "recovery", "evaluation", "commit"]
WANDA = runs.ELEMENT | {"pruning__method": "wanda"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_the_whole_pipeline(family: str, job: Jobs) -> None:
    """Removed rows and columns stay removed, all other tensors of the export equal the dense
    model's, and the report agrees with the masks. Runs include corrections.
    """
    costs = runs.GREEDY if family in GREEDY_FAMILIES else EXTENDED
    done = job(runs.MASKED | LORA | costs, model=family, cluster__num_shards=2)
    report = done.report
    assert [shot["index"] for shot in report["shots"]] == [1, 2]
    assert [shot["target_sparsity"] for shot in report["shots"]] == pytest.approx(
        [0.15, 0.3]
    )
    for shot in report["shots"]:
        assert 0 <= shot["sparsity"] - shot["target_sparsity"] < 0.02
        assert set(shot["perplexity"]) == {"docs", "again"}
        assert set(STEPS[:-1]) <= set(shot["cpu_seconds"]) & set(shot["seconds"])
        assert shot["peak_rss_bytes"] > 0
        assert shot["damping_used"] == []
    steps = [event["step"] for event in done.events]
    assert steps[:17] == ["plan", "load", "evaluation", *STEPS * 2]
    assert (done.uri / "spec.yaml").exists()

    first, second = (runs.kept_of(done.tensors(shot), family) for shot in (1, 2))
    assert all((second[name] <= first[name]).all() for name in first), (
        "a removed row or column was restored"
    )
    linears = report["linears"]
    removed = sum(
        s["rows"] * s["columns"] - s["rows_kept"] * s["columns_kept"] for s in linears
    )
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


def each(
    base: dict[str, Any], section: str, **values: Sequence[Any]
) -> list[dict[str, Any]]:
    """Return a copy of the base settings for each value of each option."""
    return [
        base | {f"{section}__{option}": value}
        for option, of_option in values.items()
        for value in of_option
    ]


SOLVERS: list[dict[str, Any]] = [{"solver": "single"}, {"solver": "none"}]
SOLVERS += [
    {"solver": "conjugate_gradients", option: value}
    for option, value in (
        ("num_iterations", 3),
        ("precision", "float32"),
        ("tolerance", 0.5),
    )
]
DAMPING = [{"a": 0.5}, {"g": 0.5}, "auto"]
UNPLACED: dict[str, Any] = {"calibration__stride": None}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"pruning": {"target_sparsity": 0.3, "sparsities": [0.25, 0.3]}},
    *each({}, "pruning", structure=["rows", "columns"], rank_by=["cost"], num_shots=[2]),
    *each({}, "pruning", costs=["obd", "greedy"], update=["single", "none"]),
    *each(
        {},
        "curvature",
        kind=["activations", "identity"],
        damping=DAMPING,
        fisher=["sampled"],
    ),
    *each({"curvature__fisher": "sampled"}, "curvature", seed=[7]),
    *each({}, "calibration", held_aside=[0.3], num_sequences=[5], stride=[None]),
    *each(UNPLACED, "calibration", seed=[3], max_tokens=[3000]),
    runs.ELEMENT,
    *each(runs.ELEMENT, "pruning", costs=["obd"], update=SOLVERS),
    runs.N_M,
    *each(runs.N_M, "pruning", n_m=[[4, 8]], costs=["obs_sum"]),
    EXTENDED,
    *each(EXTENDED, "curvature", num_kronecker_terms=[3], num_power_iterations=[3]),
    runs.SPARSEGPT,
    *each(runs.SPARSEGPT, "pruning", damping=[0.5]),
    WANDA,
    LORA,
    *each(LORA, "recovery", loss=["cross_entropy"], rank=[3], learning_rate=[1e-2]),
    *each(LORA, "recovery", num_tokens=[200], sequences_per_step=[2]),
    *each(LORA, "recovery", seed=[1]),
]


def test_every_option_changes_the_weights(job: Jobs) -> None:
    """The model has one block."""
    config = runs.config_like("llama", num_hidden_layers=1)
    model = runs.new_model(config, job.folder / "model", job.models["llama"])
    results = dict[tuple[float, ...], dict[str, Any]]()
    text = shutil.copy(__file__, job.folder / "docs.txt")
    evaluated = {"evaluation": [windows(text, 2, name="docs")]}
    for options in OPTIONS:
        shots = {} if "pruning" in options else runs.ONE
        done = job(evaluated | shots | options, model=model, folder=str(len(results)))
        tensors = done.tensors(len(done.shots))
        weights = [tensors[name] for name in sorted(tensors) if name.endswith("weight")]
        result = tuple(float(weight.double().sum()) for weight in weights)
        assert result not in results, f"{options} is as {results[result]}"
        results[result] = options


@pytest.mark.parametrize(("kind", "num_shards"), [("kfac", 3), ("activations", 1)])
def test_overflow_names_the_linear(kind: str, num_shards: int, job: Jobs) -> None:
    """The pass itself finds the overflow and stops the shot."""
    broken = overflowing_model(job.models["llama"], job.folder / "model")
    options = {"model": broken, "cluster__num_shards": num_shards}
    with pytest.raises(
        FloatingPointError,
        match=r"inputs are not finite from model\.layers\.1\.mlp\.down_proj on",
    ):
        gather_curvature(
            loaded(broken, num_shards),
            job.inputs(options).calibration,
            WantedFactors(kind),
        )
    assert "not a number" in job(options, code=1).error


def test_collapse_stops_the_run_and_keeps_earlier_shots(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The perplexity is replaced, since pruning does not make a random model worse."""
    values = iter([19.0, 21.0])
    monkeypatch.setattr(evaluation, "measure", lambda *_: Measured(next(values), 0.1))
    monkeypatch.setattr(evaluation, "remember", lambda *given: remember(*given) and 10.0)
    text = windows(job.folder / "text.txt", name="docs")
    options = {"pruning__num_shots": 3, "evaluation": {"texts": [text], "stop_above": 2}}
    done = job(options, code=1)
    assert (
        "failed: after round 2 the perplexity on docs is 21, 2.1 times the dense"
        in done.error
    )
    assert "evaluation.stop_above allows 2" in done.error
    assert [shot["index"] for shot in done.shots] == [1]
    assert not (done.uri / "shots/0002/manifest.json").exists()


def test_dry_run_prints_the_plan(job: Jobs) -> None:
    done = job({"cluster__num_shards": 2}, "--dry-run", "--set", "pruning.num_shots=7")
    said = "7 pruning rounds (shots of the paper) to 30.0%, 240 calibration tokens each"
    assert said in done.out
    defaults, proof, time, memory, places = done.out.splitlines()[1:]
    assert defaults.startswith("version 2 keeps its defaults: dtype float32")
    assert proof.startswith("proved: ")
    assert time.startswith("time: at least ")
    assert "(7 pruning rounds, 2 workers on cpu, " in time
    assert memory.startswith("peak of a worker: 0.4 GiB of memory (in ")
    assert places.startswith("2 shards, 1 replica; weights on the device")
    everything = job({"cluster__num_shards": 2}, "--dry-run", "--verbose").out
    assert "moved_bytes" in everything
    assert "0-1" in everything
    assert not done.uri.exists()


def test_plan_names_layers_that_stay_whole(job: Jobs) -> None:
    done = job({"model": "lfm2"}, "--dry-run")
    assert done.out.splitlines()[-1] == "not pruned: conv, in 2 of 4 blocks"


def test_announced_steps_match_executed_steps(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a method without curvature, and of a run that resumes."""
    announced = list[tuple[str, int]]()

    def announce(steps: Steps, to_come: Iterable[tuple[str, int]]) -> None:
        announced[:] = to_come
        steps.to_come = tuple(announced)

    def steps_of(done: Done) -> list[tuple[str, int]]:
        left_out = ("plan", "check")
        steps = [(event["step"], event["shot"]) for event in done.events]
        return [step for step in steps if step[0] not in left_out]

    monkeypatch.setattr(Steps, "announce", announce)
    answers = {"evaluation__generation": {"num_prompts": 2, "max_new_tokens": 4}}
    evaluation = {
        "evaluation": {"texts": [windows(job.folder / "whole/text.txt", name="t")]}
    }
    reconstructed = runs.GROUPS | {"pruning__reconstruction": {}}
    whole = evaluation | answers | reconstructed | runs.LORA
    done = job(whole, folder="whole")
    before = steps_of(done)
    assert before == announced
    assert {"reconstruction", "recovery", "answers"} <= {name for name, _ in before}
    shutil.rmtree(done.uri / "shots/0002")
    (done.uri / "report.json").unlink()
    again = job(whole, "--resume", folder="whole")
    assert steps_of(again)[len(before) :] == announced
    assert announced[:2] == [("load", 1), ("answers", 0)]
    assert steps_of(job(WANDA | runs.ONE | runs.MASKED, folder="wanda")) == announced


def test_files_of_a_killed_process_are_removed(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of incomplete shots and partly written files are removed, and only the last shots
    keep their tensors.
    """
    options = {"pruning__num_shots": 4, "output__keep_shots": 2}
    shots = job.folder / "run/shots"

    def drop(*_: Any) -> None:
        if (shots / "0003").exists():
            sys.exit("killed")

    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "drop_tensors", drop)
        with pytest.raises(SystemExit):
            job(options)
    half = shots.parent / ".writing-x"
    half.mkdir()
    (half / "file").write_text("half")
    done = job(options, "--resume")
    counts = [len(list((shots / f"{shot:04d}").iterdir())) for shot in (1, 2, 3, 4)]
    assert counts == [1, 1, 3, 3], "manifests are kept"
    assert [shot["index"] for shot in done.shots] == [1, 2, 3, 4]
    assert not half.exists()


def test_resumed_run_keeps_its_tasks(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks cannot change, because the dense model's scores are from the start of the run."""
    monkeypatch.setattr("ray_surgeon.export.tasks.check_tasks", lambda options: None)
    text = windows(job.folder / "text.txt", name="docs")
    options = runs.MASKED | runs.ONE | {"evaluation": {"texts": [text]}}
    done = job(options)
    asked = {"evaluation": {"texts": [text], "tasks": {"names": ["piqa"], "limit": 3}}}
    refused = job(options | asked, "--resume", code=2)
    assert "holds another run: different tasks (evaluation.tasks" in refused.error
    record = json.loads((done.uri / "run.json").read_text())
    record["fingerprints"]["tasks"] = {"names": ["piqa"]}
    (done.uri / "run.json").write_text(json.dumps(record))
    job(options, "--resume")  # tasks that failed are not repeated


def test_missing_shot_is_repeated(job: Jobs) -> None:
    """Files of a killed process in the folder of the shot are removed first."""
    options = {"pruning__num_shots": 3}
    done = job(options)
    shutil.copytree(done.uri, job.folder / "before")
    folder = done.uri / "shots/0002"
    names = sorted(path.name for path in folder.iterdir())
    (folder / "manifest.json").unlink()
    (folder / "weights-00-of-03.safetensors").touch()
    again = job(options, "--resume")
    assert_same_shot(job.folder / "before", again.uri, 3)
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [shot["index"] for shot in again.shots] == [1, 2, 3]


def test_failing_replica_raises_instead_of_blocking(
    model_folders: dict[str, Path],
) -> None:
    cluster = loaded(model_folders["llama"], 1, 2)
    with pytest.raises(AssertionError):
        cluster.run_all(finish_curvature, NOTHING_BESIDE)


def test_identity_curvature_without_updates_is_magnitude_pruning(job: Jobs) -> None:
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
    monkeypatch.chdir(folder)
    one = job(runs.ONE, name="one", folder="one")
    shutil.copytree(one.uri, folder / "two/run")
    spec = one.report["spec"] | {"name": "two"}
    (folder / "two/run/report.json").write_text(json.dumps(one.report | {"spec": spec}))
    both = [str(folder / name / "run") for name in ("one", "two")]
    there = set(folder.iterdir())
    assert compare(both) == 0
    assert set(folder.iterdir()) == there, "files are written if asked"
    capsys.readouterr()
    assert compare([*both, "--plot", "plot.png", "--text", "again"]) == 0
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    lines = [
        line for line in capsys.readouterr().out.splitlines() if "rows_columns" in line
    ]
    assert len(lines) == 4
    assert sum("dense" in line for line in lines) == 2
    (folder / "report.json").write_text('{"dense": 3}')
    for arguments, said in (
        ((*both, "--plot", "plot.xyz"), "xyz"),
        ((*both, "--plot", "x.png", "--text", "absent"), "they have docs, again"),
        (("absent",), "report.json"),
        ((str(folder),), "report.json is no report of this program"),
    ):
        assert compare(arguments) == 2
        assert said in capsys.readouterr().err
