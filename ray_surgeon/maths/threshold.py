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
    """A target exceeds everything that may be pruned; the message says how much that is."""


class StructureCosts(NamedTuple):
    """Costs of the alive rows and columns of one linear, as the threshold sees them."""

    num_parameters: int  # entries of the whole linear, bias included
    num_rows: int  # alive rows
    num_columns: int  # alive columns, bias included
    rows: Tensor  # [num candidates <= num_rows] costs of rows that may be pruned
    # [num candidates <= num_columns] costs of columns that may be pruned (never the bias)
    columns: Tensor


def check_costs(name: str, costs: Tensor, *, may_be_negative: bool = False) -> None:
    """Raise an error if costs would prune at random.

    Args:
        name: name that error messages give the costs.
        costs: costs, of any shape.
        may_be_negative: whether the costs have a first order, so that a removal may lower the loss.

    Raises:
        FloatingPointError: a cost is NaN, infinite or negative.
    """
    if not costs.numel():
        return
    low, high = torch.aminmax(costs)  # both are NaN if any cost is
    least = -torch.finfo(costs.dtype).max if may_be_negative else 0
    if low >= least and high < torch.inf:
        return
    num_bad = int((~torch.isfinite(costs) | (costs < least)).sum())
    if may_be_negative:
        raise FloatingPointError(
            f"{name}: {num_bad} of {costs.numel()} costs are NaN or infinite",
        )
    raise FloatingPointError(
        f"{name}: {num_bad} of {costs.numel()} costs are NaN, infinite or negative",
    )


def can_reach(costs: Sequence[StructureCosts], target_sparsity: float) -> bool:
    """Return whether all candidates together remove the target fraction of all parameters."""
    num_parameters = 0
    num_kept = 0
    for c in costs:
        num_parameters += c.num_parameters
        num_kept += (c.num_rows - len(c.rows)) * (c.num_columns - len(c.columns))
    wanted = math.ceil(target_sparsity * num_parameters - 1e-6)
    return num_parameters - num_kept >= wanted


def structured_threshold(
    costs: Sequence[StructureCosts], target_sparsity: float
) -> float:
    """Find the smallest threshold that removes at least the target fraction of all parameters.

    Every structure that costs at most the threshold is removed.

    A linear with alive rows R and columns C of which p and q are pruned loses p C + q R - p q
    entries: the overlap counts once. The threshold is found by bisection over the sorted costs;
    each probe counts the structures that cost at most that much, and nothing of size linears x
    structures is formed.

    Args:
        costs: one entry per linear, with costs that `check_costs` accepts.
        target_sparsity: pruned fraction of all parameters after this shot, earlier shots included.

    Raises:
        OutOfReachError: everything that may be pruned is less than the target.
    """
    num_parameters = sum(c.num_parameters for c in costs)

    def num_removed(value: float) -> int:
        removed = 0
        for linear in costs:
            num_pruned_rows = int((linear.rows.double() <= value).sum())
            num_pruned_columns = int((linear.columns.double() <= value).sum())
            num_rows_left = linear.num_rows - num_pruned_rows
            num_columns_left = linear.num_columns - num_pruned_columns
            removed += linear.num_parameters - num_rows_left * num_columns_left
        return removed

    candidates = [torch.zeros(1, dtype=torch.float64)]
    for linear in costs:
        candidates.append(linear.rows.double())
        candidates.append(linear.columns.double())
    ascending = torch.cat(candidates).sort().values
    wanted = math.ceil(target_sparsity * num_parameters - 1e-6)
    num_removable = num_removed(float(ascending[-1]))
    if num_removable < wanted:
        raise OutOfReachError(
            f"pruning.target_sparsity: {target_sparsity:g} cannot be reached; "
            f"all candidates together are {num_removable / num_parameters:.4f}"
        )
    return smallest_enough(ascending, num_removed, wanted)


def smallest_enough(
    values: Tensor, num_removed: Callable[[float], int], wanted: int
) -> float:
    """Return the smallest of ascending values at which enough is removed.

    The last value is assumed to be enough.

    Args:
        values: [n] ascending.
        num_removed: maps a threshold to the number removed at it, which never decreases.
        wanted: number that is enough.
    """
    first = bisect.bisect_left(
        range(len(values) - 1),
        wanted,
        key=lambda place: num_removed(float(values[place])),
    )
    return float(values[first])


