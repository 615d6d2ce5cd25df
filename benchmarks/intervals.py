"""Uncertainty of pass counts: intervals of one run, paired tests, and means over runs.

Each answers a different question. The interval covers other problems of the same kind.
The paired test compares two models on the same problems. The standard error over runs says how
much a repeated pruning run varies on these problems; it says nothing about other problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959963984540054
"""Quantile of the normal distribution for a two-sided interval of 95 %."""


def wilson(passed: int, num_cases: int) -> tuple[float, float]:
    """Return the 95 % interval of a pass rate (Wilson 1927).

    Its bounds are the rates p with |passed / n - p| = Z sqrt(p (1 - p) / n). Unlike the interval of
    plus and minus two standard errors, it stays in [0, 1] and has a width at 0 and at n passed.

    Args:
        passed: number of passed cases.
        num_cases: number of cases, n.

    Raises:
        ValueError: there are no cases, or the count is not one of 0 to n.
    """
    if num_cases < 1 or not 0 <= passed <= num_cases:
        raise ValueError(
            f"{passed} passed of {num_cases} cases: expected at least one case and a count from 0 "
            "to the number of cases; count the passed cases again"
        )
    rate = passed / num_cases
    scale = 1 + Z**2 / num_cases
    center = (rate + Z**2 / (2 * num_cases)) / scale
    variance = rate * (1 - rate) / num_cases + Z**2 / (4 * num_cases**2)
    half_width = Z * math.sqrt(variance) / scale
    return max(0.0, center - half_width), min(1.0, center + half_width)


def mcnemar(lost: int, won: int) -> float:
    """Return the exact two-sided p-value of McNemar's test (1947).

    Under the hypothesis that both models are equally good, each problem that only one of them
    solves is equally likely to be either's, so the smaller count follows Binomial(lost + won, 1/2).

    Args:
        lost: number of problems that only the first model solves.
        won: number of problems that only the second model solves.

    Raises:
        ValueError: a count is negative.
    """
    if min(lost, won) < 0:
        raise ValueError(
            f"counts of lost and won problems: expected none below 0, got {lost} and {won}"
        )
    differing = lost + won
    ways = sum(math.comb(differing, count) for count in range(min(lost, won) + 1))
    all_ways = 1 << differing
    return min(1.0, 2 * ways / all_ways)


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of several runs and its standard error, s / sqrt(n).

    Args:
        values: one figure per run.

    Raises:
        ValueError: there are fewer than two runs.
    """
    if len(values) < 2:
        raise ValueError(
            f"a standard error over runs needs two runs or more, got {len(values)}; give further "
            "seeds, or show the interval of the one run"
        )
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1) / len(values))
