"""Reconstruction of a feed-forward layer that lost channels.

All that is left of it is trained until it gives what the whole layer gave.

The exact update of a consumer changes its own weights only, and takes channels as they are. Here
what the kept channels compute changes, too, for the inputs that the model from before gives them.
All directions of the outputs count alike: errors are larger than what gradients say of small ones.
Nothing passes through other layers, so every token says as much of these weights as the layer has
outputs. Whether the layer got better is measured on tokens that it was not trained on.

Source: docs/method.md, section 8; block reconstruction as of BRECQ (Li et al. 2021, arXiv
2102.05426), without the Fisher's diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ray_surgeon.maths.products import product

TOKENS_AT_A_TIME = 4096
"""Tokens per batch when outputs and errors are computed."""
BEND = 4.0
"""Errors above so many times the mean error before count by their root.

Some tokens, the first one of a text above all, have outputs hundreds of times as large as others,
which the norm after them makes as small.
"""
WARM_UP = 0.05
"""Share of the steps in which the rate rises to its first value, before it falls linearly to zero.
"""


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward layer, y = W f(V x), or with a gate, y = W (f(V_1 x) * V_2 x).

    A further column of a weight is its bias.
    """

    # V [k, d] of the producers, the gate first, one or two; then the consumer's W [R, k]
    weights: tuple[Tensor, ...]
    activation: Callable[[Tensor], Tensor]  # f, of every entry

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs [N, R] for inputs [N, d], without a gradient."""
        *producers, W = self.weights
        gate, *factors = (_affine(x, V) for V in producers)
        hidden = self.activation(gate)
        for factor in factors:
            hidden = hidden * factor
        return _affine(hidden, W)

    @torch.no_grad()
    def gradients(self, x: Tensor, slope_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return the gradient of a loss at every weight.

        Args:
            x: [N, d] inputs.
            slope_of: outputs [N, R] -> the derivative of the loss by them.
        """
        *producers, W = self.weights
        before, *factors = (_affine(x, V) for V in producers)
        with torch.enable_grad():
            gate = self.activation(before.requires_grad_())
        active = gate.detach()
        hidden = active * factors[0] if factors else active
        slope = slope_of(_affine(hidden, W))
        of_hidden = product(slope, W[:, : hidden.shape[1]])
        of_gate = of_hidden * factors[0] if factors else of_hidden
        slopes = [*torch.autograd.grad(gate, before, of_gate)]
        slopes += [of_hidden.mul_(active) for _ in factors]
        gradients = [_times_inputs(own, x, V) for own, V in zip(slopes, producers, strict=True)]
        return [*gradients, _times_inputs(slope, hidden, W)]

    def to(self, dtype: torch.dtype) -> FeedForward:
        """Return the layer in another dtype."""
        return replace(self, weights=tuple(weight.to(dtype) for weight in self.weights))


