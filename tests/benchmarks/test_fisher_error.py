from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.fisher_error import block_errors, main
from tests.integration.runs import tiny_spec


def test_errors_against_the_dense_fisher() -> None:
    """One term is exact if a and g are independent. More terms never fit the whole Fisher worse,
    and enough terms fit it exactly.
    """
    a = torch.randn(40, 5, dtype=torch.float64)
    g = torch.randn(40, 4, dtype=torch.float64)
    g = g * (1 + a[:, :1].square())
    everything = torch.arange(4), torch.arange(5)
    errors = block_errors(a, g, *everything, 10, 200)
    start = errors["from the start"]
    assert start == sorted(start, reverse=True)
    assert errors["after KFAC"][0] >= start[0]
    assert errors["identity"][0] > errors["after KFAC"][0]
    assert start[-1] < 1e-6  # symmetric factors of 4 x 4 span 10 dimensions
    dense = torch.einsum("ni,nj,nk,nl->ikjl", g, a, g, a).permute(0, 2, 1, 3) / 40
    kfac = torch.einsum("ik,jl->ijkl", g.T @ g / 40, a.T @ a / 40)
    expected = (dense - kfac).norm() / dense.norm()
    assert errors["after KFAC"][0] == pytest.approx(float(expected), rel=1e-10)


def test_command_writes_a_plot_a_table_and_the_numbers(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tiny_spec(tmp_path, model_folders["opt"])
    linear = "model.decoder.layers.1.fc1"
    plot = tmp_path / "e.png"
    arguments = [str(spec), "--linear", linear, "--plot", str(plot)]
    arguments += ["--rows", "6", "--columns", "6", "--max-terms", "3"]
    assert main([*arguments, "--set", "curvature.fisher=sampled"]) == 0
    assert "3 terms" in capsys.readouterr().out
    errors = json.loads(plot.with_suffix(".json").read_text())[linear]
    assert {len(errors[way]) for way in ("after KFAC", "from the start")} == {3}
    assert plot.stat().st_size > 1000
