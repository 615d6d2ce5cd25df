"""Families that families.yaml lacks are pruned by probing alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from ray_surgeon.models.families import FAMILIES, Family
from ray_surgeon.models.probe import probed_family
from ray_surgeon.pipeline import cli
from tests.conftest import BASE
from tests.integration.runs import GROUPS, ONE, run

JOB = GROUPS | ONE | {"pruning__groups": ["ffn"], "pruning__allocation": "uniform"}
UNIFORM = {"output__exports": ["uniform"]}
TWO = {"cluster__num_shards": 2}
SMALL: dict[str, Any] = BASE | {"pad_token_id": 0, "head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 8, "attn_layer_indices": [2]}
CONFIGS: dict[str, PretrainedConfig] = {
    # gate and up in one linear
    "glm4": AutoConfig.for_model("glm4", **SMALL),
    # w1, w2 and w3, beside convolutions; the gate has another name in checkpoints
    "lfm3": AutoConfig.for_model("lfm3", **SMALL, use_attention_gate=False),
    # Mamba layers
    "bamba": AutoConfig.for_model("bamba", **BASE, **MAMBA),
}


def saved(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> Path:
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", CONFIGS)
def test_probed_family_is_pruned_and_exported(
    family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    assert family not in FAMILIES
    model = saved(CONFIGS[family], tokenizer, tmp_path / "model")
    assert run(tmp_path, model, **JOB, **UNIFORM, **TWO) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["proof"].startswith("proved: ffn in ")
    (export,) = report["exports"]
    assert export["reload_error"] < 1e-4
    pruned = AutoModelForCausalLM.from_pretrained(export["uri"], dtype=torch.float32)
    assert pruned.config.intermediate_size < 48
    assert type(pruned.config) is type(CONFIGS[family])


def test_command_prints_an_entry_of_families(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CONFIGS["bamba"].save_pretrained(tmp_path)
    assert cli(["family", str(tmp_path)]) == 0
    entries = yaml.safe_load(capsys.readouterr().out)
    read = TypeAdapter(dict[str, Family]).validate_python(entries)
    assert read == {"bamba": probed_family(CONFIGS["bamba"])}

    AutoConfig.for_model("gptj").save_pretrained(tmp_path)
    assert cli(["family", str(tmp_path)]) == 2
    assert "names a feed-forward width" in capsys.readouterr().err


def test_what_is_not_known_of_a_probed_family_is_refused(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = saved(CONFIGS["glm4"], tokenizer, tmp_path / "model")
    changes = {
        "attention, but glm4 has ffn": {"pruning__groups": ["ffn", "attention"]},
        "blocks, but of glm4 only": {"pruning__groups": ["blocks"]},
        "families.yaml, which has no glm4": {"output__exports": ["per_block"]},
    }
    for problem, change in changes.items():
        assert run(tmp_path, model, **(JOB | change)) == 2
        assert problem in " ".join(capsys.readouterr().err.split())
