"""Scales of costs: ratios of measured to expected changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ray_surgeon.maths.threshold import next_scales, shrunk_ratios


def test_by_numpy() -> None:
    generator = np.random.default_rng(0)
    changes = generator.normal(1.0, 0.3, (5, 8)) * np.array([[1, 2, 3, 4, 0.1]]).T
    costs = np.array([1.0, 1.0, 4.0, 2.0, 0.3])
    kinds = np.array([0, 1, 0, 0, 1])
    change = changes.mean(1)
    error = np.array([np.sqrt(np.var(row, ddof=1) / 8) for row in changes]) / costs
    expected = []
    for unit in range(5):
        mean = change[kinds == kinds[unit]].sum() / costs[kinds == kinds[unit]].sum()
        precision = np.array([1 / (0.5 * mean) ** 2, 1 / error[unit] ** 2])
        expected.append(float(precision @ [mean, change[unit] / costs[unit]] / precision.sum()))
    found = shrunk_ratios(torch.tensor(changes), torch.tensor(costs), torch.tensor(kinds))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(np.array(expected) / (change.sum() / costs.sum()))


@pytest.mark.parametrize(
    ("changes", "costs", "kinds", "expected"),
    [
        # without an error ratios are what they are
        ([[2.0] * 4, [2.0] * 4, [12.0] * 4], [1.0, 2.0, 4.0], [0, 0, 0], [7 / 8, 7 / 16, 21 / 16]),
        # undoing makes it worse
        ([[1.0, -3.0], [1.0, -1.0]], [1.0, 2.0], [0, 1], [1.0, 1.0]),
        # a kind whose undoing makes it worse is drawn towards all, to the smallest that is allowed
        ([[-2.0, -2.1], [9.0, 9.0]], [1.0, 2.0], [0, 1], [0.05]),
        # by what chance leaves of it: half of the ratio of all is 8.5 / 6, the error 1.5
        (
            [[-2.0, 1.0], [9.0, 9.0]],
            [1.0, 2.0],
            [0, 1],
            [1 - 20 / 17 / (1 + (1.5 / (8.5 / 6)) ** 2)],
        ),
    ],
)
def test_ratios_at_the_edges(
    changes: list[list[float]], costs: list[float], kinds: list[int], expected: list[float]
) -> None:
    found = shrunk_ratios(torch.tensor(changes), torch.tensor(costs), torch.tensor(kinds))
    assert found.tolist()[: len(expected)] == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_float64(dtype: torch.dtype) -> None:
    """Differences of divergences are small."""
    changes = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=dtype)
    costs, scales, ratios = torch.tensor([[1.0, 3.0], [1.0, 8.0], [2.0, 0.5]], dtype=dtype)
    kinds = torch.tensor([0, 0])
    wide = shrunk_ratios(changes.double(), costs.double(), kinds)
    assert torch.equal(shrunk_ratios(changes, costs, kinds), wide)
    found = next_scales(scales, ratios)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([2**0.7, 8**0.3 * 0.5**0.7])
