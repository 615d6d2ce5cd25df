"""Coupled groups of one consumer, against the dense solution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ray_surgeon.maths import group_batch
from ray_surgeon.maths.curvature import Linear, LinearCurvature
from ray_surgeon.maths.greedy import Limits
from ray_surgeon.maths.group_batch import KeptFactors, costs_of_groups
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.structured import alive_part, group_costs, lowest, prune_groups
from tests.maths.dense import (
    crossing,
    dense_minimum,
    fisher,
    flags,
    linear,
    problem,
    silence,
    too_indefinite,
)

R = 5
C = 9


def found_costs(
    curvature: LinearCurvature,
    columns: Tensor,
    least: int,
    limit: float | None,
    needed: int,
) -> Tensor:
    return group_costs(curvature, columns, Limits(limit, needed, least=least))


def costs_of(
    of: Linear, columns: Tensor, least: int, limit: float | None, needed: int = 0
) -> Tensor:
    alive = alive_part(of, StructuredMask.full(*of.W.shape))
    return found_costs(LinearCurvature(of, alive), columns, least, limit, needed)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("least", [0, 1])
def test_marginal_costs_match_brute_force_and_update_matches_dense_solution(
    width: int, least: int
) -> None:
    """An earlier shot removed a group; the last column is a bias, which is never removed."""
    W, A, G = problem(R, C)
    columns = torch.arange(8).view(-1, width)
    mask = StructuredMask(~flags(R, []), ~flags(C, columns[1].tolist()))
    mask.apply_(W)
    of = linear(W, A, G, has_bias=True)
    alive = alive_part(of, mask)
    curvature = LinearCurvature(of, alive)
    F = fisher(of, alive)
    alive_W = W[:, mask.columns]

    def found(limit: float | None, needed: int = 0) -> Tensor:
        return found_costs(curvature, columns, least, limit, needed)

    def dense(groups: Sequence[int]) -> tuple[Tensor, float]:
        gone = crossing(R, C, [], columns[list(groups)].flatten().tolist())
        return dense_minimum(alive_W, F, gone[:, mask.columns])

    def cost(groups: Sequence[int]) -> float:
        return dense(groups)[1] if groups else 0.0

    marginal = found(math.inf)
    gone: list[int] = []
    highest = 0.0
    candidates = {g for g in range(len(columns)) if g != 1}
    alone = torch.full_like(marginal, torch.inf)
    for g in candidates:
        alone[g] = cost([g])
    while len(candidates) > least:
        increase = {g: cost([*gone, g]) - cost(gone) for g in candidates}
        cheapest = min(increase, key=lambda g: increase[g])
        highest = max(highest, increase[cheapest])
        assert float(marginal[cheapest]) == pytest.approx(highest, rel=1e-7)
        gone.append(cheapest)
        candidates.remove(cheapest)
    assert int(torch.isinf(marginal).sum()) == 1 + least
    middle = float(marginal[gone[len(gone) // 2]])
    torch.testing.assert_close(
        found(middle), torch.where(marginal <= middle, marginal, torch.inf)
    )
    cheapest_two = torch.full_like(marginal, torch.inf)
    cheapest_two[gone[:2]] = marginal[gone[:2]]
    torch.testing.assert_close(found(-1.0, 2), cheapest_two)
    alone[alone.masked_fill(alone == torch.inf, -1).topk(least).indices] = torch.inf
    torch.testing.assert_close(found(None), alone)
    chosen = lowest(marginal, 4 - width).tolist()
    removed = flags(C, columns[chosen].flatten().tolist())
    removal, new_mask = prune_groups(curvature, mask, removed)
    expected, dense_cost = dense(chosen)
    torch.testing.assert_close(
        removal.W[:, mask.columns], expected, rtol=1e-8, atol=1e-10
    )
    assert removal.predicted == pytest.approx(dense_cost, rel=1e-8)
    assert torch.equal(new_mask.columns, mask.columns & ~removed)
    assert not removal.W[:, ~new_mask.columns].any()


@pytest.mark.parametrize("limit", [None, math.inf])
@pytest.mark.parametrize(("silent", "least", "num_free"), [([3], 1, 1), (range(7), 3, 5)])
def test_dead_groups_cost_nothing_but_the_required_number_stays(
    silent: Sequence[int], least: int, num_free: int, limit: float | None
) -> None:
    W, A, G = problem(R, C)
    silence(A, *silent)
    found = costs_of(linear(W, A, G), torch.arange(8)[:, None], least, limit)
    free = (found == 0).nonzero()[:, 0].tolist()
    assert len(free) == num_free
    assert set(free) <= set(silent)
    assert int(torch.isinf(found).sum()) == least


@pytest.mark.parametrize("limit", [None, math.inf])
@pytest.mark.parametrize("bad", [math.nan, 1e200])
def test_nan_and_infinite_costs_are_an_error(bad: float, limit: float | None) -> None:
    W, A, G = problem(R, C)
    W[0, 3] = bad
    with pytest.raises(FloatingPointError, match="x groups: "):
        costs_of(linear(W, A, G), torch.arange(C)[:, None], 0, limit)


def test_second_pass_reuses_the_kept_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The costs are bit-identical, also where damping was raised. Without room for the factors they
    are computed again.
    """
    W, A, G = problem(R, C)
    of = linear(W, too_indefinite(A), G)
    known = [of], [StructuredMask.full(R, C)], torch.arange(8).view(-1, 2)
    ((basis, expected),) = costs_of_groups(*known, [Limits()])
    assert basis.raised_damping
    kept = KeptFactors()
    costs_of_groups(*known, [Limits(None)], kept)
    with monkeypatch.context() as patch:
        patch.setattr("ray_surgeon.maths.curvature.factorise", None)
        ((own_basis, costs),) = costs_of_groups(*known, [Limits()], kept)
    assert torch.equal(costs, expected)
    assert own_basis.damping == basis.damping
    assert own_basis.raised_damping == basis.raised_damping
    monkeypatch.setattr(group_batch, "KEPT_BYTES", kept["x"].cholesky.nbytes - 1)
    nothing = KeptFactors()
    costs_of_groups(*known, [Limits(None)], nothing)
    assert not nothing
