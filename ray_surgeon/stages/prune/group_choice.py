"""Coupled groups on the coordinator: the target, and how many groups every block loses.

That is decided by costs as workers send them, which follow greedy paths as far as is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ray_surgeon.maths.allocate import Allocation, GroupCosts, allocate_globally, allocate_uniformly
from ray_surgeon.maths.threshold import OutOfReachError
from ray_surgeon.models.budgets import Budget
from ray_surgeon.models.layout import LinearShape
from ray_surgeon.plan.work import LinearNeeds
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.stages.curvature.gather import NOTHING_BESIDE, SumsBeside
from ray_surgeon.stages.prune.experts import ExpertSumsBeside
from ray_surgeon.stages.prune.groups_section import CoupledSection
from ray_surgeon.stages.prune.method import Choice, Ranking, Scores

if TYPE_CHECKING:
    from ray_surgeon.stages.prune.groups import Groups

_FAR_ENOUGH = 40.0
"""How many times as many groups as single costs say are followed before all are."""
NOTHING = -1.0
"""A limit below every cost."""

Unit = tuple[int, str]
"""The groups of one kind in one block."""


@dataclass(frozen=True)
class ConsumerCosts(GroupCosts):
    """Marginal costs of the groups of one consumer, as a worker sends them."""

    num_parameters: int = 0  # of one group
    # before scaling, per unit of the target if groups are ranked so; what costs more may be missing
    # in `costs`
    limit: float = math.inf
    # what costs are multiplied with to be compared with those of other consumers; see `Search`
    scale: float = 1.0

    @property
    def unit(self) -> Unit:
        """What a search scales together."""
        return self.layer, self.kind

    @property
    def num_reached(self) -> int:
        """How many groups the path has."""
        return int(torch.isfinite(self.costs).sum())

    def of_cheapest(self, count: int) -> float:
        """Return what the cheapest groups cost together, before scaling."""
        return float(self.costs.double().sort().values[:count].sum())

    def scaled(self, needs: Sequence[float]) -> GroupCosts:
        """Return the costs as an allocation sees them; `needs` are those of `GroupCosts`."""
        return replace(self, costs=self.costs * self.scale, needs=needs)


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


def renewed(before: GroupScores, after: GroupScores) -> GroupScores:
    """Return scores in which those of some consumers were taken anew."""
    costs = {c.consumer: c for c in (*before.costs, *after.costs)}
    events = (*before.raised_damping, *after.raised_damping)
    raised = {(event.linear, event.factor): event for event in events}
    return replace(after, costs=tuple(costs.values()), raised_damping=tuple(raised.values()))


@dataclass(frozen=True)
class GroupChoice(Ranking):
    """The part of `Groups` that decides; it never sees a weight."""

    section: CoupledSection
    budget: Budget | None  # what they save from; None until latencies are measured
    fewest: Mapping[str, int]  # kind -> groups that must be left in every block, or experts
    consumers: frozenset[str]  # roles of the last linears of the groups

    def __post_init__(self) -> None:
        """Refuse a target that cannot be reached, or that the dense model meets already.

        Raises:
            OutOfReachError: says what is possible.
        """
        if self.budget is not None:
            budget = self.budget
            self.section.check_target(budget.least(self.fewest), budget.dense, budget.unit)

    @property
    def gathers(self) -> frozenset[str]:
        """Producers need no curvature."""
        return self.consumers

    @property
    def ranks_experts(self) -> bool:
        """Whether whole experts may be removed."""
        return "experts" in self.section.groups

    @property
    def known_budget(self) -> Budget:
        """The budget."""
        assert self.budget is not None, "latencies are not measured yet"
        return self.budget

    @property
    def beside(self) -> SumsBeside:
        """What whole experts cost is summed beside A and G."""
        return ExpertSumsBeside() if self.ranks_experts else NOTHING_BESIDE

    def goal(self, shot: int) -> float:
        """Return what the model may need of the budget after a shot."""
        return self.section.goal(self.known_budget.dense, shot)

    def multiple(self, kind: str, shot: int) -> int:
        """Return what the number of groups left must be a multiple of.

        Widths are rounded in the last shot.
        """
        return self.section.multiple if kind != "attention" and shot == self.section.shots else 1

    @property
    def _per_unit(self) -> bool:
        return getattr(self.section, "rank_by", "cost_per_parameter") == "cost_per_parameter"

    def unit_of(self, kind: str) -> float:
        """Return what costs of groups of a kind are divided by to be ranked."""
        return self.known_budget.size(kind) if self._per_unit else 1.0

    def needs(self, shape: LinearShape) -> LinearNeeds | None:
        """Only consumers are ranked and updated.

        Their A is factorised, then the part of it that stays.
        """
        if shape.role not in self.consumers:
            return None
        R = shape.num_rows
        C = shape.num_columns
        reach = min(1.0, 2 * (self.section.target_sparsity or 0.5))
        # the mean of the layer and the shrunk factors, packed
        shrinking = 0 if shape.sees_all_tokens else 4 * (R**2 + C**2)
        # the first where nearly all stays
        measured = max(3.75 * C**2 + 2 * R * C, 2.2 * C**2 + 5 * R * C)
        return LinearNeeds(
            costs_bytes=shrinking + 4 * ((2.6 + reach) * C**2 + 2 * R**2 + 4.2 * R * C),
            costs_flops=5.0 * C**3 + R**3 + 4 * R**2 * C,
            update_bytes=shrinking + 4 * (measured + R**2),
            update_flops=2.0 * C**3,
        )

    def allocate(self, scores: GroupScores, shot: int) -> Allocation:
        """Return how many groups every block loses."""
        budget = self.known_budget
        costs = sorted(scores.costs, key=lambda c: c.consumer)
        present = [c for c in costs if c.num_left or c.kind != "expert_channels"]
        groups = [c.scaled(budget.by_left[c.kind]) for c in present]
        missing = budget.of((c.kind, c.num_left) for c in costs) - self.goal(shot)
        fewest = self.fewest.get("experts", 0)
        if self.section.uniform:
            return allocate_uniformly(groups, missing, fewest_experts=fewest)
        return allocate_globally(groups, missing, per_unit=self._per_unit, fewest_experts=fewest)

    def choose(self, cluster: Cluster, scores: GroupScores, shot: int) -> Choice:
        """Choose how many groups every block loses."""
        budget = self.known_budget
        allocation = self.allocate(scores, shot)
        costs = scores.costs
        counts = allocation.counts
        going = {c.consumer: counts.get(c.consumer, 0) for c in costs}
        num_kept = scores.num_kept - sum(going[c.consumer] * c.num_parameters for c in costs)
        need = budget.of((c.kind, c.num_left - going[c.consumer]) for c in costs)
        sparsity = 1 - num_kept / scores.num_parameters
        facts: dict[str, Any] = {"groups": sum(counts.values()), "sparsity": sparsity}
        facts |= {"need": need, "unit": budget.unit}
        of_budget = {"dense": budget.dense, "goal": self.goal(shot), "need": need}
        record = {"groups_removed": counts, "budget": {"unit": budget.unit} | of_budget}
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
        scores = self.method.taken(self.cluster, Reach(), self.shot)
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
                threshold = max(0.0, self.method.allocate(scores, self.shot).threshold or 0.0)
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
        return renewed(scores, self.method.taken(self.cluster, reach, self.shot))

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
        if unscaled <= costs.limit or self.has_ended(costs):
            return True
        reached = costs.costs[torch.isfinite(costs.costs)]
        return bool((reached >= unscaled * self.method.unit_of(costs.kind)).any())

    def has_ended(self, costs: ConsumerCosts) -> bool:
        """Whether a path has all groups that may go."""
        return costs.num_reached >= costs.num_left - self.method.fewest.get(costs.kind, 0)
