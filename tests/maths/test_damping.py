"""The choice of damping by the factors of other tokens, against dense formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ray_surgeon.maths.curvature import Linear
from ray_surgeon.maths.kronecker import Damping, PackedFactors
from ray_surgeon.maths.structured import choose_damping, cost_held_aside
from tests.maths.dense import crossing, dense_minimum, draw, fisher, packed

R = 5
C = 7
N = 50


def factors(a: Tensor, g: Tensor) -> PackedFactors:
    return PackedFactors(packed(a.T @ a), packed(g.T @ g), len(a))


@pytest.mark.parametrize("prunes_rows", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_held_aside_cost_uses_the_factors_of_other_tokens(
    has_bias: bool, prunes_rows: bool
) -> None:
    """The removal and its update follow from a linear's own factors, rows and columns
    independently. Their cost is computed with the dense Fisher of other tokens. One input and one
    gradient are always zero, and an earlier shot pruned a column.
    """
    W = draw(R, C)
    a, g, a_held, g_held = (
        draw(N, n, seed=seed) for seed, n in ((1, C), (2, R), (3, C), (4, R))
    )
    a[:, 1] = 0
    g[:, 2] = 0
    W[:, 0] = 0
    linear = Linear("x", W, factors(a, g), has_bias, Damping(0.05, 0.2, 1.0))
    held = factors(a_held, g_held)
    found = cost_held_aside(linear, held, 0.5, prunes_rows=prunes_rows)

    part = linear.nonzero
    assert part.rows.tolist() == [r != 2 for r in range(R)]
    assert part.columns.tolist() == [c > 1 for c in range(C)]
    W = part.of(W)
    F = fisher(linear, part, linear.damping)

    def update_without(rows: list[int], columns: list[int]) -> tuple[Tensor, float]:
        return dense_minimum(W, F, crossing(4, 5, rows, columns))

    by_column = [update_without([], [c])[1] for c in range(5)]
    by_row = [update_without([r], [])[1] for r in range(4)]
    by_column[-1] = math.inf if has_bias else by_column[-1]
    columns = sorted(range(5), key=lambda c: by_column[c])[:2]
    rows = sorted(range(4), key=lambda r: by_row[r])[: 2 * prunes_rows]
    after = update_without(rows, [])[0] + update_without([], columns)[0] - W
    change = (after * ~crossing(4, 5, rows, columns) - W).flatten()
    a_held = a_held[:, part.columns]
    g_held = g_held[:, part.rows]
    dense = torch.kron(g_held.T @ g_held / N, a_held.T @ a_held / N)
    assert found == pytest.approx(float(change @ dense @ change) / 2, rel=1e-9)


def test_damping_of_A_is_chosen_before_that_of_G() -> None:
    """The result lists all tried values. A NaN cost is never chosen."""

    def cost_of(a: float, g: float) -> list[float]:
        return [
            math.log(a / 0.1) ** 2 + (g - 0.3) ** 2 + 1,
            math.nan if a < 0.001 else 2.0,
        ]

    a, g, tried = choose_damping(cost_of, (0.01, 0.1, 0.5), (0.03, 0.1, 0.3))
    assert (a, g) == (0.1, 0.3)
    pairs = [(0.01, 0.1), (0.1, 0.1), (0.5, 0.1), (0.1, 0.03), (0.1, 0.3)]
    assert [one[:2] for one in tried] == pairs
    assert min(one[2] for one in tried) == 1.0
    assert choose_damping(cost_of, (0.0001, 0.5), (0.1,))[:2] == (0.5, 0.1)
    of_nothing = choose_damping(lambda a, g: [], (0.1, 0.2), (0.1,))
    assert of_nothing == (0.1, 0.1, [(0.1, 0.1, 1.0), (0.2, 0.1, 1.0)])
