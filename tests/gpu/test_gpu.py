"""On one GPU, in minutes: every method and store gives the CPU's results, memory is as planned.

``pytest -m gpu``
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from benchmarks.shaped_model import write
from ray_surgeon.maths.kronecker import PackedSymmetric
from tests.integration.runs import report_of, run, tensors_of_shot
from tests.integration.test_pretend_accelerator import (
    BY_ITERATIONS,
    METHODS,
    assert_same,
    run_on,
    small_models,  # noqa: F401 - a fixture
    spec_in,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

OTHER_KERNELS = 50.0
"""How much more than the pretend accelerator's, which has the CPU's kernels, a GPU's results may
differ.
"""
PLANNED = (0.85, 1.15)
"""Measured peak over planned one."""


@pytest.fixture(autouse=True)
def full_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_store(method: str, small_models: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    options, (of_weights, of_perplexity) = METHODS[method]
    for device in ("cpu", "cuda"):
        run_on(device, spec_in(tmp_path / device, small_models["llama"], **options))
    on_cpu, on_gpu = (report_of(tmp_path / device / "run") for device in ("cpu", "cuda"))
    allowed = max(OTHER_KERNELS * of_perplexity, 1e-5)
    assert on_gpu["shots"][-1]["perplexity"]["docs"] == pytest.approx(
        on_cpu["shots"][-1]["perplexity"]["docs"], rel=allowed
    )
    if (of_weights, of_perplexity) != BY_ITERATIONS:
        shots = len(on_cpu["shots"])
        one, other = (tensors_of_shot(tmp_path / d / "run", shots) for d in ("cpu", "cuda"))
        assert_same(one, other, max(OTHER_KERNELS * of_weights, 1e-5))


def test_streamed_weights_give_the_bits_of_resident_ones(
    small_models: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """On one device the kernels are the same wherever the weights come from."""
    ways: dict[str, dict[str, Any]] = {
        "device": {
            "memory__weights": "device",
            "memory__factors": "device",
            "memory__activations": "recompute",
        },
        "host": {"memory__weights": "host", "memory__factors": "host", "memory__wave": 3},
        "disk": {"memory__weights": "disk", "memory__factors": "disk", "memory__wave": 2},
    }
    for name, options in ways.items():
        run_on(
            "cuda", spec_in(tmp_path / name, small_models["llama"], pruning__num_shots=2, **options)
        )
    expected = tensors_of_shot(tmp_path / "device/run", 2)
    for name in ("host", "disk"):
        found = tensors_of_shot(tmp_path / name / "run", 2)
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name


@pytest.mark.parametrize(
    "way", [{}, {"memory__weights": "host", "memory__factors": "host"}], ids=["resident", "host"]
)
def test_peak_memory_is_as_planned(way: dict[str, Any], tmp_path: Path) -> None:
    """Two blocks of Llama-3-8B's shapes, on Ray, so that the worker takes its device."""
    write("llama-3-8b", tmp_path / "model", 2, torch.bfloat16)
    text = {"name": "docs", "source": "python-docs", "num_sequences": 4, "sequence_length": 1024}
    options: dict[str, Any] = {
        "model__dtype": "bfloat16",
        "calibration": {"source": "python-docs", "num_sequences": 8, "sequence_length": 1024},
        "evaluation": [text],
        "pruning": {"structure": "groups", "target_sparsity": 0.2, "num_shots": 1},
        "cluster": {"backend": "ray", "gpus_per_worker": 1},
        **way,
    }
    try:
        assert run(tmp_path, tmp_path / "model", **options) == 0
    finally:
        ray.shutdown()
    report = report_of(tmp_path / "run")
    measured = report["shots"][0]["peak_bytes"]
    planned = report["plan"]["peak_bytes"]
    ratios = {
        step: measured[step][0] / planned[step][0] for step in ("curvature", "costs", "update")
    }
    assert all(PLANNED[0] <= ratio <= PLANNED[1] for ratio in ratios.values()), ratios


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each rank")
def test_replicas_by_nccl(small_models: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    options: dict[str, Any] = {
        "cluster": {"backend": "ray", "gpus_per_worker": 1, "num_replicas": 2},
        "pruning__costs": "obs",
    }
    try:
        assert run(tmp_path / "two", small_models["llama"], **options) == 0
    finally:
        ray.shutdown()
    run_on("cpu", spec_in(tmp_path / "cpu", small_models["llama"], pruning__costs="obs"))
    assert report_of(tmp_path / "two/run")["shots"][0]["perplexity"]["docs"] > 0


def _rate(work: Any, flops: float) -> float:
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(5):
        work()
    torch.cuda.synchronize()
    return 5 * flops / (time.perf_counter() - start)


def test_second_moments_in_bfloat16(record_property: Callable[[str, object], None]) -> None:
    """They equal the float32 ones; their counted operations a second, in those of a plain product,
    are in the report of the test.
    """
    n = 11008
    num_tokens = 4096
    x = torch.randn(num_tokens, n, device="cuda").bfloat16()
    total = PackedSymmetric.zeros(n, torch.device("cuda"))
    weight: Tensor = torch.randn(n, n, device="cuda").bfloat16()
    plain = _rate(lambda: x @ weight, 2 * num_tokens * n * n)
    packed = _rate(lambda: total.add(x), 2 * num_tokens * len(total.flat))
    exact = PackedSymmetric.zeros(n, torch.device("cuda"))
    exact.add(x.float())
    again = PackedSymmetric.zeros(n, torch.device("cuda"))
    again.add(x)
    torch.testing.assert_close(again.flat, exact.flat, rtol=1e-4, atol=1e-2)
    record_property("of the GEMM rate", f"{packed / plain:.2f}")
