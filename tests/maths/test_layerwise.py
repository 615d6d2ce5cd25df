from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ray_surgeon.maths.columns import sparsegpt, upper_inverse, wanda
from ray_surgeon.maths.curvature import RaisedDamping
from tests.maths.dense import damped, problem


def pruned(
    W: Tensor, A: Tensor, *options: Any, damping: float = 0.01, **more: Any
) -> tuple[Tensor, Tensor, tuple[RaisedDamping, ...]]:
    U, raised = upper_inverse(A, damping, 1.0, "x")
    return (*sparsegpt(W.masked_fill(A.diagonal() == 0, 0.0), U, *options, **more), raised)


def by_definition(
    W: Tensor, A: Tensor, sparsity: float, n: int, m: int, block: int
) -> tuple[Tensor, Tensor]:
    """SparseGPT one weight at a time: OBS with the inverse Hessian of the columns from c on
    (equations 3 and 4 of its paper).
    """
    W, R, C = W.clone(), *W.shape
    H = damped(A, 0.01)
    kept = torch.ones(R, C, dtype=torch.bool)
    for c in range(C):
        inverse_at = [torch.linalg.inv(H[j:, j:]) for j in range(C)]
        if m == 1 and c % block == 0:
            last = min(c + block, C)
            scores = torch.stack(
                [W[:, j] ** 2 / inverse_at[j][0, 0] for j in range(c, last)], dim=1
            )
            order = scores.flatten().argsort()[: round(sparsity * scores.numel())]
            for place in order.tolist():
                kept[place // (last - c), c + place % (last - c)] = False
        if m > 1 and c % m == 0:
            scores = torch.stack(
                [W[:, j] ** 2 / inverse_at[j][0, 0] for j in range(c, c + m)], dim=1
            )
            for r in range(R):
                kept[r, c + scores[r].argsort()[: m - n]] = False
        inverse = inverse_at[c]
        for r in range(R):
            if not kept[r, c]:
                W[r, c:] -= W[r, c] / inverse[0, 0] * inverse[0]
                W[r, c] = 0
    return W, kept


@pytest.mark.parametrize(("n", "m"), [(0, 1), (2, 4), (1, 2), (1, 4), (3, 4)])
@pytest.mark.parametrize("block", [4, 100])
def test_sparsegpt_is_its_definition(n: int, m: int, block: int) -> None:
    W, A, _ = problem(5, 12)
    found, kept, _ = pruned(W, A, 0.5, n, m, before=W != 0, block_size=block)
    expected, expected_kept = by_definition(W, A, 0.5, n, m, block)
    assert torch.equal(kept, expected_kept)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert not found[~kept].any()


def test_what_sparsegpt_pruned_stays_pruned_in_the_next_shot() -> None:
    """Columns to the right of a block change before the block chooses, pruned ones, too."""
    W, A, _ = problem(8, 24)
    W, before, _ = pruned(W, A, 0.3, 0, 1, before=W != 0, block_size=4)
    found, kept, _ = pruned(W, A, 0.6, 0, 1, before=before, block_size=4)
    assert not (kept & ~before).any()
    assert not found[~kept].any()
    assert float((~kept).double().mean()) >= 0.6


def test_sparsegpt_removes_inputs_that_are_always_zero() -> None:
    W, A, _ = problem(5, 12)
    A[3] = 0
    A[:, 3] = 0
    found, kept, raised = pruned(W, A, 0.5, 0, 1, before=W != 0)
    assert not found[:, 3].any()
    assert torch.isfinite(found).all()
    assert int((~kept).sum()) == 30
    assert not raised


def test_sparsegpt_says_what_it_damped_more_than_asked() -> None:
    W, A, _ = problem(5, 12)
    A[:, 1] = A[:, 0]
    A[1] = A[0]
    A[1, 1] = A[0, 0] = A[0, 1]
    A -= 1e-9 * A[0, 0] * torch.eye(12, dtype=A.dtype)
    *_, raised = pruned(W, A, 0.5, 0, 1, before=W != 0, damping=0.0)
    (event,) = raised
    assert (event.linear, event.factor, event.asked) == ("x", "A", 0.0)
    assert event.used > 0


def test_what_wanda_pruned_stays_pruned_where_inputs_are_zero_now() -> None:
    W, A, _ = problem(5, 12)
    before = wanda(W, A.diagonal(), 0.25, 0, 1, before=W != 0)
    A[:, 2:9] = 0
    A[2:9] = 0
    kept = wanda(W * before, A.diagonal(), 0.5, 0, 1, before=before)
    assert not (kept & ~before).any()
    assert (kept.sum(dim=1) == 6).all()


def test_wanda_keeps_the_largest_of_each_row_or_group() -> None:
    W, A, _ = problem(5, 12)
    scores = W.abs() * A.diagonal().sqrt()
    kept = wanda(W, A.diagonal(), 0.25, 0, 1, before=W != 0)
    for r in range(5):
        assert set((~kept[r]).nonzero()[:, 0].tolist()) == set(scores[r].argsort()[:3].tolist())
    assert int((~wanda(W, A.diagonal(), 0.2, 0, 1, before=W != 0)).sum(dim=1).min()) == 3, (
        "at least a fifth of 12, as other methods do"
    )
    kept = wanda(W, A.diagonal(), 0.0, 2, 4, before=W != 0)
    for r in range(5):
        for start in (0, 4, 8):
            expected = scores[r, start : start + 4].argsort()[:2] + start
            assert set((~kept[r, start : start + 4]).nonzero()[:, 0].tolist()) == {
                int(e) - start for e in expected
            }
    assert (wanda(W, A.diagonal(), 0.0, 1, 4, before=W != 0).view(5, 3, 4).sum(dim=2) == 1).all()
