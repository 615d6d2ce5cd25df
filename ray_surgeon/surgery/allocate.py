"""How many coupled groups every block loses: one threshold over the whole model, or the same widths in every block.

Source: docs/method.md, section 8.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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
    whole: float = math.inf  # what it costs to remove an expert with all of its groups, its tokens going to others
    layer: int = 0  # number of the layer the expert belongs to

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
    experts: frozenset[str] = field(default=frozenset())  # consumers of the experts that go whole


def allocate_globally(costs: Sequence[GroupCosts], missing: float, *, per_unit: bool, fewest_experts: int = 0) -> Allocation:
    """Cut all paths at one threshold: the lowest that saves what is missing.

    Where only some numbers of groups may be left, those between two of them are pruned together or stay together. Paths are cut at the
    corners of their lower convex hull, because nothing between two corners is worth its cost. The removal of a whole expert is one more
    point of its path, where nothing is left.

    Args:
        costs: of every consumer.
        missing: to be saved of the budget.
        per_unit: whether the threshold is a cost per unit of the budget, or a cost per group.
        fewest_experts: that stay in every layer.

    Raises:
        OutOfReachError: everything that may be pruned saves less.
    """
    if not costs:
        raise OutOfReachError(0.0)
    numbers, steps = [], []
    for place, c in enumerate(costs):
        counts = c.possible_counts or [0]
        numbers.append(counts[0])
        curve = c.curve.tolist()
        points = [(c.saved(n) if per_unit else n, curve[n], n) for n in counts]
        if math.isfinite(c.whole):
            points.append((c.saved(c.num_left) if per_unit else c.num_left, c.whole, _WHOLE))
        for (x, y, _), (next_x, next_y, next_n) in itertools.pairwise(_hull(sorted(points))):
            steps.append(((next_y - y) / (next_x - x), place, next_n))
    steps.sort(key=lambda step: step[0])
    left = Counter(c.layer for c in costs if math.isfinite(c.whole))
    experts, threshold = set[int](), 0.0
    saved = sum(c.saved(n) for c, n in zip(costs, numbers, strict=True))
    tolerance = 1e-9 * abs(missing) + 1e-6
    for slope, place, next_n in steps:
        if saved >= missing - tolerance:
            break
        c = costs[place]
        if next_n == _WHOLE:
            if left[c.layer] <= fewest_experts:
                continue
            left[c.layer] -= 1
            experts.add(place)
            next_n = c.num_left
        saved += c.saved(next_n) - c.saved(numbers[place])
        numbers[place], threshold = next_n, slope
    if saved < missing - tolerance:
        raise OutOfReachError(saved)
    counts_of = {c.consumer: n for c, n in zip(costs, numbers, strict=True)}
    return Allocation(counts_of, threshold, frozenset(costs[place].consumer for place in experts))


_WHOLE = 2**62
"""In place of a number of groups: the whole expert."""


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


@dataclass(frozen=True)
class _Option:
    """One width of one kind, in every block."""

    saved: float
    cost: float
    counts: dict[str, int]
    experts: frozenset[str] = frozenset()


def allocate_uniformly(costs: Sequence[GroupCosts], missing: float, *, fewest_experts: int = 0) -> Allocation:
    """Give every block the same widths: of all that save what is missing, those whose removals cost least together.

    Args:
        costs: every block has the same kinds, and as many groups left of each; and as many experts.
        missing: to be saved of the budget.
        fewest_experts: that stay in every layer.

    Raises:
        OutOfReachError: everything that may be pruned saves less.
    """
    kinds = list(dict.fromkeys(c.kind for c in costs))
    options = [list(_options([c for c in costs if c.kind == kind], fewest_experts)) for kind in kinds]
    best: tuple[float, tuple[_Option, ...]] | None = None
    for choice in itertools.product(*options):
        saved, cost = sum(option.saved for option in choice), sum(option.cost for option in choice)
        if saved >= missing - 1e-9 * abs(missing) - 1e-6 and (best is None or cost < best[0]):
            best = cost, choice
    if best is None:
        raise OutOfReachError(sum(max((option.saved for option in of_kind), default=0.0) for of_kind in options))
    counts = {consumer: number for option in best[1] for consumer, number in option.counts.items()}
    return Allocation(counts, None, frozenset(expert for option in best[1] for expert in option.experts))


def _options(costs: Sequence[GroupCosts], fewest_experts: int) -> Iterable[_Option]:
    """Yield every width of one kind, and with each every number of whole experts: those go for which that saves most beside the width."""
    assert len({c.num_left for c in costs}) == 1, "blocks have different widths"
    widths = sorted(set.intersection(*(set(c.possible_counts) for c in costs)))
    curves = [c.curve for c in costs]
    layers: dict[int, list[int]] = {}
    for place, c in enumerate(costs):
        layers.setdefault(c.layer, []).append(place)
    num_experts = min(map(len, layers.values())) if all(math.isfinite(c.whole) for c in costs) else 0
    for n in widths:
        narrow = [float(curve[n]) for curve in curves]
        order = {layer: sorted(places, key=lambda place: costs[place].whole - narrow[place]) for layer, places in layers.items()}
        for m in range(max(0, num_experts - fewest_experts) + 1):
            gone = {place for places in order.values() for place in places[:m]}
            counts = {c.consumer: c.num_left if place in gone else n for place, c in enumerate(costs)}
            cost = sum(c.whole if place in gone else narrow[place] for place, c in enumerate(costs))
            saved = sum(c.saved(counts[c.consumer]) for c in costs)
            yield _Option(saved, cost, counts, frozenset(costs[place].consumer for place in gone))
