"""Removed coupled groups can be cut out of the model without a change of the logits."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from ray_surgeon.models.budgets import parameters_budget
from tests.conftest import CONFIGS, LAYOUTS, RARE
from tests.integration import runs
from tests.integration.runs import (
    MOST_BY_ORDER_OF_SUMS,
    ONE,
    Jobs,
    assert_same_shot,
    difference,
)

GROUPS = runs.GROUPS | ONE
WAYS: dict[str, dict[str, Any]] = {
    "uniform": {"pruning__allocation": "uniform"},
    "per_block": {"pruning__target_sparsity": 0.4},
}
CASES = [
    pytest.param(
        family,
        way,
        marks=[pytest.mark.slow] if family in RARE else [],
    )
    for family in sorted(CONFIGS)
    for way in WAYS
    if family == "gpt2" or way != "per_block"
]


@pytest.mark.parametrize(("family", "way"), CASES)
def test_groups_of_every_family_are_removed_whole(
    family: str, way: str, job: Jobs
) -> None:
    """Consumers lose exactly the columns whose producers lose their rows, in the masks and in the
    smaller export.
    """
    kind = "uniform" if way == "uniform" else "per_block"
    kinds = LAYOUTS[family].kinds
    options = GROUPS | WAYS[way] | {"output__exports": ["masked", kind]}
    options["pruning__groups"] = list(kinds)
    done = job(options, model=family, cluster__num_shards=2)
    (shot,) = done.shots
    tensors = done.tensors(1)
    gone = 0
    left = set()
    for groups in LAYOUTS[family].group_sets:
        columns = tensors[f"{groups.consumer}.columns"][groups.columns]
        assert (columns.all(dim=1) | ~columns.any(dim=1)).all(), (
            "a group is removed as a whole"
        )
        removed = ~columns.all(dim=1)
        for name, rows in groups.producers:
            assert torch.equal(~tensors[f"{name}.rows"][rows].all(dim=1), removed)
            assert torch.equal(tensors[f"{name}.rows"][rows].any(dim=1), ~removed)
        left.add((groups.kind, int((~removed).sum())))
        gone += int(removed.sum()) * groups.num_parameters
    whole = sum(linear["rows"] * linear["columns"] for linear in done.report["linears"])
    assert gone / whole == pytest.approx(shot["sparsity"])
    target = WAYS[way].get("pruning__target_sparsity", 0.3)
    assert target <= shot["sparsity"]
    channels, heads = ({n for k, n in left if k == kind} for kind in ("ffn", "attention"))
    assert all(n % 8 == 0 for n in channels)
    assert min(channels | heads) > 0
    if way == "uniform":
        assert len(left) == len(kinds)
    else:
        assert shot["sparsity"] < target + 0.06, "a KV group of a tiny model is large"
        assert len(left) > len(kinds)
    assert all(export["reload_max_logit_difference"] < 1e-4 for export in done.exports)
    numbers = done.report["parameters"]
    assert [export["num_parameters"] for export in done.exports] == [
        numbers["before"],
        numbers["after"],
    ]
    assert done.report["left_whole"] == LAYOUTS[family].left_whole
    export = done.export(kind)
    dense = job.models[family] / "model.safetensors"
    assert done.exports[1]["size_bytes"] < dense.stat().st_size
    config = json.loads((export / "config.json").read_text())
    if way != "uniform":
        assert config["model_type"] == f"pruned_{CONFIGS[family].model_type}"
        return
    if heads and not CONFIGS[family].model_type.startswith(("opt", "gpt2")):
        assert config["num_key_value_heads"] == max(heads)
    model = AutoModelForCausalLM.from_pretrained(export)
    assert type(model).__module__.startswith("transformers.models.")
    assert done.exports[1]["size_bytes"] == pytest.approx(
        4 * model.num_parameters(), rel=0.2
    )
    if CONFIGS[family].tie_word_embeddings:
        with safe_open(export / "model-00002-of-00002.safetensors", "pt") as file:
            assert not any("lm_head" in key for key in set(file.keys()))


def test_uniform_groups_on_shards_and_replicas_match_one_worker(job: Jobs) -> None:
    """All blocks get one width; test_experts.py tests widths that differ."""
    target = {"parameters": int(0.8 * parameters_budget(LAYOUTS["llama"]).dense)}
    options = GROUPS | {"pruning__allocation": "uniform", "pruning__num_shots": 2}
    options |= {"pruning__target": target, "pruning__target_sparsity": None}
    one = job(options, folder="one").uri
    shards = job(options, folder="shards", cluster__num_shards=3).uri
    replicas = job(options, folder="replicas", cluster__num_replicas=2).uri
    assert_same_shot(one, shards, 2)
    assert difference(one, replicas, 2) < MOST_BY_ORDER_OF_SUMS


def test_removed_ffn_channels_do_not_reach_the_logits(job: Jobs) -> None:
    """Noise in the removed rows does not change the logits, because the consumer's columns are
    zero.
    """
    options = GROUPS | {"pruning__groups": ["ffn"], "output__exports": ["masked"]}
    done = job(options, pruning__num_shots=2)
    masked = AutoModelForCausalLM.from_pretrained(done.export("masked"))
    tensors = done.tensors(2)
    tokens = torch.arange(40)[None]
    before = masked(tokens).logits
    with torch.no_grad():
        for groups in LAYOUTS["llama"].group_sets:
            columns = tensors[f"{groups.consumer}.columns"]
            assert columns.all() == (groups.kind == "attention")
            gone = ~columns[groups.columns[:, 0]]
            for name, rows in groups.producers:
                weight = masked.get_parameter(f"{name}.weight")
                assert not weight[rows[gone].flatten()].any()
                weight[rows[gone].flatten()] = 1.0
    torch.testing.assert_close(masked(tokens).logits, before)
