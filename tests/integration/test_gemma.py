"""Pruning Gemma 3 270M, which is downloaded; off by default (`-m network`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.real_models import fetch
from ray_surgeon.config.job import parse_spec
from ray_surgeon.preparation.inputs import check
from tests.integration.runs import Jobs

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch("gemma3-270m", tmp_path_factory.mktemp("gemma") / "model")


@pytest.mark.parametrize(
    ("structure", "sparsity"), [("rows_columns", 0.05), ("element", 0.3)]
)
def test_gemma_perplexity_matches_transformers(
    structure: str, sparsity: float, gemma: Path, job: Jobs
) -> None:
    text = {"source": "python-docs", "sequence_length": 256}
    options = {
        "calibration": text | {"num_sequences": 8, "stride": 2048},
        "evaluation": [text | {"name": "docs", "num_sequences": 4, "stride": 256}],
        "pruning": {"structure": structure, "target_sparsity": sparsity, "num_shots": 1},
    }
    done = job(options, model=gemma, output__exports=["masked"])
    dense = done.report["dense"]["perplexity"]["docs"]
    (shot,) = done.shots
    assert shot["sparsity"] == pytest.approx(sparsity, abs=2e-3)
    left = shot["perplexity"]["docs"]
    assert left < 1.25 * dense
    inputs = check(parse_spec((job.folder / "spec.yaml").read_text()), resume=True)
    for uri, found in ((gemma, dense), (done.export("masked"), left)):
        model = AutoModelForCausalLM.from_pretrained(uri, dtype=torch.float32)
        windows = torch.from_numpy(inputs.texts["docs"])
        with torch.no_grad():
            losses = [model(window[None], labels=window[None]).loss for window in windows]
        assert found == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)
