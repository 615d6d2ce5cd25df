"""Pruning rows and columns of one linear, against the dense solution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ray_surgeon.maths.curvature import Linear
from ray_surgeon.maths.greedy import Limits
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.structured import Candidates, find_candidates
from tests.maths import dense
from tests.maths.dense import (
    crossing,
    dense_minimum,
    fisher,
    flags,
    linear,
    problem,
    silence,
)

FULL = StructuredMask.full(6, 7)
EARLIER = StructuredMask(~flags(6, [2]), ~flags(7, [0, 5]))


def possible(costs: Tensor) -> list[int]:
    return costs.isfinite().nonzero()[:, 0].tolist()


def candidates(
    of: Linear,
    mask: StructuredMask = FULL,
    structure: str = "rows_columns",
    costs: str = "obs",
) -> Candidates:
    return find_candidates(of, mask, structure, costs, Limits(None))


def check_costs_and_updates(
    structure: str,
    costs: str,
    of: Linear,
    fisher: Callable[[Linear, StructuredMask], Tensor],
) -> None:
    """Check a linear of 6 rows and 7 columns of which an earlier shot removed those of `EARLIER`.

    Rows and columns that are removed together are updated independently, as published.
    """
    W = of.W
    mask = EARLIER
    found = candidates(of, mask, structure, costs)
    assert possible(found.rows) == ([] if structure == "columns" else [0, 1, 3, 4, 5])
    assert possible(found.columns) == ([] if structure == "rows" else [1, 2, 3, 4, 6])
    assert not found.basis.clipping
    alive = W[mask.rows][:, mask.columns]
    F = fisher(of, found.basis.part)
    alone = {
        "rows": [crossing(5, 5, [r], []) for r in range(5)],
        "columns": [crossing(5, 5, [], [c]) for c in range(5)],
    }
    by_side = {
        "rows": found.rows[found.rows.isfinite()],
        "columns": found.columns[found.columns.isfinite()],
    }

    def cost_of(removed: Tensor) -> float:
        if costs == "obd":
            return dense.cost_without_update(alive, F, removed)
        return dense_minimum(alive, F, removed)[1]

    def correction(removed: Tensor) -> Tensor:
        return dense_minimum(alive, F, removed)[0] - alive

    for side, found_costs in by_side.items():
        expected = []
        if len(found_costs):
            expected = [cost_of(removed) for removed in alone[side]]
        assert found_costs.tolist() == pytest.approx(expected, rel=1e-8)
    threshold = max(float(c.sort().values[1]) for c in by_side.values() if len(c))
    gone = [
        torch.stack(alone[side])[c <= threshold] for side, c in by_side.items() if len(c)
    ]
    together = [removed.any(dim=0) for removed in gone]
    corrections = {
        "full": [correction(removed) for removed in together],
        "single": [correction(one) for one in torch.cat(gone)],
        "none": [torch.zeros_like(alive)],
    }
    kept = ~torch.stack(together).any(dim=0)
    for update, changes in corrections.items():
        removal, new_mask = found.prune(of, mask, threshold, update)
        expected_W = (alive + torch.stack(changes).sum(dim=0)) * kept
        new = removal.W[mask.rows][:, mask.columns]
        torch.testing.assert_close(new, expected_W, rtol=1e-8, atol=1e-10)
        change = (expected_W - alive).flatten()
        assert removal.predicted == pytest.approx(
            float(0.5 * change @ F @ change), rel=1e-8
        )
        assert removal.residual == 0.0
        assert new_mask.num_kept == int(kept.sum())
        assert not removal.W[~torch.outer(new_mask.rows, new_mask.columns)].any()
        assert torch.equal(found.prune(of, mask, -1.0, update)[0].W, W)
        everything, no_mask = found.prune(of, mask, 1e300, update)
        assert not everything.W.any()
        assert no_mask.num_kept == 0


@pytest.mark.parametrize("costs", ["obs", "obd"])
@pytest.mark.parametrize("structure", ["rows", "columns", "rows_columns"])
def test_costs_and_updates_match_the_dense_solution(structure: str, costs: str) -> None:
    W, A, G = problem()
    EARLIER.apply_(W)
    check_costs_and_updates(structure, costs, linear(W, A, G), fisher)


def test_zero_rows_and_columns_cost_nothing_and_keep_the_inverse_finite() -> None:
    W, A, G = problem()
    silence(G, 1)
    silence(A, 3)
    W[:, 6] = 0
    of = linear(W, A, G)
    found = candidates(of)
    assert found.rows.nonzero()[:, 0].tolist() == [0, 2, 3, 4, 5]
    assert found.columns.nonzero()[:, 0].tolist() == [0, 1, 2, 4, 5]
    removal, mask = found.prune(of, FULL, 0.0, "full")
    assert not removal.W[1].any()
    assert mask.num_kept == 5 * 5


def test_bias_compensates_removed_columns_and_is_removed_with_its_row() -> None:
    """Also a bias that is zero."""
    W, A, G = problem()
    W[:, -1] = 0
    of = linear(W, A, G, has_bias=True)
    found = candidates(of, structure="columns")
    assert possible(found.columns) == [0, 1, 2, 3, 4, 5]
    removal, mask = found.prune(of, FULL, float(found.columns.sort().values[1]), "full")
    expected, _ = dense_minimum(W, fisher(of, of.live), (~mask.columns).expand(6, 7))
    torch.testing.assert_close(removal.W, expected, rtol=1e-9, atol=1e-11)
    assert removal.W[:, -1].all()
    found = candidates(of, structure="rows")
    removal, mask = found.prune(of, FULL, float(found.rows.min()), "full")
    assert mask.columns.all()
    assert not removal.W[~mask.rows].any()


def test_cost_per_parameter_counts_only_remaining_parameters() -> None:
    W, A, G = problem()
    mask = StructuredMask(~flags(6, [0]), flags(7, [0, 1, 2, 3]))
    mask.apply_(W)
    of = linear(W, A, G)
    by_cost = candidates(of, mask)
    limits = Limits(None, per_parameter=True)
    per_parameter = find_candidates(of, mask, "rows_columns", "obs", limits)
    torch.testing.assert_close(per_parameter.rows * 4, by_cost.rows)
    torch.testing.assert_close(per_parameter.columns * 5, by_cost.columns)


def test_update_uses_the_raised_damping_of_the_costs() -> None:
    W, A, G = problem()
    of = linear(W, dense.too_indefinite(A), G)
    found = candidates(of, structure="columns")
    assert found.basis.damping.a == pytest.approx(0.1)
    assert [(raised.factor, raised.asked) for raised in found.basis.raised_damping] == [
        ("A", 0.01)
    ]
    removal, mask = found.prune(of, FULL, float(found.columns.sort().values[1]), "full")
    F = fisher(of, of.live, found.basis.damping)
    expected, cost = dense_minimum(W, F, (~mask.columns).expand(6, 7))
    torch.testing.assert_close(removal.W, expected, rtol=1e-9, atol=1e-11)
    assert removal.predicted == pytest.approx(cost, rel=1e-9)


def test_linear_without_rows_has_no_candidates() -> None:
    W, A, G = problem()
    mask = StructuredMask(flags(6, []), ~flags(7, []))
    of = linear(torch.zeros_like(W), A, G)
    found = find_candidates(
        of, mask, "rows_columns", "obs", Limits(1.0, per_parameter=True)
    )
    assert not possible(found.rows)
    assert found.prune(of, mask, 1.0, "full")[1].num_kept == 0
