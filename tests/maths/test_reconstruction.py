"""Training of the remaining channels of a feed-forward layer, against dense formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ray_surgeon.maths.reconstruction import (
    BEND,
    FeedForward,
    Reconstructed,
    error_of,
    outputs_of,
    reconstruct,
)
from tests.maths.dense import draw

D = 6
K = 5
N = 40
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
}


def problem(
    gated: bool = True, biased: bool = True, activation: str = "silu"
) -> tuple[FeedForward, Tensor, Tensor]:
    """Return a layer, its inputs, and its target outputs; one token's target is far off."""
    producers = tuple(draw(K, D + biased, seed=1 + i) for i in range(1 + gated))
    layer = FeedForward(
        (*producers, draw(D, K + biased, seed=3)), ACTIVATIONS[activation]
    )
    y = draw(N, D, seed=5)
    y[0] *= 50
    return layer, draw(N, D, seed=4), y


def by_hand(
    weights: tuple[Tensor, ...], layer: FeedForward, x: Tensor, y: Tensor
) -> Tensor:
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


def huber(errors: Tensor, bend: Tensor) -> Tensor:
    return torch.where(errors > bend, 2 * (bend * errors).sqrt() - bend, errors).mean()


def seeded(layer: FeedForward, *data: Any, **options: Any) -> Reconstructed:
    return reconstruct(
        layer, *data, generator=torch.Generator().manual_seed(0), **options
    )


class Launches(TorchDispatchMode):
    """Counts the bytes that launches read and write, and how often the host waits for a number.

    Only tensors of given numbers of entries are counted.
    """

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.num_bytes = 0
        self.num_syncs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_syncs += func is torch.ops.aten._local_scalar_dense.default
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        if any(not alias.is_write for alias in aliases) or "empty" in str(func):
            return result
        values = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        values |= kwargs or {}
        for argument in func._schema.arguments:
            changes = argument.alias_info is not None and argument.alias_info.is_write
            # fused Adam changes gradients only where it takes them out of a scale
            changes &= argument.name != "grads"
            reads = not (changes and argument.kwarg_only)
            self.num_bytes += (reads + changes) * self._size(values.get(argument.name))
        self.num_bytes += 0 if aliases else self._size(result)
        return result

    def _size(self, value: Any) -> int:
        values = value if isinstance(value, list | tuple) else [value]
        tensors = [each for each in values if isinstance(each, Tensor)]
        return sum(tensor.nbytes for tensor in tensors if tensor.numel() in self.sizes)


def trained(layer: FeedForward, x: Tensor, y: Tensor, **options: float) -> Reconstructed:
    settings = {"learning_rate": 0.01, "tokens_per_step": 8, "num_epochs": 3} | options
    return seeded(layer.to(torch.float32), x.float(), y.float(), **settings)


def by_adam(
    layer: FeedForward,
    x: Tensor,
    y: Tensor,
    learning_rate: float,
    size: int,
    num_epochs: float,
) -> tuple[Tensor, ...]:
    """Return the weights after Adam (0.8, 0.9) on Huber's loss with a bend at 4 times the mean
    error.

    The rate rises during the first twentieth of the steps, then falls linearly to zero.
    """
    generator = torch.Generator().manual_seed(0)
    bend = 4 * by_hand(layer.weights, layer, x, y).mean()
    torch.randperm(len(x), generator=generator)  # of those that are measured
    weights = list(layer.weights)
    per_epoch = len(x) // size
    rates = [learning_rate * weight.pow(2).mean().sqrt() for weight in weights]
    means, squares = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    total = max(1, int(num_epochs * per_epoch))
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(len(x), generator=generator)
        tokens = order[step % per_epoch * size :][:size]
        leaves = tuple(weight.clone().requires_grad_() for weight in weights)
        loss = huber(by_hand(leaves, layer, x[tokens], y[tokens]), bend)
        factor = min((step + 1) / max(1, round(total / 20)), 1 - step / total)
        for i, gradient in enumerate(torch.autograd.grad(loss, leaves)):
            means[i] = 0.8 * means[i] + 0.2 * gradient
            squares[i] = 0.9 * squares[i] + 0.1 * gradient.square()
            mean = means[i] / (1 - 0.8 ** (step + 1))
            square = squares[i] / (1 - 0.9 ** (step + 1))
            weights[i] = weights[i] - factor * rates[i] * mean / square.sqrt()
    return tuple(weights)


