"""One global threshold over all linears.

Source: docs/method.md, section 5; The LLM Surgeon, section 3.2 (all costs are in the same
unit, so one threshold allocates the sparsity of every linear).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class OutOfReachError(ValueError):
    """A target asks for more than all that may be pruned; the message says how much that is."""


def _out_of_reach(target: float, most: float) -> OutOfReachError:
    most_of_all = f"all candidates together are {most:.4f}"
    return OutOfReachError(f"pruning.target_sparsity: {target:g} cannot be reached; {most_of_all}")


class StructureCosts(NamedTuple):
    """Costs of the alive rows and columns of one linear, as the threshold sees them."""

    num_parameters: int  # entries of the whole linear, bias included
    num_rows: int  # alive rows
    num_columns: int  # alive columns, bias included
    rows: Tensor  # [num candidates <= num_rows] costs of rows that may be pruned
    # [num candidates <= num_columns] costs of columns that may be pruned (never the bias's)
    columns: Tensor


def check_costs(name: str, costs: Tensor, *, may_be_negative: bool = False) -> None:
    """Refuse costs that would prune at random.

    Args:
        name: of what they belong to, for the error.
        costs: of any shape.
        may_be_negative: whether they have a first order, so that a removal may lower the loss.

    Raises:
        FloatingPointError: a cost is NaN, infinite or negative.
    """
    if not costs.numel():
        return
    low, high = torch.aminmax(costs)  # both are NaN if any cost is
    least = -torch.finfo(costs.dtype).max if may_be_negative else 0
    if not (low >= least and high < torch.inf):
        bad = int((~torch.isfinite(costs) | (costs < least)).sum())
        what = "NaN or infinite" if may_be_negative else "NaN, infinite or negative"
        raise FloatingPointError(f"{name}: {bad} of {costs.numel()} costs are {what}")


def can_reach(costs: Sequence[StructureCosts], target_sparsity: float) -> bool:
    """Return whether all candidates together remove the target fraction of all parameters."""
    kept = sum((c.num_rows - len(c.rows)) * (c.num_columns - len(c.columns)) for c in costs)
    num_parameters = sum(c.num_parameters for c in costs)
    return num_parameters - kept >= math.ceil(target_sparsity * num_parameters - 1e-6)


def structured_threshold(costs: Sequence[StructureCosts], target_sparsity: float) -> float:
    """Find the smallest threshold that removes at least the target fraction of all parameters.

    It removes every structure that costs at most this.

    A linear with alive rows R and columns C of which p and q are pruned loses p C + q R - p q
    entries: the overlap counts once. Bisection over the sorted costs; each probe counts what costs
    at most that, and nothing of size linears x structures is formed.

    Args:
        costs: one entry a linear, of numbers that `check_costs` accepts.
        target_sparsity: pruned fraction of all parameters after this shot, earlier shots included.

    Raises:
        OutOfReachError: everything that may be pruned is less than the target.
    """
    num_parameters = sum(c.num_parameters for c in costs)

    def num_removed(value: float) -> int:
        removed = 0
        for linear in costs:
            p = int((linear.rows.double() <= value).sum())
            q = int((linear.columns.double() <= value).sum())
            removed += linear.num_parameters - (linear.num_rows - p) * (linear.num_columns - q)
        return removed

    sides = (side.double() for linear in costs for side in (linear.rows, linear.columns))
    candidates = torch.cat([torch.zeros(1, dtype=torch.float64), *sides]).sort().values
    wanted = math.ceil(target_sparsity * num_parameters - 1e-6)
    most = num_removed(float(candidates[-1]))
    if most < wanted:
        raise _out_of_reach(target_sparsity, most / num_parameters)
    return smallest_enough(candidates, num_removed, wanted)


def smallest_enough(values: Tensor, num_removed: Callable[[float], int], wanted: int) -> float:
    """Return the smallest of ascending values at which enough is removed.

    The last one is taken to be enough.

    Args:
        values: [n] ascending.
        num_removed: threshold -> what is removed at it, which never falls.
        wanted: how much is enough.
    """
    places = range(len(values) - 1)
    first = bisect.bisect_left(places, wanted, key=lambda place: num_removed(float(values[place])))
    return float(values[first])


SHORT = 1e-3
"""Of all parameters, as many as may be left over when a target would take every candidate."""
_LOW_BITS = 16


def bit_histogram(costs: Tensor, high: int | None) -> Tensor:
    """Count costs by half of their bits; non-negative float32 numbers sort as their bits do.

    Args:
        costs: float32, non-negative; infinite ones are not counted.
        high: None counts by the upper 16 bits; a number counts, by the lower 16 bits, those whose
            upper 16 bits it is.

    Returns:
        [65536] int64 counts.
    """
    bits = costs[torch.isfinite(costs)].float().view(torch.int32)
    upper = bits >> _LOW_BITS
    counted = upper if high is None else bits[upper == high] & ((1 << _LOW_BITS) - 1)
    return torch.bincount(counted, minlength=1 << _LOW_BITS)


def bucket_of(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bucket in which the k-th smallest (from 1) lies, and its number inside the bucket.

    Args:
        counts: [num_buckets] in increasing order of what they count.
        k: 1 to the sum of the counts.
    """
    total = counts.cumsum(0)
    bucket = int(torch.searchsorted(total, torch.tensor(k)))
    return bucket, k - (int(total[bucket - 1]) if bucket else 0)


