from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ray_surgeon.maths.allocate import Allocation, GroupCosts, allocate_globally, allocate_uniformly
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.structured import alive_part, group_costs, lowest, prune_groups
from ray_surgeon.maths.threshold import OutOfReachError
from tests.maths.dense import crossing, damped, dense_removal, flags, linear, problem

R = 5
C = 9


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("least", [0, 1])
def test_marginal_costs_by_brute_force_and_the_update_is_dense(width: int, least: int) -> None:
    """An earlier shot removed a group; the last column is a bias, which never goes."""
    W, A, G = problem(R, C)
    columns = torch.arange(8).view(-1, width)
    gone_before = columns[1].tolist()
    mask = StructuredMask(flags(R, list(range(R))), ~flags(C, gone_before))
    mask.apply_(W)
    of = linear(W, A, G, has_bias=True, num_tokens=7)
    alive = alive_part(of, mask)
    curvature = of.curvature(alive)

    def costs_of(limit: float | None, needed: int = 0) -> Tensor:
        return group_costs(of, alive, curvature, columns, least, limit, needed)

    marginal = costs_of(math.inf)
    left = [c for c in range(C) if c not in gone_before]
    alive_W = W[:, left]
    alive_A = damped(A[left][:, left], 0.01)
    damped_G = damped(G, 0.1)

    def cost(groups: list[int]) -> float:
        places = [left.index(c) for g in groups for c in columns[g].tolist()]
        return dense_removal(alive_W, alive_A, damped_G, crossing(R, len(left), [], places))[1]

    gone: list[int] = []
    highest = 0.0
    candidates = {g for g in range(len(columns)) if g != 1}
    while len(candidates) > least:
        increase = {g: cost([*gone, g]) - (cost(gone) if gone else 0.0) for g in candidates}
        cheapest = min(increase, key=lambda g: increase[g])
        highest = max(highest, increase[cheapest])
        assert float(marginal[cheapest]) == pytest.approx(highest, rel=1e-7)
        gone.append(cheapest)
        candidates.remove(cheapest)
    assert int(torch.isinf(marginal).sum()) == 1 + least
    middle = float(marginal[gone[len(gone) // 2]])
    below = torch.where(marginal <= middle, marginal, torch.inf)
    torch.testing.assert_close(costs_of(middle), below)
    cheapest_two = [marginal[g] if g in gone[:2] else torch.inf for g in range(len(columns))]
    torch.testing.assert_close(costs_of(-1.0, 2), torch.tensor(cheapest_two, dtype=marginal.dtype))
    alone = torch.tensor(
        [cost([g]) if g != 1 else torch.inf for g in range(len(columns))], dtype=marginal.dtype
    )
    alone[alone.masked_fill(~torch.isfinite(alone), -1).topk(least).indices] = torch.inf
    torch.testing.assert_close(costs_of(None), alone)
    chosen = lowest(marginal, 3 if width == 1 else 2).tolist()
    removed = flags(C, [c for g in chosen for c in columns[g].tolist()])
    removal, new_mask = prune_groups(of, mask, alive, curvature, removed)
    expected, dense_cost = dense_removal(
        alive_W,
        alive_A,
        damped_G,
        crossing(R, len(left), [], [left.index(c) for c in removed.nonzero()[:, 0].tolist()]),
    )
    torch.testing.assert_close(removal.W[:, left], expected, rtol=1e-8, atol=1e-10)
    assert removal.predicted == pytest.approx(dense_cost, rel=1e-8)
    assert not removal.W[:, ~new_mask.columns].any()
    assert new_mask.columns[-1]


def test_groups_whose_inputs_are_always_zero_cost_nothing() -> None:
    W, A, G = problem(R, C)
    A[3] = 0
    A[:, 3] = 0
    of = linear(W, A, G)
    alive = alive_part(of, StructuredMask.full(R, C))
    marginal = group_costs(of, alive, of.curvature(alive), torch.arange(8)[:, None], 1, math.inf)
    assert float(marginal[3]) == 0.0
    assert (marginal[torch.arange(8) != 3] > 0).all()


@pytest.mark.parametrize("limit", [None, math.inf])
def test_some_groups_stay_also_where_most_inputs_are_zero(limit: float | None) -> None:
    W, A, G = problem(R, C)
    A[:7] = 0
    A[:, :7] = 0
    of = linear(W, A, G)
    alive = alive_part(of, StructuredMask.full(R, C))
    marginal = group_costs(of, alive, of.curvature(alive), torch.arange(8)[:, None], 3, limit)
    assert (marginal == 0).sum() == 5
    assert torch.isinf(marginal).sum() == 3


def test_a_group_that_is_cheap_after_another_goes_with_it() -> None:
    """Column 0 is nearly what column 1 takes away; once 1 is gone and 0 makes up for it, little of
    0 is left.
    """
    W = torch.tensor([[1.0, -0.9, 10.0]], dtype=torch.float64)
    G = torch.ones(1, 1, dtype=torch.float64)
    A = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    of = linear(W, A, G)
    alive = alive_part(of, StructuredMask.full(1, 3))
    marginal = group_costs(of, alive, of.curvature(alive), torch.arange(3)[:, None], 0, math.inf)
    one = dense_removal(W, damped(A, 0.01), damped(G, 0.1), crossing(1, 3, [], [1]))[1]
    both = dense_removal(W, damped(A, 0.01), damped(G, 0.1), crossing(1, 3, [], [0, 1]))[1]
    assert both - one < one
    assert marginal[:2].tolist() == pytest.approx([one, one])
    assert marginal[2] > one


ANY = frozenset(range(9))
EVEN = frozenset((0, 2, 4, 6, 8))


SIZES = {"attention": 40.0, "ffn": 6.0}


def costs_of(seed: int, widths: frozenset[int] = ANY) -> list[GroupCosts]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for block in range(3):
        for kind, number, scale, allowed in (("attention", 3, 50, ANY), ("ffn", 8, 4, widths)):
            marginal = torch.rand(number, generator=generator) * scale
            needs = [SIZES[kind] * n for n in range(number + 1)]
            found.append(GroupCosts(f"{block}.{kind}", kind, marginal, number, allowed, needs))
    for c in found:
        c.costs[int(c.costs.argmax())] = torch.inf
    return found


@pytest.mark.parametrize("per_unit", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_one_threshold_cuts_all_paths(seed: int, per_unit: bool) -> None:
    costs = costs_of(seed)
    found = allocate_globally(costs, 160, per_unit=per_unit)
    assert found.threshold is not None
    assert sum(found.counts[c.consumer] * SIZES[c.kind] for c in costs) >= 160
    size = {c.consumer: SIZES[c.kind] if per_unit else 1.0 for c in costs}
    below = 0.0
    for c in costs:
        assert found.counts[c.consumer] == int(
            (c.costs / size[c.consumer] <= found.threshold + 1e-9).sum()
        )
        below += SIZES[c.kind] * int((c.costs / size[c.consumer] < found.threshold - 1e-9).sum())
    assert below < 160, "a lower threshold would do"


@pytest.mark.parametrize("left", [8, 7])
@pytest.mark.parametrize("seed", range(3))
def test_widths_are_rounded_and_what_goes_together_is_ranked_by_its_mean(
    seed: int, left: int
) -> None:
    """An earlier shot may have left an odd width; then one channel must go."""
    costs = [replace(c, num_left=left if c.kind == "ffn" else 3) for c in costs_of(seed, EVEN)]
    found = allocate_globally(costs, 180, per_unit=True)
    assert sum(c.saved(found.counts[c.consumer]) for c in costs) >= 180
    steps = []
    for c in costs:
        assert (c.num_left - found.counts[c.consumer]) % 2 == 0 or c.kind == "attention"
        marginal = c.costs[c.costs.isfinite()].double().sort().values / SIZES[c.kind]
        step = 2 if c.kind == "ffn" else 1
        start = (c.num_left % 2) if c.kind == "ffn" else 0
        means = [
            float(marginal[i : i + step].mean())
            for i in range(start, len(marginal) - step + 1, step)
        ]
        taken = (found.counts[c.consumer] - start) // step
        steps += [(mean, i < taken) for i, mean in enumerate(means)]
    assert found.threshold is not None
    assert all(taken == (mean <= found.threshold + 1e-9) for mean, taken in steps)


def test_what_odd_widths_lose_in_any_case_counts() -> None:
    """One channel of each layer must go; beside them the cheapest pair is missing."""
    costs = [replace(c, num_left=7) for c in costs_of(0, EVEN) if c.kind == "ffn"]
    for missing in (0.0, 6.0, 18.0):
        assert allocate_globally(costs, missing, per_unit=True).counts == {
            c.consumer: 1 for c in costs
        }
    found = allocate_globally(costs, 18.5, per_unit=True)
    pairs = {c.consumer: float(c.curve[3] - c.curve[1]) for c in costs}
    cheapest = min(pairs, key=lambda name: pairs[name])
    assert found.counts == {name: 3 if name == cheapest else 1 for name in pairs}
    assert found.threshold == pytest.approx(pairs[cheapest] / 12)


def test_groups_of_earlier_shots_save_nothing_more() -> None:
    costs = GroupCosts(
        "x", "ffn", torch.tensor([1.0, 2.0, math.inf]), 2, ANY, [0.0, 10.0, 11.0, 30.0]
    )
    assert [costs.saved(count) for count in range(3)] == [0, 1, 11]


def test_uniform_widths_are_those_that_every_block_can_have() -> None:
    needs = [0.0, 10.0, 20.0, 30.0]
    pairs = [
        (f"{block}", torch.tensor(c))
        for block, c in enumerate(([1.0, 2.0, 3.0], [1.0, math.inf, math.inf]))
    ]
    costs = [GroupCosts(name, "ffn", c, 3, ANY, needs) for name, c in pairs]
    assert allocate_uniformly(costs, 20).counts == {"0": 1, "1": 1}
    with pytest.raises(OutOfReachError, match="save 20") as caught:
        allocate_uniformly(costs, 30)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value), (
        "from a coordinator on another machine"
    )


def test_groups_of_one_cost_go_one_at_a_time() -> None:
    """Points of their path lie on one line, but for the rounding of sums."""
    costs = GroupCosts("x", "ffn", torch.full((8,), 0.1), 8, ANY, [0.3 * n for n in range(9)])
    for number in range(1, 9):
        assert allocate_globally([costs], 0.3 * number - 0.1, per_unit=True).counts == {"x": number}


@pytest.mark.parametrize(
    "allocate",
    [lambda *given: allocate_globally(*given, per_unit=True), allocate_uniformly],
    ids=["global", "uniform"],
)
def test_a_target_that_groups_save_exactly_takes_no_more(
    allocate: Callable[..., Allocation],
) -> None:
    """Sums of needs are rounded."""
    needs = [0.1 * n for n in range(5)]
    costs = [
        GroupCosts(f"{block}", "ffn", torch.tensor([1.0, 2, 3, 4]) + block, 4, ANY, needs)
        for block in range(3)
    ]
    missing = sum(0.4 - 0.2 for _ in costs) + 1e-10
    assert sum(allocate(costs, missing).counts.values()) == 6


@pytest.mark.parametrize("seed", range(6))
def test_where_groups_save_unequally_nothing_else_is_better_at_its_price(seed: int) -> None:
    """Steps and plateaus, as of measured latencies; the oracle is the least of cost - threshold *
    saved over all numbers of groups.
    """
    generator = torch.Generator().manual_seed(seed)
    costs = []
    for c in costs_of(seed):
        steps = (
            torch.rand(c.num_left, generator=generator)
            * (torch.rand(c.num_left, generator=generator) < 0.6)
            * SIZES[c.kind]
        )
        costs.append(replace(c, needs=[0.0, *steps.double().cumsum(0).tolist()]))
    most = sum(c.saved(max(c.possible_counts)) for c in costs)
    found = allocate_globally(costs, most / 2, per_unit=True)
    assert found.threshold is not None
    assert sum(c.saved(found.counts[c.consumer]) for c in costs) >= most / 2 - 1e-6
    for c in costs:
        at_price = [float(c.curve[n]) - found.threshold * c.saved(n) for n in c.possible_counts]
        assert at_price[found.counts[c.consumer]] == pytest.approx(min(at_price), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_uniform_widths_are_the_cheapest_by_brute_force(seed: int) -> None:
    costs = costs_of(seed, EVEN)
    found = allocate_uniformly(costs, 150)
    best = min(
        (
            sum(
                float(c.costs.sort().values[: (i if c.kind == "attention" else j)].sum())
                for c in costs
            )
            for i, j in itertools.product(range(3), (0, 2, 4, 6))
            if 3 * (40 * i + 6 * j) >= 150
        )
    )
    got = sum(float(c.costs.sort().values[: found.counts[c.consumer]].sum()) for c in costs)
    assert got == pytest.approx(best, rel=1e-6)
    assert len({found.counts[c.consumer] for c in costs if c.kind == "ffn"}) == 1
    assert sum(c.saved(found.counts[c.consumer]) for c in costs) >= 150


def test_targets_out_of_reach() -> None:
    for allocate in (
        lambda: allocate_globally(costs_of(0), 550, per_unit=True),
        lambda: allocate_uniformly(costs_of(0), 550),
    ):
        with pytest.raises(OutOfReachError, match=f"save {3 * (2 * 40 + 7 * 6)}"):
            allocate()


@pytest.mark.parametrize("limit", [None, math.inf])
@pytest.mark.parametrize("bad", [math.nan, 1e200])
def test_costs_that_are_no_numbers_are_an_error_and_not_groups_that_stay(
    bad: float, limit: float | None
) -> None:
    W, A, G = problem(R, C)
    W[0, 3] = bad
    of = linear(W, A, G)
    alive = alive_part(of, StructuredMask(flags(R, list(range(R))), flags(C, list(range(C)))))
    with pytest.raises(FloatingPointError, match="x groups: "):
        group_costs(of, alive, of.curvature(alive), torch.arange(C).view(-1, 1), 0, limit)
