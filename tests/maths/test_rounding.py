"""Rounding with both factors, against the dense solution and enumeration in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import ray_surgeon.maths.rounding as module
from ray_surgeon.maths.columns import upper_inverse
from ray_surgeon.maths.rounding import FRACTIONS, Grid, round_linear
from tests.maths.dense import draw

R = 20
C = 24
SIZE = 8
GRIDS = [Grid(4, SIZE), Grid(2, SIZE), Grid(8, SIZE)]


def moment(n: int, seed: int) -> Tensor:
    x = draw(200, n, seed=seed) @ draw(n, n, seed=seed + 1)
    return x.T @ x / 200


def objective(E: Tensor, A: Tensor, G: Tensor) -> float:
    return float(((G @ E) * (E @ A)).sum())


def on(grid: Grid, x: Tensor, scale: Tensor) -> Tensor:
    """Return the nearest numbers to `x` that can be stored."""
    limit = 2 ** (grid.num_bits - 1)
    return (x / scale).round().clamp(-limit, limit - 1) * scale


def one_by_one(W: Tensor, A: Tensor, G: Tensor, grid: Grid, height: int) -> Tensor:
    """Round a column of a few rows at a time, and solve for all remaining numbers at once.

    The dense solution minimises vec(E)^T kron(G, A) vec(E) over the remaining numbers, given the
    rounded ones. Rows of a tile do not see each other's errors, so a G is used in which these rows
    are decoupled from each other, given all later rows.
    """
    rows = G.diagonal().argsort(descending=True)
    groups = A.diagonal().view(-1, SIZE).mean(dim=1).argsort(descending=True)
    inside = A.diagonal().view(-1, SIZE)[groups].argsort(dim=1, descending=True)
    columns = (groups[:, None] * SIZE + inside).flatten()
    W, A, G = W[rows][:, columns], A[columns][:, columns], G[rows][:, rows]
    found = torch.zeros_like(W)
    done = torch.zeros_like(W, dtype=torch.bool)
    H = torch.kron(G, A)
    for top, left in itertools.product(range(0, R, height), range(0, C, SIZE)):
        tile = (slice(top, min(top + height, R)), slice(left, left + SIZE))
        target = best_left(W, found, done, H)[tile]
        found[tile] = best_scales(target, A[left:, left:], grid)
        done[tile] = True
    result = torch.empty_like(W)
    result[rows[:, None], columns] = found
    return result


def best_left(W: Tensor, found: Tensor, done: Tensor, H: Tensor) -> Tensor:
    """Return W with its unfinished part set to the minimiser of the objective."""
    errors = torch.where(done, found - W, 0).flatten()
    known = done.flatten()
    change = torch.zeros_like(errors)
    change[~known] = -torch.linalg.solve(
        H[~known][:, ~known], H[~known][:, known] @ errors[known]
    )
    return W + change.view_as(W)


def best_scales(target: Tensor, A: Tensor, grid: Grid) -> Tensor:
    """Round rows independently, column by column, solving for all columns to the right."""
    scales = grid.scales(target[None])
    best = torch.empty_like(target)
    for row in range(len(target)):
        costs = []
        tried = []
        for scale in scales[0, :, row]:
            current = target[row].clone()
            for c in range(SIZE):
                current[c] = on(grid, current[c], scale)
                error = (current - target[row])[: c + 1]
                later = slice(c + 1, SIZE)
                answer = torch.linalg.solve(
                    A[c + 1 :, c + 1 :], A[c + 1 :, : c + 1] @ error
                )
                current[later] = target[row, later] - answer[: SIZE - c - 1]
            error = current - target[row]
            rest = A[SIZE:, :SIZE]
            of_group = A[:SIZE, :SIZE] - rest.T @ torch.linalg.solve(
                A[SIZE:, SIZE:], rest
            )
            costs.append(float(error @ of_group @ error))
            tried.append(current)
        best[row] = tried[costs.index(min(costs))]
    return best


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tiles_are_rounded_after_the_optimal_update(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS_TOGETHER", SIZE)
    W = draw(R, C, seed=2)
    A = moment(C, 3)
    G = moment(R, 5)
    found = round_linear(W, A, G, grid, (0.0, 0.0), "w")
    torch.testing.assert_close(
        found.W, one_by_one(W, A, G, grid, SIZE), rtol=0, atol=1e-9
    )
    scales = found.scales.repeat_interleave(SIZE, dim=1)
    torch.testing.assert_close(on(grid, found.W, scales), found.W, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_identity_G_rounds_each_row_independently(grid: Grid) -> None:
    W = draw(R, C, seed=2)
    A = moment(C, 3)
    whole = round_linear(W, A, None, grid, (0.01, 0.1), "w")
    same = round_linear(W, A, torch.eye(R, dtype=W.dtype), grid, (0.01, 0.1), "w")
    torch.testing.assert_close(whole.W, same.W, rtol=0, atol=1e-12)
    of_each = [round_linear(row[None], A, None, grid, (0.01, 0.1), "w").W for row in W]
    torch.testing.assert_close(whole.W, torch.cat(of_each), rtol=0, atol=1e-12)


def test_rounding_without_ordering_equals_gptq() -> None:
    """Columns are rounded from the left, rows independently of each other."""
    grid = GRIDS[0]
    W = draw(R, C, seed=2)
    A = moment(C, 3)
    found = round_linear(W, A, None, grid, (0.0, 0.0), "w", ordered=False).W
    for row, of_row in zip(W, found, strict=True):
        current = row.clone()
        for left in range(0, C, SIZE):
            done = slice(0, left + SIZE)
            group = best_scales(current[None, left : left + SIZE], A[left:, left:], grid)[
                0
            ]
            torch.testing.assert_close(
                of_row[left : left + SIZE], group, rtol=0, atol=1e-9
            )
            later = slice(left + SIZE, C)
            error = of_row[done] - row[done]
            current[later] = row[later] - torch.linalg.solve(
                A[later, later], A[later, done] @ error
            )


def test_two_sided_rounding_beats_one_sided_and_nearest_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ROWS_TOGETHER", 4)
    grid = GRIDS[0]
    costs = []
    for seed in range(5):
        W = draw(R, C, seed=seed)
        A = moment(C, seed + 10)
        G = moment(R, seed + 20)
        roundings = [
            round_linear(W, A, factor, grid, (0.0, 0.0), "w") for factor in (G, None)
        ]
        scale = W.view(R, -1, SIZE).abs().amax(dim=2, keepdim=True) / 7.5
        nearest = on(grid, W.view(R, -1, SIZE), scale).view(R, C)
        costs.append(
            [objective(x - W, A, G) for x in (*(r.W for r in roundings), nearest)]
        )
    both, one, nearest_ = torch.tensor(costs).mean(dim=0).tolist()
    assert both < 0.8 * one < 0.8 * nearest_


def test_rounding_comes_close_to_the_best_grid_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All points of tiny grids are enumerated, with the scales that rounding chose."""
    monkeypatch.setattr(module, "ROWS_TOGETHER", 1)
    grid = Grid(2, 3)
    ratios = []
    for seed in range(20):
        W = draw(2, 3, seed=seed)
        A = moment(3, seed + 40)
        G = moment(2, seed + 80)
        found = round_linear(W, A, G, grid, (0.0, 0.0), "w")
        points = (
            torch.tensor(list(itertools.product(range(-2, 2), repeat=6)))
            .double()
            .view(-1, 2, 3)
        )
        E = points * found.scales[:, :, None].view(1, 2, 1) - W
        best = float(((G @ E) * (E @ A)).sum(dim=(1, 2)).min())
        ratios.append(objective(found.W - W, A, G) / best)
        assert ratios[-1] >= 1 - 1e-12
    assert sum(ratio < 1.001 for ratio in ratios) >= 5  # often it is the best
    assert sorted(ratios)[10] < 2


