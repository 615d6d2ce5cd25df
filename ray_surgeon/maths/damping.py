"""How much damping the factors of a linear need, asked of tokens that they were not gathered from.

Factors of few tokens are noisy. An update that trusts them fits the noise, and one that is damped
too much does without what they know. Which is worse shows on factors of other tokens: what a
removal with its update costs there.

Source: docs/method.md, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ray_surgeon.maths.curvature import Linear, LinearCurvature
from ray_surgeon.maths.kronecker import PackedFactors
from ray_surgeon.maths.rows_columns import quadratic_cost

A_CHOICES = (1e-3, 1e-2, 1e-1, 1.0)
"""Damping of A, relative to its mean diagonal."""
G_CHOICES = (0.01, 0.03, 0.1, 0.3)
"""Damping of G, likewise."""


def cost_held_aside(
    linear: Linear, held: PackedFactors, share: float, *, prunes_rows: bool
) -> float:
    """Remove the cheapest columns of a linear, and return the cost on other tokens.

    The update is by the linear's own factors, the cost by factors of other tokens.

    Args:
        linear: with its factors and their damping.
        held: factors of tokens held aside, sums likewise; they are not damped.
        share: of the columns, and of the rows, that are removed.
        prunes_rows: whether the cheapest rows go, too.

    Returns:
        Predicted loss increase, in nats per token.

    Raises:
        FloatingPointError: a factor is not usable.
    """
    part = linear.nonzero
    curvature = LinearCurvature(linear, part)
    W = curvature.W
    column_costs = curvature.column_costs("obs")
    if linear.has_bias and bool(part.columns[-1]):
        column_costs[-1] = torch.inf
    gone_columns = _cheapest(column_costs, share)
    row_costs = curvature.row_costs("obs") if prunes_rows else W.new_zeros(len(W))
    gone_rows = _cheapest(row_costs, share if prunes_rows else 0.0)
    after, _ = curvature.prune(gone_rows, gone_columns, "full")
    factors = held.restricted(part.rows, part.columns)
    A, G = ((x / held.num_tokens).to(W.dtype) for x in (factors.A, factors.G))
    return quadratic_cost(after - W, A, G)


def _cheapest(costs: torch.Tensor, share: float) -> torch.Tensor:
    """Return which entries [n] bool are the cheapest share, fewer than all."""
    gone = torch.zeros(len(costs), dtype=torch.bool, device=costs.device)
    gone[costs.argsort(stable=True)[: min(int(share * len(costs)), len(costs) - 1)]] = True
    return gone


def choose_damping(
    cost_of: Callable[[float, float], Sequence[float]], of_A: Sequence[float], of_G: Sequence[float]
) -> tuple[float, float, list[tuple[float, float, float]]]:
    """Choose the damping of A, then that of G with it.

    Args:
        cost_of: damping of A and of G -> costs held aside of several linears.
        of_A: choices for A.
        of_G: choices for G; the one after the middle goes with all for A.

    Returns:
        The damping of A, that of G, and for everything that was tried both with the mean of the
        costs, relative to the smallest of each linear. Costs that are no number count as infinite.
    """
    middle = of_G[len(of_G) // 2]
    costs = dict[tuple[float, float], Sequence[float]]()
    means = dict[tuple[float, float], float]()

    def best_of(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
        costs.update({pair: cost_of(*pair) for pair in pairs if pair not in costs})
        means.update(zip(costs, _relative_means(list(costs.values())), strict=True))
        return min(pairs, key=lambda pair: means[pair])

    best_a, _ = best_of([(a, middle) for a in of_A])
    _, best_g = best_of([(best_a, g) for g in of_G])
    return best_a, best_g, [(a, g, mean) for (a, g), mean in means.items()]


def _relative_means(costs: Sequence[Sequence[float]]) -> list[float]:
    """Return the means of the costs of every choice, relative to the smallest of each linear."""
    by_choice = torch.tensor(costs, dtype=torch.float64).nan_to_num(nan=torch.inf, posinf=torch.inf)
    if not by_choice.numel():
        return [1.0] * len(costs)
    ratios = by_choice / by_choice.min(dim=0).values.clamp(min=1e-300)
    return ratios.nan_to_num(nan=torch.inf).mean(dim=1).tolist()
