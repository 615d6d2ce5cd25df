from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ray_surgeon.maths import experts as costs
from ray_surgeon.maths.experts import (
    ExpertSums,
    LayerMean,
    add_changes,
    mean_factor,
    shrunk_factors,
)
from ray_surgeon.maths.kronecker import PackedFactors
from ray_surgeon.maths.products import PackedSymmetric, with_ones
from ray_surgeon.maths.threshold import check_costs
from ray_surgeon.pruning.baselines import experts as baselines
from tests.maths.dense import draw, packed


def gram(x: Tensor) -> PackedSymmetric:
    return packed(x.T @ x)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 4000])
def test_factors_are_shrunk_by_the_number_of_tokens(num_tokens: int) -> None:
    """An expert with 256 tokens has the same weight as its layer. Further terms are scaled like the
    first one.
    """
    a, g = (draw(num_tokens, n) for n in (5, 3))
    M_A, M_G = (draw(9, n) for n in (5, 3))
    mean = LayerMean(gram(M_A), gram(M_G), 5000)
    own = PackedFactors(gram(a), gram(g), num_tokens)
    share = (num_tokens + 1) / 5002
    found = shrunk_factors(own, mean).dense()
    n = num_tokens + 256
    torch.testing.assert_close(found.A, (a.T @ a + 256 * M_A.T @ M_A) / n)
    torch.testing.assert_close(found.G, share * (g.T @ g + 256 * M_G.T @ M_G) / n)
    assert costs.own_divisor(num_tokens, mean) == pytest.approx(n / share)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("numbers", [(3, 0, 10), (0, 1), (0, 0)])
def test_layer_mean_ignores_removed_channels(
    numbers: tuple[int, ...], has_bias: bool
) -> None:
    """Without a common basis the mean is a multiple of the identity: the mean square over the
    channels that are left. Experts that lost channels do not lower it.
    """
    own = [draw(n, 6, seed=n) for n in numbers]
    if len(own) == 3:
        own[0][:, [0, 2, 3]] = 0
        own[2][:, 5] = 0
    used = [x[:, (x != 0).any(dim=0)].flatten() for x in own]
    level = torch.cat(used).square().sum() / max(1, sum(map(len, used)))
    sums = [(gram(with_ones(x) if has_bias else x), len(x)) for x in own]
    found = mean_factor(sums, has_basis=False, has_bias=has_bias).dense()
    expected = level * torch.eye(6 + has_bias, dtype=torch.float64)
    if has_bias:
        expected[-1, -1] = float(sum(numbers) > 0)
    torch.testing.assert_close(found, expected)
    together = torch.cat([with_ones(x) if has_bias else x for x in own])
    expected = together.T @ together / max(1, len(together))
    torch.testing.assert_close(mean_factor(sums, has_basis=True).dense(), expected)


@pytest.mark.parametrize(
    "numbers", [[[0, 1], [1, 0], [0, 1], [1, 2], [0, 1]], [[0, 1]], []]
)
def test_expert_costs_match_their_definitions(numbers: list[list[int]]) -> None:
    """Each token goes to two of four experts, in two parts; the last expert gets no token."""
    experts = torch.tensor(numbers, dtype=torch.int64).flatten()
    num_tokens = len(numbers)
    tokens = torch.arange(num_tokens).repeat_interleave(2)
    changes = torch.randn(2 * num_tokens, 6)
    gradients = torch.randn(num_tokens, 6)
    norms = torch.rand(2 * num_tokens)
    sums = ExpertSums(4)
    for part in (slice(0, 4), slice(4, None)):
        sums.add("tokens", experts[part], torch.ones(len(experts[part])))
        sums.add("weighted_norms", experts[part], norms[part])
        add_changes(sums, experts[part], changes[part], gradients[tokens[part]])
    gains = (changes * gradients[tokens]).sum(dim=1).double()
    of_all = max(1, num_tokens)
    of_expert = [experts == expert for expert in range(4)]
    second = [float(gains[mine].square().sum()) / 2 / of_all for mine in of_expert]
    first = [float(gains[mine].sum()) / of_all for mine in of_expert]
    whole = [one + other for one, other in zip(first, second, strict=True)]
    reap = [float(norms[mine].sum()) / max(1, int(mine.sum())) for mine in of_expert]
    frequency = [int(mine.sum()) / of_all for mine in of_expert]
    found = costs.rerouting_costs(sums, 2, first_order=False)
    assert found.tolist() == pytest.approx(second, rel=1e-5)
    assert costs.rerouting_costs(sums, 2).tolist() == pytest.approx(
        whole, rel=1e-5, abs=1e-6
    )
    assert baselines.reap_costs(sums).tolist() == pytest.approx(reap, rel=1e-5)
    assert baselines.frequency_costs(sums, 2).tolist() == pytest.approx(frequency)
    assert torch.equal(baselines.random_costs(4, 7), baselines.random_costs(4, 7))
    assert not torch.equal(baselines.random_costs(4, 7), baselines.random_costs(4, 8))


def test_only_costs_with_a_first_order_term_may_be_negative() -> None:
    check_costs("layer", torch.tensor([-1.0, 0.0, 2.0]), may_be_negative=True)
    with pytest.raises(
        FloatingPointError, match="layer: 1 of 3 costs are NaN, infinite or negati"
    ):
        check_costs("layer", torch.tensor([-1.0, 0.0, 2.0]))
    for wrong in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(
            FloatingPointError, match="layer: 1 of 2 costs are NaN or infinite"
        ):
            check_costs("layer", torch.tensor([wrong, -1.0]), may_be_negative=True)
