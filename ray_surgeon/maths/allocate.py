"""How many coupled groups every block loses: by one threshold, or equal widths.

Source: docs/method.md, section 8.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ray_surgeon.maths.threshold import OutOfReachError


def _out_of_reach(most: float, wanted: float) -> OutOfReachError:
    return OutOfReachError(
        f"pruning: all groups that may be pruned save {most:g} of the {wanted:g} that must go; ask "
        "for less, or name more groups"
    )


@dataclass(frozen=True)
class GroupCosts:
    """Marginal costs of the groups of one consumer, as the allocation sees them."""

    consumer: str  # the linear
    kind: str  # of the groups; all of one kind have one size
    # [num_groups] see `group_costs`; infinite for groups that stay or are pruned already
    costs: Tensor
    num_left: int  # groups that are left now
    allowed: Container[int]  # numbers of groups that may be left afterwards
    # what the block needs of the budget with 0, 1, ... groups left; it never falls
    needs: Sequence[float]
    # what it costs to remove an expert with all of its groups, its tokens going to others
    whole: float = math.inf
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
    # the largest cost of what is pruned, in the unit of the ranking; None for uniform widths
    threshold: float | None
    experts: frozenset[str] = field(default=frozenset())  # consumers of the experts that go whole


def allocate_globally(
    costs: Sequence[GroupCosts], missing: float, *, per_unit: bool, fewest_experts: int = 0
) -> Allocation:
    """Cut all paths at one threshold: the lowest that saves what is missing.

    Where only some numbers of groups may be left, those between two of them are pruned together or
    stay together. Paths are cut at the corners of their lower convex hull, because nothing between
    two corners is worth its cost; only the last step ends as soon as the goal is met, so that
    nothing goes that was not asked for. The removal of a whole expert is one more point of its
    path, where nothing is left; once its layer has no expert to spare, the path goes on without
    that point.

    Args:
        costs: of every consumer.
        missing: to be saved of the budget.
        per_unit: whether the threshold is a cost per unit of the budget, or a cost per group.
        fewest_experts: that stay in every layer.

    Raises:
        OutOfReachError: everything that may be pruned saves less.
    """
    if not costs:
        raise _out_of_reach(0.0, missing)
    paths = [_Path(c, per_unit) for c in costs]
    steps = [(path.slope, place) for place, path in enumerate(paths) if path.goes_on]
    heapq.heapify(steps)
    left = Counter(c.layer for c in costs if math.isfinite(c.whole))
    threshold = 0.0
    saved = sum(path.saved for path in paths)
    tolerance = 1e-9 * abs(missing) + 1e-6
    while saved < missing - tolerance:
        if not steps:
            raise _out_of_reach(saved, missing)
        slope, place = heapq.heappop(steps)
        path = paths[place]
        layer = costs[place].layer
        if path.goes_whole and left[layer] <= fewest_experts:
            path.stay()
        else:
            left[layer] -= path.goes_whole
            before = path.saved
            path.advance(saved_at_least=missing - tolerance - saved + before)
            saved += path.saved - before
            threshold = slope
        if path.goes_on:
            heapq.heappush(steps, (path.slope, place))
    counts = {path.costs.consumer: path.number for path in paths}
    return Allocation(
        counts, threshold, frozenset(path.costs.consumer for path in paths if path.is_whole)
    )


class _Path:
    """How far one consumer has gone along the corners of its costs."""

    def __init__(self, costs: GroupCosts, per_unit: bool) -> None:
        """Stand at its first point."""
        self.costs = costs
        self.is_whole = False
        self._per_unit = per_unit
        self._counts = costs.possible_counts or [0]
        self.number = self._counts[0]
        self._points = self._corners(can_go_whole=math.isfinite(costs.whole))

    def _corners(self, *, can_go_whole: bool) -> list[tuple[float, float, int]]:
        """Return the corners from the present number of groups on; they are taken from the end."""
        c = self.costs
        curve = self.costs.curve.tolist()
        points = [
            (c.saved(n) if self._per_unit else n, curve[n], n)
            for n in self._counts
            if n >= self.number
        ]
        if can_go_whole:
            points.append((c.saved(c.num_left) if self._per_unit else c.num_left, c.whole, _WHOLE))
        return _hull(sorted(points))[::-1]

    @property
    def goes_on(self) -> bool:
        """Whether there is another point."""
        return len(self._points) > 1

    @property
    def slope(self) -> float:
        """Price of the step to the next point."""
        return _slope(self._points[-1], self._points[-2])

    @property
    def goes_whole(self) -> bool:
        """Whether the whole expert goes at the next point."""
        return self._points[-2][2] == _WHOLE

    @property
    def saved(self) -> float:
        """What is saved so far."""
        return self.costs.saved(self.number)

    def advance(self, saved_at_least: float) -> None:
        """Go to the next point, or to the first number of groups on the way that saves enough.

        Args:
            saved_at_least: what this path has to save for the goal to be met.
        """
        self._points.pop()
        number = self._points[-1][2]
        self.is_whole = number == _WHOLE
        if self.is_whole:
            self.number = self.costs.num_left
            return
        on_the_way = (n for n in self._counts if self.number < n <= number)
        self.number = next((n for n in on_the_way if self.costs.saved(n) >= saved_at_least), number)

    def stay(self) -> None:
        """Let the whole expert stay, and go on with what lies above the way to it."""
        self._points = self._corners(can_go_whole=False)


_WHOLE = 2**62
"""In place of a number of groups: the whole expert."""


def _hull(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Return the corners of the lower convex hull of points (x, y, ...).

    x and y ascend; points on an edge stay.
    """
    corners: list[tuple[float, float, int]] = []
    for point in points:
        if corners and point[0] <= corners[-1][0]:  # costs more and saves nothing more
            continue
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) > _slope(corners[-1], point) * (
            1 + 1e-9
        ):
            corners.pop()
        corners.append(point)
    return corners