def assert_trained_alike(
    found: FeedForward, start: FeedForward, expected: FeedForward, most: float
) -> None:
    for after, before, wide in zip(
        *(x.weights for x in (found, start, expected)), strict=True
    ):
        assert after.dtype == torch.float32
        assert float((after - wide).norm() / (wide - before).norm()) < most


@pytest.mark.parametrize(
    ("gated", "biased", "activation", "size", "num_epochs"),
    [
        (True, True, "silu", 12, 3),
        (False, True, "silu", 6, 6.5),
        (True, False, "relu", 12, 3),
        (False, False, "relu", 12, 0.01),
    ],
)
def test_training_matches_adam(
    gated: bool, biased: bool, activation: str, size: int, num_epochs: float
) -> None:
    """Every epoch leaves out four tokens, other ones each time. A fraction of an epoch makes that
    fraction of its steps, at least one.
    """
    layer, x, y = problem(gated, biased, activation)
    errors = by_hand(layer.weights, layer, x, y)
    bend = BEND * errors.mean()
    assert 0 < int((errors > bend).sum()) < len(errors)
    assert error_of(layer, x, y) == pytest.approx(float(errors.mean()), rel=1e-12)
    before = float(huber(errors, bend))
    assert error_of(layer, x, y, float(bend)) == pytest.approx(before, rel=1e-12)
    found = trained(layer, x, y, tokens_per_step=size, num_epochs=num_epochs)
    assert found.before == pytest.approx(before, rel=1e-5)
    assert found.after < found.before
    expected = by_adam(layer, x, y, 0.01, size, num_epochs)
    for after, start, wanted in zip(
        found.layer.weights, layer.weights, expected, strict=True
    ):
        torch.testing.assert_close(
            after.double() - start, wanted - start, rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("gated", "biased"), [(True, True), (False, True), (True, False)]
)
def test_gradients_match_autograd_of_the_loss(
    gated: bool, biased: bool, activation: str
) -> None:
    layer, x, y = problem(gated, biased, activation)
    leaves = tuple(weight.clone().requires_grad_() for weight in layer.weights)
    expected = torch.autograd.grad(by_hand(leaves, layer, x, y).mean(), leaves)
    gradients = layer.gradients(x, lambda outputs: (outputs - y) / N)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_layer_is_kept_if_training_makes_it_worse_or_it_is_exact() -> None:
    layer, x, _ = problem()
    y = outputs_of(layer, x) + 0.01 * draw(N, D, seed=6)
    other = replace(layer, weights=by_adam(layer, x, y, 4e-4, 8, 1))
    worse = error_of(other, x, y, BEND * error_of(layer, x, y))
    found = trained(layer, x, y, learning_rate=4e-4, num_epochs=1)
    assert found.before < worse < 1.1 * found.before
    assert found.after == pytest.approx(worse, rel=1e-3)
    assert found.after >= found.before
    for after, start in zip(found.layer.weights, layer.weights, strict=True):
        assert torch.equal(after, start.float())
    exact = trained(layer, x, outputs_of(layer.to(torch.float32), x.float()))
    assert exact.after == exact.before == 0


