"""Coupled groups: channels, KV groups and experts with everything that belongs to them.

Without them the model is really smaller.

Curvature is needed only for the consumers, the last linears of the groups. Every block follows its
greedy path, one threshold over the model (or the cheapest common widths) decides how far, and the
consumers are updated exactly. A whole expert is one more point of its path: its tokens go to the
next experts, see `ray_surgeon.maths.experts`.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ray_surgeon.maths.allocate import Allocation, GroupCosts, allocate_globally, allocate_uniformly
from ray_surgeon.maths.curvature import RaisedDamping
from ray_surgeon.maths.groups import alive_part, group_costs, lowest, prune_groups
from ray_surgeon.maths.kronecker import Damping
from ray_surgeon.maths.linear import Part, Removal
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.threshold import OutOfReachError
from ray_surgeon.models.budgets import Budget
from ray_surgeon.models.layout import GroupSet, LinearShape
from ray_surgeon.models.pruned_config import kv_heads_left
from ray_surgeon.plan.linear_needs import LinearNeeds
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.worker import LinearSummary, Worker, collective, sizes
from ray_surgeon.stages.calibration import CalibrationText
from ray_surgeon.stages.curvature.section import KfacSection
from ray_surgeon.stages.prune.consumer_costs import ConsumerCosts, Reach, Unit, renewed
from ray_surgeon.stages.prune.experts import go_around_removed, whole_expert_costs
from ray_surgeon.stages.prune.groups_section import CoupledSection, GroupsSection
from ray_surgeon.stages.prune.method import Applied, Choice, Method, Scores, Tokens, taken
from ray_surgeon.stages.reconstruction.layers import RATES, Arrivals, Reconstruction
from ray_surgeon.stages.reconstruction.section import RECONSTRUCTED

_FAR = 4.0
"""Times its limit that a path is followed where its groups are needed.