def _slope(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


@dataclass(frozen=True)
class _Options:
    """Widths of one kind or more, each in every block."""

    saved: Tensor  # [num_options] float64
    cost: Tensor  # [num_options] float64
    # [num_options, num_kinds, 2] int64: groups that each consumer loses, and whole experts that
    # each layer loses
    chosen: Tensor

    def beside(self, other: _Options) -> _Options:
        """Return every one of these with every one of other kinds."""
        saved, cost = (
            (a[:, None] + b).flatten()
            for a, b in ((self.saved, other.saved), (self.cost, other.cost))
        )
        n = len(self.saved)
        m = len(other.saved)
        chosen = torch.cat(
            [self.chosen.repeat_interleave(m, dim=0), other.chosen.repeat(n, 1, 1)], dim=1
        )
        return _Options(saved, cost, chosen)

    def best(self, wanted: float) -> _Options:
        """Return the options that no other one beats, cheapest first.

        Another one beats an option if it costs less and saves as much, or saves all that is wanted.
        """
        enough = self.saved.clamp(max=max(0.0, wanted))
        # of options that save enough at the same cost, the one that removes least
        order = self.saved.argsort(stable=True)
        order = order[enough[order].argsort(descending=True, stable=True)]
        order = order[self.cost[order].argsort(stable=True)]
        saved = enough[order]
        before = torch.cat([saved.new_full((1,), -math.inf), saved.cummax(dim=0).values[:-1]])
        order = order[saved > before]
        return _Options(self.saved[order], self.cost[order], self.chosen[order])


def allocate_uniformly(
    costs: Sequence[GroupCosts], missing: float, *, fewest_experts: int = 0
) -> Allocation:
    """Give every block the same widths, at the lowest cost that saves what is missing.

    No option counts as cheaper than one that removes less of everything, as it would where experts
    promise a gain. So nothing goes beyond the next step of the widths or numbers of experts.

    Args:
        costs: every block has the same kinds, and as many groups left of each; and as many experts.
        missing: to be saved of the budget.
        fewest_experts: that stay in every layer.

    Raises:
        OutOfReachError: everything that may be pruned saves less.
    """
    kinds = list(dict.fromkeys(c.kind for c in costs))
    of_kinds = [[c for c in costs if c.kind == kind] for kind in kinds]
    wanted = missing - 1e-9 * abs(missing) - 1e-6
    nothing = torch.zeros(1, dtype=torch.float64)
    combined = _Options(nothing, nothing, torch.zeros(1, 0, 2, dtype=torch.int64))
    options = [_options(of_kind, fewest_experts) for of_kind in of_kinds]
    for option in options:
        combined = combined.beside(option.best(wanted)).best(wanted)
    enough = (combined.saved >= wanted).nonzero()[:, 0]
    if not len(enough):
        raise _out_of_reach(float(combined.saved.max()) if len(combined.saved) else 0.0, missing)
    counts = dict[str, int]()
    experts = set[str]()
    chosen = _without_surplus(options, combined.chosen[enough[0]], wanted)
    for of_kind, (number, num_whole) in zip(of_kinds, chosen.tolist(), strict=True):
        above = torch.tensor(
            [c.whole - float(c.curve[number]) for c in of_kind], dtype=torch.float64
        )
        gone = {
            int(place)
            for places in _cheapest(_layers(of_kind), above, num_whole)
            for place in places
        }
        counts |= {
            c.consumer: c.num_left if place in gone else number for place, c in enumerate(of_kind)
        }
        experts |= {of_kind[place].consumer for place in gone}
    return Allocation(counts, None, frozenset(experts))


def _without_surplus(options: Sequence[_Options], chosen: Tensor, wanted: float) -> Tensor:
    """Return the widths and numbers of experts with which no kind saves more than it must.

    The cost does not rise.

    Args:
        options: of each kind.
        chosen: [num_kinds, 2] the widths and numbers of experts that save enough together.
        wanted: to be saved.
    """
    places = [
        int((of_kind.chosen[:, 0] == own).all(dim=1).nonzero()[0])
        for of_kind, own in zip(options, chosen, strict=True)
    ]
    for kind, of_kind in enumerate(options):
        others = sum(
            float(options[other_kind].saved[place])
            for other_kind, place in enumerate(places)
            if other_kind != kind
        )
        possible = (of_kind.saved + others >= wanted) & (of_kind.cost <= of_kind.cost[places[kind]])
        places[kind] = int(of_kind.saved.where(possible, torch.inf).argmin())
    return torch.stack(
        [of_kind.chosen[place, 0] for of_kind, place in zip(options, places, strict=True)]
    )


def _layers(costs: Sequence[GroupCosts]) -> list[Tensor]:
    """Return the places of the experts of each layer."""
    layers: dict[int, list[int]] = {}
    for place, c in enumerate(costs):
        layers.setdefault(c.layer, []).append(place)
    return [torch.tensor(places) for places in layers.values()]


def _cheapest(layers: Sequence[Tensor], above: Tensor, most: int) -> list[Tensor]:
    """Return the first places of each layer, ordered by what experts cost above groups."""
    return [places[above[places].argsort(stable=True)[:most]] for places in layers]


def _options(costs: Sequence[GroupCosts], fewest_experts: int) -> _Options:
    """Return every width of one kind, each with every number of whole experts.

    Those experts go for which that costs least beside the width.
    """
    assert len({c.num_left for c in costs}) == 1, "blocks have different widths"
    widths = sorted(set.intersection(*(set(c.possible_counts) for c in costs)))
    curves = (
        torch.stack([c.curve[: widths[-1] + 1] for c in costs])
        if widths
        else torch.zeros(len(costs), 0)
    )
    whole = torch.tensor([c.whole for c in costs], dtype=torch.float64)
    saved_whole = torch.tensor([c.saved(c.num_left) for c in costs], dtype=torch.float64)
    layers = _layers(costs)
    most = (
        max(0, min(map(len, layers)) - fewest_experts) if bool(torch.isfinite(whole).all()) else 0
    )
    saved, cost = ([torch.zeros(0, dtype=torch.float64)] for _ in range(2))
    for n in widths:
        saved_narrow = torch.tensor([c.saved(n) for c in costs], dtype=torch.float64)
        savings = saved_narrow.sum().repeat(most + 1)
        prices = curves[:, n].sum().repeat(most + 1)
        above = whole - curves[:, n]
        for places in _cheapest(layers, above, most):
            prices[1:] += above[places].cumsum(0)
            savings[1:] += (saved_whole - saved_narrow)[places].cumsum(0)
        saved.append(savings)
        cost.append(prices)
    chosen = torch.cartesian_prod(torch.tensor(widths, dtype=torch.int64), torch.arange(most + 1))
    rising = torch.cat(cost).view(-1, most + 1)
    rising = rising.cummax(dim=0).values.cummax(dim=1).values if len(rising) else rising
    return _Options(torch.cat(saved), rising.flatten(), chosen[:, None, :])
