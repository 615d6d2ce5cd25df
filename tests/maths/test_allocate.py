"""Numbers of removed groups and whole experts, computed from costs alone."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from ray_surgeon.maths.allocate import (
    Allocation,
    GroupCosts,
    allocate_globally,
    allocate_uniformly,
    loss_curve_globally,
    loss_curve_uniformly,
)
from ray_surgeon.maths.threshold import OutOfReachError

Allocate = Callable[..., Allocation]
ANY = frozenset(range(9))
EVEN = frozenset((0, 2, 4, 6, 8))
SIZES = {"attention": 40.0, "ffn": 6.0}
STAYS = [math.inf] * 3


def per_unit(costs: Sequence[GroupCosts], missing: float, **options: Any) -> Allocation:
    return allocate_globally(costs, missing, per_unit=True, **options)


def per_group(costs: Sequence[GroupCosts], missing: float, **options: Any) -> Allocation:
    return allocate_globally(costs, missing, per_unit=False, **options)


BOTH = (per_unit, allocate_uniformly)


def groups(
    consumer: str, costs: Sequence[float], needs: Sequence[float], kind: str = "ffn"
) -> GroupCosts:
    return GroupCosts(consumer, kind, torch.tensor(costs), len(costs), ANY, needs)


def experts(
    whole: Sequence[float],
    channels: Sequence[Sequence[float]] | None = None,
    layer: int = 0,
) -> list[GroupCosts]:
    """Return the experts of one layer, each with three channels of ten parameters."""
    found = []
    for i, (cost, own) in enumerate(
        zip(whole, channels or [STAYS] * len(whole), strict=True)
    ):
        one = groups(f"{layer}.{i}", own, [0.0, 10.0, 20.0, 30.0], "expert_channels")
        found.append(replace(one, whole=cost, layer=layer))
    return found


def narrowed(costs: Sequence[GroupCosts], num_left: int) -> list[GroupCosts]:
    """Return the costs of consumers that lost groups in earlier shots."""
    return [replace(c, num_left=num_left) for c in costs]


def random_groups(
    seed: int, widths: frozenset[int] = ANY, num_left: int = 8
) -> list[GroupCosts]:
    """Return heads and channels of three blocks; the most expensive ones cannot be removed."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for block in range(3):
        for kind, number, scale, allowed in (
            ("attention", 3, 50, ANY),
            ("ffn", 8, 4, widths),
        ):
            costs = torch.rand(number, generator=generator) * scale
            costs[int(costs.argmax())] = torch.inf
            needs = [SIZES[kind] * n for n in range(number + 1)]
            left = num_left if kind == "ffn" else number
            found.append(GroupCosts(f"{block}.{kind}", kind, costs, left, allowed, needs))
    return found


