from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ray_surgeon.maths import threshold
from ray_surgeon.maths.threshold import (
    StructureCosts,
    can_reach,
    check_costs,
    structured_threshold,
    units_to_remove,
)


def linears(seed: int, ties: bool) -> list[StructureCosts]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(number: int) -> Tensor:
        costs = torch.rand(number, generator=generator)
        return (costs * 4).floor() / 4 if ties else costs

    sizes = [(5, 8), (8, 3), (4, 4)]
    return [StructureCosts(R * C, R, C, drawn(R), drawn(C)) for R, C in sizes]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("target", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("seed", range(3))
def test_threshold_matches_brute_force(seed: int, target: float, ties: bool) -> None:
    costs = linears(seed, ties)
    total = sum(c.num_parameters for c in costs)

    def num_removed(value: float) -> int:
        entries = ((c.rows <= value)[:, None] | (c.columns <= value) for c in costs)
        return sum(int(removed.sum()) for removed in entries)

    values = sorted(
        {0.0, *torch.cat([s for c in costs for s in (c.rows, c.columns)]).tolist()}
    )
    expected = next(v for v in values if num_removed(v) >= target * total - 1e-6)
    found = structured_threshold(costs, target)
    assert found == expected


@pytest.mark.parametrize("ties", [False, True])
def test_kth_value_by_counting_bits_matches_sorting(ties: bool) -> None:
    parts = [
        torch.rand(1000, generator=torch.Generator().manual_seed(s)) ** 8
        for s in range(3)
    ]
    if ties:
        parts = [(p * 20).floor() / 20 for p in parts]
    infinite = [torch.cat([p, torch.full((7,), torch.inf)]) for p in parts]
    expected = torch.cat(parts).sort().values

    def counted(high: int | None) -> Tensor:
        return torch.stack([threshold.bit_histogram(p, high) for p in infinite]).sum(0)

    for k in (1, 2, 1500, 2999, 3000):
        high, rest = threshold.bucket_of(counted(None), k)
        low, _ = threshold.bucket_of(counted(high), rest)
        assert threshold.cost_of_bits(high, low) == float(expected[k - 1])


@pytest.mark.parametrize(
    ("target", "num_pruned", "num_per_unit", "num_candidates", "expected"),
    [
        (0.301, 0, 1, 100, 31),  # at least the target
        (0.3, 21, 2, 40, 5),  # of whole units
        (0.3, 40, 1, 60, 0),
    ],
)
def test_number_of_units_to_remove(
    target: float, num_pruned: int, num_per_unit: int, num_candidates: int, expected: int
) -> None:
    assert (
        units_to_remove(target, 100, num_pruned, num_per_unit, num_candidates) == expected
    )


ALIVE = StructureCosts(50, 8, 4, torch.arange(1.0, 9.0), torch.full((4,), 100.0))
"""8 x 4 of 10 x 5 are alive: 18 entries count as removed at the start."""
DEAD = StructureCosts(20, 4, 5, torch.tensor([0.0, 0.0, 1.0, 2.0]), torch.full((5,), 9.0))


@pytest.mark.parametrize(
    ("costs", "target", "expected"),
    [(ALIVE, 18 / 50, 0.0), (ALIVE, 19 / 50, 1.0), (DEAD, 0.01, 0.0)],
)
def test_removed_and_dead_entries_count_towards_the_target(
    costs: StructureCosts, target: float, expected: float
) -> None:
    assert structured_threshold([costs], target) == expected


def test_targets_out_of_reach() -> None:
    """Of 4 x 5 entries, removing the 3 rows and 3 columns that may be removed leaves 1 x 2, so
    shared entries count once. Biases count and stay.
    """
    costs = [StructureCosts(20, 4, 5, torch.ones(3), torch.ones(3))]
    assert can_reach(costs, 18 / 20)
    assert not can_reach(costs, 18.5 / 20)
    with pytest.raises(ValueError, match=r"cannot be reached.*0\.9000"):
        structured_threshold(costs, 0.95)
    assert units_to_remove(0.5, 10_000, 0, 1, 4_995) == 4_995
    expected = r"0\.5 cannot be reached; all candidates together are 0\.4900"
    with pytest.raises(ValueError, match=expected):
        units_to_remove(0.5, 10_000, 0, 1, 4_900)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_error_of_a_bad_cost_names_the_linear(bad: float) -> None:
    with pytest.raises(FloatingPointError, match=r"blocks\.7\.up rows: 1 of 2"):
        check_costs("blocks.7.up rows", torch.tensor([1.0, bad]))
