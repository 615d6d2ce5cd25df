"""Scales of costs: ratios of measured to expected changes, by numpy and against the truth they are drawn from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ray_surgeon.surgery.scales import next_scales, shrunk_ratios


def test_by_numpy() -> None:
    generator = np.random.default_rng(0)
    changes, costs = generator.normal(1.0, 0.3, (5, 8)) * np.array([[1, 2, 3, 4, 0.1]]).T, np.array([1.0, 1.0, 4.0, 2.0, 0.3])
    mean, error = changes.mean(1), np.array([np.sqrt(np.var(row, ddof=1) / 8) for row in changes])
    common = mean.sum() / costs.sum()
    variance = sum((mean[b] - common * costs[b]) ** 2 - error[b] ** 2 for b in range(5)) / sum(costs**2)
    expected = [common + variance / (variance + (error[b] / costs[b]) ** 2) * (mean[b] / costs[b] - common) for b in range(5)]
    found = shrunk_ratios(torch.tensor(changes), torch.tensor(costs))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(np.array(expected) / common)


def test_shrinking_brings_ratios_nearer_to_the_truth() -> None:
    """Blocks of very different costs, whose changes are measured with the same error."""
    generator = torch.Generator().manual_seed(0)
    plain, shrunk = 0.0, 0.0
    for _ in range(50):
        truth = (0.3 * torch.randn(30, generator=generator, dtype=torch.float64)).exp()
        costs = (1.5 * torch.randn(30, generator=generator, dtype=torch.float64)).exp()
        changes = (truth * costs)[:, None] + 2.0 * torch.randn(30, 8, generator=generator, dtype=torch.float64)
        common = (truth * costs).sum() / costs.sum()
        plain += float((changes.mean(1) / costs / common - truth / common).square().mean())
        shrunk += float((shrunk_ratios(changes, costs) - truth / common).square().mean())
    assert shrunk < plain / 20


def test_without_an_error_ratios_are_what_they_are() -> None:
    costs = torch.tensor([1.0, 2.0, 4.0])
    changes = torch.tensor([2.0, 2.0, 12.0])[:, None].expand(3, 4)
    assert shrunk_ratios(changes, costs).tolist() == pytest.approx([2 / (16 / 7), 1 / (16 / 7), 3 / (16 / 7)])


def test_what_says_nothing_changes_nothing() -> None:
    costs = torch.tensor([1.0, 2.0])
    assert shrunk_ratios(torch.tensor([[1.0, -3.0], [1.0, -1.0]]), costs).tolist() == [1.0, 1.0], "undoing makes it worse"
    assert shrunk_ratios(torch.tensor([[0.0, 2.0], [1.0, 3.0]]), costs).tolist() == [1.0, 1.0], "differences are smaller than their errors"
    assert shrunk_ratios(torch.tensor([[-2.0, -2.0], [9.0, 9.0]]), costs).tolist()[0] == 0.05, "the smallest that is allowed"


def test_the_next_scales() -> None:
    before, ratios = torch.tensor([1.0, 8.0]), torch.tensor([2.0, 0.5])
    assert next_scales(before, ratios).tolist() == pytest.approx([2**0.7, 8**0.3 * 0.5**0.7])
