"""Coupled groups: marginal costs on the last linear of a group, its exact update, and how many groups every block loses.

Source: method.md section 8. Everything upstream of the removed columns writes only to them and goes for free.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_surgeon.surgery.curvature import LinearCurvature
from ray_surgeon.surgery.greedy import GreedyCurve, greedy_group_costs
from ray_surgeon.surgery.kronecker import KroneckerFactors
from ray_surgeon.surgery.masks import StructuredMask
from ray_surgeon.surgery.threshold import check_costs


class GroupSurgery:
    """The last linear of the groups of one block in one shot."""

    def __init__(
        self,
        name: str,
        W: Tensor,
        factors: KroneckerFactors,
        mask: StructuredMask,
        *,
        damping_a: float,
        damping_g: float,
        max_damping: float,
    ) -> None:
        """Take the linear; arguments as those of `LinearSurgery`."""
        self.name, self.W, self.factors = name, W, factors
        self.columns = mask.columns.to(W.device)
        self.mask = mask
        live_rows = factors.G.diagonal() > 0
        options = {"damping_a": damping_a, "damping_g": damping_g, "max_damping": max_damping}
        self.curvature = LinearCurvature(name, factors, live_rows, self.columns, dtype=W.dtype, **options)
        self._rows = live_rows

    def heights(self, columns: Tensor, least: int, limit: float | None, needed: int = 0) -> Tensor:
        """Return the marginal cost at which each group goes, see `greedy_group_costs`; 0 for groups whose inputs are always zero.

        Args:
            columns: [num_groups, width] columns of each group.
            least: groups that stay.
            limit: no group goes whose marginal cost is above it; None for the cost of each as if it went alone.
            needed: groups that go whatever they cost.

        Raises:
            FloatingPointError: a factor or a cost is not usable.
        """
        columns = columns.to(self.W.device)
        alive = self.columns[columns].all(dim=1)
        place = self.columns.cumsum(0) - 1
        A, G = self.curvature.A, self.curvature.G
        inverses = torch.cholesky_inverse(A.cholesky), torch.cholesky_inverse(G.cholesky)
        curve = GreedyCurve(self.W[self._rows][:, self.columns], A.matrix, G.matrix, *inverses)
        heights = torch.full((len(columns),), torch.inf, dtype=self.W.dtype)
        dead = (alive & (self.factors.A.diagonal()[columns] == 0).all(dim=1)).nonzero()[:, 0][: max(0, int(alive.sum()) - least)]
        if len(dead):
            curve.remove_columns(place[columns[dead]].flatten())
            heights[dead.cpu()] = 0.0
            alive[dead] = False
        numbers = alive.nonzero()[:, 0]
        if len(numbers) and limit is None:
            costs = curve.column_set_costs(place[columns[numbers]]).cpu().sort(stable=True)
            most = max(0, len(numbers) - least)
            heights[numbers.cpu()[costs.indices[:most]]] = costs.values[:most]
        elif len(numbers) and limit is not None:
            may_go = torch.ones(len(numbers), dtype=torch.bool)
            heights[numbers.cpu()] = greedy_group_costs(curve, place[columns[numbers]], may_go, least, limit=limit, needed=needed)
        check_costs(f"{self.name} groups", heights[torch.isfinite(heights)])
        return heights

    def prune(self, gone: Tensor, step: float = 0.0) -> tuple[Tensor, StructuredMask, float]:
        """Remove columns and update the others exactly.

        Args:
            gone: [C] bool.
            step: of the first-order correction, see `LinearCurvature.without`.

        Returns:
            W [R, C], the new mask, and the predicted loss increase in nats per token.
        """
        gone = gone.to(self.W.device)
        before = self.W[self._rows][:, self.columns]
        nothing = torch.zeros(len(before), dtype=torch.bool, device=self.W.device)
        after, _ = self.curvature.without(before, nothing, gone[self.columns], joint="exact", correlations="full", step=step)
        W = self.W.clone()
        W[self._rows.nonzero(), self.columns.nonzero()[:, 0]] = after
        mask = self.mask.without(torch.zeros_like(self.mask.rows), gone.cpu())
        mask.apply_(W)
        return W, mask, self.curvature.quadratic_cost(after - before)


class OutOfReachError(ValueError):
    """All groups that may go save less than is wanted.

    Attributes:
        most: what they save.
    """

    def __init__(self, most: float) -> None:
        """Take what they save."""
        super().__init__(f"all groups that may go save {most:g}")
        self.most = most


@dataclass(frozen=True)
class GroupCosts:
    """Heights of the groups of one reader, as the allocation sees them.

    Attributes:
        reader: the linear.
        kind: of the groups; all of one kind have one size.
        heights: [num_groups] see `GroupSurgery.heights`; infinite for groups that stay or are gone.
        num_left: groups that are left now.
        allowed: numbers of groups that may be left afterwards.
        needs: what the block needs of the budget with 0, 1, ... groups left; it never falls.
    """

    reader: str
    kind: str
    heights: Tensor
    num_left: int
    allowed: frozenset[int]
    needs: Sequence[float]

    @property
    def possible_counts(self) -> list[int]:
        """How many groups may go, in ascending order."""
        most = int(torch.isfinite(self.heights).sum())
        return [n for n in range(most + 1) if self.num_left - n in self.allowed]

    @property
    def curve(self) -> Tensor:
        """[most + 1] float64: what the first n groups cost together."""
        heights = self.heights[torch.isfinite(self.heights)].double().sort().values
        return torch.cat([torch.zeros(1, dtype=torch.float64), heights.cumsum(0)])

    def saved(self, count: int) -> float:
        """Return what is saved when so many groups go."""
        return self.needs[self.num_left] - self.needs[self.num_left - count]


@dataclass(frozen=True)
class Allocation:
    """How many groups each reader loses in this shot.

    Attributes:
        counts: reader -> number.
        saved: of the budget, by this shot.
        height: the largest height of what goes, in the unit of the ranking; None for uniform widths.
    """

    counts: dict[str, int]
    saved: float
    height: float | None


def allocate_globally(costs: Sequence[GroupCosts], missing: float, *, per_unit: bool) -> Allocation:
    """Cut all curves at one height: the lowest that saves what is missing.

    Where only some numbers of groups may be left, those between two of them go together or stay together. Curves are cut at the corners
    of their lower convex hull, because nothing between two corners is worth its cost.

    Args:
        costs: of every reader.
        missing: to be saved of the budget.
        per_unit: whether heights are costs per unit of the budget, or costs per group.

    Raises:
        OutOfReachError: everything that may go saves less.
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
    numbers, saved, height = list(forced), sum(c.saved(n) for c, n in zip(costs, forced, strict=True)), 0.0
    tolerance = 1e-9 * abs(missing) + 1e-6
    for slope, together, more, place in steps:
        if saved >= missing - tolerance:
            break
        numbers[place] += together
        saved, height = saved + more, slope
    if saved < missing - tolerance:
        raise OutOfReachError(saved)
    return Allocation({c.reader: n for c, n in zip(costs, numbers, strict=True)}, saved, height)


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
        OutOfReachError: everything that may go saves less.
    """
    kinds = list(dict.fromkeys(c.kind for c in costs))
    options: list[list[tuple[int, float, float]]] = []
    for kind in kinds:
        own = [c for c in costs if c.kind == kind]
        assert len({c.num_left for c in own}) == 1, "blocks have different widths"
        counts = sorted(set.intersection(*(set(c.possible_counts) for c in own)))
        curves = [c.curve for c in own]
        options.append([(n, sum(c.saved(n) for c in own), sum(float(curve[n]) for curve in curves)) for n in counts])
    best: tuple[float, tuple[int, ...], float] | None = None
    for choice in itertools.product(*options):
        saved, cost = sum(c[1] for c in choice), sum(c[2] for c in choice)
        if saved >= missing - 1e-9 * abs(missing) - 1e-6 and (best is None or cost < best[0]):
            best = cost, tuple(c[0] for c in choice), saved
    if best is None:
        raise OutOfReachError(sum(o[-1][1] if o else 0.0 for o in options))
    numbers = dict(zip(kinds, best[1], strict=True))
    return Allocation({c.reader: numbers[c.kind] for c in costs}, best[2], None)


def lowest(heights: Tensor, number: int) -> Tensor:
    """Return the indices of the `number` lowest heights, ties in order."""
    return heights.argsort(stable=True)[:number]
