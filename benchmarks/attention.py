"""Causal attention on a CPU: matrix products compared with torch's own kernel.

``python -m benchmarks.attention`` measures both in the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.consumer_costs import seconds
from ray_surgeon.models.attention import in_products
from ray_surgeon.report.display import new_console


def by_torch(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """Return the attention, computed by torch's kernel; see `in_products`."""
    return scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=1.0, enable_gqa=True
    )


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Return the milliseconds of the fastest repeat, after one for warm-up."""
    seconds(work)
    return 1e3 * min(seconds(work) for _ in range(repeats))


def both(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    gradients: bool,
    repeats: int,
) -> tuple[float, float]:
    """Return the milliseconds of the products and of torch's kernel."""
    leaves = [part.detach().requires_grad_(gradients) for part in (query, key, value)]

    def passing(attend: Callable[..., Tensor]) -> None:
        outputs = attend(*leaves, causal=causal)
        if gradients:
            torch.autograd.grad(outputs, leaves, torch.ones_like(outputs))

    own, torchs = (
        milliseconds(partial(passing, attend), repeats)
        for attend in (in_products, by_torch)
    )
    return own, torchs


def main(arguments: Sequence[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention", description=__doc__
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[256, 512, 1024, 2048],
        help="lengths of a sequence",
    )
    parser.add_argument(
        "--heads",
        type=int,
        default=9,
        help="number of query heads; 9 and 3 are SmolLM2-135M's",
    )
    parser.add_argument("--key-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument(
        "--texts", type=int, default=64, help="number of texts decoded together"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parsed = parser.parse_args(arguments)
    if parsed.heads % parsed.key_heads:
        parser.error(
            f"--heads: {parsed.heads} query heads are not a multiple of {parsed.key_heads} key "
            "heads"
        )
    torch.set_num_threads(parsed.threads)
    table = Table(
        title=f"bfloat16, {parsed.heads} heads of {parsed.head_dim}, {parsed.key_heads} of keys, "
        f"{parsed.threads} threads"
    )
    for column in ("", "in products, ms", "torch's kernel, ms", "ratio"):
        table.add_column(column, justify="right")

    def heads(n: int, length: int, count: int) -> Tensor:
        return torch.randn(n, length, count, parsed.head_dim).bfloat16().transpose(1, 2)

    for length in parsed.tokens:
        parts = (
            heads(1, length, parsed.heads),
            heads(1, length, parsed.key_heads),
            heads(1, length, parsed.key_heads),
        )
        for gradients in (False, True):
            own, torchs = both(
                *parts, causal=True, gradients=gradients, repeats=parsed.repeats
            )
            name = f"{length} tokens{' and gradients' if gradients else ''}"
            table.add_row(name, f"{own:.2f}", f"{torchs:.2f}", f"{torchs / own:.1f}")
    cached = heads(parsed.texts, 128, parsed.key_heads)
    own, torchs = both(
        heads(parsed.texts, 1, parsed.heads),
        cached,
        cached,
        causal=False,
        gradients=False,
        repeats=parsed.repeats,
    )
    table.add_row(
        f"the next token of {parsed.texts} texts of 128",
        f"{own:.2f}",
        f"{torchs:.2f}",
        f"{torchs / own:.1f}",
    )
    new_console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