def with_plateaus(costs: Sequence[GroupCosts], seed: int) -> list[GroupCosts]:
    """Let groups save different amounts, and some nothing, like measured latencies."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for c in costs:
        size, saves = (torch.rand(c.num_left, generator=generator) for _ in range(2))
        steps = size * (saves < 0.6) * SIZES[c.kind]
        found.append(replace(c, needs=[0.0, *steps.double().cumsum(0).tolist()]))
    return found


def random_experts(
    seed: int, number: int, most: float, num_layers: int = 1
) -> list[GroupCosts]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for layer in range(num_layers):
        channels = torch.rand(number, 3, generator=generator).cumsum(1).tolist()
        whole = (most * torch.rand(number, generator=generator)).tolist()
        found += experts(whole, channels, layer)
    return found


def gaining(costs: Sequence[GroupCosts]) -> list[GroupCosts]:
    """Give some experts a negative cost of removal."""
    return [replace(c, whole=c.whole - 0.7) for c in costs]


def saved_by(costs: Sequence[GroupCosts], found: Allocation) -> float:
    return sum(c.saved(found.counts[c.consumer]) for c in costs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("allocate", "costs_of", "share"),
    [
        (per_unit, random_groups, 0.4),
        (per_group, random_groups, 0.4),
        (per_unit, lambda seed: random_groups(seed, EVEN), 0.45),
        (per_unit, lambda seed: random_groups(seed, EVEN, 7), 0.45),
        (per_unit, lambda seed: with_plateaus(random_groups(seed), seed), 0.5),
        (per_unit, lambda seed: random_experts(seed, 3, 3.0), 0.5),
        (per_group, lambda seed: narrowed(random_experts(seed, 3, 1.0), 2), 0.5),
        (per_unit, lambda seed: gaining(random_experts(seed, 3, 2.0)), 0.3),
    ],
    ids=["units", "groups", "even", "odd", "plateaus", "experts", "narrowed", "gains"],
)
def test_lowest_sufficient_threshold_gives_an_optimal_allocation(
    allocate: Allocate,
    costs_of: Callable[[int], list[GroupCosts]],
    share: float,
    seed: int,
) -> None:
    """The oracle minimises cost - threshold * saved over all numbers that a consumer may lose."""
    costs = costs_of(seed)
    missing = share * sum(c.saved(max(c.possible_counts)) for c in costs)
    found = allocate(costs, missing)
    assert found.threshold is not None
    assert saved_by(costs, found) >= missing - 1e-6
    saved_below = 0.0
    for c in costs:
        options = {(n, False): float(c.curve[n]) for n in c.possible_counts}
        options[c.num_left, True] = c.whole
        unit = {
            n: n if allocate is per_group else c.saved(n) for n in range(c.num_left + 1)
        }
        at_price = {
            key: cost - found.threshold * unit[key[0]] for key, cost in options.items()
        }
        best = min(at_price.values())
        chosen = found.counts[c.consumer], c.consumer in found.experts
        assert at_price[chosen] == pytest.approx(best, abs=1e-9)
        saved_below += min(
            c.saved(n) for (n, _), cost in at_price.items() if cost <= best + 1e-9
        )
    assert saved_below < missing


@pytest.mark.parametrize("seed", range(2))
def test_channels_are_removed_where_every_expert_is_needed(seed: int) -> None:
    """Whole experts are cheap here, so as many as possible are removed. No allocation that removes
    the same experts and saves as much costs less.
    """
    costs = random_experts(seed, 4, 0.5)
    with pytest.raises(OutOfReachError, match="120"):
        per_unit(costs, 121, fewest_experts=2)
    for missing in range(10, 121, 10):
        found = per_unit(costs, missing, fewest_experts=2)
        assert saved_by(costs, found) >= missing
        assert len(found.experts) <= 2
        stay = [c for c in costs if c.consumer not in found.experts]
        numbers = [found.counts[c.consumer] for c in stay]
        prices = {
            choice: sum(float(c.curve[n]) for c, n in zip(stay, choice, strict=True))
            for choice in itertools.product(range(4), repeat=len(stay))
        }
        enough = [
            price for choice, price in prices.items() if sum(choice) >= sum(numbers)
        ]
        assert prices[tuple(numbers)] <= min(enough) + 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_uniform_widths_match_brute_force(seed: int) -> None:
    costs = random_groups(seed, EVEN)
    found = allocate_uniformly(costs, 150)
    prices = {
        (i, j): sum(float(c.curve[i if c.kind == "attention" else j]) for c in costs)
        for i, j in itertools.product(range(3), (0, 2, 4, 6))
        if 3 * (40 * i + 6 * j) >= 150
    }
    heads, channels = (
        {found.counts[c.consumer] for c in costs if c.kind == kind} for kind in SIZES
    )
    assert len(heads) == len(channels) == 1
    assert prices[heads.pop(), channels.pop()] == pytest.approx(
        min(prices.values()), rel=1e-6
    )


def test_uniform_experts_and_channels_match_brute_force() -> None:
    """An option never counts as cheaper than one that removes less of everything."""
    costs = random_experts(5, 4, 2.0, num_layers=2)
    layers = [[c for c in costs if c.layer == layer] for layer in range(2)]

    def cost_of(m: int, n: int) -> float:
        gains = (sorted(c.whole - float(c.curve[n]) for c in own)[:m] for own in layers)
        return sum(map(sum, gains)) + sum(float(c.curve[n]) for c in costs)

    options = list(itertools.product(range(4), repeat=2))
    cost = {option: cost_of(*option) for option in options}
    rising = {
        (m, n): max(cost[i, j] for i, j in options if i <= m and j <= n)
        for m, n in options
    }
    for missing in range(20, 221, 20):
        found = allocate_uniformly(costs, missing, fewest_experts=1)
        enough = {
            (m, n) for m, n in options if 2 * (30 * m + 10 * n * (4 - m)) >= missing
        }
        gone = {sum(c.consumer in found.experts for c in own) for own in layers}
        widths = {
            found.counts[c.consumer] for c in costs if c.consumer not in found.experts
        }
        assert len(gone) == len(widths) == 1
        m = gone.pop()
        n = widths.pop()
        assert rising[m, n] == pytest.approx(min(rising[option] for option in enough))
        whole = sum(c.whole for c in costs if c.consumer in found.experts)
        stay = sum(float(c.curve[n]) for c in costs if c.consumer not in found.experts)
        assert whole + stay == pytest.approx(cost[m, n])
        assert not enough & {(m - 1, n), (m, n - 1)}, "a step less would have been enough"


FALLING = [groups("x", [1.0] * 4, [0.0, 40.0, 60.0, 70.0, 80.0])]
"""The path has one long edge."""
ODD = narrowed([c for c in random_groups(0, EVEN) if c.kind == "ffn"], 7)
"""One channel of each layer must go."""
FREE = groups("x", [0.0, 0.0, 5.0], [0.0, 10.0, 20.0, 30.0])
UNEQUAL = [
    replace(FREE, consumer="0"),
    replace(FREE, consumer="1", costs=torch.tensor([1.0, *STAYS[1:]])),
]
"""The second block can lose one channel only."""
LOST_BEFORE = narrowed(experts([0.1, 0.2, 0.3], [[math.inf, 9.0, 9.0]] * 3), 2)
LAYERS = experts([0.1, 0.2, 0.3]) + experts([1.0, 2.0, 3.0], layer=1)
PROMISES = experts([-0.4, -0.3, -0.2, -0.1, 0.1, 0.2, 0.3, 0.4])
"""20 % of eight experts are two, although four promise a gain."""


NOT_ALLOWED = replace(FREE, costs=torch.tensor(STAYS), allowed={0, 2})
GONE = narrowed(experts([math.inf]), 0)
UNIFORM = [allocate_uniformly]


@pytest.mark.parametrize(
    ("allocators", "costs", "missing", "fewest", "expected"),
    [
        ([per_unit], FALLING, 15, 0, {"x": 2}),
        ([per_unit], ODD, 18, 0, {"0.ffn": 1, "1.ffn": 1, "2.ffn": 1}),
        (UNIFORM, UNEQUAL, 20, 0, {"0": 1, "1": 1}),
        (BOTH, LOST_BEFORE, 20, 0, {"0.0": 2}),
        (BOTH, PROMISES, 48, 0, {"0.0": 3, "0.1": 3}),
        (BOTH, LAYERS, 60, 2, {"0.0": 3, "1.0": 3}),
        (BOTH, random_groups(0), 550, 0, 3 * (2 * 40 + 7 * 6)),
        (BOTH, [NOT_ALLOWED], 1, 0, 0),
        (UNIFORM, UNEQUAL, 30, 0, 20),
        ([per_unit], [*experts([0.1, 0.2]), *GONE], 30, 2, 0),
        (BOTH, LAYERS, 90, 2, 60),
    ],
)
def test_small_allocations_and_targets_out_of_reach(
    allocators: Sequence[Allocate],
    costs: list[GroupCosts],
    missing: float,
    fewest: int,
    expected: dict[str, int] | int,
) -> None:
    """If the target is out of reach, the error gives the largest saving, also after pickling."""
    for allocate in allocators:
        if isinstance(expected, int):
            with pytest.raises(
                OutOfReachError, match=f"save {expected} of the {missing}"
            ) as caught:
                allocate(costs, missing, fewest_experts=fewest)
            assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
            continue
        found = allocate(costs, missing, fewest_experts=fewest)
        assert {name: n for name, n in found.counts.items() if n} == expected
        are_experts = {c.consumer for c in costs if math.isfinite(c.whole)}
        assert found.experts == are_experts & set(expected)


def test_groups_removed_in_earlier_shots_save_nothing() -> None:
    costs = replace(FREE, num_left=2, needs=[0.0, 10.0, 11.0, 30.0])
    assert [costs.saved(count) for count in range(3)] == [0, 1, 11]


@pytest.mark.parametrize("allocate", BOTH)
def test_allocation_does_not_depend_on_the_unit_of_the_budget(allocate: Allocate) -> None:
    """Seconds per token are millions of times smaller than numbers of parameters."""
    costs = random_groups(0)
    small = [replace(c, needs=[1e-9 * need for need in c.needs]) for c in costs]
    assert allocate(small, 1e-9 * 301).counts == allocate(costs, 301).counts


def test_groups_of_equal_cost_are_removed_one_at_a_time() -> None:
    """The points of their path lie on one line, up to the rounding of sums."""
    costs = groups("x", [0.1] * 8, [0.3 * n for n in range(9)])
    for number in range(1, 9):
        assert per_unit([costs], 0.3 * number - 0.1).counts == {"x": number}


@pytest.mark.parametrize(
    ("size", "missing"), [(0.1, sum([0.4 - 0.2] * 3) + 1e-10), (1e10, 6e10 * (1 + 1e-10))]
)
def test_target_is_met_up_to_rounding(size: float, missing: float) -> None:
    needs = [size * n for n in range(5)]
    costs = [
        groups(f"{block}", [block + n for n in (1.0, 2, 3, 4)], needs)
        for block in range(3)
    ]
    for allocate in BOTH:
        assert sum(allocate(costs, missing).counts.values()) == 6


def cost_of(costs: Sequence[GroupCosts], found: Allocation) -> float:
    """Return the cost of an allocation, in float64."""
    total = 0.0
    for c in costs:
        if c.consumer in found.experts:
            total += c.whole
        else:
            ascending = c.costs.double().sort().values
            total += float(ascending[: found.counts[c.consumer]].sum())
    return total


@pytest.mark.parametrize("is_uniform", [False, True], ids=["global", "uniform"])
@pytest.mark.parametrize(
    "costs_of",
    [
        random_groups,
        lambda seed: random_groups(seed, EVEN, 7),
        lambda seed: random_experts(seed, 3, 3.0, num_layers=2),
    ],
    ids=["groups", "odd", "experts"],
)
def test_every_point_of_a_loss_curve_is_an_allocation(
    costs_of: Callable[[int], list[GroupCosts]], is_uniform: bool
) -> None:
    """The budget that a point saves gives an allocation of the same size and cost."""
    costs = costs_of(0)
    num_parameters = [
        round(c.needs[1]) for c in costs
    ]  # the budget counts parameters, too
    if is_uniform:
        points = loss_curve_uniformly(costs, num_parameters, most_points=40)
    else:
        points = loss_curve_globally(costs, num_parameters, per_unit=True, most_points=40)
    assert len(points) > 2
    allocate = allocate_uniformly if is_uniform else per_unit
    for removed, cost in points:
        found = allocate(costs, removed)
        assert saved_by(costs, found) == pytest.approx(removed, rel=1e-12)
        assert cost_of(costs, found) == pytest.approx(cost, rel=1e-12)


def test_points_of_a_loss_curve_are_evenly_spread() -> None:
    number = 1000
    costs = [groups("a", [1.0] * number, [float(n) for n in range(number + 1)])]
    costs = [replace(costs[0], allowed=range(number + 1))]
    for points in (
        loss_curve_uniformly(costs, [1], most_points=11),
        loss_curve_globally(costs, [1], per_unit=True, most_points=11),
    ):
        assert points == [(100 * n, 100.0 * n) for n in range(11)]
