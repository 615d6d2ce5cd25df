"""Training what is left of a feed-forward layer, against dense formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ray_surgeon.maths.reconstruction import (
    BEND,
    FeedForward,
    Reconstructed,
    error_of,
    outputs_of,
    rate_factor,
    reconstruct,
)

D = 6
K = 5
N = 40
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(
    gated: bool, biased: bool, activation: str = "silu"
) -> tuple[FeedForward, Tensor, Tensor]:
    """Return a layer, its inputs, and what it is to give, for one token far from it."""
    producers = tuple(draw(K, D + biased, seed=1 + i) for i in range(1 + gated))
    layer = FeedForward(producers, draw(D, K + biased, seed=3), ACTIVATIONS[activation])
    x = draw(N, D, seed=4)
    y = draw(N, D, seed=5)
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


def seeded(layer: FeedForward, *data: Any, **options: Any) -> Reconstructed:
    return reconstruct(layer, *data, generator=torch.Generator().manual_seed(0), **options)


def trained(layer: FeedForward, x: Tensor, y: Tensor, **options: float) -> Reconstructed:
    settings = {"learning_rate": 0.01, "tokens_per_step": 8, "num_epochs": 3} | options
    return seeded(layer.to(torch.float32), x.float(), y.float(), **settings)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_the_error_and_the_direction_of_the_first_step(
    gated: bool, biased: bool, activation: str
) -> None:
    layer, x, y = problem(gated, biased, activation)
    before = by_hand(layer.weights, layer, x, y)
    assert error_of(layer, x, y) == pytest.approx(float(before.mean()), rel=1e-12)
    leaves = tuple(weight.clone().requires_grad_() for weight in layer.weights)
    bend = BEND * before.mean()
    errors = by_hand(leaves, layer, x, y)
    assert 0 < int((errors > bend).sum()) < len(errors)
    huber = torch.where(errors > bend, 2 * (bend * errors).sqrt() - bend, errors).mean()
    gradients = torch.autograd.grad(huber, leaves)
    found = trained(layer, x, y, tokens_per_step=1000, num_epochs=1, learning_rate=1e-3)
    assert error_of(layer, x, y, float(bend)) == pytest.approx(float(huber), rel=1e-12)
    assert found.before == pytest.approx(float(huber), rel=1e-5)
    for after, start, gradient in zip(found.layer.weights, layer.weights, gradients, strict=True):
        # Adam's first step has one size for every entry
        step = -1e-3 * start.pow(2).mean().sqrt() * gradient.sign()
        torch.testing.assert_close(after.double() - start, step, rtol=0, atol=2e-6)


def by_adam(
    layer: FeedForward, x: Tensor, y: Tensor, learning_rate: float, size: int, num_epochs: int
) -> tuple[Tensor, ...]:
    """Return the weights after all steps: Adam with 0.8 and 0.9, on Huber's loss from 4 times the
    mean error.

    The rate rises over the first twentieth of the steps, and then falls linearly to zero.
    """
    generator = torch.Generator().manual_seed(0)
    bend = 4 * by_hand(layer.weights, layer, x, y).mean()
    torch.randperm(len(x), generator=generator)  # of those that are measured
    weights = list(layer.weights)
    per_epoch = len(x) // size
    rates = [learning_rate * weight.pow(2).mean().sqrt() for weight in weights]
    means, squares = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for step in range(num_epochs * per_epoch):
        if step % per_epoch == 0:
            order = torch.randperm(len(x), generator=generator)
        tokens = order[step % per_epoch * size :][:size]
        leaves = tuple(weight.clone().requires_grad_() for weight in weights)
        errors = by_hand(leaves, layer, x[tokens], y[tokens])
        huber = torch.where(errors > bend, 2 * (bend * errors).sqrt() - bend, errors).mean()
        for i, gradient in enumerate(torch.autograd.grad(huber, leaves)):
            means[i] = 0.8 * means[i] + 0.2 * gradient
            squares[i] = 0.9 * squares[i] + 0.1 * gradient.square()
            direction = (
                means[i] / (1 - 0.8 ** (step + 1)) / (squares[i] / (1 - 0.9 ** (step + 1))).sqrt()
            )
            total = num_epochs * per_epoch
            weights[i] = (
                weights[i]
                - min((step + 1) / max(1, round(total / 20)), 1 - step / total)
                * rates[i]
                * direction
            )
    return tuple(weights)


@pytest.mark.parametrize("gated", [False, True])
def test_all_steps_are_those_of_adam_in_float64(gated: bool) -> None:
    """In every epoch four of the tokens are left over, others each time."""
    layer, x, y = problem(gated, True)
    found = trained(layer, x, y, tokens_per_step=12, num_epochs=3)
    assert found.after < found.before
    for after, start, expected in zip(
        found.layer.weights, layer.weights, by_adam(layer, x, y, 0.01, 12, 3), strict=True
    ):
        torch.testing.assert_close(after.double() - start, expected - start, rtol=1e-3, atol=1e-5)


def test_a_layer_that_gets_slightly_worse_stays() -> None:
    layer, x, _ = problem(True, True)
    y = outputs_of(layer, x) + 0.01 * draw(N, D, seed=6)
    worse = error_of(
        layer.with_weights(by_adam(layer, x, y, 4e-4, 8, 1)), x, y, BEND * error_of(layer, x, y)
    )
    found = trained(layer, x, y, learning_rate=4e-4, num_epochs=1)
    assert found.before < worse < 1.1 * found.before
    assert found.after == pytest.approx(worse, rel=1e-3)
    assert found.after >= found.before
    assert all(
        torch.equal(after, start.float())
        for after, start in zip(found.layer.weights, layer.weights, strict=True)
    )


def test_the_error_is_of_tokens_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_surgeon.maths.reconstruction.TOKENS_AT_A_TIME", N // 2)
    layer, x, _ = problem(True, True)
    y = outputs_of(layer.to(torch.float32), x.float()).double()
    y[N // 2 :] += 1
    found = trained(layer, x, y)
    assert 0.25 * D / 2 < found.before < 0.75 * D / 2, (
        "half of the tokens have an error, all of them late ones"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_products_train_float32_weights(dtype: torch.dtype) -> None:
    """A step is far below that of the dtype; all of them together change what those of float32 do,
    and errors are summed in float64.
    """
    whole, left, x = pairs_of_channels()
    y = outputs_of(whole, x)
    y[::100] = 110  # whose square is not finite in float16
    options = {"learning_rate": 2e-4, "tokens_per_step": 50, "num_epochs": 1}
    found = seeded(left, x.to(dtype), y.to(dtype), **options)
    expected = trained(left, x, y, **options)
    for after, start, wide in zip(
        found.layer.weights, left.weights, expected.layer.weights, strict=True
    ):
        assert after.dtype == torch.float32
        assert float((after - wide).norm() / (wide - start).norm()) < 0.05
    before, after = (
        (layer.to(dtype)(x.to(dtype)) - y.to(dtype)).double().square().sum(1) / 2
        for layer in (left, found.layer)
    )
    limit = BEND * before.mean()
    huber = torch.where(after > limit, 2 * (limit * after).sqrt() - limit, after)
    assert found.after == pytest.approx(float(huber.mean()), rel=1e-6)


def test_outputs_are_those_of_all_tokens_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, y = problem(True, True)
    whole = outputs_of(layer, x)
    error = error_of(layer, x, y)
    monkeypatch.setattr("ray_surgeon.maths.reconstruction.TOKENS_AT_A_TIME", 7)
    torch.testing.assert_close(outputs_of(layer, x), whole)
    assert error_of(layer, x, y) == pytest.approx(error)


def pairs_of_channels() -> tuple[FeedForward, FeedForward, Tensor]:
    """Return a layer whose channels are pairs that differ little, one of each pair with twice the
    weight, and inputs.
    """
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(8, D, generator=generator)
    both = torch.cat([first, first + 0.3 * torch.randn(8, D, generator=generator)])
    W = torch.randn(D, 8, generator=generator)
    x = torch.randn(2000, D, generator=generator)
    return (
        FeedForward((both,), torch.cat([W, W], dim=1), torch.relu),
        FeedForward((first,), 2 * W, torch.relu),
        x,
    )


def test_channels_that_others_can_replace_are_replaced() -> None:
    whole, left, x = pairs_of_channels()
    found = trained(left, x, outputs_of(whole, x), tokens_per_step=50, num_epochs=10)
    assert found.after < 0.35 * found.before
    assert found.after == pytest.approx(
        error_of(
            found.layer, x, outputs_of(whole, x), BEND * error_of(left, x, outputs_of(whole, x))
        )
    )


def test_tokens_with_huge_outputs_do_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, left, x = pairs_of_channels()
    y = outputs_of(whole, x)
    ordinary = torch.arange(len(x)) % 100 != 0
    # no channels can give that
    y[~ordinary] += 300 * torch.randn(20, D, generator=torch.Generator().manual_seed(1))

    def error() -> float:
        layer = trained(left, x, y, tokens_per_step=50, num_epochs=10).layer
        before, after = (error_of(each, x[ordinary], y[ordinary]) for each in (left, layer))
        return after / before

    with_bend = error()
    assert with_bend < 0.5
    monkeypatch.setattr("ray_surgeon.maths.reconstruction.BEND", float("inf"))
    assert error() > 2 * with_bend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_with_huge_outputs_do_not_refuse_what_all_others_gain_from(
    dtype: torch.dtype,
) -> None:
    """A few tokens had no error, and have large ones now, beside their outputs small ones."""
    whole, left, x = pairs_of_channels()
    ordinary = torch.arange(len(x)) % 500 != 0
    x = torch.where(ordinary[:, None], x, 200 * x)
    y = torch.where(ordinary[:, None], outputs_of(whole, x), outputs_of(left, x)).to(dtype)
    options = {"learning_rate": 0.01, "tokens_per_step": 50, "num_epochs": 10}
    found = seeded(left, x.to(dtype), y, **options)
    before, after = (
        error_of(each, x[ordinary], y[ordinary].float()) for each in (left, found.layer)
    )
    assert after < 0.2 * before
    assert found.after < found.before
    if dtype == torch.float32:  # in bfloat16 the plain error falls, too
        assert error_of(found.layer, x, y.float()) > error_of(left, x, y.float())


def test_outputs_of_any_size_train_alike_in_float16() -> None:
    """Of outputs up to half of what float16 can hold."""
    whole, left, x = pairs_of_channels()
    left = left.with_weights((*left.producers, 500 * left.consumer))
    y = 500 * outputs_of(whole, x)
    options = {"learning_rate": 0.01, "tokens_per_step": 2000, "num_epochs": 20}
    expected = trained(left, x, y, **options)
    found = seeded(left, x.half(), y.half(), **options)
    for after, start, wide in zip(
        found.layer.weights, left.weights, expected.layer.weights, strict=True
    ):
        assert float((after - wide).norm() / (wide - start).norm()) < 0.002


def test_a_layer_that_does_not_get_better_stays() -> None:
    layer, x, y = problem(True, True)
    found = trained(layer, x, outputs_of(layer, x) + 0.01 * y, learning_rate=1.0, num_epochs=1)
    assert found.after > found.before > 0
    for after, before in zip(found.layer.weights, layer.weights, strict=True):
        assert torch.equal(after, before.float())
    exact = trained(layer, x, outputs_of(layer.to(torch.float32), x.float()).double())
    assert exact.after == exact.before == 0


def test_a_layer_is_taken_by_tokens_held_aside_alone() -> None:
    """Few tokens are learnt by heart. That shows on others, and the layer stays; with many it is
    taken, by its error on the others.
    """
    whole, left, x = pairs_of_channels()
    y = outputs_of(whole, x)
    noise = y + 20 * torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    held = x[1000:], y[1000:]
    options = {"learning_rate": 0.02, "tokens_per_step": 20, "num_epochs": 30}
    by_heart = seeded(left, x[:20], noise[:20], held, **options)
    own = seeded(left, x[:20], noise[:20], **options)
    assert own.after < own.before
    assert by_heart.after >= by_heart.before
    assert all(
        torch.equal(after, start)
        for after, start in zip(by_heart.layer.weights, left.weights, strict=True)
    )
    found = seeded(left, x[:1000], y[:1000], held, **options)
    limit = BEND * error_of(left, x[:1000], y[:1000])
    assert found.after == pytest.approx(error_of(found.layer, *held, limit), rel=1e-6)
    assert found.before == pytest.approx(error_of(left, *held, limit), rel=1e-6)
    assert found.after < 0.5 * found.before


def test_a_part_of_a_pass_is_that_many_steps() -> None:
    layer, x, y = problem(True, True)
    found = trained(layer, x, y, tokens_per_step=8, num_epochs=0.4)
    expected = by_adam(layer, x, y, 0.01, 8, 1)
    assert not torch.equal(found.layer.consumer, expected[-1].float())
    assert [rate_factor(number, 40) for number in (0, 1, 2, 20, 39)] == pytest.approx(
        [0.5, 0.975, 0.95, 0.5, 0.025]
    )
    assert [rate_factor(number, 3) for number in range(3)] == pytest.approx([1, 2 / 3, 1 / 3])
    assert rate_factor(0, 1) == 1.0
