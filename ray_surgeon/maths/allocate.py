"""Allocation of the pruned groups to the blocks: by one global threshold, or at equal widths.

Source: docs/method.md, section 8.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_surgeon.maths.threshold import (
    OutOfReachError,
    Point,
    lower_hull,
    slope,
    worthwhile,
)


@dataclass(frozen=True)
class GroupCosts:
    """Marginal costs of the groups of one consumer, as the allocation sees them."""

    consumer: str  # the linear
    kind: str  # of the groups; all groups of one kind have the same size
    # [num_groups] see `group_costs`; infinite for groups that stay or are already pruned
    costs: Tensor
    num_left: int  # groups that are left now
    allowed: Container[int]  # numbers of groups that may be left afterwards
    # budget that the block uses with 0, 1, ... groups left; it never decreases
    needs: Sequence[float] = ()
    # cost of removing an expert with all of its groups, whose tokens go to other experts
    whole: float = math.inf
    layer: int = 0  # number of the layer the expert belongs to

    @property
    def possible_counts(self) -> list[int]:
        """Numbers of groups that may be pruned, in ascending order."""
        most = int(torch.isfinite(self.costs).sum())
        return [n for n in range(most + 1) if self.num_left - n in self.allowed]

    @property
    def curve(self) -> Tensor:
        """[most + 1] float64: total cost of the n cheapest groups, for n = 0, 1, ..."""
        finite = self.costs[torch.isfinite(self.costs)]
        ascending = finite.double().sort().values
        zero = torch.zeros(1, dtype=torch.float64)
        return torch.cat([zero, ascending.cumsum(0)])

    def saved(self, count: int) -> float:
        """Return the budget that pruning `count` groups saves."""
        return self.needs[self.num_left] - self.needs[self.num_left - count]


@dataclass(frozen=True)
class Allocation:
    """Number of groups that each consumer loses in this shot."""

    counts: dict[str, int]  # consumer -> number
    # largest cost of a pruned group, in the unit of the ranking; None for uniform widths
    threshold: float | None
    experts: frozenset[str] = frozenset()  # consumers of the removed experts


def _tolerance(costs: Sequence[GroupCosts], missing: float) -> float:
    """Return the shortfall of the saved budget that is attributed to rounding of sums."""
    largest_needs = [c.needs[-1] for c in costs if len(c.needs)]
    return 1e-9 * abs(missing) + 1e-12 * sum(largest_needs)


# One threshold


def allocate_globally(
    costs: Sequence[GroupCosts],
    missing: float,
    *,
    per_unit: bool,
    fewest_experts: int = 0,
) -> Allocation:
    """Cut all paths at the lowest common threshold that saves the missing budget.

    Where only some numbers of groups may be left, the groups between two such numbers are pruned or
    kept together. Paths are cut at the corners of their lower convex hull, because a point between
    two corners is never worth its cost. Only the last step ends as soon as the goal is met, so that
    no more is pruned than was asked for. Removing a whole expert is one more point of its path, at
    which no group is left; once its layer has no expert to spare, the path goes on without that
    point.

    Args:
        costs: costs of every consumer.
        missing: part of the budget that has to be saved.
        per_unit: whether the threshold is a cost per unit of the budget, or a cost per group.
        fewest_experts: number of experts that stay in every layer.

    Raises:
        OutOfReachError: everything that may be pruned saves less.
    """
    walk = _Walk(costs, per_unit=per_unit, fewest_experts=fewest_experts)
    tolerance = _tolerance(costs, missing)
    while walk.saved < missing - tolerance:
        if walk.has_ended:
            raise OutOfReachError(
                f"pruning: all groups that may go save {walk.saved:g} of the {missing:g} "
                "that must go; ask for less, or name more groups"
            )
        walk.step(missing - tolerance - walk.saved)
    counts = dict[str, int]()
    experts = set[str]()
    for path in walk.paths:
        counts[path.costs.consumer] = path.number
        if path.is_whole:
            experts.add(path.costs.consumer)
    return Allocation(counts=counts, threshold=walk.threshold, experts=frozenset(experts))


class _Walk:
    """Progress of all consumers along their paths, the cheapest step first.

    Attributes:
        paths: path of every consumer.
        saved: budget that the present points of all paths save.
        threshold: price of the last step.
    """

    def __init__(
        self, costs: Sequence[GroupCosts], *, per_unit: bool, fewest_experts: int
    ) -> None:
        """Start at the first point of every path; see `allocate_globally`."""
        self.paths = [_Path(c, per_unit) for c in costs]
        self.saved = sum(path.costs.saved(path.number) for path in self.paths)
        self.threshold = 0.0
        self._fewest_experts = fewest_experts
        self._experts_left = Counter(c.layer for c in costs if math.isfinite(c.whole))
        self._steps = list[tuple[float, int]]()
        for place, path in enumerate(self.paths):
            path.push(self._steps, place)

    @property
    def has_ended(self) -> bool:
        """Whether all paths are at their last points."""
        return not self._steps

    def step(self, wanted: float) -> int:
        """Take the cheapest step of all paths, as far as it is needed.

        If the step removes an expert whose layer has none to spare, the path only loses that point.

        Args:
            wanted: budget that is still missing.

        Returns:
            The place of the path.
        """
        price, place = heapq.heappop(self._steps)
        path = self.paths[place]
        layer = path.costs.layer
        removes_expert = path.goes_whole
        if removes_expert and self._experts_left[layer] <= self._fewest_experts:
            path.take_corners(can_go_whole=False)
        else:
            if removes_expert:
                self._experts_left[layer] -= 1
            self.saved += path.advance(wanted)
            self.threshold = price
        path.push(self._steps, place)
        return place


class _Path:
    """Progress of one consumer along the corners of its costs.

    Attributes:
        costs: costs of the consumer.
        number: number of groups that are pruned at the present point.
        is_whole: whether the whole expert is removed at the present point.
    """

    def __init__(self, costs: GroupCosts, per_unit: bool) -> None:
        """Start at the first point of the path."""
        self.costs = costs
        self.is_whole = False
        self._per_unit = per_unit
        self._counts = costs.possible_counts or [0]
        self.number = self._counts[0]
        self.take_corners(can_go_whole=math.isfinite(costs.whole))

    def take_corners(self, *, can_go_whole: bool) -> None:
        """Compute the corners from the present number of groups on.

        Args:
            can_go_whole: whether removing the whole expert is one of the points.
        """
        num_left = self.costs.num_left
        curve = self.costs.curve.tolist()
        points = list[Point]()
        for n in self._counts:
            if n >= self.number:
                points.append((self._gain(n), curve[n], n))
        if can_go_whole:
            points.append((self._gain(num_left), self.costs.whole, num_left + 1))
        points.sort()
        # the next corner is last, so that it can be popped
        self._points = lower_hull(points)[::-1]

    def _gain(self, number: int) -> float:
        """Return the gain of pruning `number` groups, by which costs are divided."""
        return self.costs.saved(number) if self._per_unit else number

    def push(self, steps: list[tuple[float, int]], place: int) -> None:
        """Push the price of the step to the next point onto a heap, if there is such a point."""
        if len(self._points) > 1:
            price = slope(self._points[-1], self._points[-2])
            heapq.heappush(steps, (price, place))

    @property
    def cost(self) -> float:
        """Cost of the present point, if it is a corner."""
        return self._points[-1][1]

    @property
    def goes_whole(self) -> bool:
        """Whether the whole expert is removed at the next point."""
        return self._points[-2][2] > self.costs.num_left

    def advance(self, wanted: float) -> float:
        """Go to the next point, or to the first number of groups before it that saves enough.

        Args:
            wanted: what is still missing.

        Returns:
            The budget that the step saves.
        """
        saved_before = self.costs.saved(self.number)
        self.is_whole = self.goes_whole
        self._points.pop()
        corner = min(self._points[-1][2], self.costs.num_left)
        self.number = self._first_enough(corner, wanted + saved_before)
        return self.costs.saved(self.number) - saved_before

    def _first_enough(self, corner: int, wanted: float) -> int:
        """Return the first possible number of groups before a corner that saves enough."""
        if self.is_whole or self.costs.saved(corner) < wanted:
            return corner
        for n in self._counts:
            if self.number < n <= corner and self.costs.saved(n) >= wanted:
                return n
        return corner


# Equal widths


def allocate_uniformly(
    costs: Sequence[GroupCosts], missing: float, *, fewest_experts: int = 0
) -> Allocation:
    """Give every block the same widths, at the lowest cost that saves the missing budget.

    An option that removes more is never counted as cheaper than one that removes less of
    everything, although experts that promise a gain would make it so. Therefore nothing is pruned
    beyond the next step of the widths or of the numbers of experts.

    Args:
        costs: costs of every consumer. Every block has the same kinds of groups, the same number of
            groups left of each kind, and the same number of experts.
        missing: part of the budget that has to be saved.
        fewest_experts: number of experts that stay in every layer.

    Raises:
        OutOfReachError: everything that may be pruned saves less.
    """
    kinds = _options_by_kind(costs, fewest_experts)
    wanted = missing - _tolerance(costs, missing)
    saved, chosen = _best_combinations(kinds, wanted)
    enough = (saved >= wanted).nonzero()[:, 0]
    if not len(enough):
        most = float(saved.max()) if len(saved) else 0.0
        raise OutOfReachError(
            f"pruning: all groups that may go save {most:g} of the {missing:g} "
            "that must go; ask for less, or name more groups"
        )
    options = chosen[enough[0]].tolist()
    counts = dict[str, int]()
    experts = set[str]()
    for place, kind in enumerate(kinds):
        saved_by_kind = [float(k.saved[o]) for k, o in zip(kinds, options, strict=True)]
        saved_by_others = sum(saved_by_kind[:place] + saved_by_kind[place + 1 :])
        options[place] = kind.smallest(options[place], saved_by_others, wanted)
        num_pruned, removed_experts = kind.removed(options[place])
        for c in kind.costs:
            is_removed = c.consumer in removed_experts
            counts[c.consumer] = c.num_left if is_removed else num_pruned
        experts.update(removed_experts)
    return Allocation(counts=counts, threshold=None, experts=frozenset(experts))


def _options_by_kind(
    costs: Sequence[GroupCosts], fewest_experts: int
) -> list[_UniformOptions]:
    """Return the options for each kind of groups."""
    costs_by_kind = dict[str, list[GroupCosts]]()
    for c in costs:
        costs_by_kind.setdefault(c.kind, []).append(c)
    return [
        _UniformOptions(of_kind, fewest_experts) for of_kind in costs_by_kind.values()
    ]


def _best_combinations(
    kinds: Sequence[_UniformOptions],
    wanted: float,
) -> tuple[Tensor, Tensor]:
    """Return the combinations of options, one of each kind, that no other one beats.

    Returns:
        [num_combinations] float64 saved budgets, and [num_combinations, num_kinds] int64 options;
        the cheapest combination comes first.
    """
    saved = torch.zeros(1, dtype=torch.float64)
    cost = torch.zeros(1, dtype=torch.float64)
    chosen = torch.zeros(1, 0, dtype=torch.int64)  # [num_combinations, kinds so far]
    for kind in kinds:
        options = worthwhile(kind.saved, kind.cost, wanted)
        pairs = torch.cartesian_prod(torch.arange(len(saved)), options)
        before, after = pairs.view(-1, 2).T
        saved = saved[before] + kind.saved[after]
        cost = cost[before] + kind.cost[after]
        chosen = torch.cat([chosen[before], after[:, None]], dim=1)
        best = worthwhile(saved, cost, wanted)
        saved = saved[best]
        cost = cost[best]
        chosen = chosen[best]
    return saved, chosen


class _UniformOptions:
    """Options for the groups of one kind: a common width, and a number of experts to remove.

    Every block gets the same width and loses the same number of whole experts. The removed experts
    are those whose removal costs least, given the width.

    Attributes:
        costs: costs of the consumers.
        saved: [num_widths * (num_spare + 1)] float64, the budget that each option saves.
        cost: [num_widths * (num_spare + 1)] float64, the cost of each option.
    """

    def __init__(self, costs: Sequence[GroupCosts], fewest_experts: int) -> None:
        """Compute the savings and costs of all options."""
        assert len({c.num_left for c in costs}) == 1, "blocks have different widths"
        self.costs = costs
        self._counts = _common_counts(costs)
        places_by_layer = dict[int, list[int]]()
        for place, c in enumerate(costs):
            places_by_layer.setdefault(c.layer, []).append(place)
        self._layers = [torch.tensor(places) for places in places_by_layer.values()]
        whole = torch.tensor([c.whole for c in costs], dtype=torch.float64)
        self._num_spare = 0
        if bool(torch.isfinite(whole).all()):
            smallest_layer = min(len(places) for places in self._layers)
            self._num_spare = max(0, smallest_layer - fewest_experts)
        num_points = max(self._counts, default=-1) + 1
        curves = torch.stack([c.curve[:num_points] for c in costs])
        # [num_widths, num_consumers] extra cost of removing an expert whole
        self._above = whole - curves.T[self._counts]
        self._evaluate(curves)

    def _evaluate(self, curves: Tensor) -> None:
        shape = (len(self._counts), self._num_spare + 1)
        saved = torch.zeros(shape, dtype=torch.float64)
        cost = torch.zeros(shape, dtype=torch.float64)
        saved_whole = self._saved_by_each(self.costs[0].num_left)
        for width, n in enumerate(self._counts):
            saved_narrow = self._saved_by_each(n)
            saved[width] = saved_narrow.sum()
            cost[width] = curves[:, n].sum()
            for places in self._cheapest_experts(width, self._num_spare):
                saved[width, 1:] += (saved_whole - saved_narrow)[places].cumsum(0)
                cost[width, 1:] += self._above[width, places].cumsum(0)
        if len(cost):
            cost = cost.cummax(dim=0).values.cummax(dim=1).values
        self.saved = saved.flatten()
        self.cost = cost.flatten()

    def _saved_by_each(self, count: int) -> Tensor:
        return torch.tensor([c.saved(count) for c in self.costs], dtype=torch.float64)

    def _cheapest_experts(self, width: int, number: int) -> list[Tensor]:
        """Return the places of the `number` experts of each layer that are cheapest to remove."""
        above = self._above[width]
        cheapest = list[Tensor]()
        for places in self._layers:
            order = above[places].argsort(stable=True)
            cheapest.append(places[order[:number]])
        return cheapest

    def smallest(self, option: int, saved_by_others: float, wanted: float) -> int:
        """Return the option that saves least among those that suffice and cost no more.

        Args:
            option: the option to compare with.
            saved_by_others: budget that the other kinds save.
            wanted: budget that has to be saved.
        """
        is_enough = self.saved + saved_by_others >= wanted
        is_as_cheap = self.cost <= self.cost[option]
        return int(self.saved.where(is_enough & is_as_cheap, torch.inf).argmin())

    def removed(self, option: int) -> tuple[int, set[str]]:
        """Return the number of groups each consumer loses, and the experts that are removed."""
        width, num_experts = divmod(option, self._num_spare + 1)
        places = torch.cat(self._cheapest_experts(width, num_experts)).tolist()
        experts = {self.costs[place].consumer for place in places}
        return self._counts[width], experts


def _common_counts(costs: Sequence[GroupCosts]) -> list[int]:
    """Return the numbers of groups that every consumer may lose, in ascending order."""
    common = set(costs[0].possible_counts)
    for c in costs[1:]:
        common.intersection_update(c.possible_counts)
    return sorted(common)


# The loss increase of every sparsity

CurvePoint = tuple[int, float]
"""Number of removed parameters, and the sum of the costs of what is removed."""


def loss_curve_globally(
    costs: Sequence[GroupCosts],
    num_parameters: Sequence[int],
    *,
    per_unit: bool,
    most_points: int,
    fewest_experts: int = 0,
) -> list[CurvePoint]:
    """Return what removing more and more costs by `allocate_globally`.

    Where the paths of some consumers were not followed far enough, cheaper groups of theirs may be
    missing, so the curve is an upper bound there.

    Args:
        costs: costs of every consumer.
        num_parameters: [num_consumers] parameters of one group of each consumer.
        per_unit: see `allocate_globally`.
        most_points: largest number of points, at least two. They are evenly spread.
        fewest_experts: number of experts that stay in every layer.
    """
    walk = _Walk(costs, per_unit=per_unit, fewest_experts=fewest_experts)
    removed = 0
    cost = 0.0
    for path, size in zip(walk.paths, num_parameters, strict=True):
        removed += path.number * size
        cost += path.cost
    points = [(removed, cost)]
    before = [(path.number, path.cost) for path in walk.paths]
    while not walk.has_ended:
        place = walk.step(math.inf)
        path = walk.paths[place]
        number_before, cost_before = before[place]
        removed += (path.number - number_before) * num_parameters[place]
        cost += path.cost - cost_before
        before[place] = (path.number, path.cost)
        points.append((removed, cost))
    places = _spread([removed for removed, _ in points], most_points)
    return [points[place] for place in places]


def loss_curve_uniformly(
    costs: Sequence[GroupCosts],
    num_parameters: Sequence[int],
    *,
    most_points: int,
    fewest_experts: int = 0,
) -> list[CurvePoint]:
    """Return what removing more and more costs by `allocate_uniformly`.

    Every point is a combination of widths that is the cheapest for some budget.

    Args:
        costs: costs of every consumer; see `allocate_uniformly`.
        num_parameters: [num_consumers] parameters of one group of each consumer.
        most_points: largest number of points, at least two. They are evenly spread.
        fewest_experts: number of experts that stay in every layer.
    """
    size_of = dict[str, int]()
    for c, size in zip(costs, num_parameters, strict=True):
        size_of[c.consumer] = size
    kinds = _options_by_kind(costs, fewest_experts)
    saved, chosen = _best_combinations(kinds, wanted=math.inf)
    if not len(saved):
        return []
    points = list[CurvePoint]()
    for options in chosen[_spread(saved.tolist(), most_points)].tolist():
        removed = 0
        cost = 0.0
        for kind, option in zip(kinds, options, strict=True):
            num_pruned, experts = kind.removed(option)
            for c in kind.costs:
                number = c.num_left if c.consumer in experts else num_pruned
                removed += number * size_of[c.consumer]
            cost += float(kind.cost[option])
        points.append((removed, cost))
    return points


def _spread(ascending: Sequence[float], most: int) -> list[int]:
    """Return the places of the first and last value, and of others evenly spread between them.

    Args:
        ascending: the values. Places of values that are no larger than an earlier one are left out.
        most: largest number of places to return, at least two.
    """
    places = list[int]()
    for number in range(most):
        share = number / (most - 1)
        wanted = ascending[0] + (ascending[-1] - ascending[0]) * share
        place = min(bisect.bisect_left(ascending, wanted), len(ascending) - 1)
        if not places or ascending[place] > ascending[places[-1]]:
            places.append(place)
    return places
