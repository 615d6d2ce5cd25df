"""What the counter of launches counts, by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.launches import Counter

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
