"""What the counter of launches counts, by hand, and in the steps of runs.

Whole runs are on a pretend accelerator, in processes of their own; see pretend_accelerator.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.launches import (
    Counter,
    counted_steps,
    of_a_block,
    tiny_llama,
    tiny_mixture,
)
from tests.conftest import Zygote

X = torch.randn(4, 4)
MASK = X > 0
CASES: dict[str, tuple[Callable[[], object], int, int]] = {
    "sum": (lambda: X + X, 1, 0),
    "view": (lambda: X.t()[1:].unsqueeze(0), 0, 0),
    "allocation": (lambda: torch.empty(4, 4).resize_(2, 2), 0, 0),
    "zeros": (lambda: torch.zeros(4), 1, 0),
    "scalar": (lambda: float(X[0, 0]), 0, 1),
    "truth": (lambda: bool((X > 0).any()), 2, 1),
    "nonzero": (lambda: MASK.nonzero(), 1, 1),
    "mask": (lambda: X[MASK], 1, 1),
    "places": (lambda: X[torch.tensor([0, 1])], 1, 0),
    "filled": (lambda: X.clone().masked_fill_(MASK, 0.0), 2, 0),
    "assigned by mask": (lambda: X.clone().__setitem__(MASK, 0.0), 2, 0),
    "equal": (lambda: torch.equal(X, X), 1, 1),
    "bincount": (lambda: torch.bincount(torch.arange(3)), 2, 1),
    "empty": (lambda: X[:0] @ X, 0, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_launches_and_syncs(case: str) -> None:
    compute, launches, syncs = CASES[case]
    with Counter() as counter:
        compute()
    assert (counter.launches, counter.syncs) == (launches, syncs), counter.operators


def test_bytes_and_operations() -> None:
    x = torch.randn(8, 4)
    y = torch.randn(4, 2)
    with Counter() as counter:
        product = x @ y
        product.add_(1.0)
        x[torch.tensor([1, 2])]
    assert counter.flops == {torch.float32: 2 * 8 * 4 * 2}
    # operands and result; read and written; two rows read and written, and their indices
    assert counter.bytes == 4 * (32 + 8 + 16) + 2 * 4 * 16 + 2 * 4 * 8 + 2 * 8


def test_backward_passes_count() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    with Counter() as counter:
        (x @ x).sum().backward()
    assert counter.operators["mm"] == 3
    assert sum(counter.flops.values()) == 3 * 2 * 4**3


# In runs

TENTH = 0.1
DENSE: dict[str, Any] = {
    "pruning": {"groups": ["ffn"], "width_multiple": 8, "allocation": "uniform"}
}
RECONSTRUCTED = {
    "pruning": DENSE["pruning"] | {"reconstruction": {"tokens_per_step": 128}},
    "recovery": {"rank": 4, "num_tokens": 8 * 64, "sequences_per_step": 1},
}
OF_EIGHT_STEPS: dict[str, Any] = {"num_tokens": 8 * 64, "sequences_per_step": 1}
TAUGHT = DENSE | {
    "recovery": OF_EIGHT_STEPS | {"rank": 4, "texts": [{"source": "python-code"}]},
    "memory": {"teacher": "host"},
}
ALL_WEIGHTS = DENSE | {"recovery": OF_EIGHT_STEPS | {"rank": "all"}}
MIXTURE = {"pruning": {"groups": ["expert_channels"], "width_multiple": 8}}
WHOLE = {"pruning": {"groups": ["expert_channels", "experts"], "width_multiple": 8}}


def counts_of(kind: str, sections: dict[str, Any]) -> dict[str, list[float]]:
    """Return the launches and syncs of each step, and what the plan says of the curvature pass.

    That is the operations and bytes as counted, and as planned.
    """
    is_mixture = kind in {"mixture", "whole"}
    config = tiny_mixture(2, 16) if is_mixture else tiny_llama(2)
    with tempfile.TemporaryDirectory() as folder:
        steps, plan = counted_steps(config, Path(folder), "sim", **sections)
    found: dict[str, list[float]] = {}
    for name, own in steps.items():
        found[name] = [own.launches, own.syncs]
    (step,) = plan.steps["curvature"]
    own = steps["curvature"]
    found["against the plan"] = [
        sum(own.flops.values()),
        own.bytes,
        step.flops + step.float32_flops,
        step.memory_bytes,
    ]
    return found


def on_sim(zygote: Zygote, function: Callable[..., object], **arguments: object) -> Any:
    request = {
        "function": f"{function.__module__}:{function.__name__}",
        "arguments": arguments,
    }
    return zygote.run_module("tests.pretend_accelerator", request)["returned"]


# Launches and syncs of steps, without those that depend on the data: on how far greedy paths are
# followed, and on which experts are removed whole
OF_DENSE = {
    "load": (23, 23),
    "evaluation": (185, 3),
    "curvature": (588, 2),
    "costs": (1682, 92),
    "update": (240, 58),
    "commit": (18, 18),
}
OF_MIXTURE = {"load": (119, 119), "evaluation": (337, 7), "commit": (104, 104)}
RUNS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, int]]]] = {
    "dense": (DENSE, OF_DENSE),
    "trained": (
        RECONSTRUCTED,
        OF_DENSE | {"update": (1942, 182), "recovery": (5095, 108)},
    ),
    "taught": (TAUGHT, OF_DENSE | {"recovery": (5255, 140)}),
    "all weights": (ALL_WEIGHTS, OF_DENSE | {"recovery": (3742, 160)}),
    "mixture": (MIXTURE, OF_MIXTURE | {"curvature": (1026, 4), "update": (3486, 728)}),
    "whole": (WHOLE, OF_MIXTURE | {"curvature": (1488, 10)}),
}


@pytest.mark.parametrize("kind", RUNS)
def test_steps_launch_no_more_than_was_counted(kind: str, zygote: Zygote) -> None:
    sections, most = RUNS[kind]
    found = on_sim(zygote, counts_of, kind=kind, sections=sections)
    for step, counted in most.items():
        for number, limit in zip(found[step], counted, strict=True):
            assert number <= (1 + TENTH) * limit, (step, found)
    flops, size, planned_flops, planned_size = found["against the plan"]
    assert planned_flops == pytest.approx(flops, rel=TENTH)
    assert 0.5 < planned_size / size < 1.1


@pytest.mark.parametrize(
    ("name", "launches", "syncs"),
    [
        ("dense", 16, 0.0),
        ("mixture", 200, 0.2),
        pytest.param("whole", 400, 0.6, marks=pytest.mark.slow),
    ],
)
def test_launches_of_a_block_do_not_increase(
    name: str, launches: float, syncs: float, zygote: Zygote
) -> None:
    counted = on_sim(zygote, of_a_block, name=name, device="sim")
    assert counted[0] <= launches
    assert counted[1] <= syncs
