"""Costs of coupled groups as workers send them, and how far their paths are to be followed."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ray_surgeon.maths.allocate import GroupCosts
from ray_surgeon.maths.threshold import OutOfReachError
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.stages.prune.method import Scores, taken

if TYPE_CHECKING:
    from ray_surgeon.stages.prune.groups import Groups

_FAR_ENOUGH = 40.0
"""How many times as many groups as single costs say are followed before all are."""
NOTHING = -1.0
"""A limit below every cost."""

Unit = tuple[int, str]
"""The groups of one kind in one block."""


@dataclass(frozen=True)
class ConsumerCosts:
    """Marginal costs of the groups of one consumer, as a worker sends them."""

    consumer: str  # the linear
    kind: str  # of the groups
    costs: Tensor  # [num_groups] float32, see `group_costs`
    num_left: int  # groups that are left now
    num_parameters: int  # of one group
    allowed: Container[int]  # numbers of groups that may be left afterwards
    whole: float = math.inf  # what it costs to remove the expert
    block: int = 0  # its number
    # before scaling, per unit of the target if groups are ranked so; what costs more may be missing
    # in `costs`
    limit: float = math.inf
    # what costs are multiplied with to be compared with those of other consumers; see `Search`
    scale: float = 1.0

    @property
    def unit(self) -> Unit:
        """What a search scales together."""
        return self.block, self.kind

    @property
    def num_reached(self) -> int:
        """How many groups the path has."""
        return int(torch.isfinite(self.costs).sum())

    def of_cheapest(self, count: int) -> float:
        """Return what the cheapest groups cost together, before scaling."""
        return float(self.costs.double().sort().values[:count].sum())

    def scaled(self, needs: Sequence[float]) -> GroupCosts:
        """Return the costs as an allocation sees them; `needs` are those of `GroupCosts`."""
        costs = self.costs * self.scale
        left = self.num_left, self.allowed
        return GroupCosts(self.consumer, self.kind, costs, *left, needs, self.whole, self.block)


GroupScores = Scores[ConsumerCosts]
"""Costs of the consumers that a worker owns, or of all."""


@dataclass(frozen=True)
class Reach:
    """How far the greedy paths are followed."""

    # largest scaled cost, per unit likewise; None for the cost of each group on its own
    limit: float | None = None
    # consumer -> its groups that may be needed even if they cost more
    needed: Mapping[str, int] = field(default_factory=dict)
    only: frozenset[str] | None = None  # consumers whose paths are followed anew; None for all
    # those of `ConsumerCosts`; 1 where there is none
    scales: Mapping[Unit, float] = field(default_factory=dict)

    def has(self, consumer: str) -> bool:
        """Whether the path of a consumer is followed."""
        return self.only is None or consumer in self.only


def renewed(before: GroupScores, after: GroupScores) -> GroupScores:
    """Return scores in which those of some consumers were taken anew."""
    costs = {c.consumer: c for c in (*before.costs, *after.costs)}
    events = (*before.raised_damping, *after.raised_damping)
    raised = {(event.linear, event.factor): event for event in events}
    return replace(after, costs=tuple(costs.values()), raised_damping=tuple(raised.values()))


@dataclass(frozen=True)
class Paths:
    """The greedy paths of all blocks in one shot."""

    method: Groups
    cluster: Cluster
    shot: int

    def far_enough(self) -> GroupScores:
        """Let every block follow its path somewhat farther than single costs say.

        If that was not far enough, it goes on.
        """
        scores = taken(self.cluster, self.method.costs, Reach(), self.shot)
        first = self.method.allocate(scores, self.shot)
        is_uniform = self.method.section.uniform
        singly = {name: n for name, n in first.counts.items() if name not in first.experts}
        factor = 1.25
        limit = NOTHING if is_uniform else factor * max(0.0, first.threshold or 0.0)
        only = None
        while True:
            wanted = {name: math.ceil(factor * count) for name, count in singly.items()}
            scores = self._followed(scores, Reach(limit, self.and_one_step(scores, wanted), only))
            try:
                threshold = self._threshold(scores)
            except OutOfReachError:
                if math.isinf(limit):  # all paths were followed to their ends
                    raise
                factor = 2 * factor
                only = None
                limit = 4 * limit if factor < _FAR_ENOUGH else math.inf
                continue
            only = self._short(scores, threshold)
            if is_uniform or not only:
                return scores
            limit = threshold  # with all paths up to there the threshold is this one or lower

    def rescaled(self, scores: GroupScores, scales: Mapping[Unit, float]) -> GroupScores:
        """Return scores with other scales.

        Paths that go farther now are followed anew, with the weights that workers have.
        """
        scaled = tuple(replace(c, scale=scales.get(c.unit, 1.0)) for c in scores.costs)
        scores = replace(scores, costs=scaled)
        reached = {c.consumer: c.num_reached for c in scores.costs}
        while True:
            allocation = self.method.allocate(scores, self.shot)
            threshold = max(0.0, allocation.threshold or 0.0)
            needed = self.and_one_step(scores, allocation.counts)
            open_paths = {c.consumer for c in scores.costs if not self.has_ended(c)}
            cut = {name for name in open_paths if reached[name] < needed[name]}
            only = self._short(scores, threshold) | cut
            if not only:
                return scores
            scores = self._followed(scores, Reach(threshold, needed, only, scales))
            reached |= {name: max(reached[name], needed[name]) for name in only}

    def _followed(self, scores: GroupScores, reach: Reach) -> GroupScores:
        return renewed(scores, taken(self.cluster, self.method.costs, reach, self.shot))

    def _threshold(self, scores: GroupScores) -> float:
        """Return the threshold; below 0 only experts go."""
        return max(0.0, self.method.allocate(scores, self.shot).threshold or 0.0)

    def and_one_step(self, scores: GroupScores, counts: Mapping[str, int]) -> dict[str, int]:
        """Return numbers of groups and one step more.

        The step may be worth its mean cost though its last group alone is not.
        """
        return {
            c.consumer: counts.get(c.consumer, 0) + self.method.multiple(c.kind, self.shot)
            for c in scores.costs
        }

    def _short(self, scores: GroupScores, threshold: float) -> frozenset[str]:
        """Return the consumers whose paths end before a threshold of scaled costs."""
        return frozenset(c.consumer for c in scores.costs if not self.is_followed(c, threshold))

    def is_followed(self, costs: ConsumerCosts, threshold: float) -> bool:
        """Whether a path goes on to the threshold of scaled costs.

        It does if its limit is above, if it came that far because its groups were needed, or if it
        ended.
        """
        unscaled = threshold / costs.scale
        reached = costs.costs[torch.isfinite(costs.costs)]
        return (
            unscaled <= costs.limit
            or self.has_ended(costs)
            or bool((reached >= unscaled * self.method.unit_of(costs.kind)).any())
        )

    def has_ended(self, costs: ConsumerCosts) -> bool:
        """Whether a path has all groups that may go."""
        return costs.num_reached >= costs.num_left - self.method.fewest.get(costs.kind, 0)
