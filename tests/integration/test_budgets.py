"""Targets for the whole model: parameters, bytes, operations or seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from examples import engine_table
from examples.engine_table import sizes_of, table_of
from ray_surgeon.models.budgets import bytes_budget, flops_budget, parameters_budget
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import kv_heads_left
from ray_surgeon.report.html_report import page
from ray_surgeon.run.result import PruneResult
from tests.conftest import LAYOUTS
from tests.integration import runs
from tests.integration.runs import Jobs, changes_of, config_like, new_model

GROUPS = runs.GROUPS | runs.ONE | {"pruning__target_sparsity": None}
GROUPS |= {"pruning__groups": ["ffn", "attention"]}
BUDGETS = {
    "parameters": parameters_budget(LAYOUTS["llama"]),
    "bytes": bytes_budget(LAYOUTS["llama"], 2),
    "flops": flops_budget(LAYOUTS["llama"], 100),
}
Asked = list[dict[str, Any]]
REQUEST = {"prompt_length": 16, "num_new_tokens": 2, "num_repeats": 1}


@pytest.mark.parametrize(
    ("unit", "allocation", "kind"),
    [
        ("parameters", "global", "per_block"),
        ("bytes", "uniform", "uniform"),
        ("flops", "global", "per_block"),
    ],
)
def test_target_is_not_exceeded(unit: str, allocation: str, kind: str, job: Jobs) -> None:
    budget = BUDGETS[unit]
    allowed = int(0.8 * budget.dense)
    target = {unit: allowed} | ({"prompt_length": 100} if unit == "flops" else {})
    options = GROUPS | {"pruning__target": target, "pruning__num_shots": 2}
    options |= {"pruning__allocation": allocation, "output__exports": [kind]}
    done = job(options, model__dtype="bfloat16")
    first, last = (shot["budget"] for shot in done.shots)
    assert last["goal"] == pytest.approx(allowed)
    assert first["goal"] == pytest.approx((budget.dense + allowed) / 2)
    assert last["need"] <= allowed < budget.dense == last["dense"]
    widths = done.exports[0]["widths"]
    flat = [
        (kind, width[i])
        for width in widths
        for i, kind in enumerate(("ffn", "attention"))
    ]
    assert last["need"] == pytest.approx(budget.of(flat))
    model = AutoModelForCausalLM.from_pretrained(
        done.export(kind), trust_remote_code=kind == "per_block", dtype="auto"
    )
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if unit != "flops":
        assert last["need"] == (size // 2 if unit == "parameters" else size)


def seconds(channels: int, heads: int) -> float:
    """Return the seconds of a block; channels between 16 and 32 cost nothing."""
    return (
        0.01
        + 0.001 * (channels if channels < 16 else max(16, channels - 16))
        + 0.004 * heads
    )


def a_table(folder: Path) -> Path:
    """Write the latency table of an engine whose prefill takes twice as long as its decoding."""
    sizes = sizes_of(LAYOUTS["llama"], "llamacpp", 8)
    assert sizes == {
        "dense": [(4, 48, 2)],
        "shallow": [(2, 48, 2)],
        "channels": [(4, 8, 2), (4, 24, 2), (4, 32, 2)],
        "kv_heads": [(4, 48, 1)],
    }
    of_decode: dict[Any, float] = {
        (blocks, *rest): 0.1 + blocks * seconds(*rest)
        for some in sizes.values()
        for blocks, *rest in some
    }
    table = table_of(sizes, {size: (2 * s, s) for size, s in of_decode.items()})
    request = {"batch_size": 1, "prompt_length": 16, "num_new_tokens": 10}
    file = folder / "table.json"
    file.write_text(json.dumps(table | {"engine": "a table", "request": request}))
    return file


@pytest.mark.parametrize(
    ("target", "share", "unit"),
    [
        ({"speedup": 1.25}, 3, "latency_s"),
        ({"latency_s": 3 * 0.8 * (0.1 + 4 * seconds(48, 2))}, 3, "latency_s"),
        (
            {"decode_tokens_per_s": 12.5 / (0.1 + 4 * seconds(48, 2))},
            0.1,
            "seconds a new token",
        ),
    ],
)
def test_speed_targets_use_the_table_of_an_engine(
    target: dict[str, Any], share: float, unit: str, job: Jobs
) -> None:
    dense = share * (0.1 + 4 * seconds(48, 2))
    options = {"pruning__target": target | {"table": str(a_table(job.folder))}}
    done = job(GROUPS | options, pruning__allocation="uniform")
    budget = done.shot["budget"]
    assert (budget["unit"], budget["dense"]) == (unit, pytest.approx(dense))
    assert budget["goal"] == pytest.approx(0.8 * dense)
    rows = {linear["name"]: linear["rows_kept"] for linear in done.report["linears"]}
    layer = "model.layers.0."
    widths = (rows[f"{layer}mlp.up_proj"], rows[f"{layer}self_attn.k_proj"] // 8)
    numbers = [0, 8, 24, 32, 48]
    of_widths = [seconds(8, 2) - (seconds(24, 2) - seconds(8, 2)) / 2]
    of_widths += [seconds(number, 2) for number in numbers[1:]]
    block = np.interp(widths[0], numbers, of_widths) - 0.004 * (2 - widths[1])
    assert budget["need"] == pytest.approx(share * (0.1 + 4 * block))
    assert budget["need"] <= 0.8 * dense


def test_several_speeds_in_one_run(job: Jobs) -> None:
    dense = 3 * (0.1 + 4 * seconds(48, 2))
    target = {"speedup": 1.5, "table": str(a_table(job.folder))}
    options = GROUPS | {"pruning__target": target, "pruning__sizes": [1.25, 1.5]}
    options |= {"pruning__allocation": "uniform", "output__exports": ["uniform"]}
    done = job(options, pruning__num_shots=2)
    goals = [shot["budget"]["goal"] for shot in done.shots]
    assert goals == pytest.approx([dense * part for part in (0.9, 0.8, 11 / 15, 2 / 3)])
    assert [export["size"] for export in done.exports] == [1.5, 1.25]
    for shot in done.shots:
        assert shot["budget"]["need"] <= shot["budget"]["goal"] * (1 + 1e-9)
    for export in done.exports:
        assert all(channels % 8 == 0 for channels, _ in export["widths"])
    assert "(uniform at speedup 1.25)" in done.out
    result = PruneResult(str(done.uri), done.report)
    ends = {size: shot["budget"]["goal"] for size, shot in result.sizes.items()}
    assert ends == {1.25: pytest.approx(0.8 * dense), 1.5: pytest.approx(2 / 3 * dense)}
    assert "<td>speedup 1.5</td>" in page([done.report])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"num_blocks": 5},
            "a model with (5, 48, 2) blocks, feed-forward channels and KV heads",
        ),
        ({"rest": None}, "cannot be used: 1 validation error for _Table rest"),
        ({"channels": {"x": [1, 1]}}, "channels.x"),
        ({"kv_heads": {"2": [1, 1]}}, "no attention save anything; leave attention out"),
    ],
)
def test_unsuitable_latency_tables_are_refused(
    changed: dict[str, Any], message: str, job: Jobs
) -> None:
    table = json.loads(a_table(job.folder).read_text()) | changed
    file = job.folder / "other.json"
    file.write_text(json.dumps(table))
    target = {"speedup": 2, "table": str(file)}
    assert message in job.refused("", **GROUPS, pruning__target=target)


def test_latency_target_with_widths_that_differ_by_block(job: Jobs) -> None:
    """One threshold decides for all blocks. An error for an unreachable target gives the smallest
    possible value.
    """
    dense = 3 * (0.1 + 4 * seconds(48, 2))
    table = str(a_table(job.folder))
    options = GROUPS | {"pruning__target": {"latency_s": 0.8 * dense, "table": table}}
    budget = job(options).shot["budget"]
    assert budget["need"] <= 0.8 * dense == pytest.approx(budget["goal"])
    options["pruning__target"] = {"latency_s": 0.001, "table": table}
    error = job(options, folder="other", code=2).error
    assert "the model needs at least 0.564" in error
    assert "--resume" not in error, "resuming would fail again"


def test_latency_table_of_transformers(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the whole model is really timed, in its own process; the seconds of others are given."""
    measured = dict[str, tuple[float, float]]()

    def timed(command: list[str]) -> tuple[float, float]:
        size = Path(command[3]).name
        if size == "4x48x2":
            measured[size] = time_here(command)
        blocks, channels, heads = map(int, size.split("x"))
        return 0.1 + blocks * seconds(channels, heads), 0.2 + blocks * seconds(
            channels, heads
        )

    time_here = engine_table.time_here
    monkeypatch.setattr(engine_table, "time_here", timed)
    file = job.folder / "table.json"
    request = [
        "--prompt-length",
        "16",
        "--num-new-tokens",
        "4",
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    options = ["--engine", "transformers", "--multiple", "8", *request]
    assert engine_table.main([str(job.models["llama"]), str(file), *options]) == 0
    table = json.loads(file.read_text())
    assert table["engine"] == "transformers"
    assert list(table["channels"]) == ["8", "24", "32", "48"]
    assert list(table["kv_heads"]) == ["1", "2"]
    assert table["channels"]["48"] == pytest.approx([seconds(48, 2)] * 2)
    assert table["rest"] == pytest.approx([0.1, 0.2])
    assert min(measured["4x48x2"]) > 0


BYTES = "pruning.target={bytes: 10}"
OVER_THREE = "pruning.target_sparsity=0.3; pruning.tensor_parallel=3"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("pruning.target={parameters: 10}", "the model needs at least"),
        ("pruning.target={parameters: 1000000000}", "the dense model needs no more than"),
        (
            "pruning.target={parameters: 10, bytes: 10}",
            "bytes: is not an option of parameters",
        ),
        ("pruning.target={}", "bytes, flops, latency_s, speedup and decode_tokens_per_s"),
        (
            "pruning.target={latency_s: 1}",
            "table is missing: a target of speed needs the seconds",
        ),
        ("pruning.target={speedup: 2, table: none.json}", "none.json cannot be used"),
        (f"{BYTES}; pruning.target_sparsity=0.5", "got target_sparsity and target"),
        (
            "pruning.target={parameters: 100}; pruning.sizes=[1000000000, 100]",
            "needs no more than",
        ),
        (
            "pruning.target={speedup: 2, table: t}; pruning.sizes=[0.5, 2]",
            "should be greater than 1",
        ),
        (
            f"{BYTES}; pruning.sizes=[20, 15]",
            "give smaller and smaller models that end at it",
        ),
        (
            f"{BYTES}; pruning.sizes=[20, 30, 10]",
            "give smaller and smaller models that end at it",
        ),
        ("", "got none"),
        (f"{BYTES}; pruning.structure=rows", "is not an option of rows_columns"),
        (f"{BYTES}; pruning.sparsities=[0.1, 0.2]", "or use num_shots"),
        (
            f"{OVER_THREE}; pruning.width_multiple=null",
            "dense model's 4 query heads and 2 KV",
        ),
        (OVER_THREE, "8 channels cannot be split over tensor_parallel 3"),
    ],
)
def test_invalid_targets_are_refused(settings: str, message: str, job: Jobs) -> None:
    assert message in job.refused(settings, **GROUPS)


