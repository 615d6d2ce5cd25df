"""Intervals, paired tests and means over runs, against published and hand-computed values."""

from __future__ import annotations

import math

import pytest

from benchmarks.intervals import Z, mcnemar, mean_and_standard_error, wilson


@pytest.mark.parametrize(
    ("passed", "num_cases", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_matches_published_values(
    passed: int, num_cases: int, low: float, high: float
) -> None:
    assert wilson(passed, num_cases) == pytest.approx((low, high), abs=5e-5)


def test_bounds_of_wilson_solve_its_equation() -> None:
    for bound in wilson(52, 164):
        error = math.sqrt(bound * (1 - bound) / 164)
        assert abs(52 / 164 - bound) == pytest.approx(Z * error)


def test_mcnemar_matches_sums_of_the_binomial() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(4, 4) == 1  # the two tails overlap
    assert mcnemar(0, 5) == mcnemar(5, 0) == 2 / 32
    assert mcnemar(1, 7) == 2 * (1 + 8) / 256
    assert mcnemar(30, 12) == pytest.approx(0.0079, abs=5e-5)
    assert mcnemar(2000, 0) < 1e-300, "large counts do not overflow"


def test_mcnemar_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for lost, won in ((3, 9), (12, 30), (0, 2)):
        expected = stats.binomtest(lost, lost + won, 0.5).pvalue
        assert mcnemar(lost, won) == pytest.approx(expected)


def test_mean_and_standard_error_match_hand_computation() -> None:
    # deviations -3, -1, 4: variance 26 / 2, divided by 3 runs
    assert mean_and_standard_error([44, 46, 51]) == pytest.approx((47, math.sqrt(13 / 3)))
    assert mean_and_standard_error([1, 1]) == (1, 0)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="3 passed of 2 cases"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="0 passed of 0 cases"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="got -1 and 2"):
        mcnemar(-1, 2)
    with pytest.raises(ValueError, match="needs two runs or more, got 1"):
        mean_and_standard_error([44])
