"""Greedy paths of rows and columns; those of groups are in tests/maths/test_groups.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ray_surgeon.maths.curvature import LinearCurvature
from ray_surgeon.maths.greedy import GreedyPath, Limits, greedy_costs
from ray_surgeon.maths.kronecker import Damping, root
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.structured import find_candidates
from tests.maths.dense import (
    crossing,
    damped,
    dense_minimum,
    flags,
    linear,
    problem,
    silence,
    spd,
)

R = 6
C = 7


UNDAMPED = Damping(0.0, 0.0, 0.0)


def curvature_of(W: Tensor, A: Tensor, G: Tensor) -> LinearCurvature:
    undamped = replace(linear(W, A, G), damping=UNDAMPED)
    return LinearCurvature(undamped, StructuredMask.full(*W.shape))


def path(rows: int = R, columns: int = C) -> tuple[GreedyPath, Tensor, Tensor]:
    """Return a path that may remove the first rows and columns, the weights, and F."""
    W, A, G = problem(R, C)
    may_prune = flags(R, list(range(rows))), flags(C, list(range(columns)))
    return GreedyPath(curvature_of(W, A, G), may_prune), W, torch.kron(G, A)


def test_root_of_a_block_made_indefinite_by_rounding() -> None:
    block = torch.tensor([[1.0, 1.0 + 1e-6], [1.0 + 1e-6, 1.0]])
    L = root(block)
    assert torch.equal(L, L.tril())
    torch.testing.assert_close(L @ L.T, block, rtol=1e-5, atol=1e-5)


def test_costs_of_wide_sets_match_the_dense_costs_on_two_threads() -> None:
    width = 192
    W = torch.randn(5, 3 * width)
    sets = torch.arange(3 * width).view(3, width)
    matrices = spd(3 * width, 0), spd(5, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        A, G = (damped(matrix, 0.1).float() for matrix in matrices)
        may_prune = flags(5, []), flags(3, [0, 1, 2])
        found = GreedyPath(curvature_of(W, A, G), may_prune, sets).column_set_costs()
    finally:
        torch.set_num_threads(before)
    inverse = torch.linalg.inv(A.double())
    for cost, places in zip(found.tolist(), sets, strict=True):
        part = W[:, places].double()
        own = torch.linalg.inv(inverse[places][:, places])
        expected = 0.5 * torch.trace(part.T @ G.double() @ part @ own)
        assert cost == pytest.approx(float(expected), rel=1e-3)


def test_weights_and_costs_after_downdating_match_the_dense_solution() -> None:
    """After alternating removals W is the dense joint solution, and each cost is what its removal
    adds to the dense cost.
    """
    found, W, F = path()
    found.remove_rows(torch.tensor([1, 4]))
    found.remove_columns(torch.tensor([0]))
    found.remove_rows(torch.tensor([3]))
    found.remove_columns(torch.tensor([5, 2]))
    rows = [1, 3, 4]
    columns = [0, 2, 5]
    expected, before = dense_minimum(W, F, crossing(R, C, rows, columns))
    torch.testing.assert_close(found.W, expected, rtol=1e-9, atol=1e-11)
    by_row = [
        dense_minimum(W, F, crossing(R, C, [*rows, r], columns))[1] for r in range(R)
    ]
    by_column = [
        dense_minimum(W, F, crossing(R, C, rows, [*columns, c]))[1] for c in range(C)
    ]
    for costs, after in (
        (found.row_costs(), by_row),
        (found.column_set_costs(), by_column),
    ):
        assert costs.tolist() == pytest.approx(
            [cost - before for cost in after], rel=1e-8, abs=1e-12
        )


def marginals_by_brute_force(
    W: Tensor,
    F: Tensor,
    rows: Sequence[int],
    columns: Sequence[int],
    *,
    per_parameter: bool,
) -> tuple[Tensor, list[int]]:
    """Return the running maximum of the dense marginal costs and the order of removal.

    Rows come before columns. The cheapest structure is removed first, one at a time.
    """
    sizes = {"rows": W.shape[0], "columns": W.shape[1]}
    gone: dict[str, list[int]] = {"rows": [], "columns": []}
    marginal = torch.full((sum(W.shape),), torch.inf, dtype=W.dtype)
    order = list[int]()

    def cost(**more: list[int]) -> float:
        sides = [gone[side] + more.get(side, []) for side in gone]
        return dense_minimum(W, F, crossing(*W.shape, *sides))[1] if any(sides) else 0.0

    highest = 0.0
    while len(order) < len(rows) + len(columns):
        options = []
        for side, other, indices in (
            ("rows", "columns", rows),
            ("columns", "rows", columns),
        ):
            entries = max(1, sizes[other] - len(gone[other])) if per_parameter else 1
            for i in set(indices) - set(gone[side]):
                options.append(((cost(**{side: [i]}) - cost()) / entries, side, i))
        cheapest, side, i = min(options)
        highest = max(highest, cheapest)
        gone[side].append(i)
        order.append(i if side == "rows" else len(W) + i)
        marginal[order[-1]] = highest
    return marginal, order


@pytest.mark.parametrize("per_parameter", [False, True])
def test_greedy_path_matches_brute_force(per_parameter: bool) -> None:
    """Brute force removes the structure of the lowest dense marginal cost, one at a time. A limit
    ends the same path earlier.
    """
    found, W, F = path(R - 1, C - 1)
    marginal = torch.cat(
        greedy_costs(found, Limits(per_parameter=per_parameter), "linear")
    )
    sides = range(R - 1), range(C - 1)
    expected, _ = marginals_by_brute_force(W, F, *sides, per_parameter=per_parameter)
    torch.testing.assert_close(marginal, expected, rtol=1e-7, atol=0)
    assert torch.isinf(marginal[[R - 1, R + C - 1]]).all()
    limit = float(marginal.sort().values[5])
    shorter, _, _ = path(R - 1, C - 1)
    cut = greedy_costs(shorter, Limits(limit, per_parameter=per_parameter), "linear")
    assert torch.equal(
        torch.cat(cut), torch.where(marginal <= limit, marginal, torch.inf)
    )


def test_greedy_candidates_are_limited_to_live_rows_and_columns() -> None:
    W, A, G = problem(R, C)
    silence(G, 2)
    mask = StructuredMask(~flags(R, []), ~flags(C, [3]))
    mask.apply_(W)
    of = linear(W, A, G, has_bias=True)
    once = find_candidates(of, mask, "rows_columns", "obs", Limits(None))
    limit = float(sum(x[x.isfinite()].max() for x in (once.rows, once.columns)))
    found = find_candidates(of, mask, "rows_columns", "obs", Limits(limit))
    assert found.rows[2] == 0.0
    assert set(found.columns.isfinite().nonzero()[:, 0].tolist()) <= {0, 1, 2, 4, 5}
    assert torch.cat([found.rows, found.columns]).isfinite().sum() > 3
    removal, _ = found.prune(of, mask, limit, "full")
    assert removal.predicted > 0
    assert not removal.W[found.rows.isfinite()].any()