def test_plan_prints_the_needs_of_the_dense_model(job: Jobs) -> None:
    dense = int(BUDGETS["parameters"].dense)
    target = {"parameters": dense - 5000}
    options = GROUPS | {"pruning__num_shots": 2, "pruning__target": target}
    said = " ".join(job(options, "--dry-run").out.split())
    goal = f"to {dense - 5000} of {dense} parameters"
    assert f"2 pruning rounds (shots of the paper) {goal}" in said
    widths = (
        "feed-forward widths, 48 channels, stay multiples of 8; to quantise later, set"
    )
    assert f"{widths} pruning.width_multiple to 128" in said


def test_tensor_parallel_keeps_heads_and_widths_divisible(job: Jobs) -> None:
    """On two devices the number of KV heads is even, or one that is copied; the numbers of query
    heads and channels are even.
    """
    config = config_like(
        "llama", num_attention_heads=8, num_key_value_heads=8, head_dim=4
    )
    folder = new_model(config, job.folder / "model", job.models["llama"])
    assert kv_heads_left(ModelLayout.of(config), 2, uniform=False) == (0, 2, 4, 6, 8)
    assert kv_heads_left(LAYOUTS["llama"], 2, uniform=True) == (1, 2)
    found = {}
    for devices in (1, 2):
        options = changes_of("pruning.width_multiple=2; output.exports=[per_block]")
        options = runs.GROUPS | runs.ONE | options | {"pruning__tensor_parallel": devices}
        (export,) = job(options, model=folder, folder=str(devices)).exports
        found[devices] = [kv for _, kv in export["widths"]]
    assert any(kv % 2 for kv in found[1])
    assert not any(kv % 2 for kv in found[2])
