"""Coupled groups on the coordinator: the target, and how many groups every block loses.

That is decided by costs as workers send them, which follow greedy paths as far as is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ray_surgeon.curvature.collector import NOTHING_BESIDE, SumsBeside
from ray_surgeon.maths.allocate import Allocation, GroupCosts, allocate_globally, allocate_uniformly
from ray_surgeon.maths.threshold import OutOfReachError
from ray_surgeon.models.budgets import Budget
from ray_surgeon.models.groups import GroupSet
from ray_surgeon.models.layers import LayerKey
from ray_surgeon.models.layout import LinearShape
from ray_surgeon.plan.work import LinearNeeds
from ray_surgeon.pruning.experts import ExpertSumsBeside
from ray_surgeon.pruning.group_needs import FARTHER, needs_of_consumer
from ray_surgeon.pruning.method import Choice, Ranking, Scores
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.spec.groups import CoupledSection

if TYPE_CHECKING:
    from ray_surgeon.pruning.coupled_groups import Groups

_FAR_ENOUGH = 40.0
"""How many times as many groups as single costs say are followed before all are."""

Counts = Mapping[str, int]
"""Consumer -> number of its groups."""


@dataclass(frozen=True)
class ConsumerCosts(GroupCosts):
    """Marginal costs of the groups of one consumer, as a worker sends them."""

    num_parameters: int = 0  # of one group
    # per unit of the target; groups that cost more may be missing in `costs`
    limit: float = math.inf

    @property
    def num_reached(self) -> int:
        """How many groups the path has."""
        return int(torch.isfinite(self.costs).sum())


GroupScores = Scores[ConsumerCosts]
"""Costs of the consumers that a worker owns, or of all."""


class Reach(NamedTuple):
    """How far the greedy path of a consumer is followed."""

    limit: float  # largest cost per unit of the target
    needed: int = 0  # groups that may be needed even if they cost more


@dataclass(frozen=True)
class GroupChoice(Ranking):
    """The part of `Groups` that decides; it never sees a weight."""

    section: CoupledSection
    budget: Budget  # what they save from
    fewest: Mapping[str, int]  # kind -> groups that must be left in every block, or experts
    consumers: frozenset[str]  # roles of the last linears of the groups
    removed: frozenset[LayerKey] = frozenset()  # layers that are gone whole

    def __post_init__(self) -> None:
        """Refuse a target that cannot be reached, or that the dense model meets already.

        Raises:
            OutOfReachError: says what is possible.
        """
        budget = self.budget
        depth = self.section.depth
        num_removed = None if depth is None else depth.num_removed
        most = budget.most_saved(self.section.layer_kinds, num_removed)
        least = max(0.0, budget.least(self.fewest) - most)
        self.section.check_target(least, budget.dense, budget.unit)

    @property
    def gathers(self) -> frozenset[str]:
        """Producers need no curvature."""
        return self.consumers

    @property
    def has_costs(self) -> bool:
        """Whether anything narrower than a layer goes."""
        return bool(self.section.narrow_kinds)

    @property
    def ranks_experts(self) -> bool:
        """Whether whole experts may be removed."""
        return "experts" in self.section.groups

    @property
    def beside(self) -> SumsBeside:
        """What whole experts cost is summed beside A and G."""
        return ExpertSumsBeside() if self.ranks_experts else NOTHING_BESIDE

    def goal(self, shot: int) -> float:
        """Return what the model may need of the budget after a shot."""
        return self.section.goal(self.budget.dense, shot)

    def need(self, left: Iterable[tuple[str, int]]) -> float:
        """Return what the model needs of the budget; see `Budget.of`.

        `left` has no consumers in layers that are gone.
        """
        budget = self.budget
        return budget.of(left) - budget.saved_without(self.removed)

    def is_there(self, groups: GroupSet) -> bool:
        """Whether the layer of groups is not gone."""
        part = "attention_layers" if groups.kind == "attention" else "ffn_layers"
        return self.removed.isdisjoint({("blocks", groups.block), (part, groups.block)})

    def multiple(self, kind: str, shot: int) -> int:
        """Return what the number of groups left must be a multiple of.

        Widths are rounded where a size of the model is reached.
        """
        is_size = shot in self.section.size_shots
        return self.section.multiple if kind != "attention" and is_size else 1

    def unit_of(self, kind: str) -> float:
        """Return what costs of groups of a kind are divided by to be ranked."""
        return self.budget.size(kind)

    def needs(self, shape: LinearShape) -> LinearNeeds | None:
        """Return what a consumer needs; nothing else is ranked and updated."""
        if shape.role not in self.consumers:
            return None
        budget = self.budget
        most = max(budget.dense - budget.least(self.fewest), 1e-9 * budget.dense)
        # of the groups, in the first shot: all consumers lose the same
        share = min(1.0, (budget.dense - self.goal(1)) / most)
        reach = min(1.0, 2 * (self.section.last_sparsity or 0.5))
        return needs_of_consumer(shape, reach, share * (1.0 if self.section.uniform else FARTHER))

    def allocate(self, scores: GroupScores, shot: int) -> Allocation:
        """Return how many groups every block loses."""
        budget = self.budget
        costs = sorted(scores.costs, key=lambda c: c.consumer)
        present = [c for c in costs if c.num_left or c.kind != "expert_channels"]
        needs = budget.by_left
        groups = [replace(c, needs=needs[c.kind]) for c in present]
        missing = self.need((c.kind, c.num_left) for c in costs) - self.goal(shot)
        fewest = self.fewest.get("experts", 0)
        if self.section.uniform:
            return allocate_uniformly(groups, missing, fewest_experts=fewest)
        return allocate_globally(groups, missing, per_unit=True, fewest_experts=fewest)

    def choose(self, cluster: Cluster, scores: GroupScores, shot: int) -> Choice:
        """Choose how many groups every block loses."""
        budget = self.budget
        allocation = self.allocate(scores, shot)
        costs = scores.costs
        counts = allocation.counts
        going = {c.consumer: counts.get(c.consumer, 0) for c in costs}
        num_kept = scores.num_kept - sum(going[c.consumer] * c.num_parameters for c in costs)
        need = self.need((c.kind, c.num_left - going[c.consumer]) for c in costs)
        sparsity = 1 - num_kept / scores.num_parameters
        of_need = {"need": need, "unit": budget.unit}
        facts: dict[str, Any] = {"groups": sum(counts.values()), "sparsity": sparsity} | of_need
        of_budget = of_need | {"dense": budget.dense, "goal": self.goal(shot)}
        record: dict[str, Any] = {"groups_removed": counts, "budget": of_budget}
        experts = {c.consumer: c.whole for c in costs if c.consumer in allocation.experts}
        if self.ranks_experts:
            facts["experts"] = len(experts)
            record["experts_removed"] = experts
            record["expert_costs"] = {c.consumer: c.whole for c in costs if math.isfinite(c.whole)}
        return Choice(allocation.threshold, facts, (counts, experts), record)


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
        scores = self.method.taken(self.cluster, None, self.shot)
        first = self.method.allocate(scores, self.shot)
        is_uniform = self.method.section.uniform
        singly = {name: n for name, n in first.counts.items() if name not in first.experts}
        factor = 1.25
        # uniform widths have no threshold: below every cost
        limit = -1.0 if is_uniform else factor * max(0.0, first.threshold or 0.0)
        following: Sequence[ConsumerCosts] = scores.costs
        while True:
            wanted = {name: math.ceil(factor * count) for name, count in singly.items()}
            scores = self._followed(scores, limit, self._and_one_step(following, wanted))
            try:
                threshold = max(0.0, self.method.allocate(scores, self.shot).threshold or 0.0)
            except OutOfReachError:
                if math.isinf(limit):  # all paths were followed to their ends
                    raise
                factor = 2 * factor
                following = scores.costs
                limit = 4 * limit if factor < _FAR_ENOUGH else math.inf
                continue
            following = [c for c in scores.costs if self._is_short(c, threshold)]
            if is_uniform or not following:
                return scores
            limit = threshold  # with all paths up to there the threshold is this one or lower

    def _followed(self, scores: GroupScores, limit: float, needed: Counts) -> GroupScores:
        """Return scores of which those in `needed` were taken anew, up to a cost."""
        reach = {name: Reach(limit, count) for name, count in needed.items()}
        after = self.method.taken(self.cluster, reach, self.shot)
        costs = {c.consumer: c for c in (*scores.costs, *after.costs)}
        events = (*scores.raised_damping, *after.raised_damping)
        raised = {(event.linear, event.factor): event for event in events}
        return replace(after, costs=tuple(costs.values()), raised_damping=tuple(raised.values()))

    def _and_one_step(self, costs: Sequence[ConsumerCosts], counts: Counts) -> dict[str, int]:
        """Return consumer -> number of its groups and one step more.

        The step may be worth its mean cost though its last group alone is not.
        """
        steps = {c.consumer: self.method.multiple(c.kind, self.shot) for c in costs}
        return {name: counts.get(name, 0) + step for name, step in steps.items()}

    def _is_short(self, costs: ConsumerCosts, threshold: float) -> bool:
        """Whether a path could go on and ends before a threshold.

        It does not if its limit is above, or if it came that far because its groups were needed.
        """
        if threshold <= costs.limit or self._has_ended(costs):
            return False
        reached = costs.costs[torch.isfinite(costs.costs)]
        return not (reached >= threshold * self.method.unit_of(costs.kind)).any()

    def _has_ended(self, costs: ConsumerCosts) -> bool:
        """Whether a path has all groups that may go."""
        return costs.num_reached >= costs.num_left - self.method.fewest.get(costs.kind, 0)
