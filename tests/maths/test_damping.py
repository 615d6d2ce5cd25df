"""The choice of damping by factors of other tokens, against dense formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ray_surgeon.maths.damping import choose_damping, cost_held_aside
from ray_surgeon.maths.kronecker import Damping, PackedFactors, PackedSymmetric
from ray_surgeon.maths.linear import Linear
from ray_surgeon.maths.masks import StructuredMask

R = 4
C = 6
N = 50


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(a: Tensor, g: Tensor) -> PackedFactors:
    return PackedFactors(PackedSymmetric.of(a.T @ a), PackedSymmetric.of(g.T @ g), len(a))


def damped(moment: Tensor, damping: float) -> Tensor:
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


@pytest.mark.parametrize("prunes_rows", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_cost_held_aside_is_the_quadratic_form_of_the_other_tokens(
    has_bias: bool, prunes_rows: bool
) -> None:
    """The removal and its update follow from the own factors, by constrained least squares. Its
    price from the dense Fisher of others.
    """
    W = draw(R, C, seed=0)
    a, g, a_held, g_held = (draw(N, n, seed=seed) for seed, n in ((1, C), (2, R), (3, C), (4, R)))
    damping = Damping(0.05, 0.2, 1.0)
    linear = Linear("x", W, factors(a, g), has_bias, damping)
    found = cost_held_aside(
        linear, StructuredMask.full(R, C), factors(a_held, g_held), 0.34, prunes_rows=prunes_rows
    )

    A = damped(a.T @ a / N, 0.05)
    G = damped(g.T @ g / N, 0.2)
    column_costs = (W * (G @ W)).sum(0) / torch.linalg.inv(A).diagonal()
    row_costs = ((W @ A) * W).sum(1) / torch.linalg.inv(G).diagonal()
    if has_bias:
        column_costs[-1] = math.inf
    columns = column_costs.argsort()[: int(0.34 * C)]
    rows = row_costs.argsort()[: int(0.34 * R)] if prunes_rows else row_costs.argsort()[:0]
    by_columns = torch.zeros(R, C, dtype=torch.bool)
    by_rows = torch.zeros(R, C, dtype=torch.bool)
    fisher = torch.kron(G, A)
    by_columns[:, columns] = True
    by_rows[rows] = True
    after = W.flatten().clone()
    # independent of each other, as published
    for gone in (by_columns.flatten(), by_rows.flatten()):
        removal = -W.flatten() * gone
        removal[~gone] = -torch.linalg.solve(fisher[~gone][:, ~gone], fisher[~gone] @ removal)
        after += removal
    change = after * ~(by_columns | by_rows).flatten() - W.flatten()
    held = torch.kron(g_held.T @ g_held / N, a_held.T @ a_held / N)
    assert found == pytest.approx(float(change @ held @ change) / 2, rel=1e-9)


def test_dead_rows_and_what_earlier_shots_pruned_take_no_part() -> None:
    W = draw(R, C, seed=0)
    a = draw(N, C, seed=1)
    g = draw(N, R, seed=2)
    a[:, 1] = 0
    g[:, 2] = 0
    mask = StructuredMask.full(R, C)
    mask.columns[0] = False
    whole = Linear("x", W, factors(a, g), False, Damping(0.05, 0.2, 1.0))
    rows = [0, 1, 3]
    columns = [2, 3, 4, 5]
    small = Linear(
        "x", W[rows][:, columns], factors(a[:, columns], g[:, rows]), False, whole.damping
    )
    found = [
        cost_held_aside(linear, kept, linear.factors, 0.5, prunes_rows=True)
        for linear, kept in ((whole, mask), (small, StructuredMask.full(3, 4)))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_little_damping_loses_where_tokens_are_few_and_wins_where_they_are_many() -> None:
    W = draw(R, 12, seed=0)
    mix = draw(12, 12, seed=5)

    def best(num_tokens: int) -> float:
        a = draw(num_tokens, 12, seed=1) @ mix
        g = draw(num_tokens, R, seed=2)
        held = factors(draw(40_000, 12, seed=3) @ mix, draw(40_000, R, seed=4))
        mask = StructuredMask.full(R, 12)

        def cost_of(of_A: float, of_G: float) -> list[float]:
            linear = Linear("x", W, factors(a, g), False, Damping(of_A, of_G, 1.0))
            return [cost_held_aside(linear, mask, held, 0.09, prunes_rows=False)]

        return choose_damping(cost_of, (1e-4, 1e-2, 1.0), (0.1,))[0]

    assert best(8) > best(40_000) == 1e-4


def test_the_choice_is_made_one_after_the_other_and_says_what_was_tried() -> None:
    def cost_of(a: float, g: float) -> list[float]:
        return [
            (math.log(a) - math.log(0.1)) ** 2 + (g - 0.3) ** 2 + 1,
            math.nan if a < 0.001 else 2.0,
        ]

    a, g, tried = choose_damping(cost_of, (0.01, 0.1, 0.5), (0.03, 0.1, 0.3))
    assert (a, g) == (0.1, 0.3)
    assert [(one[0], one[1]) for one in tried] == [
        (0.01, 0.1),
        (0.1, 0.1),
        (0.5, 0.1),
        (0.1, 0.03),
        (0.1, 0.3),
    ]
    assert min(one[2] for one in tried) == 1.0
    assert choose_damping(cost_of, (0.0001, 0.5), (0.1,))[:2] == (0.5, 0.1), (
        "a cost that is no number loses"
    )
    assert choose_damping(lambda a, g: [], (0.1, 0.2), (0.1,)) == (
        0.1,
        0.1,
        [(0.1, 0.1, 1.0), (0.2, 0.1, 1.0)],
    )
