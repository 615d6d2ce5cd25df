from __future__ import annotations

import pytest
import torch

from ray_surgeon.maths.factorised import DowndatedInverse, factorise, root
from ray_surgeon.maths.greedy import GreedyPath, greedy_costs
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.structured import find_candidates, prune_structures
from tests.maths.dense import crossing, dense_removal, flags, linear, problem, spd

R = 6
C = 7


ALL = flags(R, list(range(R))), flags(C, list(range(C)))


def path(
    may_prune: tuple[torch.Tensor, torch.Tensor] = ALL,
) -> tuple[GreedyPath, torch.Tensor, torch.Tensor, torch.Tensor]:
    W, A, G = problem(R, C)
    factors = factorise(A.clone(), 0.0, 0.0, "A"), factorise(G.clone(), 0.0, 0.0, "G")
    return GreedyPath(W, *factors, may_prune), W, A, G


@pytest.mark.parametrize("width", [1, 2, 3])
def test_downdated_inverse_is_that_of_what_is_left(width: int) -> None:
    """Blocks and eliminations after some eliminations, one of which is of every index a set has."""
    n = 12
    matrix = spd(n, 4)
    sets = torch.arange(n).view(-1, width)
    found = DowndatedInverse(factorise(matrix.clone(), 0.0, 0.0, "x"), sets)
    gone: list[int] = []
    for Q in (sets[1], sets[[0, 3]].flatten()):
        kept = [i for i in range(n) if i not in gone]
        inverse = torch.zeros(n, n, dtype=matrix.dtype)
        inverse[torch.tensor(kept)[:, None], torch.tensor(kept)] = torch.linalg.inv(
            matrix[kept][:, kept]
        )
        expected = torch.linalg.solve(inverse[Q][:, Q], inverse[Q])
        torch.testing.assert_close(found.eliminate(Q), expected, rtol=1e-9, atol=1e-10)
        gone += Q.tolist()
    kept = [i for i in range(n) if i not in gone]
    inverse = torch.linalg.inv(matrix[kept][:, kept])
    for number, indices in enumerate(sets.tolist()):
        places = [kept.index(i) for i in indices if i in kept]
        expected = inverse[places][:, places] if places else torch.eye(width, dtype=matrix.dtype)
        torch.testing.assert_close(found.blocks[number], expected, rtol=1e-9, atol=1e-10)


