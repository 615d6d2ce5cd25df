"""How many groups go, from costs alone: exact targets, ties, and what earlier shots have left."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ray_surgeon.surgery.allocate import Allocation, GroupCosts, allocate_globally, allocate_uniformly
from ray_surgeon.surgery.threshold import OutOfReachError
from tests.surgery.test_experts import experts_of

ANY = frozenset(range(9))


def per_unit(costs: list[GroupCosts], missing: float) -> Allocation:
    return allocate_globally(costs, missing, per_unit=True)


def test_experts_that_are_gone_are_none_to_spare() -> None:
    costs = experts_of(0, [[math.inf] * 3] * 3, [0.1, 0.2, math.inf])
    costs[2] = replace(costs[2], num_left=0)
    with pytest.raises(OutOfReachError, match="save 0"):
        allocate_globally(costs, 30, per_unit=True, fewest_experts=2)


@pytest.mark.parametrize("allocate", [per_unit, allocate_uniformly])
def test_a_target_of_many_bytes_that_sums_reach_but_for_their_rounding(allocate: Callable[..., Allocation]) -> None:
    needs = [1e10 * n for n in range(5)]
    costs = [GroupCosts(f"{block}", "ffn", torch.tensor([1.0, 2, 3, 4]) + block, 4, ANY, needs) for block in range(3)]
    assert sum(allocate(costs, 6e10 * (1 + 1e-10)).counts.values()) == 6


def test_a_narrowed_expert_counts_as_the_groups_that_it_has() -> None:
    costs = [replace(c, num_left=2) for c in experts_of(0, [[math.inf] * 3], [0.8])]
    assert allocate_globally(costs, 10, per_unit=False).threshold == pytest.approx(0.4)


def test_of_uniform_widths_with_equal_costs_the_one_that_saves_more_is_taken() -> None:
    costs = [
        GroupCosts("x", "ffn", torch.tensor([0.0, 0.0, 5.0]), 3, ANY, [0.0, 10.0, 20.0, 30.0]),
        GroupCosts("y", "attention", torch.tensor([1.0]), 1, ANY, [0.0, 10.0]),
    ]
    assert allocate_uniformly(costs, 10).counts == {"x": 2, "y": 0}


def test_uniform_layers_without_an_expert_to_spare() -> None:
    with pytest.raises(OutOfReachError, match="save 0"):
        allocate_uniformly(experts_of(0, [[math.inf] * 3] * 2, [0.1, 0.2]), 10, fewest_experts=2)


@pytest.mark.parametrize("allocate", [per_unit, allocate_uniformly])
def test_a_width_that_is_not_allowed_stays_if_nothing_may_go(allocate: Callable[..., Allocation]) -> None:
    costs = GroupCosts("x", "ffn", torch.full((3,), math.inf), 3, frozenset({0, 2}), [0.0, 1.0, 2.0, 3.0])
    with pytest.raises(OutOfReachError, match="save 0"):
        allocate([costs], 1)
