"""A target for the whole model: parameters, bytes, operations or seconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ray_surgeon.export import latency
from ray_surgeon.models.budgets import bytes_budget, flops_budget, parameters_budget
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import kv_heads_left
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.spec.targets import SpeedSection
from tests.conftest import CONFIGS, LAYOUTS, Zygote
from tests.integration.runs import assert_same_shot, report_of, run

GROUPS: dict[str, Any] = {
    "pruning__structure": "groups",
    "pruning__width_multiple": 8,
    "pruning__target_sparsity": None,
}
BUDGETS = {
    "parameters": parameters_budget(LAYOUTS["llama"]),
    "bytes": bytes_budget(LAYOUTS["llama"], 2),
    "flops": flops_budget(LAYOUTS["llama"], 100),
}
REQUEST = {"prompt_length": 16, "num_new_tokens": 2, "num_repeats": 1}


@pytest.mark.parametrize("unit", sorted(BUDGETS))
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_the_model_needs_no_more_than_the_target(
    unit: str, allocation: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    budget = BUDGETS[unit]
    allowed = int(0.8 * budget.dense)
    target = {unit: allowed} | ({"prompt_length": 100} if unit == "flops" else {})
    kind = "uniform" if allocation == "uniform" else "per_block"
    options = {
        **GROUPS,
        "pruning__target": target,
        "pruning__allocation": allocation,
        "output__exports": [kind],
        "model__dtype": "bfloat16",
    }
    assert run(tmp_path, model_folders["llama"], **options) == 0
    report = report_of(tmp_path / "run")
    first, last = (shot["budget"] for shot in report["shots"])
    assert last["goal"] == pytest.approx(allowed)
    assert first["goal"] == pytest.approx((budget.dense + allowed) / 2)
    assert last["need"] <= allowed < budget.dense == last["dense"]
    widths = report["exports"][0]["widths"]
    flat = [(kind, width[i]) for width in widths for i, kind in enumerate(("ffn", "attention"))]
    assert last["need"] == pytest.approx(budget.of(flat))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run/export" / kind, trust_remote_code=kind == "per_block", dtype="auto"
    )
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if unit != "flops":
        assert last["need"] == (size // 2 if unit == "parameters" else size)


def seconds(channels: int, heads: int) -> float:
    """Channels are free between 16 and 32."""
    return 0.01 + 0.001 * (channels if channels < 16 else max(16, channels - 16)) + 0.004 * heads


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_latency_is_measured_once_a_width(
    allocation: str,
    model_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []

    def measure(worker: Worker, module: str, request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request)
        return {
            "device": "a table",
            "seconds": [seconds(*width) for width in request["widths"]],
            "rest_seconds": 0.1,
        }

    monkeypatch.setattr(latency, "run_on_worker", measure)
    dense = 0.1 + 4 * seconds(48, 2)
    options = {
        **GROUPS,
        "pruning__target": {"latency_s": 0.8 * dense, "request": REQUEST},
        "pruning__allocation": allocation,
    }
    assert run(tmp_path, model_folders["llama"], **options) == 0
    (request,) = asked
    assert [tuple(width) for width in request["widths"]] == [(n, 2) for n in range(8, 56, 8)] + [
        (48, 1)
    ]
    assert request["request"]["prompt_length"] == 16
    report = report_of(tmp_path / "run")
    budget = report["shots"][-1]["budget"]
    assert (budget["unit"], budget["dense"]) == ("latency_s", pytest.approx(dense))
    rows = {linear["name"]: linear["rows_kept"] for linear in report["linears"]}
    blocks = [
        (rows[f"model.layers.{i}.mlp.up_proj"], rows[f"model.layers.{i}.self_attn.k_proj"] // 8)
        for i in range(4)
    ]
    need = 0.1 + sum(seconds(*block) for block in blocks)
    assert need <= 0.8 * dense
    assert budget["need"] == pytest.approx(need)
    assert all(channels != 24 for channels, _ in blocks), "as fast as 32, and worse"
    assert run(tmp_path, model_folders["llama"], "--resume", **options) == 0
    assert len(asked) == 1
    assert json.loads((tmp_path / "run/latency.json").read_text())["device"] == "a table"
    options["pruning__target"] = {"latency_s": 0.001, "request": REQUEST}
    options["output__uri"] = str(tmp_path / "other")
    assert run(tmp_path, model_folders["llama"], **options) == 2
    error = capsys.readouterr().err
    assert "the model needs at least 0.1" in error
    assert "--resume" not in error, "it would be the same again"
    assert len(asked) == 2


def test_latency_of_blocks_with_and_without_a_window_counts_as_there_are(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four blocks three look at a window; each kind is measured by itself, so that no width is
    taken for a kind.
    """
    asked = []

    def measure(worker: Worker, module: str, request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request["layer_type"])
        factor = 2.0 if request["layer_type"] == "full_attention" else 1.0
        return {
            "device": "a table",
            "seconds": [factor * seconds(*width) for width in request["widths"]],
            "rest_seconds": 0.1,
        }

    monkeypatch.setattr(latency, "run_on_worker", measure)
    model = Path(shutil.copytree(model_folders["gemma3"], tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    (model / "config.json").write_text(json.dumps(config | {"layer_types": kinds}))
    dense = 0.1 + 5 * seconds(48, 2)
    assert (
        run(
            tmp_path,
            model,
            **GROUPS,
            pruning__target={"latency_s": 0.9 * dense, "request": REQUEST},
        )
        == 0
    )
    assert asked == ["sliding_attention", "full_attention"]
    assert report_of(tmp_path / "run")["shots"][-1]["budget"]["dense"] == pytest.approx(dense)


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "llama", "opt"])
def test_blocks_of_every_width_are_timed(
    family: str, zygote: Zygote, model_folders: dict[str, Path]
) -> None:
    """Nothing is said of the seconds but that there are some: they are measured."""
    request = SpeedSection(prompt_length=16, num_new_tokens=2, num_repeats=1).model_dump()
    document = json.loads((model_folders[family] / "config.json").read_text()) | {
        "dtype": "float32"
    }
    widths = [[48, 2], [24, 2], [0, 2], [48, 1], [48, 0], *([n, 2] for n in range(1, 6))]
    asked = {"device": "cpu", "request": request, "document": document, "widths": widths}
    asked["layer_type"] = "full_attention" if family == "gemma3" else None
    found = zygote.run_module("ray_surgeon.export.latency", asked)
    assert len(found["seconds"]) == len(widths)
    assert found["rest_seconds"] > 0
    assert found["seconds"][0] > 0
    assert found["device"] == "CPU, 1 threads"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pruning__target": {"parameters": 10}}, "the model needs at least"),
        ({"pruning__target": {"parameters": 10**9}}, "the dense model needs no more than"),
        (
            {"pruning__target": {"parameters": 10, "bytes": 10}},
            "pruning.target.bytes: is not an option of parameters",
        ),
        ({"pruning__target": {}}, "expected one of parameters, bytes, flops and latency_s"),
        (
            {"pruning__target": {"bytes": 10, "request": {"prompt_length": 3}}},
            "pruning.target.request: is not an option of bytes",
        ),
        (
            {"pruning__target": {"flops": 10, "device": "cuda"}},
            "pruning.target.device: is not an option of flops",
        ),
        (
            {"pruning__target": {"flops": 10, "request": {"num_threads": 3}}},
            "pruning.target.request: is not an option of flops",
        ),
        (
            {"pruning__target": {"latency_s": 1, "device": "cuda"}},
            "set cluster.gpus_per_worker to 1",
        ),
        ({"pruning__target": {"bytes": 10}, "pruning__target_sparsity": 0.5}, "got both"),
        ({}, "got none"),
        (
            {"pruning__target": {"bytes": 10}, "pruning__structure": "rows"},
            "is not an option of rows_columns",
        ),
        (
            {"pruning__target": {"bytes": 10}, "pruning__sparsities": [0.1, 0.2]},
            "use num_shots and schedule",
        ),
    ],
)
def test_targets_that_cannot_be(
    changes: dict[str, Any],
    message: str,
    model_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path, model_folders["llama"], **{**GROUPS, **changes}) == 2
    assert message in capsys.readouterr().err


