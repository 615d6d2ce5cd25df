"""Scales of costs: ratios of measured to expected changes, by numpy and against the truth they are
drawn from.
"""

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


def test_shrinking_brings_ratios_nearer_to_the_truth() -> None:
    """Units of very different costs and of two kinds, whose changes are measured with the same
    error.
    """
    generator = torch.Generator().manual_seed(0)
    plain = 0.0
    shrunk = 0.0
    kinds = torch.arange(30) % 2
    for _ in range(50):
        truth = (1 + kinds) * (
            1 + 0.4 * torch.randn(30, generator=generator, dtype=torch.float64)
        ).clamp(min=0.1)
        costs = (1.5 * torch.randn(30, generator=generator, dtype=torch.float64)).exp()
        changes = (truth * costs)[:, None] + torch.randn(
            30, 8, generator=generator, dtype=torch.float64
        )
        common = (truth * costs).sum() / costs.sum()
        plain += float((changes.mean(1) / costs / common - truth / common).square().mean())
        shrunk += float((shrunk_ratios(changes, costs, kinds) - truth / common).square().mean())
    assert shrunk < plain / 5


def test_without_an_error_ratios_are_what_they_are() -> None:
    costs = torch.tensor([1.0, 2.0, 4.0])
    changes = torch.tensor([2.0, 2.0, 12.0])[:, None].expand(3, 4)
    for kinds in (torch.zeros(3), torch.arange(3)):
        assert shrunk_ratios(changes, costs, kinds).tolist() == pytest.approx(
            [2 / (16 / 7), 1 / (16 / 7), 3 / (16 / 7)]
        )


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_ratios_are_the_same_in_every_unit(unit: float) -> None:
    changes = torch.tensor([[1.0, 2.0], [3.0, 5.0], [0.5, 0.1]])
    costs = torch.tensor([1.0, 3.0, 2.0])
    kinds = torch.tensor([0, 0, 1])
    expected = shrunk_ratios(changes, costs, kinds).tolist()
    assert shrunk_ratios(unit * changes, costs, kinds).tolist() == pytest.approx(expected)


def test_a_kind_of_its_own_is_not_drawn_towards_others() -> None:
    costs = torch.ones(4)
    changes = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [2.0, 6.0]])
    alone, together = (
        shrunk_ratios(changes, costs, torch.tensor(kinds))[3]
        for kinds in ([0, 0, 0, 1], [0, 0, 0, 0])
    )
    assert float(alone) == pytest.approx(4 / (7 / 4))
    assert float(together) < 0.7 * float(alone)


def test_what_says_nothing_changes_nothing() -> None:
    costs = torch.tensor([1.0, 2.0])
    kinds = torch.tensor([0, 1])
    assert shrunk_ratios(torch.tensor([[1.0, -3.0], [1.0, -1.0]]), costs, kinds).tolist() == [
        1.0,
        1.0,
    ], "undoing makes it worse"
    found = shrunk_ratios(torch.tensor([[-2.0, -2.0], [9.0, 9.0]]), costs, torch.tensor([0, 0]))
    assert found.tolist()[0] == 0.05, "the smallest that is allowed"
    worse = shrunk_ratios(torch.tensor([[-2.0, -2.1], [9.0, 9.0]]), costs, kinds)
    assert worse.tolist()[0] == 0.05, "a kind whose undoing makes it worse is drawn towards all"
    noisy = shrunk_ratios(torch.tensor([[-2.0, 1.0], [9.0, 9.0]]), costs, kinds)
    common = 8.5 / 3
    weight = (common / 2) ** 2 / ((common / 2) ** 2 + 1.5**2)
    assert noisy.tolist()[0] == pytest.approx((common + weight * (-0.5 - common)) / common), (
        "here by what chance leaves of it"
    )


def test_the_next_scales() -> None:
    before = torch.tensor([1.0, 8.0])
    ratios = torch.tensor([2.0, 0.5])
    assert next_scales(before, ratios).tolist() == pytest.approx([2**0.7, 8**0.3 * 0.5**0.7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_float64(dtype: torch.dtype) -> None:
    """Differences of divergences are small."""
    changes = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=dtype)
    costs = torch.tensor([1.0, 3.0], dtype=dtype)
    found = shrunk_ratios(changes, costs, torch.tensor([0, 0]))
    assert (
        found.tolist()
        == shrunk_ratios(changes.double(), costs.double(), torch.tensor([0, 0])).tolist()
    )
    assert next_scales(costs, costs).dtype == torch.float64
