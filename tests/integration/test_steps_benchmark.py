"""The operations and seconds that `benchmarks.steps` counts."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from benchmarks.steps import Operations, run_steps
from ray_surgeon.maths import products
from tests.integration.runs import tiny_spec


def test_operations_are_counted() -> None:
    n = 160
    x = torch.randn(n, n)
    assert n**3 >= products.WORTH_IT, "the size is large enough for the fast product"
    triangle = torch.linalg.cholesky(x @ x.T + n * torch.eye(n))
    calls = {
        lambda: products.product(x, x): 2 * n**3,
        lambda: x.bfloat16() @ x.bfloat16(): 2 * n**3,
        lambda: torch.addmm(x, x, x[:, :5] @ x[:5]): 2 * n**3 + 10 * n**2,
        lambda: torch.linalg.cholesky(triangle @ triangle.T): 2 * n**3 + n**3 // 3,
        lambda: torch.linalg.solve_triangular(triangle, x[:, :7], upper=False): 7 * n**2,
        lambda: x + x: 0,
    }
    for call, expected in calls.items():
        with Operations() as operations:
            call()
        assert sum(operations.done.values()) == expected
    leaf = x.clone().requires_grad_()
    with Operations() as operations:
        products.times(leaf, x).sum().backward()
    assert operations.done == {torch.float32: 4 * n**3}


def test_every_step_reports_seconds_and_operations(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Reconstruction counts as a part of the update."""
    changes = {
        "pruning": {"structure": "groups", "target_sparsity": 0.2, "width_multiple": 4},
        "pruning__reconstruction": {"num_epochs": 1, "learning_rate": 0.01},
        "cluster__cpus_per_worker": 1,
    }
    path = tiny_spec(tmp_path, model_folders["llama"], **changes)
    plain = yaml.safe_load(path.read_text())
    trained = plain | {
        "recovery": {"num_tokens": 80, "sequences_per_step": 1, "learning_rate": 0.001}
    }
    seconds, flops = run_steps(trained, tmp_path / "with", Operations())
    assert {"evaluation", "curvature", "costs", "update", "recovery"} <= set(flops)
    assert all(seconds[step] > 0 for step in flops)
    without, none = run_steps(plain, tmp_path / "without", None)
    assert not none
    assert "recovery" not in without
    changes["pruning__reconstruction"] = None
    bare = yaml.safe_load(
        tiny_spec(tmp_path, model_folders["llama"], **changes).read_text()
    )
    _, fewer = run_steps(bare, tmp_path / "bare", Operations())
    assert fewer["update"]["float32"] < flops["update"]["float32"]
    # corrections are measured on windows on which the dense model is measured, too
    assert fewer["evaluation"]["float32"] < flops["evaluation"]["float32"]
