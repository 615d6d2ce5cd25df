"""Learning rates of a recovery: which are tried, how they change, and how checks judge them."""

from __future__ import annotations

from dataclasses import dataclass

RATES = (1e-3, 5e-4, 2.5e-4)
"""Learning rates that are tried in turn, relative to the root mean square of each weight.

The first one that does no harm goes on. What is best for few steps is no guide to what is best for
many: on SmolLM2 the lowest of 6e-4, 1.2e-3 and 2.4e-3 is best for four steps and the second for
sixty; on Qwen2.5-Coder-0.5B the last is best for four and diverges later.
"""
HARMLESS = 1.05
"""Times the measure at the start, up to which first steps with a rate do no harm to corrections.

To all weights they do none if it does not rise: what is close to the dense model already loses more
by a high rate than few steps bring back.
"""
_WARM_UP = 0.1
"""Of the steps, those in which the rate rises,"""
_MOST_WARM_UP = 20
"""but no more than these, so that the trial of a rate reaches it."""
_STEPS_OF_A_CHECK = 100
"""After so many steps a training is measured on the windows held aside, or after a third of it."""
PATIENCE = 4
"""Checks in a row that bring nothing, after which a training ends."""
TOLERATED = 1.02
"""Times the best measure so far, up to which a training goes on as it is."""
GIVEN_UP = 1.5
"""Times the measure at the start, from which a training with a rate given by hand is given up."""


def trial_steps(num_steps: int) -> int:
    """Return how many steps of a training are made with each learning rate that is tried."""
    return min(num_steps, max(3, min(_MOST_WARM_UP, num_steps // 15)))


def steps_between_checks(num_steps: int) -> int:
    """Return after how many steps a training is measured on the windows held aside."""
    return max(1, min(_STEPS_OF_A_CHECK, round(num_steps / 3)))


def rising_steps(num_steps: int) -> int:
    """Return in how many steps of a training the rate rises; see `rate_factor`."""
    return max(1, min(_MOST_WARM_UP, round(_WARM_UP * num_steps)))


@dataclass(frozen=True)
class Check:
    """A training measured on the windows held aside."""

    steps: int  # that were made
    value: float  # divergence from the dense model, or loss, in nats per token
    acceptance: float | None = None  # share of the dense model's tokens; None with the loss
    tokens: int = 0  # that were trained on
    loss: float | None = None  # mean of the steps since the check before, nats per token
    tokens_per_s: float | None = None  # likewise