Single costs say how many are needed.
"""
_FAR_ENOUGH = 40.0
"""How many times as many groups as single costs say are followed before all are."""
NOTHING = -1.0
"""A limit below every cost."""


@dataclass
class Scored:
    """What `score` leaves on a worker for `apply`, by consumer.

    That is the alive part, the damping its factors needed, and marginal costs.
    """

    consumers: dict[str, tuple[Part, Damping, Tensor]]


@dataclass(frozen=True)
class Groups(Method):
    """Coupled groups."""

    section: CoupledSection
    budget: Budget | None  # what they save from; None until latencies are measured
    fewest: Mapping[str, int]  # kind -> groups that must be left in every block, or experts
    consumers: frozenset[str]  # roles of the last linears of the groups

    @property
    def gathers(self) -> frozenset[str]:
        """Producers need no curvature."""
        return self.consumers

    @property
    def ranks_experts(self) -> bool:
        """Whether whole experts may be removed."""
        return "experts" in self.section.groups

    def sets(self, worker: Worker) -> list[GroupSet]:
        """Return the groups of a worker that may be pruned.

        Experts are sets of channels, whether these may be pruned singly or not.
        """
        kinds = {"expert_channels" if kind == "experts" else kind for kind in self.section.groups}
        return [groups for groups in worker.group_sets if groups.kind in kinds]

    @property
    def reconstruction(self) -> Reconstruction | None:
        """The reconstruction of layers that lose groups, if there is one."""
        section = self.section.reconstruction
        kinds = RECONSTRUCTED & set(self.section.groups)
        return None if section is None else Reconstruction(section, kinds)

    @property
    def _per_unit(self) -> bool:
        return (
            not isinstance(self.section, GroupsSection)
            or self.section.rank_by == "cost_per_parameter"
        )

    @property
    def known_budget(self) -> Budget:
        """The budget."""
        assert self.budget is not None, "latencies are not measured yet"
        return self.budget

    def with_budget(self, budget: Budget) -> Groups:
        """Return the method with a measured budget.

        Raises:
            OutOfReachError: see `check`.
        """
        method = replace(self, budget=budget)
        method.check()
        return method

    def check(self) -> None:
        """Refuse a target that cannot be reached, or that the dense model meets already.

        Raises:
            OutOfReachError: says what is possible.
        """
        if self.budget is None:
            return
        least = self.budget.least(self.fewest)
        dense = self.budget.dense
        section = self.section
        if section.target is None:
            assert section.target_sparsity is not None
            if dense * (1 - section.target_sparsity) < least:
                nothing = (
                    f"lower pruning.width_multiple, which is {section.multiple}"
                    if section.has_widths
                    else "name other groups"
                )
                change = "lower it, or change those" if least < dense else nothing
                raise OutOfReachError(
                    f"pruning.target_sparsity: {section.target_sparsity:g}, but with these groups, "
                    f"allocation and widths at most {1 - least / dense:.4f} of the parameters of "
                    f"this model's linears can be removed; {change}"
                )
            return
        what = f"pruning.target: {self.budget.unit} {section.target.allowed:.6g}, but"
        if section.target.allowed < least:
            raise OutOfReachError(
                f"{what} with these groups, allocation and widths the model needs at least "
                f"{least:.6g}; raise it, or change those"
            )
        if section.target.allowed >= dense:
            raise OutOfReachError(
                f"{what} the dense model needs no more than {dense:.6g}; lower it"
            )

    def goal(self, shot: int) -> float:
        """Return what the model may need of the budget after a shot."""
        section = self.section
        dense = self.known_budget.dense
        last = (
            section.target_sparsity
            if section.target is None
            else 1 - section.target.allowed / dense
        )
        assert last is not None
        return dense * (1 - section.fractions(last)[shot - 1])

    def multiple(self, kind: str, shot: int) -> int:
        """Return what the number of groups left must be a multiple of.

        Widths are rounded in the last shot.
        """
        return self.section.multiple if kind != "attention" and shot == self.section.shots else 1

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
        shrinking = 0 if shape.expert is None else 4 * (R**2 + C**2)
        return LinearNeeds(
            costs_bytes=shrinking + 4 * ((2.6 + reach) * C**2 + 2 * R**2 + 4.2 * R * C),
            costs_flops=5.0 * C**3 + R**3 + 4 * R**2 * C,
            update_bytes=shrinking
            + 4
            # measured, the first where nearly all stays
            * (max(3.75 * C**2 + 2 * R * C, 2.2 * C**2 + 5 * R * C) + R**2),
            update_flops=2.0 * C**3,
        )

    # On a worker

    def costs(self, worker: Worker, reach: Reach, shot: int) -> Scores[ConsumerCosts]:
        """Take the marginal costs of the owned consumers' groups and keep them for `prune`.

        Raises:
            FloatingPointError: a factor or a cost is not usable; names the linear.
        """
        scored = Scored({}) if reach.only is None else worker.kept(Scored)
        replies = []
        raised = list[RaisedDamping]()
        sets = {groups.consumer: groups for groups in self.sets(worker)}
        whole = self._expert_costs(worker, shot)
        for name in worker.each(
            [
                name
                for name in sets
                if worker.owns(name) and (reach.only is None or name in reach.only)
            ]
        ):
            groups = sets[name]
            mask = worker.mask(name, StructuredMask)
            left = int(mask.columns[groups.columns].all(dim=1).sum())
            size = groups.num_parameters
            # experts go whole, or stay
            is_fixed = worker.layout.shapes[name].role not in self.consumers
            if left == 0 or is_fixed:
                nothing = torch.full((len(groups.columns),), torch.inf)
                expert = whole.get(name, math.inf) if left else math.inf
                replies.append(
                    ConsumerCosts(
                        name,
                        groups.kind,
                        nothing,
                        left,
                        size,
                        frozenset((left,)),
                        expert,
                        groups.block,
                    )
                )
                continue
            linear = self.linear(worker, name)
            alive = alive_part(linear, mask)
            kind = groups.kind
            curvature = linear.curvature(alive)
            scale = reach.scales.get((groups.block, kind), 1.0)
            unscaled = -math.inf if reach.limit is None else reach.limit / scale
            limit = None if reach.limit is None else unscaled * self._unit_of(kind)
            odd = left % self.multiple(kind, shot)  # must go whatever they cost
            most = math.inf if self.section.uniform or limit is None or odd else _FAR * limit
            needed = max((reach.needed or {}).get(name, 0), odd)
            costs = group_costs(
                linear,
                alive,
                curvature,
                groups.columns,
                self.section.fewest_groups[kind],
                limit,
                needed,
                most,
            ).float()
            scored.consumers[name] = alive, curvature.used_damping, costs
            raised += curvature.raised_damping
            allowed = self._allowed(worker, groups, shot)
            whole_cost = whole.get(name, math.inf)
            replies.append(
                ConsumerCosts(
                    name,
                    kind,
                    costs,
                    left,
                    size,
                    allowed,
                    whole_cost,
                    groups.block,
                    unscaled,
                    scale,
                )
            )
        worker.keep(scored)
        return Scores(tuple(replies), *sizes(worker), tuple(raised))

    def _expert_costs(self, worker: Worker, shot: int) -> dict[str, float]:
        if not self.ranks_experts:
            return {}
        has_own_labels = (
            isinstance(self.curvature, KfacSection) and self.curvature.fisher == "empirical"
        )
        return whole_expert_costs(
            worker, self.section.expert_costs, shot, first_order=has_own_labels
        )

    def _allowed(self, worker: Worker, groups: GroupSet, shot: int) -> Container[int]:
        if groups.kind == "attention":
            return frozenset(
                kv_heads_left(
                    worker.layout, self.section.tensor_parallel, uniform=self.section.uniform
                )
            )
        whole = len(groups.columns)
        # a range takes no memory, of which experts are many
        multiple = self.multiple(groups.kind, shot)
        return (
            range(0, whole + 1, multiple)
            if whole % multiple == 0
            else frozenset((*range(0, whole, multiple), whole))
        )

    def try_rates(self, worker: Worker, counts: Mapping[str, int]) -> list[tuple[float, float]]:
        """Train layers shortly with several learning rates, without changing anything.

        Args:
            worker: after `costs`.
            counts: consumer of each of the layers -> number of its groups that go.

        Returns:
            A rate and the relative error held aside after it, for every rate and every layer that
            the worker owns.
        """
        reconstruction = self.reconstruction
        scored = worker.kept(Scored)
        assert reconstruction is not None
        tried = []
        for groups in (
            groups
            for groups in self.sets(worker)
            if groups.consumer in scored.consumers and groups.consumer in counts
        ):
            removal, mask = self.removal(worker, scored, groups, counts[groups.consumer])
            kept = mask.columns[groups.columns].all(dim=1)
            tried += [
                (rate, reconstruction.tried(worker, groups, removal.W, kept, rate))
                for rate in RATES
                if kept.any()
            ]
        return tried

    @collective
    def prune(
        self,
        worker: Worker,
        counts: Mapping[str, int],
        experts: Mapping[str, float],
        rate: float | None,
    ) -> tuple[LinearSummary, ...]:
        """Remove the cheapest groups of every consumer and the rows of its producers.

        Args:
            worker: after `costs`.
            counts: consumer -> number of its groups.
            experts: consumer of each expert that goes whole -> what that costs.
            rate: learning rate of reconstructions; None if there are none.
        """
        scored = worker.drop(Scored)
        predicted = {name: cost for name, cost in experts.items() if name in worker.masks}
        shapes = worker.layout.shapes
        reconstruction = self.reconstruction
        sets = [
            g
            for g in self.sets(worker)
            if g.consumer not in experts and shapes[g.consumer].role in self.consumers
        ]
        owned = {groups.consumer: groups for groups in sets if groups.consumer in scored.consumers}
        for name in worker.each(list(owned)):
            groups = owned[name]
            removal, worker.masks[name] = self.removal(worker, scored, groups, counts[name])
            W = removal.W
            predicted[name] = removal.predicted
            if (
                reconstruction is not None
                and rate is not None
                and groups.kind in reconstruction.kinds
                and counts[name]
            ):
                W = reconstruction.fitted(worker, groups, W, rate)
            worker.shard.set_weight(name, W)
        worker.shard.drop_curvature()
        worker.share_linears(groups.consumer for groups in sets)
        if reconstruction is not None:
            reconstruction.end(
                worker,
                [
                    groups
                    for groups in sets
                    if groups.kind in reconstruction.kinds and counts.get(groups.consumer)
                ],
            )
        for groups in sets:
            _remove_producers(worker, groups)
        for of_block in worker.expert_sets if experts else ():
            worker.remove_experts(
                of_block, torch.tensor([linears[-1] in experts for linears in of_block.linears])
            )
        return tuple(worker.summary(name, predicted.get(name, 0.0), 0.0) for name in worker.owned())

    def removal(
        self, worker: Worker, scored: Scored, groups: GroupSet, count: int
    ) -> tuple[Removal, StructuredMask]:
        """Return an owned consumer without its cheapest groups; see `prune_groups`.

        Args:
            worker: after `costs`.
            scored: what these left there.
            groups: those of the consumer.
            count: how many of them go.
        """
        alive, damping, costs = scored.consumers[groups.consumer]
        mask = worker.mask(groups.consumer, StructuredMask)
        linear = self.linear(worker, groups.consumer)
        to_prune = torch.zeros(len(mask.columns), dtype=torch.bool)
        to_prune[groups.columns[lowest(costs, count)].flatten()] = True
        return prune_groups(linear, mask, alive, linear.curvature(alive, damping), to_prune)

    # On the coordinator

    def after_resuming(self, cluster: Cluster) -> None:
        """Let routers go around the experts that earlier shots removed."""
        cluster.run_all(go_around_removed)

    def before_pass(self, cluster: Cluster, text: CalibrationText) -> None:
        """Let workers keep the inputs of the layers that are reconstructed; see `Method`."""
        if self.reconstruction is not None:
            cluster.run_all(self.reconstruction.start, self._arrivals(cluster, text))

    def after_pass(self, cluster: Cluster, text: CalibrationText) -> None:
        """Send the inputs to the layers' owners; see `Method`."""
        if self.reconstruction is not None:
            arrivals = self._arrivals(cluster, text)
            cluster.run_all(self.reconstruction.share, arrivals, are_held=False)
            self.reconstruction.keep_held(cluster, text.held)

    def _arrivals(self, cluster: Cluster, text: CalibrationText) -> Arrivals:
        return Arrivals.in_pass(self.used_curvature, text.tokens, cluster.placement.num_replicas)

    def score(self, cluster: Cluster, shot: int) -> Scores[ConsumerCosts]:
        """Let every block follow its greedy path somewhat farther than single costs say.

        If that was not far enough, it goes on.
        """
        once = taken(cluster, self.costs, Reach(), shot)
        first = self.allocate(once, shot)
        factor = 1.25
        limit = NOTHING if self.section.uniform else factor * max(0.0, first.threshold or 0.0)
        scores = once
        only = None
        while True:
            wanted = {
                name: math.ceil(factor * count)
                for name, count in first.counts.items()
                if name not in first.experts
            }
            scores = self._followed(
                cluster, scores, Reach(limit, self._and_one_step(scores, wanted, shot), only), shot
            )
            try:
                allocation = self.allocate(scores, shot)
            except OutOfReachError:
                if math.isinf(limit):  # all paths were followed to their ends
                    raise
                factor = 2 * factor
                only = None
                limit = 4 * limit if factor < _FAR_ENOUGH else math.inf
                continue
            threshold = max(0.0, allocation.threshold or 0.0)  # below 0 only experts go
            only = self._short(scores, threshold)
            if self.section.uniform or not only:
                return scores
            limit = threshold  # with all paths up to there the threshold is this one or lower

    def rescaled(
        self,
        cluster: Cluster,
        scores: Scores[ConsumerCosts],
        scales: Mapping[Unit, float],
        shot: int,
    ) -> Scores[ConsumerCosts]:
        """Return scores with other scales.

        Paths that go farther now are followed anew, with the weights that workers have.
        """
        scores = replace(
            scores, costs=tuple(replace(c, scale=scales.get(c.unit, 1.0)) for c in scores.costs)
        )
        reached = {c.consumer: c.num_reached for c in scores.costs}
        while True:
            allocation = self.allocate(scores, shot)
            threshold = max(0.0, allocation.threshold or 0.0)
            needed = self._and_one_step(scores, allocation.counts, shot)
            cut = {
                c.consumer
                for c in scores.costs
                if reached[c.consumer] < needed[c.consumer] and not self._has_ended(c)
            }
            only = self._short(scores, threshold) | cut
            if not only:
                return scores
            scores = self._followed(cluster, scores, Reach(threshold, needed, only, scales), shot)
            reached |= {name: max(reached[name], needed[name]) for name in only}

    def _followed(
        self, cluster: Cluster, scores: Scores[ConsumerCosts], reach: Reach, shot: int
    ) -> Scores[ConsumerCosts]:
        return renewed(scores, taken(cluster, self.costs, reach, shot))

    def _and_one_step(
        self, scores: Scores[ConsumerCosts], counts: Mapping[str, int], shot: int
    ) -> dict[str, int]:
        """Return numbers of groups and one step more.

        The step may be worth its mean cost though its last group alone is not.
        """
        return {
            c.consumer: counts.get(c.consumer, 0) + self.multiple(c.kind, shot)
            for c in scores.costs
        }

    def _unit_of(self, kind: str) -> float:
        """Return what costs of groups of a kind are divided by to be ranked."""
        return self.known_budget.size(kind) if self._per_unit else 1.0

    def _short(self, scores: Scores[ConsumerCosts], threshold: float) -> frozenset[str]:
        return frozenset(
            c.consumer for c in scores.costs if not self._is_followed(c, threshold / c.scale)
        )

    def _is_followed(self, costs: ConsumerCosts, threshold: float) -> bool:
        """Whether a path goes on to the threshold.

        It does if its limit is above, if it came that far because its groups were needed, or if it
        ended.
        """
        reached = costs.costs[torch.isfinite(costs.costs)]
        return (
            threshold <= costs.limit
            or self._has_ended(costs)
            or bool((reached >= threshold * self._unit_of(costs.kind)).any())
        )

    def _has_ended(self, costs: ConsumerCosts) -> bool:
        return costs.num_left == 0 or costs.num_reached >= costs.num_left - self.fewest.get(
            costs.kind, 0
        )

    def allocate(self, scores: Scores[ConsumerCosts], shot: int) -> Allocation:
        """Return how many groups every block loses."""
        budget = self.known_budget
        costs = sorted(scores.costs, key=lambda c: c.consumer)
        groups = [
            GroupCosts(
                c.consumer,
                c.kind,
                c.costs * c.scale,
                c.num_left,
                c.allowed,
                budget.by_left[c.kind],
                c.whole,
                c.block,
            )
            for c in costs
            if c.num_left or c.kind != "expert_channels"
        ]
        missing = budget.of((c.kind, c.num_left) for c in costs) - self.goal(shot)
        fewest = self.fewest.get("experts", 0)
        if self.section.uniform:
            return allocate_uniformly(groups, missing, fewest_experts=fewest)
        return allocate_globally(groups, missing, per_unit=self._per_unit, fewest_experts=fewest)

    def choose(self, cluster: Cluster, scores: Scores[ConsumerCosts], shot: int) -> Choice:
        """Choose how many groups every block loses."""
        budget = self.known_budget
        allocation = self.allocate(scores, shot)
        costs = scores.costs
        num_kept = scores.num_kept - sum(
            allocation.counts.get(c.consumer, 0) * c.num_parameters for c in costs
        )
        need = budget.of((c.kind, c.num_left - allocation.counts.get(c.consumer, 0)) for c in costs)
        facts: dict[str, Any] = {
            "groups": sum(allocation.counts.values()),
            "sparsity": 1 - num_kept / scores.num_parameters,
            "need": need,
            "unit": budget.unit,
        }
        record = {
            "groups_removed": allocation.counts,
            "budget": {
                "unit": budget.unit,
                "dense": budget.dense,
                "goal": self.goal(shot),
                "need": need,
            },
        }
        experts = {c.consumer: c.whole for c in costs if c.consumer in allocation.experts}
        if self.ranks_experts:
            facts["experts"] = len(experts)
            record["experts_removed"] = experts
            record["expert_costs"] = {c.consumer: c.whole for c in costs if math.isfinite(c.whole)}
        return Choice(
            allocation.threshold,
            facts,
            allocation.counts,
            experts,
            self._trial(scores, allocation),
            record,
        )

    def _trial(self, scores: Scores[ConsumerCosts], allocation: Allocation) -> dict[str, int]:
        """Return the layers on which learning rates are tried, with the groups they lose.

        They are a third and two thirds through the model.
        """
        if self.reconstruction is None:
            return {}
        kinds = self.reconstruction.kinds
        going = allocation.counts
        trained = sorted(
            (c.block, c.consumer) for c in scores.costs if c.kind in kinds and going.get(c.consumer)
        )
        names = (
            {trained[len(trained) * third // 3][1] for third in (1, 2)} if trained else set[str]()
        )
        return {name: going[name] for name in sorted(names)}

    def apply(self, cluster: Cluster, tokens: Tokens, choice: Choice, shot: int) -> Applied:
        """Prune, update, and train layers with the learning rate that did best on some of them."""
        rate = self._learning_rate(cluster, choice)
        cluster.progress.begin(unit="linears")
        workers = cluster.run_all(self.prune, choice.counts, choice.experts, rate)
        return list(chain.from_iterable(workers)), {}

    def _learning_rate(self, cluster: Cluster, choice: Choice) -> float | None:
        """Return the learning rate of reconstructions: the given one, or the best on two layers."""
        if self.reconstruction is None or self.reconstruction.section.learning_rate is not None:
            return (
                None if self.reconstruction is None else self.reconstruction.section.learning_rate
            )
        if not choice.trial:
            return RATES[0]
        errors: dict[float, list[float]] = {rate: [] for rate in RATES}
        for of_worker in cluster.run_all(self.try_rates, choice.trial):
            for rate, error in of_worker:
                errors[rate].append(error)
        return Reconstruction.best_rate(errors)


def _remove_producers(worker: Worker, groups: GroupSet) -> None:
    pruned = ~worker.mask(groups.consumer, StructuredMask).columns[groups.columns].all(dim=1)
    for name, rows in groups.producers:
        mask = worker.mask(name, StructuredMask)
        removed = torch.zeros_like(mask.rows)
        removed[rows[pruned].flatten()] = True
        worker.masks[name] = mask.without(removed, torch.zeros_like(mask.columns))
        W = worker.shard.weight(name)
        W[removed.to(W.device)] = 0
        worker.shard.set_weight(name, W)
