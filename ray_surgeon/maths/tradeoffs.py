"""What is worth its cost: corners of a lower convex hull, and options that no other one beats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Point = tuple[float, float, int]
"""What is saved, what it costs, and what is removed for it."""


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """Return the corners of the lower convex hull of ascending points.

    Points on an edge stay.
    """
    corners: list[Point] = []
    for point in points:
        if corners and point[0] <= corners[-1][0]:  # costs more and saves nothing more
            continue
        while len(corners) > 1 and slope(corners[-2], corners[-1]) > slope(corners[-1], point) * (
            1 + 1e-9
        ):
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
