import pytest
import torch

from ray_surgeon.maths.rows_columns import (
    column_costs,
    diagonal_column_costs,
    diagonal_row_costs,
    prune_columns,
    prune_rows,
    prune_rows_and_columns,
    prune_singly,
    quadratic_cost,
    row_costs,
)
from tests.maths.dense import assert_exact, crossing, dense_removal, flags, problem


@pytest.mark.parametrize("seed", range(3))
def test_row_cost_is_the_dense_cost(seed: int) -> None:
    W, A, G = problem(seed=seed)
    costs = row_costs(W, A, torch.linalg.inv(G).diagonal())
    for r in range(len(W)):
        _, cost = dense_removal(W, A, G, crossing(6, 7, [r], []))
        assert float(costs[r]) == pytest.approx(cost, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_column_cost_is_the_dense_cost(seed: int) -> None:
    W, A, G = problem(seed=seed)
    costs = column_costs(W, G, torch.linalg.inv(A).diagonal())
    for c in range(W.shape[1]):
        _, cost = dense_removal(W, A, G, crossing(6, 7, [], [c]))
        assert float(costs[c]) == pytest.approx(cost, rel=1e-9)


def test_quadratic_cost_is_the_dense_form() -> None:
    W, A, G = problem()
    F = torch.kron(G, A)
    assert quadratic_cost(W, A, G) == pytest.approx(
        float(0.5 * W.reshape(-1) @ F @ W.reshape(-1)), rel=1e-12
    )


@pytest.mark.parametrize("rows", [[0], [1, 4], [0, 2, 3, 5]])
def test_row_update_is_the_dense_solution(rows: list[int]) -> None:
    W, A, G = problem()
    expected, _ = dense_removal(W, A, G, crossing(6, 7, rows, []))
    assert_exact(prune_rows(W, G, flags(6, rows)), expected)


@pytest.mark.parametrize("columns", [[6], [0, 3], [1, 2, 4, 5]])
def test_column_update_is_the_dense_solution(columns: list[int]) -> None:
    W, A, G = problem()
    expected, _ = dense_removal(W, A, G, crossing(6, 7, [], columns))
    assert_exact(prune_columns(W, A, flags(7, columns)), expected)


@pytest.mark.parametrize(("rows", "columns"), [([2], []), ([0, 4], []), ([], [3, 5])])
def test_update_of_rows_or_columns_alone_is_the_dense_solution_and_has_its_cost(
    rows: list[int], columns: list[int]
) -> None:
    W, A, G = problem()
    expected, cost = dense_removal(W, A, G, crossing(6, 7, rows, columns))
    found = prune_rows_and_columns(W, A, G, flags(6, rows), flags(7, columns))
    assert_exact(found, expected)
    assert quadratic_cost(found - W, A, G) == pytest.approx(cost, rel=1e-9)


def test_update_of_rows_and_columns_is_the_dense_solution_without_the_cross_term() -> None:
    """W_KL + M W_PL + W_KQ N against the dense W_KL + M W_PL + W_KQ N + M W_PQ N."""
    W, A, G = problem()
    P = flags(6, [1, 4])
    Q = flags(7, [2, 6])
    K = ~P
    L = ~Q
    M = torch.linalg.solve(G[K][:, K], G[K][:, P])
    N = torch.linalg.solve(A[L][:, L], A[L][:, Q]).T
    expected = torch.zeros_like(W)
    kept = torch.outer(K, L)
    expected[kept] = (W[K][:, L] + M @ W[P][:, L] + W[K][:, Q] @ N).reshape(-1)
    found = prune_rows_and_columns(W, A, G, P, Q)
    assert_exact(found, expected)
    exact, _ = dense_removal(W, A, G, crossing(6, 7, [1, 4], [2, 6]))
    assert_exact(exact[K][:, L] - found[K][:, L], M @ W[P][:, Q] @ N)


def test_removing_everything_or_nothing() -> None:
    W, A, G = problem()
    everything = prune_rows_and_columns(W, A, G, flags(6, list(range(6))), flags(7, [1]))
    assert not everything.any()
    assert torch.equal(prune_rows_and_columns(W, A, G, flags(6, []), flags(7, [])), W)


def test_diagonal_costs_are_the_quadratic_without_updates() -> None:
    """With G (for rows) or A (for columns) diagonal, removing a structure alone is exactly its OBD
    cost.
    """
    W, A, G = problem()
    for r in range(6):
        change = torch.zeros_like(W)
        change[r] = -W[r]
        assert float(diagonal_row_costs(W, A, G.diagonal())[r]) == pytest.approx(
            quadratic_cost(change, A, G), rel=1e-9
        )
    for c in range(7):
        change = torch.zeros_like(W)
        change[:, c] = -W[:, c]
        assert float(diagonal_column_costs(W, G, A.diagonal())[c]) == pytest.approx(
            quadratic_cost(change, A, G), rel=1e-9
        )


def test_single_corrections_are_dense_for_one_structure() -> None:
    W, A, G = problem()
    inverses = torch.linalg.inv(A), torch.linalg.inv(G)
    one_row = prune_singly(W, *inverses, flags(6, [2]), flags(7, []))
    assert_exact(one_row, dense_removal(W, A, G, crossing(6, 7, [2], []))[0])
    one_column = prune_singly(W, *inverses, flags(6, []), flags(7, [3]))
    assert_exact(one_column, dense_removal(W, A, G, crossing(6, 7, [], [3]))[0])
    both = prune_singly(W, *inverses, flags(6, [2, 4]), flags(7, [3]))
    assert not both[[2, 4]].any()
    assert not both[:, 3].any()
    alone = sum(dense_removal(W, A, G, crossing(6, 7, [r], []))[0] - W for r in (2, 4)) + (
        one_column - W
    )
    assert_exact(both[0, :3], (W + alone)[0, :3])