def test_a_group_of_zeros_stays_zero() -> None:
    W = draw(R, C, seed=2)
    W[2, SIZE : 2 * SIZE] = 0
    # other groups' errors do not reach it
    A = torch.block_diag(*(moment(SIZE, i) for i in range(C // SIZE)))
    for grid in GRIDS:
        found = round_linear(W, A, None, grid, (0.01, 0.1), "w")
        assert not found.W[2, SIZE : 2 * SIZE].any()
        assert torch.isfinite(found.W).all()
        assert torch.isfinite(found.scales).all()


@pytest.mark.parametrize(
    ("num_columns", "num_tokens", "damping"), [(32, 20, 0.0), (128, 64, 1e-7)]
)
def test_inverse_exists_with_few_tokens_and_little_damping(
    num_columns: int, num_tokens: int, damping: float
) -> None:
    """In float32 the inverse of a matrix with a Cholesky factor may have none."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        scale = torch.logspace(0, -2, num_columns)[
            torch.randperm(num_columns, generator=generator)
        ]
        x = torch.randn(num_tokens, num_columns, generator=generator) * scale
        U, _ = upper_inverse(x.T @ x / num_tokens, damping, 1.0, "w")
        assert torch.isfinite(U).all()
        assert (U.diagonal() > 0).all()


def test_dead_inputs_do_not_change_the_damping_of_others() -> None:
    """Nor does the overall scale of the inputs."""
    A = moment(C, 3)
    live = torch.ones(C, dtype=torch.bool)
    live[[0, 3, 7, 20]] = False
    A *= 1e-6 * torch.outer(live, live)
    U, _ = upper_inverse(A, 0.01, 1.0, "w")
    alone, _ = upper_inverse(A[live][:, live], 0.01, 1.0, "w")
    torch.testing.assert_close(U[live][:, live], alone, rtol=1e-9, atol=0)
    assert not U[~live][:, live].any()
    W = draw(R, C, seed=2)
    found, expected = (
        round_linear(W, each, None, GRIDS[0], (0.01, 0.1), "w").W for each in (A, 1e6 * A)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_first_tried_scale_just_fits_the_largest_weight() -> None:
    groups = draw(R, SIZE, seed=1)[None]
    assert FRACTIONS[0] == 1
    for grid in GRIDS:
        scales = grid.scales(groups)[0, 0, :, None]
        error = (on(grid, groups[0], scales) - groups[0]).abs() / scales
        assert error.max() == pytest.approx(0.5, rel=1e-9)
