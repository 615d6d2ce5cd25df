"""Training what is left of a feed-forward layer, against dense formulas in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ray_surgeon.surgery.reconstruction import BEND, FeedForward, Reconstructed, error_of, outputs_of, reconstruct

D, K, N = 6, 5, 40
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": torch.nn.functional.silu, "relu": torch.relu}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(gated: bool, biased: bool, activation: str = "silu") -> tuple[FeedForward, Tensor, Tensor]:
    """Return a layer, its inputs, and what it is to give, for one token far from it."""
    producers = tuple(draw(K, D + biased, seed=1 + i) for i in range(1 + gated))
    layer = FeedForward(producers, draw(D, K + biased, seed=3), ACTIVATIONS[activation])
    x, y = draw(N, D, seed=4), draw(N, D, seed=5)
    y[0] *= 50
    return layer, x, y


def by_hand(weights: tuple[Tensor, ...], layer: FeedForward, x: Tensor, y: Tensor) -> Tensor:
    """Return 1/2 |e|^2 of every token, channel by channel."""
    found = []
    *producers, W = weights
    ones = torch.ones(1, dtype=torch.float64)
    for token, wanted in zip(x, y, strict=True):
        read = [torch.cat([token, ones])[: V.shape[1]] for V in producers]
        hidden = layer.activation(producers[0] @ read[0])
        if len(producers) == 2:
            hidden = hidden * (producers[1] @ read[1])
        error = W @ torch.cat([hidden, ones])[: W.shape[1]] - wanted
        found.append(error @ error / 2)
    return torch.stack(found)


def trained(layer: FeedForward, x: Tensor, y: Tensor, **options: float) -> Reconstructed:
    settings = {"learning_rate": 0.01, "tokens_per_step": 8, "num_epochs": 3} | options
    generator = torch.Generator().manual_seed(0)
    return reconstruct(layer.to(torch.float32), x.float(), y.float(), generator=generator, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_the_error_and_the_direction_of_the_first_step(gated: bool, biased: bool, activation: str) -> None:
    layer, x, y = problem(gated, biased, activation)
    before = by_hand(layer.weights, layer, x, y)
    assert error_of(layer, x, y) == pytest.approx(float(before.mean()), rel=1e-12)
    leaves, bend = tuple(weight.clone().requires_grad_() for weight in layer.weights), BEND * before.mean()
    errors = by_hand(leaves, layer, x, y)
    assert 0 < int((errors > bend).sum()) < len(errors)
    huber = torch.where(errors > bend, 2 * (bend * errors).sqrt() - bend, errors).mean()
    gradients = torch.autograd.grad(huber, leaves)
    found = trained(layer, x, y, tokens_per_step=1000, num_epochs=1, learning_rate=1e-3)
    assert found.before == pytest.approx(error_of(layer, x, y), rel=1e-5)
    for after, start, gradient in zip(found.layer.weights, layer.weights, gradients, strict=True):
        step = -1e-3 * start.pow(2).mean().sqrt() * gradient.sign()  # Adam's first step has one size for every entry
        torch.testing.assert_close(after.double() - start, step, rtol=0, atol=2e-6)


def test_outputs_are_those_of_all_tokens_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, y = problem(True, True)
    whole, error = outputs_of(layer, x), error_of(layer, x, y)
    monkeypatch.setattr("ray_surgeon.surgery.reconstruction.TOKENS_AT_A_TIME", 7)
    torch.testing.assert_close(outputs_of(layer, x), whole)
    assert error_of(layer, x, y) == pytest.approx(error)


def pairs_of_channels() -> tuple[FeedForward, FeedForward, Tensor]:
    """Return a layer whose channels are pairs that differ little, one of each pair with twice the weight, and inputs."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(8, D, generator=generator)
    both = torch.cat([first, first + 0.3 * torch.randn(8, D, generator=generator)])
    W, x = torch.randn(D, 8, generator=generator), torch.randn(2000, D, generator=generator)
    return FeedForward((both,), torch.cat([W, W], dim=1), torch.relu), FeedForward((first,), 2 * W, torch.relu), x


def test_channels_that_others_can_replace_are_replaced() -> None:
    whole, left, x = pairs_of_channels()
    found = trained(left, x, outputs_of(whole, x), tokens_per_step=50, num_epochs=10)
    assert found.after < 0.35 * found.before
    assert found.after == pytest.approx(error_of(found.layer, x, outputs_of(whole, x)))


def test_tokens_with_huge_outputs_do_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, left, x = pairs_of_channels()
    y, ordinary = outputs_of(whole, x), torch.arange(len(x)) % 100 != 0
    y[~ordinary] += 300 * torch.randn(20, D, generator=torch.Generator().manual_seed(1))  # no channels can give that

    def error() -> float:
        layer = trained(left, x, y, tokens_per_step=50, num_epochs=10).layer
        before, after = (error_of(each, x[ordinary], y[ordinary]) for each in (left, layer))
        return after / before

    with_bend = error()
    assert with_bend < 0.5
    monkeypatch.setattr("ray_surgeon.surgery.reconstruction.BEND", float("inf"))
    assert error() > 2 * with_bend


def test_a_layer_that_does_not_get_better_stays() -> None:
    layer, x, y = problem(True, True)
    found = trained(layer, x, outputs_of(layer, x) + 0.01 * y, learning_rate=1.0, num_epochs=1)
    assert found.after == found.before > 0
    for after, before in zip(found.layer.weights, layer.weights, strict=True):
        assert torch.equal(after, before.float())
    exact = trained(layer, x, outputs_of(layer.to(torch.float32), x.float()).double())
    assert exact.after == exact.before == 0
