"""On one GPU, in minutes: every method and store gives the CPU's results, and memory is as planned.

``pytest -m gpu``
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from benchmarks.shaped_model import write
from ray_surgeon.maths.products import PackedSymmetric
from ray_surgeon.memory.stores import Place
from tests.integration.runs import report_of, run, tensors_of_shot
from tests.integration.test_pretend_accelerator import (
    BY_ITERATIONS,
    BY_ORDER_OF_SUMS,
    METHODS,
    assert_same,
    run_on,
    small_models,  # noqa: F401 - a fixture
    spec_in,
)
from tests.memory.test_transfers import stored, streamed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

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
def test_methods_match_the_cpu(
    method: str,
    small_models: dict[str, Path],  # noqa: F811 - the fixture
    tmp_path: Path,
) -> None:
    options, (of_weights, of_perplexity) = METHODS[method]
    for device in ("cpu", "cuda"):
        run_on(device, spec_in(tmp_path / device, small_models["llama"], **options))
    on_cpu, on_gpu = (
        report_of(tmp_path / device / "run")["shots"] for device in ("cpu", "cuda")
    )
    found, expected = (shots[-1]["perplexity"]["docs"] for shots in (on_gpu, on_cpu))
    assert found == pytest.approx(expected, rel=max(OTHER_KERNELS * of_perplexity, 1e-5))
    if (of_weights, of_perplexity) != BY_ITERATIONS:
        one, other = (
            tensors_of_shot(tmp_path / d / "run", len(on_cpu)) for d in ("cpu", "cuda")
        )
        assert_same(one, other, max(OTHER_KERNELS * of_weights, 1e-5))


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_background_copies_are_bit_identical(place: Place) -> None:
    for seed in range(20):
        assert stored("cuda:0", place, seed) == stored("cpu", place, seed)
    assert streamed("cuda:0", place) == streamed("cpu", place)


def test_streamed_weights_give_the_results_of_resident_ones(
    small_models: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """CUDA guarantees the bits of a copy, but not those of sums: its libraries also choose kernels
    by the alignment of a matrix in memory.
    """
    found = {}
    for name in ("device", "host", "disk"):
        memory = {"weights": name, "factors": name, "activations": "recompute", "wave": 2}
        options = {"pruning__num_shots": 2, "memory": memory}
        run_on("cuda", spec_in(tmp_path / name, small_models["llama"], **options))
        found[name] = tensors_of_shot(tmp_path / name / "run", 2)
    for name in ("host", "disk"):
        assert_same(found["device"], found[name], OTHER_KERNELS * BY_ORDER_OF_SUMS[0])


@pytest.fixture
def no_ray_after() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.mark.usefixtures("no_ray_after")
@pytest.mark.parametrize("kept", ["auto", "host"])
def test_peak_memory_is_as_planned(kept: str, tmp_path: Path) -> None:
    """Two blocks of Llama-3-8B's shapes, on Ray, so that the worker takes its device."""
    write("llama-3-8b", tmp_path / "model", 2, torch.bfloat16)
    text = {"source": "python-docs", "num_sequences": 4, "sequence_length": 1024}
    options: dict[str, Any] = {
        "model__dtype": "bfloat16",
        "calibration": text | {"num_sequences": 8},
        "evaluation": [text | {"name": "docs"}],
        "pruning": {"structure": "groups", "target_sparsity": 0.2, "num_shots": 1},
        "cluster": {"backend": "ray", "gpus_per_worker": 1},
        "memory": {"weights": kept, "factors": kept},
    }
    assert run(tmp_path, tmp_path / "model", **options) == 0
    report = report_of(tmp_path / "run")
    measured = report["shots"][0]["peak_bytes"]
    planned = report["plan"]["peak_bytes"]
    for step in ("curvature", "costs", "update"):
        assert PLANNED[0] <= measured[step][0] / planned[step][0] <= PLANNED[1], step


@pytest.mark.usefixtures("no_ray_after")
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each rank"
)
def test_replicas_with_nccl(small_models: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    cluster = {"backend": "ray", "gpus_per_worker": 1, "num_replicas": 2}
    options: dict[str, Any] = {"cluster": cluster, "pruning__costs": "obs"}
    assert run(tmp_path, small_models["llama"], **options) == 0
    assert report_of(tmp_path / "run")["shots"][0]["perplexity"]["docs"] > 0


def _rate(work: Any, flops: float) -> float:
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(5):
        work()
    torch.cuda.synchronize()
    return 5 * flops / (time.perf_counter() - start)


def test_second_moments_in_bfloat16(
    record_property: Callable[[str, object], None],
) -> None:
    """They equal the float32 ones. The report of the test has their operations per second, relative
    to those of a plain product.
    """
    n = 11008
    num_tokens = 4096
    x = torch.randn(num_tokens, n, device="cuda").bfloat16()
    weight = torch.randn(n, n, device="cuda").bfloat16()
    total, exact, again = (
        PackedSymmetric.zeros(n, torch.device("cuda")) for _ in range(3)
    )
    plain = _rate(lambda: x @ weight, 2 * num_tokens * n * n)
    packed = _rate(lambda: total.add(x), 2 * num_tokens * len(total.flat))
    exact.add(x.float())
    again.add(x)
    torch.testing.assert_close(again.flat, exact.flat, rtol=1e-4, atol=1e-2)
    record_property("of the GEMM rate", f"{packed / plain:.2f}")
