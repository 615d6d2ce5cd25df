"""Coupled groups on the coordinator: the target, and how many groups every block loses.

That is decided by costs as workers send them, which follow greedy paths as far as is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ray_surgeon.maths.allocate import Allocation, GroupCosts, allocate_globally, allocate_uniformly
from ray_surgeon.maths.group_batch import BATCH_BYTES, bytes_needed
from ray_surgeon.maths.threshold import OutOfReachError
from ray_surgeon.models.budgets import Budget
from ray_surgeon.models.layout import LinearShape
from ray_surgeon.plan.counts import Counted, num_steps
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

_FARTHER = 1.25
"""Times as many groups as go are on the paths that are followed."""
_HEAD = 128
"""Columns of a group of attention."""
_STEP = 25
"""Launches of a step of a batch's paths, for which the host waits once."""
_BATCH = 610
_SYNCS_OF_BATCH = 51
"""Launches and syncs of a batch beside the steps."""
_COSTS = 22
"""More launches for each consumer in it."""
_UPDATE = ((105, 22), (120, 29))
"""Launches and syncs of a consumer's update: of one in a mixture, and of all others."""

Unit = tuple[int, str]
"""The groups of one kind in one block."""
Counts = Mapping[str, int]
"""Consumer -> number of its groups."""


@dataclass(frozen=True)
class ConsumerCosts(GroupCosts):
    """Marginal costs of the groups of one consumer, as a worker sends them."""

    num_parameters: int = 0  # of one group
    # before scaling, per unit of the target if groups are ranked so; what costs more may be missing
    # in `costs`
    limit: float = math.inf
    # what costs are multiplied with to be compared with those of other consumers; see `Search`,
    # the workers know nothing of it
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


GroupScores = Scores[ConsumerCosts]
"""Costs of the consumers that a worker owns, or of all."""


class Reach(NamedTuple):
    """How far the greedy path of a consumer is followed."""

    limit: float  # largest cost, before scaling, per unit likewise
    needed: int = 0  # groups that may be needed even if they cost more


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
        if (budget := self.budget) is not None:
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
        steps = self._steps_of_path(shape)
        # the first where nearly all stays
        measured = max(3.75 * C**2 + 2 * R * C, 2.2 * C**2 + 5 * R * C)
        return LinearNeeds(
            costs_bytes=shrinking + 4 * ((2.6 + reach) * C**2 + 2 * R**2 + 4.2 * R * C),
            costs_flops=5.0 * C**3 + R**3 + 4 * R**2 * C,
            update_bytes=shrinking + 4 * (measured + R**2),
            update_flops=2.0 * C**3,
            costs_counts=Counted(_COSTS, 0, 4.0 * (2 * C**2 + 6 * R * C) * steps),
            update_counts=Counted(*_UPDATE[shape.sees_all_tokens], 4.0 * (4 * C**2 + 6 * R * C)),
            batch_counts=Counted(_BATCH + _STEP * steps, _SYNCS_OF_BATCH + steps),
            together=max(1, BATCH_BYTES // bytes_needed(R, C)),
        )

    def _steps_of_path(self, shape: LinearShape) -> int:
        """Return how many steps of a consumer's path are followed in the first shot.

        All consumers lose the same share of what the budget lets go.
        """
        budget = self.budget
        share = 0.5
        if budget is not None:
            share = (budget.dense - self.goal(1)) / (budget.dense - budget.least(self.fewest))
        farther = 1.0 if self.section.uniform else _FARTHER
        C = shape.num_columns
        num_groups = C // _HEAD if "att" in shape.role else C
        return num_steps(num_groups, min(1.0, farther * share) * num_groups)

    def allocate(self, scores: GroupScores, shot: int) -> Allocation:
        """Return how many groups every block loses."""
        budget = self.known_budget
        costs = sorted(scores.costs, key=lambda c: c.consumer)
        present = [c for c in costs if c.num_left or c.kind != "expert_channels"]
        needs = budget.by_left
        groups = [replace(c, costs=c.costs * c.scale, needs=needs[c.kind]) for c in present]
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
            wanted = self._and_one_step(scores.costs, allocation.counts)
            short = {c.consumer for c in scores.costs if self._is_short(c, threshold)}
            going_on = (c.consumer for c in scores.costs if not self._has_ended(c))
            short |= {name for name in going_on if reached[name] < wanted[name]}
            if not short:
                return scores
            needed = {name: wanted[name] for name in short}
            scores = self._followed(scores, threshold, needed)
            reached |= {name: max(reached[name], count) for name, count in needed.items()}

    def _followed(self, scores: GroupScores, limit: float, needed: Counts) -> GroupScores:
        """Return scores of which those in `needed` were taken anew, up to a scaled cost."""
        costs = {c.consumer: c for c in scores.costs}
        reach = {name: Reach(limit / costs[name].scale, count) for name, count in needed.items()}
        after = self.method.taken(self.cluster, reach, self.shot)
        costs |= {c.consumer: replace(c, scale=costs[c.consumer].scale) for c in after.costs}
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
        """Whether a path could go on and ends before a threshold of scaled costs.

        It does not if its limit is above, or if it came that far because its groups were needed.
        """
        unscaled = threshold / costs.scale
        if unscaled <= costs.limit or self._has_ended(costs):
            return False
        reached = costs.costs[torch.isfinite(costs.costs)]
        return not (reached >= unscaled * self.method.unit_of(costs.kind)).any()

    def _has_ended(self, costs: ConsumerCosts) -> bool:
        """Whether a path has all groups that may go."""
        return costs.num_reached >= costs.num_left - self.method.fewest.get(costs.kind, 0)
