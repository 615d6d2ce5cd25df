"""The benchmarks of mixtures of experts: what they measure, and what others remove, against the
definitions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast

from benchmarks.expert_costs import predictions, sequences_of_help
from benchmarks.experts import Point, record_of
from ray_surgeon.models.layout import ModelLayout
from tests.conftest import SPARSE_CONFIGS

CONFIG = MixtralConfig(**{**SPARSE_CONFIGS["mixtral"].to_dict(), "max_position_embeddings": 512})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    path = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def removed_by(point: Point, model: Path, folder: Path) -> tuple[dict[str, Any], set[str]]:
    """Run a point; return its record and the experts that are gone, as ``block.number``."""
    record = record_of(point, model, folder)
    report = json.loads(
        (folder / f"{point.kind}-{point.fraction:g}-{point.method}" / "report.json").read_text()
    )
    names = [name.split(".") for shot in report["shots"] for name in shot["experts_removed"]]
    return record, {f"{name[2]}.{name[-2]}" for name in names}


def test_magnitude_removes_the_experts_with_the_smallest_weights(
    folder: Path, tmp_path: Path
) -> None:
    record, gone = removed_by(Point("experts", 0.5, "magnitude"), folder, tmp_path)
    expected = set()
    for number, block in enumerate(AutoModelForCausalLM.from_pretrained(folder).model.layers):
        experts = block.mlp.experts
        sizes = experts.gate_up_proj.square().sum(dim=(1, 2)) + experts.down_proj.square().sum(
            dim=(1, 2)
        )
        expected |= {f"{number}.{expert}" for expert in sizes.argsort()[:2].tolist()}
    assert gone == expected
    assert record["divergence"]["python-docs"] > 0


def test_ours_removes_one_expert_of_each_block_a_shot(folder: Path, tmp_path: Path) -> None:
    record, gone = removed_by(Point("experts", 0.5, "rerouting"), folder, tmp_path)
    assert len(gone) == CONFIG.num_hidden_layers * CONFIG.num_local_experts / 2
    assert record["sparsity"] < 0.5  # attention stays
    shots = json.loads((tmp_path / "experts-0.5-rerouting" / "report.json").read_text())["shots"]
    assert [len(shot["experts_removed"]) for shot in shots] == [CONFIG.num_hidden_layers] * 2


def without(model: torch.nn.Module, block: int, expert: int) -> None:
    """Let the router of a block go around an expert, by the definition of Mixtral's."""
    gate: Any = model.get_submodule(f"model.layers.{block}.mlp.gate")

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.reshape(-1, hidden.shape[-1]) @ gate.weight.T
        logits[:, expert] = -torch.inf
        weights, numbers = logits.softmax(dim=-1).topk(CONFIG.num_experts_per_tok)
        return logits, weights / weights.sum(dim=-1, keepdim=True), numbers

    gate.forward = forward


@torch.no_grad()
def log_chances(model: torch.nn.Module, sequences: Tensor) -> Tensor:
    found: Tensor = model(input_ids=sequences).logits[:, :-1].double().log_softmax(dim=-1)
    return found


def test_removals_of_single_experts_are_measured_on_as_many_sequences_as_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sequences = sequences_of_help(folder, 30)
    assert sequences.shape == (30, 512)
    assert not list(tmp_path.iterdir()), "no run is started"
    few = sequences[:2]
    found = predictions(folder, ModelLayout.of(CONFIG), few, every=2)["experts"]
    assert [(entry["block"], entry["expert"]) for entry in found] == [
        (block, expert) for block in (1, 3) for expert in range(4)
    ]
    tokens = torch.from_numpy(few)
    dense = log_chances(AutoModelForCausalLM.from_pretrained(folder), tokens)
    for entry in found[:3]:
        model = AutoModelForCausalLM.from_pretrained(folder)
        without(model, entry["block"], entry["expert"])
        pruned = log_chances(model, tokens)
        increase = (dense - pruned).gather(2, tokens[:, 1:, None]).mean()
        divergence = (dense.exp() * (dense - pruned)).sum(dim=-1).mean()
        assert entry["measured"] == pytest.approx(float(increase), rel=1e-3, abs=1e-6)
        assert entry["divergence"] == pytest.approx(float(divergence), rel=1e-3, abs=1e-6)
