"""How many coupled groups every block loses: by one threshold, or equal widths.

Source: docs/method.md, section 8.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_surgeon.maths.threshold import OutOfReachError, lower_hull, slope, worthwhile


def _out_of_reach(most: float, wanted: float) -> OutOfReachError:
    saved = f"all groups that may go save {most:g} of the {wanted:g} that must go"
    return OutOfReachError(f"pruning: {saved}; ask for less, or name more groups")


def _tolerance(costs: Sequence[GroupCosts], missing: float) -> float:
    """Return by how much what is saved may fall short, because sums are rounded."""
    return 1e-9 * abs(missing) + 1e-12 * sum(c.needs[-1] for c in costs if len(c.needs))


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
    needs: Sequence[float] = ()
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
    experts: frozenset[str] = frozenset()  # consumers of the experts that go whole


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
    paths = [_Path(c, per_unit) for c in costs]
    steps = list[tuple[float, int]]()
    for place, path in enumerate(paths):
        path.push(steps, place)
    left = Counter(c.layer for c in costs if math.isfinite(c.whole))
    threshold = 0.0
    saved = sum(path.costs.saved(path.number) for path in paths)
    tolerance = _tolerance(costs, missing)
    while saved < missing - tolerance:
        if not steps:
            raise _out_of_reach(saved, missing)
        price, place = heapq.heappop(steps)
        path = paths[place]
        layer = costs[place].layer
        if path.goes_whole and left[layer] <= fewest_experts:
            path.take_corners(can_go_whole=False)
        else:
            left[layer] -= path.goes_whole
            saved += path.advance(missing - tolerance - saved)
            threshold = price
        path.push(steps, place)
    counts = {path.costs.consumer: path.number for path in paths}
    whole = frozenset(path.costs.consumer for path in paths if path.is_whole)
    return Allocation(counts, threshold, whole)


class _Path:
    """How far one consumer has gone along the corners of its costs."""

    def __init__(self, costs: GroupCosts, per_unit: bool) -> None:
        """Stand at its first point."""
        self.costs = costs
        self.is_whole = False
        self._per_unit = per_unit
        self._counts = costs.possible_counts or [0]
        self.number = self._counts[0]
        self.take_corners(can_go_whole=math.isfinite(costs.whole))

    def take_corners(self, *, can_go_whole: bool) -> None:
        """Take the corners from the present number of groups on.

        They are taken from the end, without the way to a whole expert that has to stay.
        """
        c = self.costs
        curve = c.curve.tolist()
        prices = [(n, curve[n], n) for n in self._counts if n >= self.number]
        if can_go_whole:
            prices.append((c.num_left, c.whole, c.num_left + 1))
        points = [(c.saved(n) if self._per_unit else n, cost, place) for n, cost, place in prices]
        self._points = lower_hull(sorted(points))[::-1]

    def push(self, steps: list[tuple[float, int]], place: int) -> None:
        """Put the price of the step to the next point on a heap, if there is one."""
        if len(self._points) > 1:
            heapq.heappush(steps, (slope(self._points[-1], self._points[-2]), place))

    @property
    def goes_whole(self) -> bool:
        """Whether the whole expert goes at the next point."""
        return self._points[-2][2] > self.costs.num_left

    def advance(self, wanted: float) -> float:
        """Go to the next point, or to the first number of groups on the way that saves enough.

        Args:
            wanted: what is missing for the goal to be met.

        Returns:
            What is saved on the way.
        """
        before = self.costs.saved(self.number)
        self.is_whole = self.goes_whole
        self._points.pop()
        last = min(self._points[-1][2], self.costs.num_left)
        on_the_way = (n for n in self._counts if self.number < n <= last and not self.is_whole)
        enough = (n for n in on_the_way if self.costs.saved(n) >= wanted + before)
        self.number = next(enough, last)
        return self.costs.saved(self.number) - before


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
    names = dict.fromkeys(c.kind for c in costs)
    kinds = [_Widths([c for c in costs if c.kind == name], fewest_experts) for name in names]
    wanted = missing - _tolerance(costs, missing)
    saved = torch.zeros(1, dtype=torch.float64)
    cost = torch.zeros(1, dtype=torch.float64)
    chosen = torch.zeros(1, 0, dtype=torch.int64)  # [num_combinations, kinds so far] options
    for kind in kinds:
        own = worthwhile(kind.saved, kind.cost, wanted)
        before, after = torch.cartesian_prod(torch.arange(len(saved)), own).view(-1, 2).T
        saved = saved[before] + kind.saved[after]
        cost = cost[before] + kind.cost[after]
        best = worthwhile(saved, cost, wanted)
        chosen = torch.cat([chosen[before], after[:, None]], dim=1)[best]
        saved = saved[best]
        cost = cost[best]
    enough = (saved >= wanted).nonzero()[:, 0]
    if not len(enough):
        raise _out_of_reach(float(saved.max()) if len(saved) else 0.0, missing)
    options = chosen[enough[0]].tolist()
    counts = dict[str, int]()
    experts = set[str]()
    for place, kind in enumerate(kinds):
        of_all = [float(k.saved[option]) for k, option in zip(kinds, options, strict=True)]
        others = sum(of_all[:place] + of_all[place + 1 :])
        # of those that save enough and cost no more, the one that saves least
        possible = (kind.saved + others >= wanted) & (kind.cost <= kind.cost[options[place]])
        options[place] = int(kind.saved.where(possible, torch.inf).argmin())
        number, whole = kind.removed(options[place])
        counts |= {c.consumer: c.num_left if c.consumer in whole else number for c in kind.costs}
        experts |= whole
    return Allocation(counts, None, frozenset(experts))


class _Widths:
    """Every width of one kind in every block, each with every number of whole experts a layer.

    Those experts go for which that costs least beside the width.
    """

    def __init__(self, costs: Sequence[GroupCosts], fewest_experts: int) -> None:
        """Take what each option saves and costs, [num_widths * (spare + 1)] float64."""
        assert len({c.num_left for c in costs}) == 1, "blocks have different widths"
        self.costs = costs
        self._numbers = sorted(set.intersection(*(set(c.possible_counts) for c in costs)))
        of_place = torch.tensor([c.layer for c in costs])
        layers = dict.fromkeys(c.layer for c in costs)
        self._layers = [(of_place == layer).nonzero()[:, 0] for layer in layers]
        whole = torch.tensor([c.whole for c in costs], dtype=torch.float64)
        spare = min(map(len, self._layers)) - fewest_experts
        self._spare = max(0, spare) if bool(torch.isfinite(whole).all()) else 0
        saved_whole = self._saved(costs[0].num_left)
        num_points = max(self._numbers, default=-1) + 1
        curves = torch.stack([c.curve[:num_points] for c in costs])
        self._above = whole - curves.T[self._numbers]  # [num_widths, num_consumers]
        shape = (len(self._numbers), self._spare + 1)
        saved, cost = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        for i, n in enumerate(self._numbers):
            saved_narrow = self._saved(n)
            saved[i] = saved_narrow.sum()
            cost[i] = curves[:, n].sum()
            for places in self._cheapest(i, self._spare):
                saved[i, 1:] += (saved_whole - saved_narrow)[places].cumsum(0)
                cost[i, 1:] += self._above[i, places].cumsum(0)
        if len(cost):
            cost = cost.cummax(dim=0).values.cummax(dim=1).values
        self.saved = saved.flatten()
        self.cost = cost.flatten()

    def _saved(self, number: int) -> Tensor:
        return torch.tensor([c.saved(number) for c in self.costs], dtype=torch.float64)

    def _cheapest(self, width: int, number: int) -> list[Tensor]:
        """Return so many places of each layer, ordered by what experts cost above groups."""
        above = self._above[width]
        return [places[above[places].argsort(stable=True)[:number]] for places in self._layers]

    def removed(self, option: int) -> tuple[int, set[str]]:
        """Return how many groups every consumer loses, and the consumers of the whole experts."""
        width, num_whole = divmod(option, self._spare + 1)
        gone = torch.cat(self._cheapest(width, num_whole)).tolist()
        return self._numbers[width], {self.costs[place].consumer for place in gone}
