import pytest
import torch

from ray_surgeon.maths.linear import Linear, Part
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.structured import Candidates, find_candidates, prune_structures
from tests.maths.dense import (
    crossing,
    damped,
    dense_removal,
    flags,
    linear,
    problem,
    too_indefinite,
)


def candidates(
    of: Linear,
    mask: StructuredMask,
    structure: str = "rows_columns",
    *,
    per_parameter: bool = False,
) -> Candidates:
    return find_candidates(of, mask, structure, "obs", per_parameter=per_parameter)


def test_a_part_is_put_back_where_it_came_from() -> None:
    W = torch.arange(12.0).view(3, 4)
    part = Part(flags(3, [0, 2]), flags(4, [1, 3]))
    assert part.of(W).tolist() == [[1, 3], [9, 11]]
    changed = part.put(-part.of(W), W)
    assert changed.tolist() == [[0, -1, 2, -3], [4, 5, 6, 7], [8, -9, 10, -11]]
    assert torch.equal(W, torch.arange(12.0).view(3, 4)), "the original stays"


@pytest.mark.parametrize("structure", ["rows", "columns"])
def test_costs_and_update_are_the_dense_ones_on_the_alive_part(structure: str) -> None:
    """An earlier shot removed row 2 and columns 0 and 5; now rows, or columns, below a threshold
    are pruned.
    """
    W, A, G = problem()
    rows = [0, 1, 3, 4, 5]
    columns = [1, 2, 3, 4, 6]
    mask = StructuredMask(
        torch.tensor([i in rows for i in range(6)]), torch.tensor([i in columns for i in range(7)])
    )
    mask.apply_(W)
    of = linear(W, A, G)
    found = candidates(of, mask)
    alive_W = W[rows][:, columns]
    alive_A = damped(A[columns][:, columns], 0.01)
    alive_G = damped(G[rows][:, rows], 0.1)
    for i in range(5):
        assert float(found.row_costs[i]) == pytest.approx(
            dense_removal(alive_W, alive_A, alive_G, crossing(5, 5, [i], []))[1], rel=1e-9
        )
        assert float(found.column_costs[i]) == pytest.approx(
            dense_removal(alive_W, alive_A, alive_G, crossing(5, 5, [], [i]))[1], rel=1e-9
        )
    found = candidates(of, mask, structure)
    costs = found.row_costs if structure == "rows" else found.column_costs
    threshold = float(costs.sort().values[2])
    removal, new_mask = prune_structures(of, mask, found, threshold, "full")
    pruned = [i for i in range(5) if costs[i] <= threshold]
    crossed = crossing(5, 5, pruned, []) if structure == "rows" else crossing(5, 5, [], pruned)
    expected, cost = dense_removal(alive_W, alive_A, alive_G, crossed)
    torch.testing.assert_close(removal.W[rows][:, columns], expected, rtol=1e-9, atol=1e-11)
    assert removal.predicted == pytest.approx(cost, rel=1e-9)
    assert not removal.W[2].any()
    assert not removal.W[:, [0, 5]].any()
    assert not removal.W[~new_mask.rows].any()
    assert not removal.W[:, ~new_mask.columns].any()
    assert len(pruned) == 3


def test_always_zero_rows_and_columns_cost_nothing_and_do_not_break_the_inverse() -> None:
    W, A, G = problem()
    G[1] = 0
    G[:, 1] = 0
    A[3] = 0
    A[:, 3] = 0
    W[:, 6] = 0
    of = linear(W, A, G)
    full = StructuredMask.full(6, 7)
    found = candidates(of, full)
    assert found.row_costs[1] == 0
    assert found.column_costs[3] == 0
    assert found.column_costs[6] == 0
    assert (found.row_costs[[0, 2, 3, 4, 5]] > 0).all()
    removal, mask = prune_structures(of, full, found, 0.0, "full")
    assert not removal.W[1].any()
    assert mask.num_kept == 5 * 5