SHORT = 1e-3
"""Fraction of all parameters by which the target may be missed if all candidates are pruned."""
_LOW_BITS = 16


def bit_histogram(costs: Tensor, high: int | None) -> Tensor:
    """Count costs by half of their bits; non-negative float32 numbers sort as their bits do.

    Args:
        costs: float32, non-negative; infinite costs are not counted.
        high: None to count all costs by their upper 16 bits; a number to count only the costs with
            these upper 16 bits, by their lower 16 bits.

    Returns:
        [65536] int64 counts.
    """
    bits = costs[torch.isfinite(costs)].float().view(torch.int32)
    counted = bits >> _LOW_BITS
    if high is not None:
        low_mask = (1 << _LOW_BITS) - 1
        counted = bits[counted == high] & low_mask
    return torch.bincount(counted, minlength=1 << _LOW_BITS)


def bucket_of(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bucket that holds the k-th smallest value, and the rank inside that bucket.

    Args:
        counts: [num_buckets] number of values in each bucket, buckets in ascending order.
        k: rank, from 1 to the sum of the counts.
    """
    total = counts.cumsum(0)
    bucket = int(torch.searchsorted(total, torch.tensor(k)))
    if bucket == 0:
        return bucket, k
    return bucket, k - int(total[bucket - 1])


def cost_of_bits(high: int, low: int) -> float:
    """Return the float32 number with the given upper and lower 16 bits."""
    bits = torch.tensor((high << _LOW_BITS) | low, dtype=torch.int32)
    return float(bits.view(torch.float32))


def units_to_remove(
    target: float,
    num_parameters: int,
    num_pruned: int,
    num_per_unit: int,
    num_candidates: int,
) -> int:
    """Return the number of units of `num_per_unit` entries that must be pruned for the target.

    It is the number of all candidates if these miss the target by at most `SHORT`, because biases
    count as parameters but are never pruned.

    Raises:
        OutOfReachError: there are fewer candidates than that.
    """
    missing = math.ceil(target * num_parameters - 1e-6) - num_pruned
    num_units = max(0, math.ceil(missing / num_per_unit))
    most = (num_pruned + num_candidates * num_per_unit) / num_parameters
    if num_units > num_candidates and target - most > SHORT:
        raise OutOfReachError(
            f"pruning.target_sparsity: {target:g} cannot be reached; "
            f"all candidates together are {most:.4f}"
        )
    return min(num_units, num_candidates)


Point = tuple[float, float, int]
"""Saved budget, its cost, and a number that identifies the removal."""
_ROUNDING = 1 + 1e-9
"""Largest ratio of two slopes that count as equal."""


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """Return the corners of the lower convex hull of ascending points.

    Points on an edge count as corners.
    """
    corners = list[Point]()
    for point in points:
        if corners and point[0] <= corners[-1][0]:  # costs more and saves nothing more
            continue
        while len(corners) > 1 and _is_above_line(corners[-2], corners[-1], point):
            corners.pop()
        corners.append(point)
    return corners


def _is_above_line(a: Point, b: Point, c: Point) -> bool:
    """Return whether b lies above the line from a to c, so that it is no corner."""
    return slope(a, b) > slope(b, c) * _ROUNDING


def slope(a: Point, b: Point) -> float:
    """Return the price of the step from one point to another."""
    return (b[1] - a[1]) / (b[0] - a[0])


def worthwhile(saved: Tensor, cost: Tensor, wanted: float) -> Tensor:
    """Return the numbers of the options that no other option beats, cheapest first.

    An option is beaten by one that costs less and saves as much, or saves all that is wanted.
    """
    enough = saved.clamp(max=max(0.0, wanted))
    # of options that save enough at the same cost, the one that removes least comes first
    order = saved.argsort(stable=True)
    order = order[enough[order].argsort(descending=True, stable=True)]
    order = order[cost[order].argsort(stable=True)]
    enough = enough[order]
    most = enough.cummax(dim=0).values
    most_of_cheaper = torch.cat([most.new_full((1,), -math.inf), most[:-1]])
    return order[enough > most_of_cheaper]
