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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

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

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs [N, R] for inputs [N, d]."""
        *producers, W = self.weights
        gate, *factors = (_affine(x, V) for V in producers)
        hidden = self.activation(gate)
        for factor in factors:
            hidden = hidden * factor
        return _affine(hidden, W)

    def to(self, dtype: torch.dtype) -> FeedForward:
        """Return the layer in another dtype, without gradients."""
        return replace(self, weights=tuple(weight.detach().to(dtype) for weight in self.weights))


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
    own = inputs[some], outputs[some]
    mean = error_of(layer.to(dtype), *own)
    if not mean > 0:
        return Reconstructed(layer, mean, mean)
    limit = BEND * mean
    masters = tuple(weight.detach().clone().requires_grad_() for weight in layer.weights)
    rates = [learning_rate * float(weight.detach().pow(2).mean().sqrt()) for weight in masters]
    groups = [{"params": [weight]} for weight in masters]
    optimizer = torch.optim.Adam(groups, betas=(0.8, 0.9), fused=True)
    num_steps = max(1, int(num_epochs * (len(inputs) // size)))
    for number, tokens in enumerate(_steps(len(inputs), size, num_steps, generator)):
        batch = tokens.to(inputs.device)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * rate_factor(number, num_steps)
        working = tuple(weight.detach().to(dtype).requires_grad_() for weight in masters)
        with torch.enable_grad():
            computed = replace(layer, weights=working)(inputs[batch])
        error = (computed.detach() - outputs[batch]).float()
        in_means = error.pow(2).sum(dim=1, keepdim=True) / (2 * mean)
        # Adam's steps are the same in every unit of the loss; in this one gradients are far from
        # its eps and from float16's least
        slope = error * ((BEND / in_means.clamp_(min=BEND)).sqrt_() / (2 * size * mean) ** 0.5)
        gradients = torch.autograd.grad(computed, working, slope.to(dtype))
        for weight, gradient in zip(masters, gradients, strict=True):
            weight.grad = gradient.to(weight.dtype)
        optimizer.step()
    trained = replace(layer, weights=tuple(weight.detach() for weight in masters))
    measured = own if held is None else held
    before, after = (error_of(each.to(dtype), *measured, limit) for each in (layer, trained))
    return Reconstructed(trained if after < before else layer, before, after)


def _steps(num_tokens: int, size: int, count: int, drawn: torch.Generator) -> Iterator[Tensor]:
    """Yield the tokens [size] of each step; every pass over all of them has an order of its own."""
    while count > 0:
        order = torch.randperm(num_tokens, generator=drawn)
        steps = torch.split(order[: num_tokens // size * size], size)[:count]
        yield from steps
        count -= len(steps)


def rate_factor(number: int, num_steps: int) -> float:
    """Return the factor of the learning rate in a step: a short rise, then a linear fall.

    Args:
        number: of the step, from 0.
        num_steps: in all.
    """
    rise = max(1, round(WARM_UP * num_steps))
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
    total = 0.0
    parts = (torch.split(whole, TOKENS_AT_A_TIME) for whole in (inputs, outputs))
    for x, y in zip(*parts, strict=True):
        errors = (layer(x) - y).double().pow(2).sum(dim=1) / 2
        bent = 2 * (errors * limit).sqrt() - limit
        total += float(torch.where(errors > limit, bent, errors).sum())
    return total / len(inputs)


@torch.no_grad()
def outputs_of(layer: FeedForward, inputs: Tensor) -> Tensor:
    """Return the outputs [N, R] of a layer for many inputs [N, d], a part of them at a time."""
    return torch.cat([layer(x) for x in torch.split(inputs, TOKENS_AT_A_TIME)])


def _affine(x: Tensor, W: Tensor) -> Tensor:
    n = x.shape[-1]
    return x @ W.T if W.shape[1] == n else x @ W[:, :n].T + W[:, n]
