"""Coupled groups: marginal costs on the last linear of a group, its exact update, and how many groups every block loses.

Source: method.md section 8. Everything upstream of the removed columns writes only to them and goes for free.
"""

from __future__ import annotations

import itertools
import math
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


@dataclass(frozen=True)
class GroupCosts:
    """Heights of the groups of one reader, as the allocation sees them.

    Attributes:
        reader: the linear.
        kind: of the groups; all of one kind have one size.
        heights: [num_groups] see `GroupSurgery.heights`; infinite for groups that stay or are gone.
        num_left: groups that are left now.
        num_parameters: of one group.
        allowed: numbers of groups that may be left afterwards.
    """

    reader: str
    kind: str
    heights: Tensor
    num_left: int
    num_parameters: int
    allowed: frozenset[int]

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


@dataclass(frozen=True)
class Allocation:
    """How many groups each reader loses in this shot, and the parameters that are gone afterwards.

    Attributes:
        counts: reader -> number.
        num_removed: parameters, those of earlier shots included.
        num_parameters: of all the blocks' linears.
        height: the largest height of what goes, in the unit of the ranking; None for uniform widths.
    """

    counts: dict[str, int]
    num_removed: int
    num_parameters: int
    height: float | None


def allocate_globally(costs: Sequence[GroupCosts], target: float, num_parameters: int, num_gone: int, *, per_parameter: bool) -> Allocation:
    """Cut all curves at one height: the lowest that removes the target fraction of all parameters.

    Where only some numbers of groups may be left, those between two of them go together or stay together, at their mean height.

    Raises:
        ValueError: everything that may go is less than the target.
    """
    forced, steps = [], []
    for place, c in enumerate(costs):
        counts = torch.tensor(c.possible_counts or [0])
        forced.append(int(counts[0]))
        together = counts.diff()
        heights = (c.curve[counts].diff() / together / (c.num_parameters if per_parameter else 1)).cummax(0).values
        steps.append(torch.stack([heights, together.double(), torch.full_like(heights, place)]))
    by_height = torch.cat(steps, dim=1)
    by_height = by_height[:, by_height[0].argsort(stable=True)]
    going, owners = by_height[1].long(), by_height[2].long()
    sizes = torch.tensor([c.num_parameters for c in costs])
    gone = num_gone + sum(n * c.num_parameters for n, c in zip(forced, costs, strict=True))
    total = gone + (going * sizes[owners]).cumsum(0)
    wanted = math.ceil(target * num_parameters - 1e-6)
    most = int(total[-1]) if len(total) else gone
    if wanted > most:
        raise _unreachable(target, most, num_parameters)
    number = int(torch.searchsorted(total, wanted)) + 1 if wanted > gone else 0
    number_gone = torch.tensor(forced).index_add(0, owners[:number], going[:number]).tolist()
    height = float(by_height[0, number - 1]) if number else 0.0
    removed = int(total[number - 1]) if number else gone
    return Allocation({c.reader: int(n) for c, n in zip(costs, number_gone, strict=True)}, removed, num_parameters, height)


def allocate_uniformly(costs: Sequence[GroupCosts], target: float, num_parameters: int, num_gone: int) -> Allocation:
    """Give every block the same widths: of all that remove the target fraction, those whose removals cost least together.

    Args:
        costs: every block has the same kinds, and as many groups left of each.
        target: fraction of all parameters to be gone afterwards.
        num_parameters: of all the blocks' linears.
        num_gone: of them, in earlier shots.

    Raises:
        ValueError: everything that may go is less than the target.
    """
    kinds = list(dict.fromkeys(c.kind for c in costs))
    options: list[list[tuple[int, int, float]]] = []
    for kind in kinds:
        own = [c for c in costs if c.kind == kind]
        assert len({c.num_left for c in own}) == 1, "blocks have different widths"
        counts = sorted(set.intersection(*(set(c.possible_counts) for c in own)))
        size, curves = sum(c.num_parameters for c in own), [c.curve for c in own]
        options.append([(n, n * size, sum(float(curve[n]) for curve in curves)) for n in counts])
    missing = math.ceil(target * num_parameters - 1e-6) - num_gone
    best: tuple[float, tuple[int, ...], int] | None = None
    for choice in itertools.product(*options):
        removed, cost = sum(c[1] for c in choice), sum(c[2] for c in choice)
        if removed >= missing and (best is None or cost < best[0]):
            best = cost, tuple(c[0] for c in choice), removed
    if best is None:
        raise _unreachable(target, num_gone + sum(o[-1][1] if o else 0 for o in options), num_parameters)
    numbers = dict(zip(kinds, best[1], strict=True))
    return Allocation({c.reader: numbers[c.kind] for c in costs}, num_gone + best[2], num_parameters, None)


def _unreachable(target: float, most: int, num_parameters: int) -> ValueError:
    return ValueError(
        f"pruning.target_sparsity: {target:g} cannot be reached; all groups that may go are {most / num_parameters:.4f} of the parameters"
    )


def lowest(heights: Tensor, number: int) -> Tensor:
    """Return the indices of the `number` lowest heights, ties in order."""
    return heights.argsort(stable=True)[:number]
