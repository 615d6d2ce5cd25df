from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from ray_surgeon.maths.allocate import GroupCosts, allocate_globally, allocate_uniformly
from ray_surgeon.maths.experts import (
    ExpertSums,
    LayerMean,
    add_changes,
    frequency_costs,
    mean_factor,
    own_divisor,
    random_costs,
    reap_costs,
    rerouting_costs,
    shrunk_factors,
)
from ray_surgeon.maths.kronecker import PackedFactors, PackedSymmetric, with_ones
from ray_surgeon.maths.threshold import OutOfReachError, check_costs


def gram(x: torch.Tensor) -> PackedSymmetric:
    return PackedSymmetric.of(x.T @ x)


def sums_of(own: list[torch.Tensor]) -> list[tuple[PackedSymmetric, int]]:
    return [(gram(x), len(x)) for x in own]


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 4000])
def test_factors_are_shrunk_by_the_number_of_tokens(num_tokens: int) -> None:
    a = torch.randn(num_tokens, 5, dtype=torch.float64)
    g = torch.randn(num_tokens, 3, dtype=torch.float64)
    M_A, M_G = (torch.randn(9, n, dtype=torch.float64) for n in (5, 3))
    mean = LayerMean(gram(M_A), gram(M_G), 5000)
    found = shrunk_factors(
        PackedFactors(gram(a), gram(g), num_tokens), mean, prior_tokens=20
    ).dense()
    share = (num_tokens + 1) / 5002
    torch.testing.assert_close(found.A, (a.T @ a + 20 * M_A.T @ M_A) / (num_tokens + 20))
    torch.testing.assert_close(found.G, share * (g.T @ g + 20 * M_G.T @ M_G) / (num_tokens + 20))
    if num_tokens > 1000:
        torch.testing.assert_close(found.A, a.T @ a / num_tokens, rtol=0.2, atol=0.1)


def test_an_expert_with_256_tokens_counts_as_much_as_its_layer() -> None:
    a = torch.randn(256, 5, dtype=torch.float64)
    g = torch.randn(256, 3, dtype=torch.float64)
    M_A, M_G = (torch.randn(9, n, dtype=torch.float64) for n in (5, 3))
    found = shrunk_factors(
        PackedFactors(gram(a), gram(g), 256), LayerMean(gram(M_A), gram(M_G), 512)
    ).dense()
    torch.testing.assert_close(found.A, (a.T @ a / 256 + M_A.T @ M_A) / 2)
    torch.testing.assert_close(found.G, 257 / 514 * (g.T @ g / 256 + M_G.T @ M_G) / 2)


@pytest.mark.parametrize("num_tokens", [0, 3, 4000])
def test_further_terms_of_an_expert_are_divided_as_its_own_part_of_the_first_one_is(
    num_tokens: int,
) -> None:
    a = torch.randn(num_tokens, 5, dtype=torch.float64)
    g = torch.randn(num_tokens, 3, dtype=torch.float64)
    nothing = LayerMean(
        PackedSymmetric.zeros(5, None, torch.float64),
        PackedSymmetric.zeros(3, None, torch.float64),
        5000,
    )
    found = shrunk_factors(PackedFactors(gram(a), gram(g), num_tokens), nothing).dense()
    torch.testing.assert_close(found.G, g.T @ g / own_divisor(num_tokens, nothing))


@pytest.mark.parametrize("has_basis", [False, True])
def test_the_mean_of_a_layer_that_saw_one_token_or_none(has_basis: bool) -> None:
    nothing = torch.zeros(0, 4, dtype=torch.float64)
    one = torch.randn(1, 4, dtype=torch.float64)
    assert not mean_factor(sums_of([nothing, nothing]), has_basis=has_basis).dense().any()
    wanted = one.T @ one if has_basis else one.square().mean() * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(
        mean_factor(sums_of([nothing, one]), has_basis=has_basis).dense(), wanted
    )


def test_the_mean_of_a_layer_all_of_whose_channels_are_zero_is_zero() -> None:
    assert (
        not mean_factor(sums_of([torch.zeros(3, 4, dtype=torch.float64)]), has_basis=False)
        .dense()
        .any()
    )


