"""Coupled groups on the coordinator: the target, and how many groups every block loses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_surgeon.maths.allocate import Allocation, allocate_globally, allocate_uniformly
from ray_surgeon.models.budgets import Budget
from ray_surgeon.models.layout import LinearShape
from ray_surgeon.plan.work import LinearNeeds
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.stages.prune.consumer_costs import GroupScores
from ray_surgeon.stages.prune.groups_section import CoupledSection
from ray_surgeon.stages.prune.method import Choice, Method


@dataclass(frozen=True)
class GroupChoice(Method):
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
        facts: dict[str, Any] = {
            "groups": sum(counts.values()),
            "sparsity": 1 - num_kept / scores.num_parameters,
        }
        facts |= {"need": need, "unit": budget.unit}
        of_budget = {"dense": budget.dense, "goal": self.goal(shot), "need": need}
        record = {"groups_removed": counts, "budget": {"unit": budget.unit} | of_budget}
        experts = {c.consumer: c.whole for c in costs if c.consumer in allocation.experts}
        if self.ranks_experts:
            facts["experts"] = len(experts)
            record["experts_removed"] = experts
            record["expert_costs"] = {c.consumer: c.whole for c in costs if math.isfinite(c.whole)}
        return Choice(allocation.threshold, facts, counts, experts, record)
