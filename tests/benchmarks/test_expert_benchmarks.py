"""The benchmarks of mixtures of experts: measures and baselines, against their definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import experts
from benchmarks.expert_costs import predictions, sequences_of_help
from ray_surgeon.config.job import parse_spec
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.report.html_report import LivePage
from tests.integration.runs import config_like, new_model, report_of

CONFIG = config_like("mixtral", max_position_embeddings=512)
TEXT = "{name: docs, source: python-docs, num_sequences: 2, sequence_length: 64, max_tokens: 40000}"
LITTLE = (f"evaluation=[{TEXT}]", "calibration.max_tokens=40000", "model.dtype=float32")


def shorten(monkeypatch: pytest.MonkeyPatch, *changes: str) -> None:
    """Let jobs of the benchmark read a part of one text, and draw no plots."""
    monkeypatch.setattr(
        experts, "parse_spec", lambda text: parse_spec(text, [*LITTLE, *changes])
    )
    monkeypatch.setattr(LivePage, "draw", lambda self, record, *, final: None)


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path]
) -> Path:
    return new_model(CONFIG, tmp_path_factory.mktemp("mixture"), model_folders["mixtral"])


def test_magnitude_removes_the_experts_of_lowest_norm(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, "calibration.num_sequences=4", "calibration.sequence_length=64")
    record = experts.record_of(
        experts.Point("experts", 0.5, "magnitude"), folder, tmp_path
    )
    assert record["divergence"]["docs"] > 0
    (shot,) = report_of(tmp_path / "experts-0.5-magnitude")["shots"]
    expected = set()
    for number, block in enumerate(
        AutoModelForCausalLM.from_pretrained(folder).model.layers
    ):
        weights = (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj)
        sizes = sum(weight.square().sum(dim=(1, 2)) for weight in weights)
        expected |= {
            (str(number), str(expert)) for expert in sizes.argsort()[:2].tolist()
        }
    assert len(shot["experts_removed"]) == len(expected) == 8
    assert {tuple(name.split(".")[2::3]) for name in shot["experts_removed"]} == expected


def without(model: torch.nn.Module, block: int, expert: int) -> None:
    """Make the router of a block skip an expert, by Mixtral's definition."""
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


def test_measured_removals_of_experts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch)
    few = sequences_of_help(folder, 2)[:, :64]
    found = predictions(folder, ModelLayout.of(CONFIG), few, every=2)["experts"]
    places = [(block, expert) for block in (1, 3) for expert in range(4)]
    assert [(entry["block"], entry["expert"]) for entry in found] == places
    tokens = torch.from_numpy(few)
    dense = log_chances(AutoModelForCausalLM.from_pretrained(folder), tokens)
    for entry in found[:2]:
        model = AutoModelForCausalLM.from_pretrained(folder)
        without(model, entry["block"], entry["expert"])
        pruned = log_chances(model, tokens)
        increase = (dense - pruned).gather(2, tokens[:, 1:, None]).mean()
        divergence = (dense.exp() * (dense - pruned)).sum(dim=-1).mean()
        assert entry["measured"] == pytest.approx(float(increase), rel=1e-3, abs=1e-6)
        assert entry["divergence"] == pytest.approx(float(divergence), rel=1e-3, abs=1e-6)
