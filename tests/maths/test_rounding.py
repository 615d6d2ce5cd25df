"""Rounding column by column against the dense solution, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ray_surgeon.maths.columns import FRACTIONS, nearest, round_columns, scales_of, upper_inverse
from tests.maths.dense import draw

R = 5
C = 24
SIZE = 8
BITS = 4


def rounded(W: Tensor, A: Tensor, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    U, _ = upper_inverse(A, damping, 1.0, "w")
    return round_columns(W, U, SIZE, BITS)


def problem(num_columns: int = C) -> tuple[Tensor, Tensor]:
    x = draw(200, num_columns) @ draw(num_columns, num_columns, seed=1)
    return draw(R, num_columns, seed=2), x.T @ x / 200


def one_by_one(W: Tensor, A: Tensor) -> Tensor:
    """Round a column, then solve for all to its right at once, from the original weights."""
    found = W.clone()
    current = W.clone()
    # least cost of a unit error of column c
    importance = torch.stack([1 / torch.linalg.inv(A[c:, c:])[0, 0] for c in range(len(A))])
    for c in range(W.shape[1]):
        if c % SIZE == 0:
            scale = scales_of(current[:, c : c + SIZE], importance[c : c + SIZE], BITS)
        found[:, c] = nearest(current[:, c], scale, BITS)
        done = slice(0, c + 1)
        rest = slice(c + 1, None)
        # least tr(D A D^T) over D_rest, with D_done = found - W: D_rest = -D_done A_done,rest
        # A_rest,rest^-1
        change = -(found[:, done] - W[:, done]) @ A[done, rest] @ torch.linalg.inv(A[rest, rest])
        current[:, rest] = W[:, rest] + change
    return found


def test_columns_are_rounded_after_the_best_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of columns change nothing."""
    W, A = problem(64)
    expected = one_by_one(W, A)
    for block_size in (128, 12):  # rounded up to two groups
        monkeypatch.setattr("ray_surgeon.maths.columns.BLOCK_SIZE", block_size)
        found, scales = rounded(W, A)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        integers = found.view(R, -1, SIZE) / scales[..., None]
        torch.testing.assert_close(integers, integers.round().clamp(-8, 7), rtol=0, atol=1e-9)


def test_a_group_of_zeros_stays_zero() -> None:
    W, A = problem()
    W[2, SIZE : 2 * SIZE] = 0
    # other groups' errors do not reach it
    A = torch.block_diag(*(A[i : i + SIZE, i : i + SIZE] for i in range(0, C, SIZE)))
    found, scales = rounded(W, A)
    assert not found[2, SIZE : 2 * SIZE].any()
    assert torch.isfinite(found).all()
    assert torch.isfinite(scales).all()


@pytest.mark.parametrize(("num_columns", "num_tokens", "damping"), [(32, 20, 0.0), (128, 64, 1e-7)])
def test_few_tokens_and_little_damping(num_columns: int, num_tokens: int, damping: float) -> None:
    """In float32 the inverse of what has a Cholesky factor may have none."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        scale = torch.logspace(0, -2, num_columns)[torch.randperm(num_columns, generator=generator)]
        x = torch.randn(num_tokens, num_columns, generator=generator) * scale
        U, _ = upper_inverse(x.T @ x / num_tokens, damping, 1.0, "w")
        assert torch.isfinite(U).all()
        assert (U.diagonal() > 0).all()


def test_inputs_that_are_always_zero_change_no_damping_of_the_others() -> None:
    """Nor does the strength of all."""
    W, A = problem()
    live = torch.ones(C, dtype=torch.bool)
    live[[0, 3, 7, 20]] = False
    A *= 1e-6 * torch.outer(live, live)
    U, _ = upper_inverse(A, 0.01, 1.0, "w")
    alone, _ = upper_inverse(A[live][:, live], 0.01, 1.0, "w")
    torch.testing.assert_close(U[live][:, live], alone, rtol=1e-9, atol=0)
    assert not U[~live][:, live].any()
    found, expected = (rounded(W, each, 0.01)[0] for each in (A, 1e6 * A))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_scale_is_the_best_that_is_tried() -> None:
    group = problem()[0][:, :SIZE]
    weight = torch.arange(1.0, SIZE + 1, dtype=torch.float64)
    for row, found in zip(group, scales_of(group, weight, BITS), strict=True):
        tried = [row.abs().max() / 7.5 * fraction for fraction in FRACTIONS]
        errors = [((row - nearest(row, scale, BITS)).square() * weight).sum() for scale in tried]
        assert float(found) == pytest.approx(float(tried[int(torch.stack(errors).argmin())]))
