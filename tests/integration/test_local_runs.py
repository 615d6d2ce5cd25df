from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_surgeon.report.directory import RunDirectory
from ray_surgeon.report.tables import main as compare
from ray_surgeon.run.inputs import check
from ray_surgeon.runtime.passes import Measured, remember
from ray_surgeon.spec.parsing import parse_spec
from ray_surgeon.stages import evaluation
from ray_surgeon.stages.curvature.gather import finish_curvature, gather_curvature
from ray_surgeon.stages.prune.rows_columns import RowsColumns
from ray_surgeon.storage import files, tensor_files
from tests.conftest import CONFIGS
from tests.integration.runs import (
    MOST_BY_ORDER_OF_SUMS,
    assert_same_shot,
    difference,
    loaded,
    overflowing_model,
    report_of,
    run,
    tensors_of_shot,
    tiny_spec,
)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_runs_the_whole_pipeline(
    family: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert (
        run(tmp_path, model_folders[family], cluster__num_shards=2, output__exports=["masked"]) == 0
    )
    report = report_of(tmp_path / "run")
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
    linears = report["linears"]
    removed = sum(s["rows"] * s["columns"] - s["rows_kept"] * s["columns_kept"] for s in linears)
    assert removed / sum(s["rows"] * s["columns"] for s in linears) == pytest.approx(
        report["shots"][-1]["sparsity"]
    )
    parameters = report["parameters"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/masked")
    assert parameters["before"] == sum(p.numel() for p in model.parameters())
    assert (
        sum(int(model.get_parameter(f"{s['name']}.weight").count_nonzero()) for s in linears)
        <= parameters["nonzero_in_pruned_linears"]
    )
    (export,) = report["exports"]
    assert export["reload_max_logit_difference"] < 1e-4
    assert {"fingerprints", "environment", "spec", "dense"} <= set(report)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_removed_structures_stay_removed_and_the_rest_is_the_models(
    family: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert run(tmp_path, model_folders[family], output__exports=["masked"]) == 0
    first, second = (tensors_of_shot(tmp_path / "run", shot) for shot in (1, 2))
    masks = [name for name in second if name.endswith(".rows")]
    for name in masks:
        linear = name.removesuffix(".rows")
        rows = second[name]
        columns = second[f"{linear}.columns"]
        W = second[f"{linear}.weight"]
        assert not W[~rows].any()
        assert not W[:, ~columns[: W.shape[1]]].any()
        assert (rows <= first[name]).all(), "a removed row came back"
        assert (columns <= first[f"{linear}.columns"]).all(), "a removed column came back"
        if f"{linear}.bias" in second:
            assert columns[-1], "the bias is no column that can go"
            assert not second[f"{linear}.bias"][~rows].any()
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/masked").state_dict()
    dense = AutoModelForCausalLM.from_pretrained(model_folders[family]).state_dict()
    for name, tensor in dense.items():
        expected = second.get(name, tensor)
        assert torch.equal(pruned[name], expected), name


@pytest.mark.parametrize("family", ["llama", "opt-projections"])
def test_any_number_of_shards_gives_the_same_bits(
    family: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    for num_shards in (1, 2, 3):
        assert (
            run(tmp_path / str(num_shards), model_folders[family], cluster__num_shards=num_shards)
            == 0
        )
    for num_shards in (2, 3):
        for shot in (1, 2):
            assert_same_shot(tmp_path / "1/run", tmp_path / f"{num_shards}/run", shot)


def test_replicas_give_the_same_model_up_to_the_order_of_sums(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    for num_replicas in (1, 2, 3):
        assert (
            run(
                tmp_path / str(num_replicas),
                model_folders["llama"],
                cluster__num_replicas=num_replicas,
            )
            == 0
        )
    for num_replicas in (2, 3):
        assert (
            difference(tmp_path / "1/run", tmp_path / f"{num_replicas}/run", 2)
            < MOST_BY_ORDER_OF_SUMS
        )


def test_factors_of_replicas_are_those_of_one(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    inputs = check(parse_spec(tiny_spec(tmp_path, model_folders["llama"]).read_text()))
    factors = []
    for num_replicas in (1, 2, 3):
        cluster = loaded(model_folders["llama"], 2, num_replicas)
        gather_curvature(cluster, inputs.calibration, "kfac")
        owned = {
            name: w.shard.factors(name) for w in cluster.workers.values() for name in w.owned()
        }
        assert len(owned) == 4 * 7
        factors.append(owned)
    for others in factors[1:]:
        for name, one in factors[0].items():
            other = others[name]
            assert other.num_tokens == one.num_tokens == inputs.calibration.size
            for a, b in ((one.A, other.A), (one.G, other.G)):
                assert float((a.flat - b.flat).norm() / a.flat.norm()) < 1e-5


class MachineGoneError(RuntimeError):
    pass


@pytest.mark.parametrize("stop_at", ["costs", "evaluation"])
def test_resumed_run_ends_with_the_same_bits(
    stop_at: str, model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"pruning__num_shots": 3, "cluster__num_shards": 2}
    assert run(tmp_path / "whole", model_folders["llama"], **options) == 0

    original = RunDirectory.add_event

    def stop(self: Any, event: dict[str, Any]) -> None:
        original(self, event)
        if event["shot"] == 2 and event["step"] == stop_at:
            raise MachineGoneError("the machine went away")

    monkeypatch.setattr(RunDirectory, "add_event", stop)
    assert run(tmp_path / "cut", model_folders["llama"], **options) == 1
    monkeypatch.undo()
    assert files.exists(str(tmp_path / "cut/run/shots/0001/manifest.json"))
    assert not files.exists(str(tmp_path / "cut/run/shots/0002/manifest.json"))
    assert run(tmp_path / "cut", model_folders["llama"], **options) == 2, (
        "without --resume nothing is overwritten"
    )
    assert (
        run(
            tmp_path / "cut",
            model_folders["llama"],
            "--resume",
            **{**options, "cluster__num_shards": 3},
        )
        == 0
    )
    for shot in (1, 2, 3):
        assert_same_shot(tmp_path / "whole/run", tmp_path / "cut/run", shot)
    whole = report_of(tmp_path / "whole/run")
    cut = report_of(tmp_path / "cut/run")
    assert [s["perplexity"] for s in cut["shots"]] == [s["perplexity"] for s in whole["shots"]]
    assert cut["dense"] == whole["dense"]


EVALUATION = [{"name": "docs", "source": "python-docs", "num_sequences": 2, "sequence_length": 40}]


def test_options_do_something(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Each option changes the weights of the result."""
    element = {"pruning__structure": "element"}
    cg = {"solver": "conjugate_gradients"}
    extended = {"curvature__kind": "extended_kfac"}
    sparsegpt, wanda = (
        {"pruning__structure": "element", "pruning__method": method}
        for method in ("sparsegpt", "wanda")
    )
    changes: dict[str, Any] = {
        "default": {},
        "structure": {"pruning__structure": "rows"},
        "schedule": {"pruning__num_shots": 2, "pruning__schedule": "geometric"},
        "sparsities": {"pruning": {"target_sparsity": 0.3, "sparsities": [0.25, 0.3]}},
        "num_shots": {"pruning__num_shots": 2},
        "structure-columns": {"pruning__structure": "columns"},
        "rank_by": {"pruning__rank_by": "cost"},
        "costs-obd": {"pruning__costs": "obd"},
        "costs-obs": {"pruning__costs": "obs"},
        "update-single": {"pruning__update": "single"},
        "update-none": {"pruning__update": "none"},
        "kind-activations": {"curvature__kind": "activations"},
        "kind-identity": {"curvature__kind": "identity"},
        "element": element,
        "element-obd": {**element, "pruning__costs": "obd"},
        "element-single": {**element, "pruning__update": {"solver": "single"}},
        "element-none": {**element, "pruning__update": {"solver": "none"}},
        "num_iterations": {**element, "pruning__update": {**cg, "num_iterations": 3}},
        "terms": extended,
        "three-terms": {**extended, "curvature__num_kronecker_terms": 3},
        "iterations": {**extended, "curvature__num_power_iterations": 3},
        "sparsegpt": sparsegpt,
        "sparsegpt-damping": {**sparsegpt, "pruning__damping": 0.5},
        "sparsegpt-n_m": {
            **sparsegpt,
            "pruning__structure": "n_m",
            "pruning__target_sparsity": 0.5,
        },
        "wanda": wanda,
        "wanda-n_m": {**wanda, "pruning__structure": "n_m", "pruning__target_sparsity": 0.5},
        "wanda-pattern": {
            **wanda,
            "pruning__structure": "n_m",
            "pruning__n_m": [4, 8],
            "pruning__target_sparsity": 0.5,
        },
        "lora": {"calibration__held_aside": 0, "correction__lora_rank": 2},
        "lora-loss": {
            "calibration__held_aside": 0,
            "correction__lora_rank": 2,
            "correction__loss": "cross_entropy",
        },
        "lora-rank": {"calibration__held_aside": 0, "correction__lora_rank": 3},
        "lora-rate": {
            "calibration__held_aside": 0,
            "correction__lora_rank": 2,
            "correction__learning_rate": 1e-2,
        },
        "lora-steps": {
            "calibration__held_aside": 0,
            "correction__lora_rank": 2,
            "correction__steps_per_shot": 2,
        },
        "lora-sequences": {
            "calibration__held_aside": 0,
            "correction__lora_rank": 2,
            "correction__sequences_per_step": 2,
        },
        "lora-epochs": {
            "calibration__held_aside": 0,
            "correction__lora_rank": 2,
            "correction__final_epochs": 1,
        },
        "lora-seed": {
            "calibration__held_aside": 0,
            "correction__lora_rank": 2,
            "correction__seed": 1,
        },
        "precision": {**element, "pruning__update": {**cg, "precision": "float32"}},
        "tolerance": {**element, "pruning__update": {**cg, "tolerance": 0.5}},
        "n_m": {"pruning__structure": "n_m"},
        "pattern": {"pruning__structure": "n_m", "pruning__n_m": [4, 8]},
        "obs_sum": {"pruning__structure": "n_m", "pruning__costs": "obs_sum"},
        "damping.a": {"curvature__damping": {"a": 0.5}},
        "damping.g": {"curvature__damping": {"g": 0.5}},
        "damping-auto": {"curvature__damping": "auto"},
        "held_aside": {"calibration__held_aside": 0.3},
        "fisher": {"curvature__fisher": "sampled"},
        "fisher-seed": {"curvature__fisher": "sampled", "curvature__seed": 7},
        "dtype": {"model__dtype": "bfloat16"},
        "num_sequences": {"calibration__num_sequences": 5},
        "stride": {"calibration__stride": None},
        "seed": {"calibration__stride": None, "calibration__seed": 3},
        "max_tokens": {
            "calibration__stride": None,
            "calibration__max_tokens": 3000,
            "evaluation": EVALUATION,
        },
    }
    results = {}
    for name, change in changes.items():
        assert (
            run(
                tmp_path / name,
                model_folders["llama"],
                **({} if "pruning" in change else {"pruning__num_shots": 1}) | change,
            )
            == 0
        )
        weights = tensors_of_shot(
            tmp_path / name / "run", len(report_of(tmp_path / name / "run")["shots"])
        )
        results[name] = tuple(
            float(weights[key].double().sum()) for key in sorted(weights) if key.endswith("weight")
        )
    assert len(set(results.values())) == len(changes), results


def test_bfloat16_model_keeps_its_dtype_and_float32_curvature(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert (
        run(
            tmp_path,
            model_folders["llama"],
            model__dtype="bfloat16",
            cluster__num_shards=2,
            output__exports=["masked"],
        )
        == 0
    )
    tensors = tensors_of_shot(tmp_path / "run", 2)
    assert {t.dtype for name, t in tensors.items() if name.endswith("weight")} == {torch.bfloat16}
    assert (
        json.loads((tmp_path / "run/export/masked/config.json").read_text())["dtype"] == "bfloat16"
    )
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/masked", dtype="auto").dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("kind", ["kfac", "activations"])
def test_overflow_stops_the_shot_and_the_linear_is_named(
    kind: str,
    num_shards: int,
    model_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only the pass itself can tell."""
    broken = overflowing_model(model_folders["llama"], tmp_path / "model")
    inputs = check(
        parse_spec(tiny_spec(tmp_path, broken, cluster__num_shards=num_shards).read_text())
    )
    cluster = loaded(broken, num_shards)
    with pytest.raises(
        FloatingPointError, match=r"inputs are not finite from model\.layers\.1\.mlp\.down_proj on"
    ):
        gather_curvature(cluster, inputs.calibration, kind)
    assert run(tmp_path, broken, cluster__num_shards=num_shards) == 1
    assert "not a number" in capsys.readouterr().err


def test_a_collapse_stops_the_run_and_keeps_the_shots_before(
    model_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tiny model of random weights does not become worse, so its perplexity is made up."""
    values = iter([19.0, 21.0])
    monkeypatch.setattr(
        evaluation, "measure", lambda cluster, text, windows: Measured(next(values), 0.1)
    )
    monkeypatch.setattr(
        evaluation,
        "remember",
        lambda cluster, text, windows: remember(cluster, text, windows) and 10.0,
    )
    texts = [
        {
            "name": "docs",
            "source": "python-docs",
            "num_sequences": 2,
            "sequence_length": 32,
            "max_tokens": 3000,
        }
    ]
    assert (
        run(
            tmp_path,
            model_folders["llama"],
            pruning__num_shots=3,
            evaluation={"texts": texts, "stop_above": 2},
        )
        == 1
    )
    error = capsys.readouterr().err
    assert (
        "failed: after shot 2 the perplexity on docs is 21, 2.1 times the dense model's; "
        "evaluation.stop_above allows 2" in error
    )
    assert [shot["index"] for shot in report_of(tmp_path / "run")["shots"]] == [1]
    assert not (tmp_path / "run/shots/0002/manifest.json").exists()


def test_evaluation_does_not_change_the_weights_and_events_are_kept(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert run(tmp_path, model_folders["opt"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    per_shot = ["curvature", "costs", "threshold", "update", "evaluation", "commit"]
    assert [event["step"] for event in lines] == ["plan", "load", "evaluation", *per_shot * 2]
    assert (tmp_path / "run/spec.yaml").exists()


def test_module_entry_and_dry_run(model_folders: dict[str, Path], tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, model_folders["llama"], cluster__num_shards=2)
    command = [
        sys.executable,
        "-m",
        "ray_surgeon.pipeline",
        str(spec),
        "--dry-run",
        "--set",
        "pruning.num_shots=7",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "7 shots to 30.0%, 240 calibration tokens each" in done.stdout
    assert "0-" in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_sentencepiece_file_is_exported_as_it_is(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Llama-2 has its tokenizer as a binary file too."""
    model = Path(shutil.copytree(model_folders["llama"], tmp_path / "model"))
    (model / "tokenizer.model").write_bytes(b"\xff\xfe\x00binary")
    assert run(tmp_path, model, output__exports=["masked"]) == 0
    assert (tmp_path / "run/export/masked/tokenizer.model").read_bytes() == b"\xff\xfe\x00binary"


def test_only_the_last_shots_keep_their_tensors(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert run(tmp_path, model_folders["llama"], pruning__num_shots=4, output__keep_shots=2) == 0
    names = {
        shot: files.list_names(str(tmp_path / f"run/shots/{shot:04d}")) for shot in (1, 2, 3, 4)
    }
    assert names[1] == names[2] == ["manifest.json"]
    assert len(names[3]) == len(names[4]) == 3
    assert [shot["index"] for shot in report_of(tmp_path / "run")["shots"]] == [1, 2, 3, 4]


def test_what_a_killed_process_did_not_remove_goes_later(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of a shot from before it was killed, and a file that it was writing."""
    options: dict[str, Any] = {"pruning__num_shots": 5, "output__keep_shots": 2}
    with monkeypatch.context() as patched:
        patched.setattr(
            RunDirectory,
            "drop_tensors",
            lambda *_: sys.exit("killed") if (tmp_path / "run/shots/0003").exists() else None,
        )
        with pytest.raises(SystemExit):
            run(tmp_path, model_folders["llama"], **options)
    (tmp_path / "run/.writing-x").mkdir()
    (tmp_path / "run/.writing-x/file").write_text("half")
    assert run(tmp_path, model_folders["llama"], "--resume", **options) == 0
    kept = [
        shot
        for shot in range(1, 6)
        if list((tmp_path / f"run/shots/{shot:04d}").glob("*.safetensors"))
    ]
    assert kept == [4, 5]
    assert not (tmp_path / "run/.writing-x").exists()


def test_tasks_of_a_run_that_goes_on_are_those_it_began_with(
    model_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The dense model's scores are from the beginning."""
    monkeypatch.setattr("ray_surgeon.stages.evaluation.check_tasks", lambda options: None)
    model = model_folders["llama"]
    exports = {
        "pruning__structure": "groups",
        "pruning__width_multiple": 8,
        "output__exports": ["per_block"],
    }
    text = {
        "name": "docs",
        "source": str(tmp_path / "text.txt"),
        "num_sequences": 4,
        "sequence_length": 40,
        "max_tokens": 4000,
    }
    assert run(tmp_path, model, **exports, evaluation={"texts": [text]}) == 0
    capsys.readouterr()
    tasks = {"names": ["piqa"], "limit": 3}
    assert (
        run(tmp_path, model, "--resume", **exports, evaluation={"texts": [text], "tasks": tasks})
        == 2
    )
    assert "holds another run: different tasks (evaluation.tasks" in capsys.readouterr().err
    record = json.loads((tmp_path / "run/run.json").read_text())
    record["fingerprints"]["tasks"] = {"names": ["piqa"]}
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    assert run(tmp_path, model, "--resume", **exports, evaluation={"texts": [text]}) == 0, (
        "without tasks that failed"
    )


def test_the_event_of_a_commit_is_kept_where_events_cannot_be_appended(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(method: RowsColumns, cluster: Any, scores: Any, shot: int) -> Any:
        if shot == 2:
            there.append(files.read_text("memory://stopped/events.jsonl"))
            raise KeyboardInterrupt
        return choose(method, cluster, scores, shot)

    choose = RowsColumns.choose
    there = list[str]()
    monkeypatch.setattr(RowsColumns, "choose", stop)
    assert run(tmp_path, model_folders["llama"], output__uri="memory://stopped") == 130
    events = [
        json.loads(line) for line in files.read_text("memory://stopped/events.jsonl").splitlines()
    ]
    assert [event["step"] for event in events][-3:] == ["commit", "curvature", "costs"]
    assert json.loads(there[0].splitlines()[-1])["step"] == "commit", (
        "also if the process is killed now"
    )


def test_a_gap_in_the_shots_is_repeated(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """In an empty folder, whatever a process that was killed left there."""
    options: dict[str, Any] = {"pruning__num_shots": 3}
    assert run(tmp_path, model_folders["llama"], **options) == 0
    expected = tensors_of_shot(tmp_path / "run", 3)
    folder = tmp_path / "run/shots/0002"
    names = sorted(path.name for path in folder.iterdir())
    (folder / "manifest.json").unlink()
    (folder / "weights-00-of-03.safetensors").touch()
    (folder / ".writing-abc").mkdir()
    (folder / ".writing-abc/file").write_text("half")
    assert run(tmp_path, model_folders["llama"], "--resume", **options) == 0
    found = tensors_of_shot(tmp_path / "run", 3)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [shot["index"] for shot in report_of(tmp_path / "run")["shots"]] == [1, 2, 3]


def test_replica_that_fails_is_named_and_not_waited_for(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    cluster = loaded(model_folders["llama"], 1, 2)
    with pytest.raises(AssertionError):
        cluster.run_all(finish_curvature)


@pytest.mark.parametrize("structure", ["element", "n_m"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma3"])
def test_elements_and_groups(
    family: str, structure: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Two shots to 40 %, on two shards, with and without replicas, resumed after the first: zeros
    stay, patterns hold.
    """
    options: dict[str, Any] = {
        "pruning__structure": structure,
        "pruning__target_sparsity": 0.4,
        "cluster__num_shards": 2,
    }
    assert run(tmp_path / "one", model_folders[family], **options) == 0
    assert run(tmp_path / "two", model_folders[family], **options, cluster__num_replicas=2) == 0
    report = report_of(tmp_path / "one/run")
    for shot in report["shots"]:
        assert shot["sparsity"] == pytest.approx(shot["target_sparsity"], abs=1e-3)
        assert (
            difference(tmp_path / "one/run", tmp_path / "two/run", shot["index"])
            < MOST_BY_ORDER_OF_SUMS
        )
        assert 0 <= shot["update_residual"]["median"] <= shot["update_residual"]["max"]
    first, second = (tensors_of_shot(tmp_path / "one/run", shot) for shot in (1, 2))
    transposed = family == "gpt2"
    for name in (key for key in second if key.endswith(".kept")):
        kept = second[name]
        linear = name.removesuffix(".kept")
        assert not (kept & ~first[name]).any(), "a removed element came back"
        W = second[f"{linear}.weight"].T if transposed else second[f"{linear}.weight"]
        inputs = W.shape[1]
        assert not W[~kept[:, :inputs]].any()
        assert kept[:, inputs:].all(), "biases stay"
        if structure == "n_m":
            assert set(kept[:, :inputs].reshape(len(W), -1, 4).sum(dim=2).unique().tolist()) <= {
                2,
                4,
            }
    shutil.rmtree(tmp_path / "one/run/shots/0002")
    assert run(tmp_path / "one", model_folders[family], "--resume", **options) == 0
    again = tensors_of_shot(tmp_path / "one/run", 2)
    assert all(torch.equal(again[name], second[name]) for name in second)


def test_magnitude_is_identity_curvature_without_updates(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    options = {
        "curvature__kind": "identity",
        "pruning__costs": "obd",
        "pruning__update": {"solver": "none"},
        "pruning__structure": "element",
    }
    assert (
        run(
            tmp_path,
            model_folders["llama"],
            **options,
            pruning__target_sparsity=0.5,
            pruning__num_shots=1,
        )
        == 0
    )
    dense = AutoModelForCausalLM.from_pretrained(model_folders["llama"]).state_dict()
    pruned = tensors_of_shot(tmp_path / "run", 1)
    names = [name for name in pruned if name.endswith(".weight")]
    size = torch.cat([dense[name].flatten().abs() for name in names])
    border = float(size.sort().values[len(size) // 2 - 1])
    for name in names:
        assert torch.equal(pruned[name], dense[name] * (dense[name].abs() > border))


def test_runs_are_compared_in_one_table(
    model_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where comparison.html goes
    for name in ("one", "two"):
        assert run(tmp_path / name, model_folders["llama"], name=name, pruning__num_shots=1) == 0
    capsys.readouterr()
    runs = [str(tmp_path / "one/run"), str(tmp_path / "two/run")]
    for plot in ("plot.png", "plot.svg"):
        assert compare([*runs, "--plot", str(tmp_path / plot)]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    assert compare([*runs, "--plot", str(tmp_path / "plot.xyz")]) == 2
    assert compare([*runs, "--plot", str(tmp_path / "x.png"), "--text", "absent"]) == 2
    assert "they have docs, again" in capsys.readouterr().err
    assert compare([*runs, "--plot", str(tmp_path / "plot.png"), "--text", "again"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "rows_columns" in line]
    assert len(lines) == 4
    assert sum("dense" in line for line in lines) == 2
    assert compare([str(tmp_path / "absent")]) == 2
    assert "report.json" in capsys.readouterr().err
    (tmp_path / "report.json").write_text('{"dense": 3}')
    assert compare([str(tmp_path)]) == 2
    assert "report.json is no report of this program" in capsys.readouterr().err


def test_model_text_and_run_on_s3(
    model_folders: dict[str, Path], tmp_path: Path, s3: None, cache: Path
) -> None:
    """Everything in a bucket: two shots, a resume after the first, and an export that reloads;
    equal to the run on disk.
    """
    filesystem, _ = files.open_filesystem("s3://bucket/x")
    filesystem.put(f"{model_folders['llama']}/", "bucket/models/llama/", recursive=True)
    assert run(tmp_path / "disk", model_folders["llama"], cluster__num_shards=2) == 0
    filesystem.put_file(str(tmp_path / "disk/text.txt"), "bucket/text.txt")
    text = {
        "source": "s3://bucket/text.txt",
        "num_sequences": 6,
        "sequence_length": 40,
        "stride": 64,
        "max_tokens": 4000,
    }
    places = {
        "model__source": "s3://bucket/models/llama",
        "output__uri": "s3://bucket/run",
        "calibration": text,
    }
    options: dict[str, Any] = {**places, "cluster__num_shards": 2, "output__exports": ["masked"]}
    assert run(tmp_path / "s3", model_folders["llama"], **options) == 0
    for name in ("spec.yaml", "run.json", "events.jsonl", "report.json", "export"):
        assert name in files.list_names("s3://bucket/run")
    expected = tensors_of_shot(tmp_path / "disk/run", 2)
    for _ in range(2):
        for shard in (1, 2):
            found = tensor_files.read(f"s3://bucket/run/shots/0002/shard-{shard:04d}.safetensors")
            assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        filesystem.rm("bucket/run/shots/0002", recursive=True)
        assert run(tmp_path / "s3", model_folders["llama"], "--resume", **options) == 0
    stopping = {
        **options,
        "output__uri": "s3://bucket/stopped",
        "evaluation": {"texts": EVALUATION, "stop_above": 1.00001},
    }
    assert run(tmp_path / "s3", model_folders["llama"], **stopping) == 1
    assert (
        "evaluation"
        in json.loads(files.read_text("s3://bucket/stopped/events.jsonl").splitlines()[-1])["step"]
    ), "what ended it"