def test_the_mean_of_a_layer_keeps_a_basis_only_where_there_is_one() -> None:
    own = [torch.randn(n, 4, dtype=torch.float64) for n in (3, 0, 10)]
    together = torch.cat(own)
    wanted = together.T @ together / 13
    torch.testing.assert_close(mean_factor(sums_of(own), has_basis=True).dense(), wanted)
    level = wanted.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(mean_factor(sums_of(own), has_basis=False).dense(), level)


def test_the_mean_of_a_layer_has_the_bias_as_it_is() -> None:
    own = [with_ones(torch.randn(n, 4, dtype=torch.float64)) for n in (3, 0, 10)]
    level = torch.cat(own)[:, :4].square().sum() / 13 / 4
    wanted = torch.diag(torch.tensor([*[level] * 4, 1.0], dtype=torch.float64))
    torch.testing.assert_close(
        mean_factor(sums_of(own), has_basis=False, has_bias=True).dense(), wanted
    )


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_level_of_a_layer_is_that_of_the_channels_which_are_left(has_bias: bool) -> None:
    """Experts of other widths: those that lost channels do not lower it."""
    own = [torch.randn(n, 6, dtype=torch.float64) for n in (300, 0, 500)]
    own[0][:, [0, 2, 3]] = 0
    own[2][:, 5] = 0
    left = torch.cat([own[0][:, [1, 4, 5]].flatten(), own[2][:, :5].flatten()])
    found = mean_factor(
        sums_of([with_ones(x) if has_bias else x for x in own]), has_basis=False, has_bias=has_bias
    ).dense()
    torch.testing.assert_close(
        found[:6, :6], left.square().mean() * torch.eye(6, dtype=torch.float64)
    )


def test_costs_from_their_definitions() -> None:
    """Three experts, two a token, five tokens."""
    numbers = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 2], [0, 1]])
    experts = numbers.flatten()
    tokens = torch.arange(5).repeat_interleave(2)
    changes = torch.randn(10, 6)
    gradients = torch.randn(5, 6)
    norms = torch.rand(10)
    sums = ExpertSums(4)
    for part in (slice(0, 4), slice(4, 10)):
        sums.add("tokens", experts[part], torch.ones(len(experts[part])))
        sums.add("weighted_norms", experts[part], norms[part])
        add_changes(sums, experts[part], changes[part], gradients[tokens[part]])
    gains = (changes * gradients[tokens]).sum(dim=1).double()
    for expert in range(3):
        mine = experts == expert
        second = float(gains[mine].square().sum()) / 2 / 5
        assert float(rerouting_costs(sums, 2, first_order=False)[expert]) == pytest.approx(
            second, rel=1e-5
        )
        assert float(rerouting_costs(sums, 2)[expert]) == pytest.approx(
            second + float(gains[mine].sum()) / 5, rel=1e-5, abs=1e-6
        )
        assert float(reap_costs(sums)[expert]) == pytest.approx(float(norms[mine].mean()), rel=1e-5)
        assert float(frequency_costs(sums, 2)[expert]) == pytest.approx(int(mine.sum()) / 5)
    for costs in (rerouting_costs(sums, 2), reap_costs(sums), frequency_costs(sums, 2)):
        assert float(costs[3]) == 0, "no token came"
    assert torch.equal(random_costs(4, 7), random_costs(4, 7))
    assert not torch.equal(random_costs(4, 7), random_costs(4, 8))


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_costs_where_one_token_came_or_none(num_tokens: int) -> None:
    sums = ExpertSums(3)
    experts = torch.arange(num_tokens)
    changes = torch.randn(num_tokens, 6)
    gradients = torch.randn(num_tokens, 6)
    sums.add("tokens", experts, torch.ones(num_tokens))
    sums.add("weighted_norms", experts, torch.full((num_tokens,), 0.5))
    add_changes(sums, experts, changes, gradients)
    gain = float((changes * gradients).sum())
    assert rerouting_costs(sums, 1).tolist() == pytest.approx([gain + gain**2 / 2, 0, 0], rel=1e-5)
    assert reap_costs(sums).tolist() == [0.5 * num_tokens, 0, 0]
    assert frequency_costs(sums, 1).tolist() == [num_tokens, 0, 0]


