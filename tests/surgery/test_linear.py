import pytest
import torch
from torch import Tensor

from ray_surgeon.surgery.kronecker import KroneckerFactors, damped
from ray_surgeon.surgery.linear import LinearSurgery
from ray_surgeon.surgery.masks import StructuredMask
from tests.surgery.dense import crossing, dense_removal, problem


def surgery(W: Tensor, A: Tensor, G: Tensor, mask: StructuredMask, *, has_bias: bool = False) -> LinearSurgery:
    n = 11
    factors = KroneckerFactors(A * n, G * n, n)
    return LinearSurgery("x", W, factors, mask, has_bias=has_bias, damping_a=0.01, damping_g=0.1, max_damping=1.0)


def test_costs_and_update_are_the_dense_ones_on_the_alive_part() -> None:
    """An earlier shot removed row 2 and columns 0 and 5; now rows and columns below a threshold go."""
    W, A, G = problem()
    rows, columns = [0, 1, 3, 4, 5], [1, 2, 3, 4, 6]
    mask = StructuredMask(torch.tensor([i in rows for i in range(6)]), torch.tensor([i in columns for i in range(7)]))
    mask.apply_(W)
    operation = surgery(W, A, G, mask)
    found = operation.candidates("rows_columns", "cost")
    alive_W = W[rows][:, columns]
    alive_A, alive_G = damped(A[columns][:, columns], 0.01), damped(G[rows][:, rows], 0.1)
    for i in range(5):
        assert float(found.row_costs[i]) == pytest.approx(dense_removal(alive_W, alive_A, alive_G, crossing(5, 5, [i], []))[1], rel=1e-9)
        assert float(found.column_costs[i]) == pytest.approx(dense_removal(alive_W, alive_A, alive_G, crossing(5, 5, [], [i]))[1], rel=1e-9)
    threshold = float(torch.cat([found.row_costs, found.column_costs]).sort().values[2])
    new, new_mask, predicted, _ = operation.prune(found, threshold, "exact")
    gone_rows = [i for i in range(5) if found.row_costs[i] <= threshold]
    gone_columns = [i for i in range(5) if found.column_costs[i] <= threshold]
    expected, cost = dense_removal(alive_W, alive_A, alive_G, crossing(5, 5, gone_rows, gone_columns))
    torch.testing.assert_close(new[rows][:, columns], expected, rtol=1e-9, atol=1e-11)
    assert predicted == pytest.approx(cost, rel=1e-9)
    assert not new[2].any()
    assert not new[:, [0, 5]].any()
    assert not new[~new_mask.rows].any()
    assert not new[:, ~new_mask.columns].any()
    assert len(gone_rows) + len(gone_columns) == 3


def test_dead_rows_and_columns_cost_nothing_and_do_not_break_the_inverse() -> None:
    W, A, G = problem()
    G[1], G[:, 1] = 0, 0
    A[3], A[:, 3] = 0, 0
    W[:, 6] = 0
    found = surgery(W, A, G, StructuredMask.full(6, 7)).candidates("rows_columns", "cost")
    assert found.row_costs[1] == 0
    assert found.column_costs[3] == 0
    assert found.column_costs[6] == 0
    assert (found.row_costs[[0, 2, 3, 4, 5]] > 0).all()
    new, mask, _, _ = surgery(W, A, G, StructuredMask.full(6, 7)).prune(found, 0.0, "exact")
    assert not new[1].any()
    assert mask.num_kept == 5 * 5


def test_the_bias_is_never_a_candidate_and_goes_with_its_row() -> None:
    W, A, G = problem()
    operation = surgery(W, A, G, StructuredMask.full(6, 7), has_bias=True)
    found = operation.candidates("rows_columns", "cost")
    assert found.columns.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(found.rows) == 6
    threshold = float(found.row_costs.min())
    new, mask, _, _ = operation.prune(found, threshold, "exact")
    assert mask.columns[-1]
    assert new[~mask.rows, -1].tolist() == [0.0]


@pytest.mark.parametrize(("structure", "num_rows", "num_columns"), [("rows", 6, 0), ("columns", 0, 7), ("rows_columns", 6, 7)])
def test_structure_limits_the_candidates(structure: str, num_rows: int, num_columns: int) -> None:
    W, A, G = problem()
    found = surgery(W, A, G, StructuredMask.full(6, 7)).candidates(structure, "cost")
    assert (len(found.rows), len(found.columns)) == (num_rows, num_columns)


def test_cost_per_parameter_divides_by_what_the_structure_still_has() -> None:
    W, A, G = problem()
    mask = StructuredMask(torch.arange(6) != 0, torch.arange(7) < 5)
    mask.apply_(W)
    by_cost = surgery(W, A, G, mask).candidates("rows_columns", "cost")
    per_parameter = surgery(W, A, G, mask).candidates("rows_columns", "cost_per_parameter")
    torch.testing.assert_close(per_parameter.row_costs * 5, by_cost.row_costs)
    torch.testing.assert_close(per_parameter.column_costs * 5, by_cost.column_costs)


def test_nan_weights_are_an_error_that_names_the_linear() -> None:
    W, A, G = problem()
    W[2, 2] = float("nan")
    with pytest.raises(FloatingPointError, match="x rows"):
        surgery(W, A, G, StructuredMask.full(6, 7)).candidates("rows_columns", "cost")