def test_outputs_and_errors_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """If only a part of the tokens is measured, it is spread over all tokens that have an error."""
    layer, x, y = problem()
    whole = outputs_of(layer, x)
    error = error_of(layer, x, y)
    monkeypatch.setattr("ray_surgeon.maths.reconstruction.TOKENS_AT_A_TIME", 7)
    torch.testing.assert_close(outputs_of(layer, x), whole)
    assert error_of(layer, x, y) == pytest.approx(error)
    monkeypatch.setattr("ray_surgeon.maths.reconstruction.TOKENS_AT_A_TIME", N // 2)
    whole[N // 2 :] += 1
    assert 0.25 * D / 2 < trained(layer, x, whole).before < 0.75 * D / 2


def pairs_of_channels() -> tuple[FeedForward, FeedForward, Tensor, Tensor]:
    """Return a layer, its half, inputs, and the outputs of the whole layer.

    The channels are pairs that differ little; the half has one of each pair with twice the weight.
    """
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(8, D, generator=generator)
    both = torch.cat([first, first + 0.3 * torch.randn(8, D, generator=generator)])
    W = torch.randn(D, 8, generator=generator)
    x = torch.randn(2000, D, generator=generator)
    whole = FeedForward((both, torch.cat([W, W], dim=1)), torch.relu)
    return whole, FeedForward((first, 2 * W), torch.relu), x, outputs_of(whole, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_accumulate_with_narrow_products(dtype: torch.dtype) -> None:
    """A step is far below the resolution of the dtype. All steps together change what float32 steps
    change, and errors are summed in float64.
    """
    _, left, x, y = pairs_of_channels()
    y[::100] = 110  # whose square is not finite in float16
    options = {"learning_rate": 2e-4, "tokens_per_step": 50, "num_epochs": 1}
    found = seeded(left, x.to(dtype), y.to(dtype), **options)
    assert_trained_alike(found.layer, left, trained(left, x, y, **options).layer, 0.05)
    before, after = (
        (layer.to(dtype)(x.to(dtype)) - y.to(dtype)).double().square().sum(1) / 2
        for layer in (left, found.layer)
    )
    assert found.after == pytest.approx(
        float(huber(after, BEND * before.mean())), rel=1e-6
    )


def test_tokens_with_huge_outputs_do_not_prevent_an_improvement() -> None:
    """A few tokens had no error. After training their errors are large, but small beside their
    outputs.
    """
    whole, left, x, _ = pairs_of_channels()
    ordinary = torch.arange(len(x)) % 500 != 0
    x = torch.where(ordinary[:, None], x, 200 * x)
    y = torch.where(ordinary[:, None], outputs_of(whole, x), outputs_of(left, x))
    found = trained(left, x, y, tokens_per_step=50)
    before, after = (
        error_of(each, x[ordinary], y[ordinary]) for each in (left, found.layer)
    )
    assert after < 0.2 * before
    assert found.after < found.before
    assert error_of(found.layer, x, y) > error_of(left, x, y)


def test_step_moves_few_bytes_and_never_waits() -> None:
    """In bfloat16: forward 2 bytes for a weight; backward 2 for its gradient and 2 more for a third
    of the weights; 14 for Adam; 6 for the sum of start and change. With float32 masters it was 44.7
    in all.
    """
    shapes = [(48, 32), (48, 32), (32, 48)]
    layer = FeedForward(tuple(draw(*shape).float() for shape in shapes), torch.relu)
    x, y = (draw(80, 32, seed=seed).bfloat16() for seed in (1, 2))
    counts = []
    for num_epochs in (1, 3):
        with Launches({48 * 32}) as launches:
            seeded(
                layer, x, y, learning_rate=0.01, tokens_per_step=8, num_epochs=num_epochs
            )
        counts.append((launches.num_bytes, launches.num_syncs))
    (few, once), (many, later) = counts
    assert once == later
    assert (many - few) / (20 * 3 * 48 * 32) == pytest.approx(2 + 2 + 2 / 3 + 14 + 6)


def test_float16_training_does_not_depend_on_the_size_of_outputs() -> None:
    """Outputs are up to half of the largest float16 number."""
    _, left, x, y = pairs_of_channels()
    left = replace(left, weights=(*left.weights[:-1], 500 * left.weights[-1]))
    options = {"learning_rate": 0.01, "tokens_per_step": 2000, "num_epochs": 20}
    found = seeded(left, x.half(), (500 * y).half(), **options)
    # what bfloat16 rounds of the change makes 0.007
    assert_trained_alike(
        found.layer, left, trained(left, x, 500 * y, **options).layer, 0.015
    )


def test_layer_is_accepted_by_held_aside_tokens_only() -> None:
    """Few tokens are overfitted. The other tokens show that, and the layer stays as it was. With
    many tokens the error on the others is lower, and the layer is accepted.
    """
    _, left, x, y = pairs_of_channels()
    noise = y + 20 * torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    held = x[1000:], y[1000:]
    options = {"learning_rate": 0.02, "tokens_per_step": 20, "num_epochs": 10}
    by_heart = seeded(left, x[:20], noise[:20], held, **options)
    own = seeded(left, x[:20], noise[:20], **options)
    assert own.after < own.before
    assert by_heart.after >= by_heart.before
    for after, start in zip(by_heart.layer.weights, left.weights, strict=True):
        assert torch.equal(after, start)
    found = seeded(left, x[:1000], y[:1000], held, **options)
    limit = BEND * error_of(left, x[:1000], y[:1000])
    assert found.after == pytest.approx(error_of(found.layer, *held, limit), rel=1e-6)
    assert found.before == pytest.approx(error_of(left, *held, limit), rel=1e-6)
    assert found.after < 0.5 * found.before
