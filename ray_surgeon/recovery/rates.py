"""Learning rates of a recovery: which are tried, how they change, and how checks judge them."""

from __future__ import annotations

from dataclasses import dataclass

RATES = (1e-3, 5e-4, 2.5e-4)
"""Learning rates that are tried in turn, relative to the root mean square of each weight.

The first one that does no harm is kept. The best rate for few steps does not predict the best rate
for many: on SmolLM2 the lowest of 6e-4, 1.2e-3 and 2.4e-3 is best for four steps and the second for
sixty; on Qwen2.5-Coder-0.5B the last is best for four and diverges later.
"""
HARMLESS = 1.05
"""Factor on the measure at the start, up to which first steps with a rate are harmless.

This holds for corrections. For a training of all weights, the measure must not rise: a model that
is already close to the dense one loses more by a high rate than few steps can recover.
"""
_WARM_UP = 0.1
"""Fraction of the steps in which the rate rises."""
_MOST_WARM_UP = 20
"""Limit on the number of steps in which the rate rises, so that a trial reaches the full rate."""
_STEPS_OF_A_CHECK = 100
"""Steps between measures on the windows held aside; a third of all steps if that is less."""
PATIENCE = 4
"""Consecutive checks without an improvement, after which a training ends."""
TOLERATED = 1.02
"""Factor on the best measure so far, up to which a training goes on unchanged."""
GIVEN_UP = 1.5
"""Factor on the measure at the start, above which a training with a given rate is abandoned."""


def trial_steps(num_steps: int) -> int:
    """Return the number of steps made with each learning rate that is tried."""
    return min(num_steps, max(3, min(_MOST_WARM_UP, num_steps // 15)))


def steps_between_checks(num_steps: int) -> int:
    """Return the number of steps between measures on the windows held aside."""
    return max(1, min(_STEPS_OF_A_CHECK, round(num_steps / 3)))


def rising_steps(num_steps: int) -> int:
    """Return the number of steps in which the rate rises; see `rate_factor`."""
    return max(1, min(_MOST_WARM_UP, round(_WARM_UP * num_steps)))


@dataclass(frozen=True)
class Check:
    """A measure of a training on the windows held aside."""

    steps: int  # number of steps made
    value: float  # divergence from the dense model, or loss, in nats per token
    # accepted share of the dense model's tokens; None if the loss is measured
    acceptance: float | None = None
    tokens: int = 0  # number of tokens trained on
    loss: float | None = None  # mean of the steps since the last check, nats per token
    tokens_per_s: float | None = None  # since the last check