def test_the_plan_says_what_the_dense_model_needs(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = int(BUDGETS["parameters"].dense)
    assert (
        run(
            tmp_path,
            model_folders["llama"],
            "--dry-run",
            **GROUPS,
            pruning__target={"parameters": dense - 5000},
        )
        == 0
    )
    said = " ".join(capsys.readouterr().out.split())
    assert f"2 shots to {dense - 5000} of {dense} parameters" in said
    assert "multiples of 8 channels; to quantise later, set pruning.width_multiple to 128" in said


def test_shards_agree(model_folders: dict[str, Path], tmp_path: Path) -> None:
    target = {"parameters": int(0.8 * BUDGETS["parameters"].dense)}
    for name, shards in (("one", 1), ("two", 2)):
        assert (
            run(
                tmp_path / name,
                model_folders["llama"],
                **GROUPS,
                pruning__target=target,
                cluster__num_shards=shards,
            )
            == 0
        )
    assert_same_shot(tmp_path / "one/run", tmp_path / "two/run", 2)


def test_heads_and_widths_that_engines_can_split(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Over two devices: KV heads come in pairs or are one that is copied, query heads and channels
    in pairs.
    """
    config = LlamaConfig(
        **{
            **CONFIGS["llama"].to_dict(),
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": 4,
        }
    )
    torch.manual_seed(0)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folders["llama"] / name).read_bytes())
    assert kv_heads_left(ModelLayout.of(config), 2, uniform=False) == (0, 2, 4, 6, 8)
    assert kv_heads_left(LAYOUTS["llama"], 2, uniform=True) == (1, 2)
    for name, devices in (("one", 1), ("two", 2)):
        pruning = {
            "pruning__structure": "groups",
            "pruning__tensor_parallel": devices,
            "pruning__width_multiple": 2,
        }
        assert run(tmp_path / name, folder, **pruning, output__exports=["per_block"]) == 0
    heads = {
        name: [kv for _, kv in report_of(tmp_path / name / "run")["exports"][0]["widths"]]
        for name in ("one", "two")
    }
    assert any(kv % 2 for kv in heads["one"])
    assert not any(kv % 2 for kv in heads["two"])


def test_what_no_engine_splits_is_refused(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruning = {"pruning__structure": "groups", "pruning__tensor_parallel": 3}
    assert run(tmp_path, model_folders["llama"], **pruning) == 2
    assert (
        "no engine splits the dense model's 4 query heads and 2 KV heads so"
        in capsys.readouterr().err
    )
    assert run(tmp_path, model_folders["llama"], **pruning, pruning__width_multiple=8) == 2
    assert "8 channels cannot be split over tensor_parallel 3" in capsys.readouterr().err