class _Adam:
    """Adam on the weights of a layer, float32 or narrow.

    A narrow dtype would round most steps away. There the weights are those of the start plus a
    change, and the change is trained, in bfloat16: it is small, and so is its last place.

    Attributes:
        weights: for the products, as the last step left them.
    """

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype, learning_rate: float) -> None:
        """Start from float32 weights.

        Args:
            weights: which stay as they are.
            dtype: of the products.
            learning_rate: see `reconstruct`.
        """
        self.weights = [weight.to(dtype, copy=True) for weight in weights]
        self._starts = list[Tensor]()
        # a weight of zeros has no unit, and stays
        sizes = torch.stack([weight.pow(2).mean().sqrt() for weight in weights])
        self._units: list[float] = sizes.clamp_(min=1e-30).tolist()
        if dtype == torch.float32:
            self._trained = self.weights
            self._rates = [learning_rate * unit for unit in self._units]
        else:  # of one rate, so that a launch makes the step of all of them
            self._starts = [weight.clone() for weight in self.weights]
            whole = zip(weights, self._starts, self._units, strict=True)
            self._trained = [((weight - start) / unit).bfloat16() for weight, start, unit in whole]
            self._rates = [learning_rate]
        groups = [self._trained] if self._starts else [[weight] for weight in self._trained]
        parameters = [{"params": group} for group in groups]
        self._optimizer = torch.optim.Adam(parameters, betas=(0.8, 0.9), fused=True)

    def step(self, gradients: Sequence[Tensor], factor: float) -> None:
        """Make a step with a factor of the rates, without waiting for it."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        for trained, gradient in zip(self._trained, gradients, strict=True):
            trained.grad = gradient.to(trained.dtype)
        self._optimizer.step()
        for weight, start, change, unit in self._parts() if self._starts else ():
            torch.add(start, change, alpha=unit, out=weight)

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        return zip(self.weights, self._starts, self._trained, self._units, strict=True)

    def result(self) -> tuple[Tensor, ...]:
        """Return the trained weights, float32."""
        if not self._starts:
            return tuple(self.weights)
        parts = self._parts()
        return tuple(start.float().add_(change, alpha=unit) for _, start, change, unit in parts)


@dataclass(frozen=True)
class Reconstructed:
    """A layer, and its mean loss over tokens held aside before and after.

    `error_of` with the limit of the training.
    """

    layer: FeedForward  # float32
    before: float
    after: float  # of the trained layer, even if it was worse and the layer stayed as it was


def reconstruct(
    layer: FeedForward,
    inputs: Tensor,
    outputs: Tensor,
    held: tuple[Tensor, Tensor] | None = None,
    *,
    learning_rate: float,
    tokens_per_step: int,
    num_epochs: float,
    generator: torch.Generator,
) -> Reconstructed:
    """Train a layer on the squared error of its outputs, by Adam.

    The rate rises shortly and then falls linearly to zero.

    The loss is Huber's (1964): half of a token's squared error, from `BEND` on tangent to it and
    linear in the root.

    Args:
        layer: what is left, float32.
        inputs: [N, d] of the layer, in the dtype of the products.
        outputs: [N, R] what they are to give, likewise.
        held: inputs [M, d] and outputs [M, R] of tokens held aside, on which the layer is measured;
            some of its own if not given.
        learning_rate: the largest one, in units of the root mean square of each weight.
        tokens_per_step: of the gradient of a step; all, if there are fewer.
        num_epochs: passes over the tokens; less than one pass trains on some of them, at least one
            step.
        generator: of their order, on the CPU.

    Returns:
        The trained layer, or the one that was given if the loss on the measured tokens did not
        fall.
    """
    dtype = inputs.dtype
    size = min(tokens_per_step, len(inputs))
    some = torch.randperm(len(inputs), generator=generator)[:TOKENS_AT_A_TIME].sort().values
    some = some.to(inputs.device)
    own = inputs[some], outputs[some]
    mean = error_of(layer.to(dtype), *own)
    if not mean > 0:
        return Reconstructed(layer, mean, mean)
    limit = BEND * mean
    adam = _Adam(layer.weights, dtype, learning_rate)
    num_steps = max(1, int(num_epochs * (len(inputs) // size)))
    rise = max(1, round(WARM_UP * num_steps))
    for number, batch in enumerate(_steps(len(inputs), size, num_steps, generator, inputs.device)):
        slope_of = partial(_slope, outputs[batch], mean)
        gradients = replace(layer, weights=tuple(adam.weights)).gradients(inputs[batch], slope_of)
        adam.step(gradients, rate_factor(number, num_steps, rise))
    trained = replace(layer, weights=adam.result())
    measured = own if held is None else held
    before, after = (error_of(each.to(dtype), *measured, limit) for each in (layer, trained))
    return Reconstructed(trained if after < before else layer, before, after)


def _steps(
    num_tokens: int, size: int, count: int, drawn: torch.Generator, device: torch.device
) -> Iterator[Tensor]:
    """Yield the tokens [size] of each step; every pass over all of them has an order of its own."""
    while count > 0:
        order = torch.randperm(num_tokens, generator=drawn)
        used = order[: num_tokens // size * size][: count * size].to(device)
        steps = torch.split(used, size)
        yield from steps
        count -= len(steps)


def _slope(wanted: Tensor, mean: float, outputs: Tensor) -> Tensor:
    """Return the derivative of the loss by the outputs [N, R] of a step, over a constant.

    Adam's steps are the same in every unit of the loss; in this one gradients are far from its eps
    and from float16's least.

    Args:
        wanted: [N, R] what they are to be.
        mean: half of a squared error in the mean over all tokens.
        outputs: in the dtype of the products.
    """
    error = outputs - wanted
    sizes = torch.linalg.vector_norm(error, dim=1, keepdim=True, dtype=torch.float32)
    limit = (2 * BEND * mean) ** 0.5
    over = limit / (2 * len(wanted) * mean) ** 0.5
    slope: Tensor = error * sizes.clamp_(min=limit).reciprocal_().mul_(over)
    return slope.to(outputs.dtype)


def rate_factor(number: int, num_steps: int, rise: int) -> float:
    """Return the factor of the learning rate in a step: a short rise, then a linear fall.

    Args:
        number: of the step, from 0.
        num_steps: in all.
        rise: steps in which it rises, one or more.
    """
    return min((number + 1) / rise, 1 - number / num_steps)


@torch.no_grad()
def error_of(layer: FeedForward, inputs: Tensor, outputs: Tensor, limit: float = math.inf) -> float:
    """Return the mean of 1/2 |e|^2 over the layer's errors e, Huber's above a limit.

    Args:
        layer: in the dtype of the products.
        inputs: as those of `reconstruct`.
        outputs: likewise.
        limit: from which on the loss goes on along its tangent, linear in |e|.
    """
    total = torch.zeros((), dtype=torch.float64, device=inputs.device)
    parts = (torch.split(whole, TOKENS_AT_A_TIME) for whole in (inputs, outputs))
    for x, y in zip(*parts, strict=True):
        errors = (layer(x) - y).double().pow(2).sum(dim=1) / 2
        total += torch.where(errors > limit, 2 * (errors * limit).sqrt() - limit, errors).sum()
    return float(total) / len(inputs)


@torch.no_grad()
def outputs_of(layer: FeedForward, inputs: Tensor) -> Tensor:
    """Return the outputs [N, R] of a layer for many inputs [N, d], a part of them at a time."""
    return torch.cat([layer(x) for x in torch.split(inputs, TOKENS_AT_A_TIME)])


def _affine(x: Tensor, W: Tensor) -> Tensor:
    n = x.shape[1]
    y = product(x, W[:, :n].T)
    return y if W.shape[1] == n else y.add_(W[:, n])


def _times_inputs(slope: Tensor, x: Tensor, W: Tensor) -> Tensor:
    """Return the gradient at a weight W, from slopes [N, R] at what it gives for x [N, n]."""
    gradient = product(slope.T, x)
    if W.shape[1] == x.shape[1]:
        return gradient
    return torch.cat([gradient, slope.sum(dim=0)[:, None]], dim=1)
