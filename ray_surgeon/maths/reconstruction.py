"""Reconstruction of a feed-forward layer that lost channels.

The remaining layer is trained to reproduce the outputs of the whole layer.

The exact update of a consumer changes its own weights only, and takes the channels as given. Here
the kept channels are trained, too, on the inputs that the earlier model gives the layer. All
directions of the outputs count equally: gradients only tell them apart for small errors, and these
are larger. No other layer is involved, so every token gives as many equations for these weights as
the layer has outputs. The improvement is measured on tokens that are not used for training.

Source: docs/method.md, section 8; block reconstruction as in BRECQ (Li et al. 2021, arXiv
2102.05426), without the diagonal of the Fisher.
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
"""Errors above this multiple of the mean error before training count by their root.

Some tokens, above all the first one of a text, have outputs hundreds of times as large as others,
which the next norm scales down again.
"""
WARM_UP = 0.05
"""Fraction of the steps in which the rate rises to its largest value.

Then it falls linearly to zero.
"""


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward layer, y = W f(V x), or with a gate, y = W (f(V_1 x) * V_2 x).

    The bias of a weight, if it has one, is a further column.
    """

    # V [k, d] of one or two producers, the gate first, and then W [R, k] of the consumer
    weights: tuple[Tensor, ...]
    activation: Callable[[Tensor], Tensor]  # f, elementwise

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs [N, R] for inputs [N, d], without a gradient."""
        *producers, W = self.weights
        gate, *factors = [_affine(x, V) for V in producers]
        hidden = self.activation(gate)
        for factor in factors:
            hidden = hidden * factor
        return _affine(hidden, W)

    @torch.no_grad()
    def gradients(self, x: Tensor, slope_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return the gradient of a loss at every weight.

        Args:
            x: [N, d] inputs.
            slope_of: maps outputs [N, R] to the derivative of the loss with respect to them.
        """
        *producers, W = self.weights
        before, *factors = [_affine(x, V) for V in producers]
        with torch.enable_grad():
            gate = self.activation(before.requires_grad_())
        active = gate.detach()
        hidden = active
        if factors:
            hidden = active * factors[0]
        slope = slope_of(_affine(hidden, W))
        hidden_slope = product(slope, W[:, : hidden.shape[1]])
        gate_slope = hidden_slope
        if factors:
            gate_slope = hidden_slope * factors[0]
        (before_slope,) = torch.autograd.grad(gate, before, gate_slope)
        gradients = [_weight_gradient(before_slope, x, producers[0])]
        if factors:
            factor_slope = hidden_slope.mul_(active)
            gradients.append(_weight_gradient(factor_slope, x, producers[1]))
        gradients.append(_weight_gradient(slope, hidden, W))
        return gradients

    def to(self, dtype: torch.dtype) -> FeedForward:
        """Return the layer in another dtype."""
        return replace(self, weights=tuple(weight.to(dtype) for weight in self.weights))


