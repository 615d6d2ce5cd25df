"""Time of the costs of wide consumers, relative to one GEMM on the same machine.

The table lists factors, single costs and greedy paths.

``python -m benchmarks.consumer_costs --rows 4096 --columns 11008`` prints a Markdown table. The
GEMM is torch's product of two square float32 matrices with the consumer's number of columns, timed
in the same process. With ``--number 128 --device cuda`` both are for a batch of consumers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ray_surgeon.maths.curvature import Linear
from ray_surgeon.maths.greedy import Limits
from ray_surgeon.maths.group_batch import costs_of_groups
from ray_surgeon.maths.kronecker import Damping, PackedFactors
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.products import PackedSymmetric

_TOKENS = 4096


def consumer(num_rows: int, num_columns: int, device: str = "cpu") -> Linear:
    """Return a linear with random weights, and factors of random tokens.

    The channels differ in scale.
    """
    generator = torch.Generator().manual_seed(0)

    def second_moments(n: int) -> PackedSymmetric:
        x = (
            torch.randn(_TOKENS, n, generator=generator)
            * torch.randn(n, generator=generator).exp()
        )
        total = PackedSymmetric.zeros(n)
        total.add(x)
        return PackedSymmetric(n, total.flat.to(device))

    W = (torch.randn(num_rows, num_columns, generator=generator) * num_columns**-0.5).to(
        device
    )
    factors = PackedFactors(
        second_moments(num_columns), second_moments(num_rows), _TOKENS
    )
    return Linear(
        "consumer", W, factors, has_bias=False, damping=Damping(a=0.01, g=0.01, max=1.0)
    )


def seconds(run: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.consumer_costs",
        description="Time the costs of one consumer.",
    )
    parser.add_argument("--rows", type=int, default=4096, help="of the consumer")
    parser.add_argument("--columns", type=int, default=11008, help="of the consumer")
    parser.add_argument(
        "--fractions",
        type=float,
        nargs="+",
        default=[0.2, 0.5, 0.99],
        help="fraction of the columns pruned along a path",
    )
    parser.add_argument(
        "--number", type=int, default=1, help="number of consumers of this shape"
    )
    parser.add_argument("--device", default="cpu", help="on which torch computes")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    n = arguments.columns
    device = arguments.device
    x, y = torch.randn(2, n, n, device=device)
    gemm = min(seconds(lambda: torch.mm(x, y)[:1].cpu()) for _ in range(3))
    linears = [consumer(arguments.rows, n, device)] * arguments.number
    masks = [StructuredMask.full(arguments.rows, n)] * arguments.number
    groups = torch.arange(n)[:, None]
    lines = [
        f"GEMM of {n}^3: {gemm:.1f} s, {2 * n**3 / gemm / 1e9:.0f} GFLOP/s",
        "",
        "| step | seconds | GEMMs |",
        "|---|---:|---:|",
    ]

    def line(step: str, run: Callable[[], object]) -> None:
        taken = seconds(run)
        lines.append(f"| {step} | {taken:.1f} | {taken / gemm:.2f} |")

    def costs(limit: float | None, needed: int) -> Tensor:
        limits = Limits(limit, needed, least=n - needed if needed else 1)
        return costs_of_groups(linears, masks, groups, [limits] * len(linears))[-1][1]

    line("factors, single costs", lambda: costs(None, 0))
    for fraction in arguments.fractions:
        line(
            f"factors, greedy path of {fraction:.0%}",
            partial(costs, -1.0, int(n * fraction)),
        )
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
