from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ray_surgeon.maths.columns import sparsegpt, upper_inverse, wanda
from ray_surgeon.maths.kronecker import RaisedDamping
from tests.maths.dense import damped, problem, silence


def by_sparsegpt(
    W: Tensor, A: Tensor, sparsity: float = 0.5, damping: float = 0.01, **options: Any
) -> tuple[Tensor, Tensor, tuple[RaisedDamping, ...]]:
    U, raised = upper_inverse(A, damping, 1.0, "x")
    live = W.masked_fill(A.diagonal() == 0, 0.0)
    settings: dict[str, Any] = {
        "n": 0,
        "m": 1,
        "before": W != 0,
        "block_size": 128,
    } | options
    return (*sparsegpt(live, U, sparsity, **settings), raised)


def by_definition(
    W: Tensor, A: Tensor, sparsity: float, n: int, m: int, block: int
) -> tuple[Tensor, Tensor]:
    """Return SparseGPT one weight at a time (equations 3 and 4 of its paper).

    This is OBS with the inverse Hessian of the columns from c on.
    """
    W = W.clone()
    R, C = W.shape
    H = damped(A, 0.01)
    kept = torch.ones(R, C, dtype=torch.bool)
    inverse_at = [torch.linalg.inv(H[j:, j:]) for j in range(C)]
    for c in range(C):
        width = m if m > 1 else block
        if c % width == 0:
            part = range(c, min(c + width, C))
            scores = torch.stack(
                [W[:, j] ** 2 / inverse_at[j][0, 0] for j in part], dim=1
            )
            rows = scores if m > 1 else scores.flatten()[None]
            number = m - n if m > 1 else round(sparsity * scores.numel())
            gone = torch.zeros_like(rows, dtype=torch.bool)
            gone.scatter_(1, rows.argsort(dim=1)[:, :number], True)
            kept[:, c : part.stop] = ~gone.view_as(scores)
        for r in range(R):
            if not kept[r, c]:
                W[r, c:] -= W[r, c] / inverse_at[c][0, 0] * inverse_at[c][0]
                W[r, c] = 0
    return W, kept


@pytest.mark.parametrize(
    ("n", "m", "block"), [(0, 1, 4), (0, 1, 100), (2, 4, 100), (1, 2, 3), (3, 4, 8)]
)
def test_sparsegpt_matches_its_definition(n: int, m: int, block: int) -> None:
    W, A, _ = problem(5, 12)
    found, kept, raised = by_sparsegpt(W, A, n=n, m=m, block_size=block)
    expected, expected_kept = by_definition(W, A, 0.5, n, m, block)
    assert torch.equal(kept, expected_kept)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert not raised


def test_sparsegpt_keeps_earlier_pruned_weights_at_zero() -> None:
    """Columns to the right of a block change before the block is chosen, pruned ones too."""
    W, A, _ = problem(8, 24)
    W, before, _ = by_sparsegpt(W, A, 0.3, block_size=4)
    found, kept, _ = by_sparsegpt(W, A, 0.6, before=before, block_size=4)
    assert not (kept & ~before).any()
    assert not found[~kept].any()
    assert float((~kept).double().mean()) >= 0.6


def test_sparsegpt_reports_raised_damping() -> None:
    W, A, _ = problem(5, 12)
    A[:, 1] = A[:, 0]
    A[1] = A[0]
    A -= 1e-9 * A[0, 0] * torch.eye(12, dtype=A.dtype)
    *_, raised = by_sparsegpt(W, A, damping=0.0)
    (event,) = raised
    assert (event.linear, event.factor, event.asked) == ("x", "A", 0.0)
    assert event.used > 0


def test_wanda_keeps_earlier_pruned_weights_at_zero_if_inputs_are_zero() -> None:
    W, A, _ = problem(5, 12)
    before = wanda(W, A.diagonal(), 0.25, 0, 1, before=W != 0)
    silence(A, *range(2, 9))
    kept = wanda(W * before, A.diagonal(), 0.5, 0, 1, before=before)
    assert not (kept & ~before).any()
    assert (kept.sum(dim=1) == 6).all()


@pytest.mark.parametrize(
    ("sparsity", "n", "m", "number"),
    [(0.25, 0, 1, 3), (0.2, 0, 1, 3), (0.0, 2, 4, 2), (0.0, 1, 4, 3)],
)
def test_wanda_keeps_the_largest_scores(
    sparsity: float, n: int, m: int, number: int
) -> None:
    """At least a fifth of 12 is removed, as by other methods."""
    W, A, _ = problem(5, 12)
    scores = (W.abs() * A.diagonal().sqrt()).view(-1, 12 if m == 1 else m)
    kept = wanda(W, A.diagonal(), sparsity, n, m, before=W != 0).view_as(scores)
    largest_gone = scores.sort(dim=1).values[:, number - 1 : number]
    assert torch.equal(kept, scores > largest_gone)