def test_the_bias_is_never_a_candidate_and_goes_with_its_row() -> None:
    W, A, G = problem()
    of = linear(W, A, G, has_bias=True)
    full = StructuredMask.full(6, 7)
    found = candidates(of, full)
    assert found.columns.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(found.rows) == 6
    threshold = float(found.row_costs.min())
    removal, mask = prune_structures(of, full, found, threshold, "full")
    assert mask.columns[-1]
    assert removal.W[~mask.rows, -1].tolist() == [0.0]


@pytest.mark.parametrize(
    ("structure", "num_rows", "num_columns"),
    [("rows", 6, 0), ("columns", 0, 7), ("rows_columns", 6, 7)],
)
def test_structure_limits_the_candidates(structure: str, num_rows: int, num_columns: int) -> None:
    W, A, G = problem()
    found = candidates(linear(W, A, G), StructuredMask.full(6, 7), structure)
    assert (len(found.rows), len(found.columns)) == (num_rows, num_columns)


def test_cost_per_parameter_divides_by_what_the_structure_still_has() -> None:
    W, A, G = problem()
    mask = StructuredMask(torch.arange(6) != 0, torch.arange(7) < 4)
    mask.apply_(W)
    by_cost = candidates(linear(W, A, G), mask)
    per_parameter = candidates(linear(W, A, G), mask, per_parameter=True)
    torch.testing.assert_close(per_parameter.row_costs * 4, by_cost.row_costs)
    torch.testing.assert_close(per_parameter.column_costs * 5, by_cost.column_costs)


def test_a_bias_that_is_zero_makes_up_for_columns() -> None:
    W, A, G = problem()
    W[:, -1] = 0
    of = linear(W, A, G, has_bias=True)
    full = StructuredMask.full(6, 7)
    found = candidates(of, full, "columns")
    threshold = float(found.column_costs.sort().values[1])
    removal, mask = prune_structures(of, full, found, threshold, "full")
    expected, _ = dense_removal(
        W,
        damped(A, 0.01),
        damped(G, 0.1),
        crossing(6, 7, [], (~mask.columns).nonzero()[:, 0].tolist()),
    )
    torch.testing.assert_close(removal.W, expected, rtol=1e-9, atol=1e-11)
    assert removal.W[:, -1].all()


def test_the_update_has_the_damping_that_the_costs_needed() -> None:
    W, A, G = problem()
    A = too_indefinite(A)
    of = linear(W, A, G)
    full = StructuredMask.full(6, 7)
    found = candidates(of, full, "columns")
    assert found.damping.a == pytest.approx(0.1)
    assert [(raised.factor, raised.asked) for raised in found.raised_damping] == [("A", 0.01)]
    threshold = float(found.column_costs.sort().values[1])
    removal, mask = prune_structures(of, full, found, threshold, "full")
    expected, cost = dense_removal(
        W,
        damped(A, 0.1),
        damped(G, 0.1),
        crossing(6, 7, [], (~mask.columns).nonzero()[:, 0].tolist()),
    )
    torch.testing.assert_close(removal.W, expected, rtol=1e-9, atol=1e-11)
    assert removal.predicted == pytest.approx(cost, rel=1e-9)


def test_nan_weights_are_an_error_that_names_the_linear() -> None:
    W, A, G = problem()
    W[2, 2] = float("nan")
    with pytest.raises(FloatingPointError, match="x rows"):
        candidates(linear(W, A, G), StructuredMask.full(6, 7))


def test_a_linear_of_which_all_rows_are_pruned_has_no_candidates() -> None:
    W, A, G = problem()
    mask = StructuredMask(flags(6, []), flags(7, list(range(7))))
    mask.apply_(W)
    found = find_candidates(
        linear(W, A, G), mask, "rows_columns", "obs", per_parameter=True, limit=1.0
    )
    assert not len(found.rows)
    assert prune_structures(linear(W, A, G), mask, found, 1.0, "full")[1].num_kept == 0
