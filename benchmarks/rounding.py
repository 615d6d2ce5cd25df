"""Times the rounding of a model's linears to four bits, relative to matrix products.

``python -m benchmarks.rounding`` rounds a random linear of every shape of SmolLM2-135M by GPTQ and
by both sides, in turns. It prints a Markdown table with the milliseconds of the fastest turn, and
in brackets the same time in products of the linear [R, C] with its A [C, C], timed in the same
turns. The last row is the whole model. The time to gather factors is not included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.consumer_costs import seconds
from ray_surgeon.export.rounding import DAMPING
from ray_surgeon.maths.products import product
from ray_surgeon.maths.rounding import Grid, round_linear

SHAPES = {(576, 576): 60, (192, 576): 60, (1536, 576): 60, (576, 1536): 30}
"""Rows and columns -> number of linears in SmolLM2-135M."""
WAYS = ("a product", "GPTQ", "both sides")
_TOKENS = 4096


def second_moments(n: int) -> Tensor:
    """Return [n, n] second moments of random inputs whose channels differ in scale."""
    x = torch.randn(_TOKENS, n) * torch.randn(n).exp()
    return x.T @ x / _TOKENS


def fastest(runs: Sequence[Callable[[], object]], turns: int) -> list[float]:
    """Return the time of the fastest turn of each function, in seconds."""
    found = [float("inf")] * len(runs)
    for _ in range(turns):
        for n, run in enumerate(runs):
            found[n] = min(found[n], seconds(run))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rounding",
        description="Time the rounding of a model's linears.",
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch"
    )
    parser.add_argument(
        "--group-size", type=int, default=64, help="columns that share a scale"
    )
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    grid = Grid(4, arguments.group_size)
    lines = ["| linears | " + " | ".join(WAYS) + " |", "|---|---:|---:|---:|"]
    whole = [0.0] * len(WAYS)
    for (R, C), count in SHAPES.items():
        W, A, G = torch.randn(R, C), second_moments(C), second_moments(R)
        both = partial(round_linear, W, A, G, grid, DAMPING, "linear")
        gptq = partial(round_linear, W, A, None, grid, DAMPING, "linear", ordered=False)
        taken = fastest([partial(product, W, A), gptq, both], arguments.turns)
        whole = [total + count * own for total, own in zip(whole, taken, strict=True)]
        lines.append(_line(f"{R} x {C}", taken))
    lines.append(_line(f"all {sum(SHAPES.values())}", whole))
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _line(name: str, taken: Sequence[float]) -> str:
    cells = [f"{1e3 * own:.4g} ({own / taken[0]:.0f})" for own in taken[1:]]
    return "| " + " | ".join([name, f"{1e3 * taken[0]:.4g}", *cells]) + " |"


if __name__ == "__main__":
    sys.exit(main())