def experts_of(layer: int, costs: list[list[float]], whole: list[float]) -> list[GroupCosts]:
    """Experts of one layer, of three channels of ten parameters each."""
    needs = [0.0, 10.0, 20.0, 30.0]
    return [
        GroupCosts(
            f"{layer}.{i}",
            "expert_channels",
            torch.tensor(c),
            3,
            frozenset(range(4)),
            needs,
            w,
            layer,
        )
        for i, (c, w) in enumerate(zip(costs, whole, strict=True))
    ]


def test_whole_experts_and_channels_under_one_threshold_by_brute_force() -> None:
    """Every allocation on the path costs least of all that save as much, if no layer is short of
    experts.
    """
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        curves = [torch.rand(3, generator=generator).cumsum(0).tolist() for _ in range(3)]
        whole = (3 * torch.rand(3, generator=generator)).tolist()
        costs = experts_of(0, curves, whole)
        for missing in (10.0, 25.0, 40.0, 60.0):
            found = allocate_globally(costs, missing, per_unit=True)
            cost = sum(
                c.whole if c.consumer in found.experts else float(c.curve[found.counts[c.consumer]])
                for c in costs
            )
            saved = sum(c.saved(found.counts[c.consumer]) for c in costs)
            assert saved >= missing
            for choice in itertools.product(range(5), repeat=3):  # 4 stands for the whole expert
                other = sum(
                    c.whole if n == 4 else float(c.curve[n])
                    for c, n in zip(costs, choice, strict=True)
                )
                if sum(c.saved(min(n, 3)) for c, n in zip(costs, choice, strict=True)) >= saved:
                    assert cost <= other + 1e-6


def test_a_layer_keeps_its_fewest_experts() -> None:
    costs = experts_of(0, [[9.0, 9.0, 9.0]] * 3, [0.1, 0.2, 0.3]) + experts_of(
        1, [[9.0, 9.0, 9.0]] * 3, [1.0, 2.0, 3.0]
    )
    found = allocate_globally(costs, 60, per_unit=True, fewest_experts=2)
    assert found.experts == {"0.0", "1.0"}
    fixed = [
        GroupCosts(
            c.consumer,
            c.kind,
            torch.full((3,), torch.inf),
            3,
            frozenset({3}),
            c.needs,
            c.whole,
            c.layer,
        )
        for c in costs
    ]
    with pytest.raises(OutOfReachError, match="60"):
        allocate_globally(fixed, 90, per_unit=True, fewest_experts=2)
    uniform = allocate_uniformly(fixed, 60, fewest_experts=2)
    assert uniform.experts == {"0.0", "1.0"}
    assert uniform.counts == {c.consumer: 3 if c.consumer in uniform.experts else 0 for c in costs}
    with pytest.raises(OutOfReachError):
        allocate_uniformly(fixed, 90, fewest_experts=2)


def test_experts_that_lost_channels_before_go_with_those_that_are_left() -> None:
    costs = [
        replace(c, num_left=2) for c in experts_of(0, [[math.inf, 9.0, 9.0]] * 3, [0.1, 0.2, 0.3])
    ]
    for found in (allocate_globally(costs, 20, per_unit=True), allocate_uniformly(costs, 20)):
        assert found.experts == {"0.0"}
        assert found.counts == {"0.0": 2, "0.1": 0, "0.2": 0}


def test_an_expert_that_is_ranked_by_groups_counts_as_all_that_are_left_of_it() -> None:
    costs = experts_of(0, [[math.inf] * 3, [0.5, 0.6, 0.7]], [0.9, math.inf])
    found = allocate_globally(costs, 10, per_unit=False)
    assert found.experts == {"0.0"}
    assert found.threshold == pytest.approx(0.3)


def test_no_expert_goes_uniformly_where_a_layer_can_spare_none() -> None:
    costs = experts_of(0, [[math.inf] * 3] * 2, [0.1, 0.2]) + experts_of(
        1, [[math.inf] * 3] * 2, [math.inf, math.inf]
    )
    with pytest.raises(OutOfReachError, match="save 0"):
        allocate_uniformly(costs, 20)