def cost_of_bits(high: int, low: int) -> float:
    """Return the float32 number with the given upper and lower 16 bits."""
    return float(torch.tensor((high << _LOW_BITS) | low, dtype=torch.int32).view(torch.float32))


def units_to_remove(
    target: float, num_parameters: int, num_pruned: int, num_per_unit: int, num_candidates: int
) -> int:
    """Return how many units of `num_per_unit` entries must be pruned to reach the target.

    All of them if they come short of it by no more than `SHORT`: biases count and stay.

    Raises:
        OutOfReachError: there are not that many candidates.
    """
    missing = math.ceil(target * num_parameters - 1e-6) - num_pruned
    num_units = max(0, math.ceil(missing / num_per_unit))
    most = (num_pruned + num_candidates * num_per_unit) / num_parameters
    if num_units > num_candidates and target - most > SHORT:
        raise _out_of_reach(target, most)
    return min(num_units, num_candidates)


Point = tuple[float, float, int]
"""What is saved, what it costs, and what is removed for it."""
_ROUNDING = 1 + 1e-9
"""Between slopes that count as equal."""


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """Return the corners of the lower convex hull of ascending points.

    Points on an edge stay.
    """
    corners: list[Point] = []
    for point in points:
        if corners and point[0] <= corners[-1][0]:  # costs more and saves nothing more
            continue
        while len(corners) > 1 and slope(*corners[-2:]) > slope(corners[-1], point) * _ROUNDING:
            corners.pop()
        corners.append(point)
    return corners


def slope(a: Point, b: Point) -> float:
    """Return the price of the step from one point to another."""
    return (b[1] - a[1]) / (b[0] - a[0])


def worthwhile(saved: Tensor, cost: Tensor, wanted: float) -> Tensor:
    """Return the options that no other one beats, cheapest first.

    Another one beats an option if it costs less and saves as much, or saves all that is wanted.
    """
    enough = saved.clamp(max=max(0.0, wanted))
    # of options that save enough at the same cost, the one that removes least
    order = saved.argsort(stable=True)
    order = order[enough[order].argsort(descending=True, stable=True)]
    order = order[cost[order].argsort(stable=True)]
    most = enough[order].cummax(dim=0).values
    return order[enough[order] > torch.cat([most.new_full((1,), -math.inf), most[:-1]])]
