"""Coupled groups: channels, KV groups and experts with everything that belongs to them.

Without them the model is really smaller.

Curvature is needed only for the consumers, the last linears of the groups. Every block follows its
greedy path, one threshold over the model (or the cheapest common widths) decides how far, and the
consumers are updated exactly. A whole expert is one more point of its path: its tokens go to the
next experts, see `ray_surgeon.maths.experts`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import torch

from ray_surgeon.curvature.collector import NOTHING_BESIDE, SumsBeside
from ray_surgeon.maths.allocate import Allocation, GroupCosts, allocate_globally, allocate_uniformly
from ray_surgeon.maths.greedy import Limits
from ray_surgeon.maths.group_batch import KeptFactors, costs_of_groups, most_at_once
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.structured import Pruned, lowest, prune_groups
from ray_surgeon.maths.threshold import OutOfReachError
from ray_surgeon.models.budgets import Budget
from ray_surgeon.models.groups import GroupSet
from ray_surgeon.models.layers import LayerKey
from ray_surgeon.models.layout import FEED_FORWARD_OF_ALL
from ray_surgeon.models.pruned_config import kv_heads_left
from ray_surgeon.pruning.experts import (
    ExpertSumsBeside,
    go_around_removed,
    remove_experts,
    whole_expert_costs,
)
from ray_surgeon.pruning.layer_removal import layers_gone
from ray_surgeon.pruning.method import Applied, Choice, Ranking, Scores
from ray_surgeon.recovery.reconstruction import Reconstruction
from ray_surgeon.run_state import CalibrationText
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.wave import Tokens
from ray_surgeon.runtime.worker import LinearSummary, Worker, collective, sizes, summaries
from ray_surgeon.spec.groups import CoupledSection

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


_FAR = 4.0
"""Times its limit that a path is followed where its groups are needed, as single costs say."""


Far = Mapping[str, Reach]  # consumer -> how far its path is followed


@dataclass(frozen=True)
class Groups(Ranking):
    """Coupled groups."""

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

    @property
    def reconstruction(self) -> Reconstruction | None:
        """The reconstruction of layers that lose groups, if there is one."""
        section = self.section.reconstruction
        kinds = FEED_FORWARD_OF_ALL & set(self.section.groups)
        if section is None or not kinds:
            return None
        curvature = self.used_curvature
        num_backward = 0 if curvature.gathers == "A" else curvature.sequences_backward
        return Reconstruction(section, kinds, num_backward)

    # On a worker

    def sets(self, worker: Worker) -> list[GroupSet]:
        """Return the groups of a worker that may be pruned.

        Experts are sets of channels, whether these may be pruned singly or not.
        """
        kinds = {"expert_channels" if kind == "experts" else kind for kind in self.section.groups}
        return [g for g in worker.group_sets if g.kind in kinds and self.is_there(g)]

    def costs(self, worker: Worker, reach: Far | None, shot: int) -> Scores[Any]:
        """Take the marginal costs of the owned consumers' groups and keep them for `prune`.

        Args:
            worker: with curvature.
            reach: consumers whose paths are followed -> how far; None for the cost of each group on
                its own, of all consumers.
            shot: its number.

        Raises:
            FloatingPointError: a factor or a cost is not usable; names the linear.
        """
        if reach is None:
            worker.state.group_costs = {}
            worker.state.factors = KeptFactors()
        scored = worker.state.group_costs
        owned = {g.consumer: g for g in self.sets(worker) if worker.owns(g.consumer)}
        names = [name for name in owned if reach is None or name in reach]
        whole = self._expert_costs(worker, shot)
        batches = _batches(worker, [owned[name] for name in names])
        starting = {batch[0].consumer: batch for batch in batches}
        by_name = dict[str, ConsumerCosts]()
        for name in worker.each([groups.consumer for groups in chain(*batches)]):
            by_name |= self._costs_of(worker, starting.get(name, ()), reach, shot)
        for name, c in by_name.items():
            by_name[name] = replace(c, whole=whole.get(name, math.inf) if c.num_left else math.inf)
        bases = (scored[name][0] for name in names if name in scored)
        raised = chain.from_iterable(basis.raised_damping for basis in bases)
        return Scores(tuple(by_name[name] for name in names), *sizes(worker), tuple(raised))

    def _costs_of(
        self, worker: Worker, batch: Sequence[GroupSet], reach: Far | None, shot: int
    ) -> dict[str, ConsumerCosts]:
        """Return consumer -> the costs of its groups, of owned ones of one shape; keep them."""
        costs = dict[str, ConsumerCosts]()
        limits = dict[str, Limits]()
        for groups in batch:
            name = groups.consumer
            left = int(worker.mask(name, StructuredMask).columns[groups.columns].all(1).sum())
            about: dict[str, Any] = {"layer": groups.block, "num_parameters": groups.num_parameters}
            nothing = torch.full((len(groups.columns),), torch.inf)
            allowed: Container[int] = frozenset((left,))
            per_unit, needed = Reach(-math.inf) if reach is None else reach[name]
            if left and worker.layout.shapes[name].role in self.consumers:  # else none goes singly
                allowed = self._allowed(worker, groups, shot)
                about["limit"] = per_unit
                limit = per_unit * self.unit_of(groups.kind)
                odd = left % self.multiple(groups.kind, shot)  # must go whatever they cost
                most = math.inf if self.section.uniform or odd else _FAR * limit
                least = self.section.fewest_groups[groups.kind]
                far = None if reach is None else limit
                limits[name] = Limits(far, max(needed, odd), most, least)
            costs[name] = ConsumerCosts(name, groups.kind, nothing, left, allowed, **about)
        if limits:
            linears = [self.linear(worker, name) for name in limits]
            marginals = costs_of_groups(
                linears,
                masks=[worker.mask(name, StructuredMask) for name in limits],
                columns=batch[0].columns,
                limits=list(limits.values()),
                factors=worker.state.factors,
            )
            for name, (basis, marginal) in zip(limits, marginals, strict=True):
                worker.state.group_costs[name] = basis, marginal.float()
                costs[name] = replace(costs[name], costs=marginal.float())
        return costs

    def _expert_costs(self, worker: Worker, shot: int) -> dict[str, float]:
        if not self.ranks_experts:
            return {}
        own_labels = getattr(self.curvature, "fisher", None) == "empirical"
        return whole_expert_costs(worker, self.section.expert_costs, shot, first_order=own_labels)

    def _allowed(self, worker: Worker, groups: GroupSet, shot: int) -> Container[int]:
        section = self.section
        if groups.kind == "attention":
            devices = section.tensor_parallel
            return frozenset(kv_heads_left(worker.layout, devices, uniform=section.uniform))
        whole = len(groups.columns)
        multiple = self.multiple(groups.kind, shot)
        if whole % multiple == 0:
            return range(0, whole + 1, multiple)  # takes no memory, of which experts are many
        return frozenset((*range(0, whole, multiple), whole))

    def try_rates(self, worker: Worker, counts: Mapping[str, int]) -> list[tuple[float, float]]:
        """Train layers shortly with several learning rates, without changing anything.

        They are a third and two thirds through those of the model that lose groups.

        Args:
            worker: after `costs`.
            counts: consumer -> number of its groups that go.

        Returns:
            A rate and the relative error held aside after it, for every rate and each of the layers
            that the worker owns.
        """
        reconstruction = self.reconstruction
        assert reconstruction is not None
        sets = [g for g in worker.layout.group_sets if g.kind in reconstruction.kinds]
        losing = [groups for groups in sets if counts.get(groups.consumer)]
        layers = {g.consumer: g for g in (losing[len(losing) * i // 3] for i in (1, 2) if losing)}
        tried = list[tuple[float, float]]()
        for name, groups in layers.items():
            if name in worker.state.group_costs:
                removal, mask = self.removal(worker, groups, counts[name])
                kept = mask.columns[groups.columns].all(dim=1)
                if kept.any():
                    tried += reconstruction.tried(worker, groups, removal.W, kept)
        return tried

    @collective
    def prune(
        self, worker: Worker, counts: Mapping[str, int], experts: Mapping[str, float], rate: float
    ) -> tuple[LinearSummary, ...]:
        """Remove the cheapest groups of every consumer, and the rows of its producers.

        Args:
            worker: after `costs`.
            counts: consumer -> number of its groups.
            experts: consumer of each expert that goes whole -> what that costs.
            rate: learning rate of reconstructions; 0 if there are none.
        """
        predicted = {name: cost for name, cost in experts.items() if name in worker.masks}
        shapes = worker.layout.shapes
        sets = {g.consumer: g for g in self.sets(worker) if g.consumer not in experts}
        sets = {name: g for name, g in sets.items() if shapes[name].role in self.consumers}
        reconstruction = self.reconstruction
        kinds = reconstruction.kinds if reconstruction is not None else ()
        changed = {name: g for name, g in sets.items() if g.kind in kinds and counts.get(name)}
        scored = worker.state.group_costs
        for name in worker.each([name for name in sets if name in scored]):
            removal, worker.masks[name] = self.removal(worker, sets[name], counts[name])
            predicted[name] = removal.predicted
            W = removal.W
            if reconstruction is not None and name in changed:
                W = reconstruction.fitted(worker, sets[name], W, rate)
            worker.shard.set_weight(name, W)
        worker.state.group_costs = {}
        worker.shard.drop_curvature()
        worker.share_linears(sets)
        if reconstruction is not None:
            reconstruction.end(worker, changed.values())
        for groups in sets.values():
            _remove_producers(worker, groups)
        remove_experts(worker, experts)
        return tuple(worker.summary(name, predicted.get(name, 0.0), 0.0) for name in worker.owned())

    def removal(self, worker: Worker, groups: GroupSet, count: int) -> Pruned:
        """Return an owned consumer without its cheapest groups; see `prune_groups`.

        Args:
            worker: after `costs`.
            groups: those of the consumer.
            count: how many of them go.
        """
        basis, costs = worker.state.group_costs[groups.consumer]
        mask = worker.mask(groups.consumer, StructuredMask)
        linear = self.linear(worker, groups.consumer)
        to_prune = torch.zeros(len(mask.columns), dtype=torch.bool)
        to_prune[groups.columns[lowest(costs, count)].flatten()] = True
        return prune_groups(basis.curvature(linear), mask, to_prune)

    # On the coordinator

    def after_resuming(self, cluster: Cluster) -> None:
        """Let passes go around what earlier shots removed: experts and blocks."""
        cluster.run_all(go_around_removed)
        cluster.run_all(layers_gone, None)

    def around_pass(self, cluster: Cluster, text: CalibrationText) -> AbstractContextManager[None]:
        """Let workers keep the inputs of the layers that are reconstructed; see `Method`."""
        reconstruction = self.reconstruction
        return reconstruction.around_pass(cluster, text) if reconstruction else nullcontext()

    def score(self, cluster: Cluster, shot: int) -> Scores[ConsumerCosts]:
        """Let every block follow its greedy path as far as the threshold needs."""
        scores = Paths(self, cluster, shot).far_enough()
        cluster.run_all(_forget_factors)
        return scores

    def apply(self, cluster: Cluster, tokens: Tokens, choice: Choice, shot: int) -> Applied:
        """Prune, update, and train layers with the learning rate that did best on some of them."""
        if not self.has_costs:
            return list(chain.from_iterable(cluster.run_all(summaries))), {}
        counts, experts = choice.removed
        section = self.section.reconstruction
        rate = 0.0 if section is None else section.learning_rate
        if rate is None:
            tried = chain.from_iterable(cluster.run_all(self.try_rates, counts))
            rate = Reconstruction.best_rate(list(tried))
        cluster.progress.begin(unit="linears")
        workers = cluster.run_all(self.prune, counts, experts, rate)
        record = {} if section is None else {"reconstruction_rate": rate}
        return list(chain.from_iterable(workers)), record


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


def _batches(worker: Worker, sets: Sequence[GroupSet]) -> list[list[GroupSet]]:
    """Return groups in batches whose costs are taken together.

    Those of one shape, as many as there is room for; on the CPU each on its own.
    """
    if worker.device.type == "cpu":
        return [[groups] for groups in sets]
    alike = defaultdict[tuple[str, int, int], list[GroupSet]](list)
    for groups in sets:
        of_consumer = worker.layout.shapes[groups.consumer]
        alike[groups.kind, of_consumer.num_rows, of_consumer.num_columns].append(groups)
    batches = []
    for (_, *shape), own in alike.items():
        size = math.ceil(len(own) / math.ceil(len(own) / max(1, most_at_once(*shape))))
        batches += [own[start : start + size] for start in range(0, len(own), size)]
    return batches


def _forget_factors(worker: Worker) -> None:
    worker.state.factors = None


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