@pytest.mark.parametrize("seed", range(5))
def test_channels_go_where_no_expert_can_be_spared(seed: int) -> None:
    """Whole experts are cheap; all that may go together does, and no allocation of the same experts
    that saves as much costs less.
    """
    generator = torch.Generator().manual_seed(seed)
    curves = torch.rand(4, 3, generator=generator).cumsum(1).tolist()
    costs = experts_of(0, curves, (0.5 * torch.rand(4, generator=generator)).tolist())
    with pytest.raises(OutOfReachError, match="120"):
        allocate_globally(costs, 121, per_unit=True, fewest_experts=2)
    for missing in range(10, 121, 10):
        found = allocate_globally(costs, missing, per_unit=True, fewest_experts=2)
        saved = sum(c.saved(found.counts[c.consumer]) for c in costs)
        assert saved >= missing
        assert len(found.experts) <= 2
        stay = [c for c in costs if c.consumer not in found.experts]
        numbers = [found.counts[c.consumer] for c in stay]
        price = sum(float(c.curve[n]) for c, n in zip(stay, numbers, strict=True))
        for choice in itertools.product(range(4), repeat=len(stay)):
            if sum(choice) >= sum(numbers):
                assert (
                    price
                    <= sum(float(c.curve[n]) for c, n in zip(stay, choice, strict=True)) + 1e-6
                )


def test_only_costs_with_a_first_order_may_be_negative() -> None:
    check_costs("layer", torch.tensor([-1.0, 0.0, 2.0]), may_be_negative=True)
    with pytest.raises(
        FloatingPointError, match="layer: 1 of 3 costs are NaN, infinite or negative"
    ):
        check_costs("layer", torch.tensor([-1.0, 0.0, 2.0]))
    for wrong in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(FloatingPointError, match="layer: 1 of 2 costs are NaN or infinite"):
            check_costs("layer", torch.tensor([wrong, -1.0]), may_be_negative=True)


def test_an_expert_whose_removal_lowers_the_loss_goes_first() -> None:
    costs = experts_of(0, [[0.1, 0.1, 0.1]] * 3, [0.5, -0.3, 0.3])
    found = allocate_globally(costs, 30, per_unit=True)
    assert found.experts == {"0.1"}
    assert found.counts == {"0.0": 0, "0.1": 3, "0.2": 0}
    assert found.threshold == pytest.approx(-0.01)
    assert allocate_globally(costs, 40, per_unit=True).threshold == pytest.approx(0.01)


def test_uniform_experts_and_channels_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(5)
    costs = [
        c
        for layer in range(2)
        for c in experts_of(
            layer,
            torch.rand(4, 3, generator=generator).cumsum(1).tolist(),
            (2 * torch.rand(4, generator=generator)).tolist(),
        )
    ]
    for missing in range(20, 221, 20):
        found = allocate_uniformly(costs, missing, fewest_experts=1)

        def cost_of(m: int, n: int) -> float:
            total = 0.0
            for layer in range(2):
                own = [c for c in costs if c.layer == layer]
                subsets = itertools.combinations(range(4), m)
                total += min(
                    sum(c.whole if i in gone else float(c.curve[n]) for i, c in enumerate(own))
                    for gone in subsets
                )
            return total

        def saves_enough(m: int, n: int, wanted: int = missing) -> bool:
            return 2 * (30 * m + 10 * n * (4 - m)) >= wanted

        cost = {(m, n): cost_of(m, n) for m in range(4) for n in range(4)}
        rising = {
            (m, n): max(cost[i, j] for i in range(m + 1) for j in range(n + 1)) for m, n in cost
        }
        best = min(price for option, price in rising.items() if saves_enough(*option))
        gone = {
            sum(c.consumer in found.experts for c in costs if c.layer == layer)
            for layer in range(2)
        }
        number = next(iter(gone))
        width = next(found.counts[c.consumer] for c in costs if c.consumer not in found.experts)
        chosen = sum(
            c.whole if c.consumer in found.experts else float(c.curve[width]) for c in costs
        )
        assert rising[number, width] == pytest.approx(best)
        assert chosen == pytest.approx(cost[number, width])
        for less in ((number - 1, width), (number, width - 1)):
            assert min(less) < 0 or not saves_enough(*less), "a step less would have been enough"
        assert (
            len(
                {
                    sum(c.consumer in found.experts for c in costs if c.layer == layer)
                    for layer in range(2)
                }
            )
            == 1
        )
    assert math.isinf(GroupCosts("x", "ffn", torch.zeros(1), 1, frozenset({0}), [0.0, 1.0]).whole)
