"""How many coupled groups every block loses: one threshold over the whole model, or the same widths in every block.

Source: docs/method.md, section 8.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class OutOfReachError(ValueError):
    """All groups that may be pruned save less than is wanted."""

    def __init__(self, most: float) -> None:
        """Take what they save."""
        super().__init__(f"all groups that may be pruned save {most:g}")


@dataclass(frozen=True)
class GroupCosts:
    """Marginal costs of the groups of one consumer, as the allocation sees them."""

    consumer: str  # the linear
    kind: str  # of the groups; all of one kind have one size
    costs: Tensor  # [num_groups] see `group_costs`; infinite for groups that stay or are pruned already
    num_left: int  # groups that are left now
    allowed: frozenset[int]  # numbers of groups that may be left afterwards
    needs: Sequence[float]  # what the block needs of the budget with 0, 1, ... groups left; it never falls

    @property
    def possible_counts(self) -> list[int]:
        """How many groups may be pruned, in ascending order."""
        most = int(torch.isfinite(self.costs).sum())
        return [n for n in range(most + 1) if self.num_left - n in self.allowed]

    @property
    def curve(self) -> Tensor:
        """[most + 1] float64: what the first n groups cost together."""
        ascending = self.costs[torch.isfinite(self.costs)].double().sort().values
        return torch.cat([torch.zeros(1, dtype=torch.float64), ascending.cumsum(0)])

    def saved(self, count: int) -> float:
        """Return what is saved when so many groups are pruned."""
        return self.needs[self.num_left] - self.needs[self.num_left - count]


@dataclass(frozen=True)
class Allocation:
    """How many groups each consumer loses in this shot."""

    counts: dict[str, int]  # consumer -> number
    threshold: float | None  # the largest cost of what is pruned, in the unit of the ranking; None for uniform widths


def allocate_globally(costs: Sequence[GroupCosts], missing: float, *, per_unit: bool) -> Allocation:
    """Cut all paths at one threshold: the lowest that saves what is missing.

    Where only some numbers of groups may be left, those between two of them are pruned together or stay together. Paths are cut at the
    corners of their lower convex hull, because nothing between two corners is worth its cost.

    Args:
        costs: of every consumer.
        missing: to be saved of the budget.
        per_unit: whether the threshold is a cost per unit of the budget, or a cost per group.

    Raises:
        OutOfReachError: everything that may be pruned saves less.
    """
    if not costs:
        raise OutOfReachError(0.0)
    forced, steps = [], []
    for place, c in enumerate(costs):
        counts = c.possible_counts or [0]
        forced.append(counts[0])
        curve = c.curve.tolist()
        corners = _hull([(c.saved(n) if per_unit else n, curve[n], n) for n in counts])
        for (x, y, n), (next_x, next_y, next_n) in itertools.pairwise(corners):
            steps.append(((next_y - y) / (next_x - x), next_n - n, c.saved(next_n) - c.saved(n), place))
    steps.sort(key=lambda step: step[0])
    numbers, saved, threshold = list(forced), sum(c.saved(n) for c, n in zip(costs, forced, strict=True)), 0.0
    tolerance = 1e-9 * abs(missing) + 1e-6
    for slope, together, more, place in steps:
        if saved >= missing - tolerance:
            break
        numbers[place] += together
        saved, threshold = saved + more, slope
    if saved < missing - tolerance:
        raise OutOfReachError(saved)
    return Allocation({c.consumer: n for c, n in zip(costs, numbers, strict=True)}, threshold)


def _hull(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Return the corners of the lower convex hull of points (x, y, ...) with x and y ascending; points on an edge stay."""
    corners: list[tuple[float, float, int]] = []
    for point in points:
        if corners and point[0] <= corners[-1][0]:  # costs more and saves nothing more
            continue
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) > _slope(corners[-1], point) * (1 + 1e-9):
            corners.pop()
        corners.append(point)
    return corners


def _slope(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def allocate_uniformly(costs: Sequence[GroupCosts], missing: float) -> Allocation:
    """Give every block the same widths: of all that save what is missing, those whose removals cost least together.

    Args:
        costs: every block has the same kinds, and as many groups left of each.
        missing: to be saved of the budget.

    Raises:
        OutOfReachError: everything that may be pruned saves less.
    """
    kinds = list(dict.fromkeys(c.kind for c in costs))
    options: list[list[tuple[int, float, float]]] = []
    for kind in kinds:
        own = [c for c in costs if c.kind == kind]
        assert len({c.num_left for c in own}) == 1, "blocks have different widths"
        counts = sorted(set.intersection(*(set(c.possible_counts) for c in own)))
        curves = [c.curve for c in own]
        options.append([(n, sum(c.saved(n) for c in own), sum(float(curve[n]) for curve in curves)) for n in counts])
    best: tuple[float, tuple[int, ...]] | None = None
    for choice in itertools.product(*options):
        saved, cost = sum(c[1] for c in choice), sum(c[2] for c in choice)
        if saved >= missing - 1e-9 * abs(missing) - 1e-6 and (best is None or cost < best[0]):
            best = cost, tuple(c[0] for c in choice)
    if best is None:
        raise OutOfReachError(sum(o[-1][1] if o else 0.0 for o in options))
    numbers = dict(zip(kinds, best[1], strict=True))
    return Allocation({c.consumer: numbers[c.kind] for c in costs}, None)