def test_a_block_that_rounding_made_indefinite_still_has_a_root() -> None:
    block = torch.tensor([[1.0, 1.0 + 1e-6], [1.0 + 1e-6, 1.0]])
    L = root(block)
    assert torch.equal(L, L.tril())
    torch.testing.assert_close(L @ L.T, block, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_costs_of_wide_sets_are_the_dense_ones_on_any_number_of_threads(num_threads: int) -> None:
    width = 192
    rows = 5
    W = torch.randn(rows, 3 * width)
    A = spd(3 * width, 0)
    G = spd(rows, 1)
    sets = torch.arange(3 * width).view(3, width)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        of_A, of_G = (factorise(matrix.float(), 0.1, 0.1, "x") for matrix in (A, G))
        may_prune = flags(rows, []), flags(3, [0, 1, 2])
        found = GreedyPath(W, of_A, of_G, may_prune, sets).column_set_costs()
    finally:
        torch.set_num_threads(before)
    inverse = torch.linalg.inv(of_A.matrix.double())
    damped = of_G.matrix.double()
    for number, places in enumerate(sets):
        part = W[:, places].double()
        expected = 0.5 * torch.trace(
            part.T @ damped @ part @ torch.linalg.inv(inverse[places][:, places])
        )
        assert float(found[number]) == pytest.approx(float(expected), rel=1e-3)


def test_weights_and_costs_after_downdating_are_the_dense_ones() -> None:
    """After a few removals in turns: W is the dense joint solution, and every cost what its removal
    adds to the dense cost.
    """
    found, W, A, G = path()
    found.remove_rows(torch.tensor([1, 4]))
    found.remove_columns(torch.tensor([0]))
    found.remove_rows(torch.tensor([3]))
    found.remove_columns(torch.tensor([5, 2]))
    rows = [1, 3, 4]
    columns = [0, 2, 5]
    expected, before = dense_removal(W, A, G, crossing(R, C, rows, columns))
    torch.testing.assert_close(found.W, expected, rtol=1e-9, atol=1e-11)
    for r in set(range(R)) - set(rows):
        _, after = dense_removal(W, A, G, crossing(R, C, [*rows, r], columns))
        assert float(found.row_costs()[r]) == pytest.approx(after - before, rel=1e-8)
    for c in set(range(C)) - set(columns):
        _, after = dense_removal(W, A, G, crossing(R, C, rows, [*columns, c]))
        assert float(found.column_set_costs()[c]) == pytest.approx(after - before, rel=1e-8)
    assert not found.row_costs()[rows].any()


@pytest.mark.parametrize("per_parameter", [False, True])
def test_greedy_path_by_brute_force(per_parameter: bool) -> None:
    """One at a time, the cheapest by the dense marginal cost; the result is the running maximum."""
    found, W, A, G = path((flags(R, [0, 1, 2, 3, 4]), flags(C, list(range(C - 1)))))
    by_row, by_column = greedy_costs(found, name="linear", per_parameter=per_parameter)
    rows: list[int] = []
    columns: list[int] = []
    highest = 0.0
    before = 0.0
    while len(rows) < 5 or len(columns) < C - 1:
        options = []
        for r in set(range(5)) - set(rows):
            cost = dense_removal(W, A, G, crossing(R, C, [*rows, r], columns))[1] - before
            options.append((cost / (C - len(columns) if per_parameter else 1), "row", r))
        for c in set(range(C - 1)) - set(columns):
            cost = dense_removal(W, A, G, crossing(R, C, rows, [*columns, c]))[1] - before
            options.append((cost / (R - len(rows) if per_parameter else 1), "column", c))
        cost, kind, index = min(options)
        highest = max(highest, cost)
        (rows if kind == "row" else columns).append(index)
        before = dense_removal(W, A, G, crossing(R, C, rows, columns))[1]
        assert float((by_row if kind == "row" else by_column)[index]) == pytest.approx(
            highest, rel=1e-7
        )
    assert torch.isinf(by_row[5])
    assert torch.isinf(by_column[C - 1])


def test_a_limit_cuts_the_same_path() -> None:
    whole = torch.cat(greedy_costs(path()[0], name="linear", per_parameter=True))
    limit = float(whole.sort().values[5])
    cut = torch.cat(greedy_costs(path()[0], name="linear", per_parameter=True, limit=limit))
    assert torch.equal(cut, torch.where(whole <= limit, whole, torch.inf))


def test_a_linear_gives_its_greedy_candidates_on_the_alive_part() -> None:
    W, A, G = problem(R, C)
    G[2] = 0
    G[:, 2] = 0
    mask = StructuredMask(flags(R, list(range(R))), flags(C, [0, 1, 2, 4, 5, 6]))
    mask.apply_(W)
    of = linear(W, A, G, has_bias=True, num_tokens=5)
    once = find_candidates(of, mask, "rows_columns", "obs", per_parameter=False)
    limit = float(once.row_costs.max() + once.column_costs.max())
    found = find_candidates(of, mask, "rows_columns", "obs", per_parameter=False, limit=limit)
    assert 2 in found.rows
    assert float(found.row_costs[found.rows == 2]) == 0.0
    assert 6 not in found.columns
    assert 3 not in found.columns
    assert len(found.rows) + len(found.columns) > 3
    cheapest = torch.cat([once.row_costs, once.column_costs]).sort().values
    assert float(
        torch.cat([found.row_costs, found.column_costs]).sort().values[1]
    ) == pytest.approx(float(cheapest[1]), rel=1e-9)
    removal, _ = prune_structures(of, mask, found, limit, "full")
    assert removal.predicted > 0
    assert not removal.W[found.rows].any()
