"""How many groups go, from costs alone: exact targets, ties, and what earlier shots have left."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ray_surgeon.maths.allocate import Allocation, GroupCosts, allocate_globally, allocate_uniformly
from ray_surgeon.maths.threshold import OutOfReachError
from tests.maths.test_experts import experts_of

ANY = frozenset(range(9))


def per_unit(costs: list[GroupCosts], missing: float) -> Allocation:
    return allocate_globally(costs, missing, per_unit=True)


def test_experts_that_are_gone_are_none_to_spare() -> None:
    costs = experts_of(0, [[math.inf] * 3] * 3, [0.1, 0.2, math.inf])
    costs[2] = replace(costs[2], num_left=0)
    with pytest.raises(OutOfReachError, match="save 0"):
        allocate_globally(costs, 30, per_unit=True, fewest_experts=2)


@pytest.mark.parametrize("allocate", [per_unit, allocate_uniformly])
def test_a_target_of_many_bytes_that_sums_reach_but_for_their_rounding(
    allocate: Callable[..., Allocation],
) -> None:
    needs = [1e10 * n for n in range(5)]
    costs = [
        GroupCosts(f"{block}", "ffn", torch.tensor([1.0, 2, 3, 4]) + block, 4, ANY, needs)
        for block in range(3)
    ]
    assert sum(allocate(costs, 6e10 * (1 + 1e-10)).counts.values()) == 6


def test_a_narrowed_expert_counts_as_the_groups_that_it_has() -> None:
    costs = [replace(c, num_left=2) for c in experts_of(0, [[math.inf] * 3], [0.8])]
    assert allocate_globally(costs, 10, per_unit=False).threshold == pytest.approx(0.4)


def test_of_uniform_widths_with_equal_costs_no_more_goes_than_was_asked_for() -> None:
    costs = [
        GroupCosts("x", "ffn", torch.tensor([0.0, 0.0, 5.0]), 3, ANY, [0.0, 10.0, 20.0, 30.0]),
        GroupCosts("y", "attention", torch.tensor([1.0]), 1, ANY, [0.0, 10.0]),
    ]
    assert allocate_uniformly(costs, 10).counts == {"x": 1, "y": 0}
    assert allocate_uniformly(costs, 15).counts == {"x": 2, "y": 0}


def test_uniform_widths_of_two_kinds_leave_no_surplus_of_free_groups() -> None:
    """Both free channels together with the head would save 28, where one channel less saves the 20
    that are wanted.
    """
    costs = [
        GroupCosts("x", "ffn", torch.tensor([0.0, 0.0, 5.0]), 3, ANY, [0.0, 8.0, 16.0, 24.0]),
        GroupCosts("y", "attention", torch.tensor([1.0]), 1, ANY, [0.0, 12.0]),
    ]
    assert allocate_uniformly(costs, 20).counts == {"x": 1, "y": 1}


@pytest.mark.parametrize("allocate", [per_unit, allocate_uniformly])
def test_experts_that_promise_a_gain_go_only_as_far_as_asked(
    allocate: Callable[..., Allocation],
) -> None:
    """20 % of eight experts are two of them, though four promise a gain."""
    promises = [-0.4, -0.3, -0.2, -0.1, 0.1, 0.2, 0.3, 0.4]
    found = allocate(experts_of(0, [[math.inf] * 3] * 8, promises), 0.2 * 8 * 30)
    assert found.experts == {"0.0", "0.1"}


def test_the_last_step_of_a_path_ends_where_the_goal_is_met() -> None:
    """The costs fall, so that the path has one long edge; a goal inside of it takes no more than
    its part.
    """
    falling = GroupCosts(
        "x",
        "ffn",
        torch.tensor([1.0, 1.0, 1.0, 1.0]),
        4,
        frozenset({0, 1, 2, 3, 4}),
        [0.0, 40.0, 60.0, 70.0, 80.0],
    )
    assert per_unit([falling], 10).counts == {"x": 1}
    assert per_unit([falling], 15).counts == {"x": 2}


def test_uniform_layers_without_an_expert_to_spare() -> None:
    with pytest.raises(OutOfReachError, match="save 0"):
        allocate_uniformly(experts_of(0, [[math.inf] * 3] * 2, [0.1, 0.2]), 10, fewest_experts=2)


@pytest.mark.parametrize("allocate", [per_unit, allocate_uniformly])
def test_a_width_that_is_not_allowed_stays_if_nothing_may_go(
    allocate: Callable[..., Allocation],
) -> None:
    costs = GroupCosts(
        "x", "ffn", torch.full((3,), math.inf), 3, frozenset({0, 2}), [0.0, 1.0, 2.0, 3.0]
    )
    with pytest.raises(OutOfReachError, match="save 0"):
        allocate([costs], 1)