class _Adam:
    """Adam on the weights of a layer, in float32 or in a narrow dtype.

    A narrow dtype would round most steps away. Its weights are therefore the initial weights plus a
    change, and the change is trained, in bfloat16: it is small, and so are its rounding errors.

    Attributes:
        weights: weights after the last step, in the dtype of the products.
    """

    def __init__(
        self, weights: Sequence[Tensor], dtype: torch.dtype, learning_rate: float
    ) -> None:
        """Start from float32 weights.

        Args:
            weights: initial weights, which are not changed.
            dtype: dtype of the products.
            learning_rate: see `reconstruct`.
        """
        self.weights = [weight.to(dtype, copy=True) for weight in weights]
        self._starts: list[Tensor] = []
        # the unit of a weight is its root mean square; a weight of zeros has none, and stays
        sizes = torch.stack([weight.pow(2).mean().sqrt() for weight in weights])
        self._units: list[float] = sizes.clamp_(min=1e-30).tolist()
        if dtype == torch.float32:
            self._trained = self.weights
            self._rates = [learning_rate * unit for unit in self._units]
            groups = [{"params": [weight]} for weight in self._trained]
        else:
            self._starts = [weight.clone() for weight in self.weights]
            self._trained = []
            parts = zip(weights, self._starts, self._units, strict=True)
            for weight, start, unit in parts:
                self._trained.append(((weight - start) / unit).bfloat16())
            # with a single rate, one launch makes the step of all weights
            self._rates = [learning_rate]
            groups = [{"params": self._trained}]
        self._optimizer = torch.optim.Adam(groups, betas=(0.8, 0.9), fused=True)

    def step(self, gradients: Sequence[Tensor], factor: float) -> None:
        """Make one step with the rates times a factor, without waiting for the device."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        for trained, gradient in zip(self._trained, gradients, strict=True):
            trained.grad = gradient.to(trained.dtype)
        self._optimizer.step()
        if self._starts:
            for weight, start, change, unit in self._parts():
                torch.add(start, change, alpha=unit, out=weight)

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        return zip(self.weights, self._starts, self._trained, self._units, strict=True)

    def result(self) -> tuple[Tensor, ...]:
        """Return the trained weights in float32."""
        if not self._starts:
            return tuple(self.weights)
        weights = []
        for _, start, change, unit in self._parts():
            weights.append(start.float().add_(change, alpha=unit))
        return tuple(weights)


@dataclass(frozen=True)
class Reconstructed:
    """A layer, and its loss on held-out tokens before and after the training.

    The loss is `error_of` with the limit of the training.
    """

    layer: FeedForward  # float32
    before: float
    after: float  # loss of the trained layer, even if it was worse and `layer` is the original


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

    The rate rises briefly and then falls linearly to zero.

    The loss is that of Huber (1964): half of a token's squared error up to `BEND` times the mean;
    above that, its tangent, which is linear in the root.

    Args:
        layer: the remaining layer, float32.
        inputs: [N, d] inputs of the layer, in the dtype of the products.
        outputs: [N, R] wanted outputs, in the dtype of the products.
        held: inputs [M, d] and outputs [M, R] of held-out tokens, on which the layer is measured;
            if None, some of the training tokens.
        learning_rate: the largest rate, in units of the root mean square of each weight.
        tokens_per_step: tokens per step; all, if there are fewer.
        num_epochs: passes over the tokens. Less than one pass trains on some of them, in at least
            one step.
        generator: draws the order of the tokens, on the CPU.

    Returns:
        The trained layer, or the original one if the loss on the measured tokens did not fall.
    """
    dtype = inputs.dtype
    device = inputs.device
    num_tokens = len(inputs)
    size = min(tokens_per_step, num_tokens)
    order = torch.randperm(num_tokens, generator=generator)
    some = order[:TOKENS_AT_A_TIME].sort().values.to(device)
    measured_inputs = inputs[some]
    measured_outputs = outputs[some]
    mean = error_of(layer.to(dtype), measured_inputs, measured_outputs)
    if not mean > 0:
        return Reconstructed(layer=layer, before=mean, after=mean)
    limit = BEND * mean
    adam = _Adam(layer.weights, dtype, learning_rate)
    num_steps = max(1, int(num_epochs * (num_tokens // size)))
    rise = max(1, round(WARM_UP * num_steps))
    steps = _steps(num_tokens, size, num_steps, generator, device)
    for number, batch in enumerate(steps):
        slope_of = partial(_slope, outputs[batch], mean)
        current = replace(layer, weights=tuple(adam.weights))
        gradients = current.gradients(inputs[batch], slope_of)
        adam.step(gradients, rate_factor(number, num_steps, rise))
    trained = replace(layer, weights=adam.result())
    if held is not None:
        measured_inputs, measured_outputs = held
    before = error_of(layer.to(dtype), measured_inputs, measured_outputs, limit)
    after = error_of(trained.to(dtype), measured_inputs, measured_outputs, limit)
    result = trained if after < before else layer
    return Reconstructed(layer=result, before=before, after=after)


def _steps(
    num_tokens: int,
    size: int,
    count: int,
    generator: torch.Generator,
    device: torch.device,
) -> Iterator[Tensor]:
    """Yield the indices [size] of the tokens of each step; each pass draws a new order.

    Args:
        num_tokens: number of all tokens.
        size: tokens per step.
        count: number of steps.
        generator: draws the orders.
        device: device of the indices.
    """
    steps_per_pass = num_tokens // size
    while count > 0:
        order = torch.randperm(num_tokens, generator=generator)
        used = order[: min(count, steps_per_pass) * size].to(device)
        steps = torch.split(used, size)
        yield from steps
        count -= len(steps)


def _slope(wanted: Tensor, mean: float, outputs: Tensor) -> Tensor:
    """Return the scaled derivative of the loss with respect to the outputs [N, R] of a step.

    Adam's steps do not depend on the scale of the loss. This scale keeps gradients far from Adam's
    eps and from the smallest number of float16.

    Args:
        wanted: [N, R] wanted outputs.
        mean: mean over all tokens of half of the squared error.
        outputs: [N, R] outputs, in the dtype of the products.
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
        number: number of the step, from 0.
        num_steps: number of all steps.
        rise: number of steps in which the rate rises, one or more.
    """
    return min((number + 1) / rise, 1 - number / num_steps)


@torch.no_grad()
def error_of(
    layer: FeedForward, inputs: Tensor, outputs: Tensor, limit: float = math.inf
) -> float:
    """Return the mean over tokens of 1/2 |e|^2, or of Huber's loss, for the layer's errors e.

    Args:
        layer: layer in the dtype of the products.
        inputs: [N, d], as in `reconstruct`.
        outputs: [N, R] wanted outputs, as in `reconstruct`.
        limit: above it the loss continues as its tangent, which is linear in |e|.
    """
    total = torch.zeros((), dtype=torch.float64, device=inputs.device)
    input_parts = torch.split(inputs, TOKENS_AT_A_TIME)
    output_parts = torch.split(outputs, TOKENS_AT_A_TIME)
    for x, y in zip(input_parts, output_parts, strict=True):
        errors = (layer(x) - y).double().pow(2).sum(dim=1) / 2
        tangent = 2 * (errors * limit).sqrt() - limit
        total += torch.where(errors > limit, tangent, errors).sum()
    return float(total) / len(inputs)


@torch.no_grad()
def outputs_of(layer: FeedForward, inputs: Tensor) -> Tensor:
    """Return the outputs [N, R] of a layer for many inputs [N, d], computed in parts."""
    return torch.cat([layer(x) for x in torch.split(inputs, TOKENS_AT_A_TIME)])


def _affine(x: Tensor, W: Tensor) -> Tensor:
    n = x.shape[1]
    y = product(x, W[:, :n].T)
    has_bias = W.shape[1] > n
    if has_bias:
        y.add_(W[:, n])
    return y


def _weight_gradient(slope: Tensor, x: Tensor, W: Tensor) -> Tensor:
    """Return the gradient [R, n or n + 1] at a weight W with a bias or without.

    Args:
        slope: [N, R] gradient at the outputs of W.
        x: [N, n] inputs of W.
        W: [R, n or n + 1].
    """
    gradient = product(slope.T, x)
    if W.shape[1] == x.shape[1]:
        return gradient
    return torch.cat([gradient, slope.sum(dim=0)[:, None]], dim=1)
