"""Coupled groups: channels, KV groups and experts, removed together with all weights they use.

Their removal makes the model itself smaller.

Curvature is needed only for the consumers, the last linears of the groups. Every block follows its
greedy path; one threshold over the model (or the cheapest common widths) decides how far each path
is taken, and the consumers are updated exactly. A whole expert is one more point of its path: its
tokens go to the next experts, see `ray_surgeon.maths.experts`.
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

from ray_surgeon.config.groups import CoupledSection
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.microbatch import Tokens
from ray_surgeon.distributed.worker import (
    LinearSummary,
    Worker,
    collective,
    sizes,
    summaries,
)
from ray_surgeon.factors.collector import NOTHING_BESIDE, SumsBeside
from ray_surgeon.maths.allocate import (
    Allocation,
    GroupCosts,
    allocate_globally,
    allocate_uniformly,
    loss_curve_globally,
    loss_curve_uniformly,
)
from ray_surgeon.maths.greedy import Limits
from ray_surgeon.maths.group_batch import KeptFactors, costs_of_groups, most_at_once
from ray_surgeon.maths.kronecker import RaisedDamping
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.structured import RemovalAndMask, lowest, prune_groups
from ray_surgeon.maths.threshold import OutOfReachError
from ray_surgeon.models.budgets import Budget
from ray_surgeon.models.layers import LayerKey
from ray_surgeon.models.layout import FEED_FORWARD_OF_ALL, GroupSet
from ray_surgeon.models.pruned_config import kv_heads_left
from ray_surgeon.pruning.method import Applied, Choice, Ranking, Scores
from ray_surgeon.recovery.reconstruction import Reconstruction
from ray_surgeon.run_state import CalibrationText

_PATH_MARGIN = 1.25
"""Initial length of paths relative to the numbers of groups predicted by single costs.

Single costs are estimates, so paths are followed somewhat farther.
"""
_LARGEST_MARGIN = 40.0
"""Margin at which all paths are followed to their ends.

The margin doubles whenever paths are too short; at this size, single costs are no guide.
"""
_MOST_TIMES_LIMIT = 4.0
"""Largest cost, relative to the limit, of groups on a path that may be needed.

The number of these groups comes from single costs, so their costs may be far above the limit.
"""

_CURVE_POINTS = 40
"""Maximum number of points of the predicted loss increase in the report."""

Counts = Mapping[str, int]
"""Consumer -> number of its groups."""


@dataclass(frozen=True)
class ConsumerCosts(GroupCosts):
    """Marginal costs of the groups of one consumer, as a worker sends them."""

    num_parameters: int = 0  # parameters of one group
    # cost per unit of the target up to which the path was followed; `costs` may lack groups above
    limit: float = math.inf

    @property
    def num_reached(self) -> int:
        """Number of groups on the path."""
        return int(torch.isfinite(self.costs).sum())


GroupScores = Scores[ConsumerCosts]
"""Costs of the consumers that a worker owns, or of all consumers."""


class Reach(NamedTuple):
    """How far the greedy path of a consumer is followed."""

    limit: float  # largest cost per unit of the target
    needed: int = 0  # number of groups that may be needed even if they cost more


Reaches = Mapping[str, Reach]
"""Consumer -> how far its path is followed."""


@dataclass(frozen=True)
class Groups(Ranking):
    """The LLM Surgeon on coupled groups."""

    section: CoupledSection
    budget: Budget  # need of the model, which removed groups reduce
    # kind -> smallest number of groups (or experts) left in each block
    fewest: Mapping[str, int]
    consumers: frozenset[str]  # roles of the last linears of the groups
    removed: frozenset[LayerKey] = frozenset()  # layers that are removed whole

    def __post_init__(self) -> None:
        """Refuse a target that cannot be reached, or that the dense model already meets.

        Raises:
            OutOfReachError: the target is out of reach; the message says what is possible.
        """
        budget = self.budget
        depth = self.section.depth
        num_removed = depth.num_removed if depth is not None else None
        most = budget.most_saved(self.section.layer_kinds, num_removed)
        least = max(0.0, budget.least(self.fewest) - most)
        self.section.check_target(least, budget.dense, budget.unit)

    @property
    def gathers(self) -> frozenset[str]:
        """Roles of the consumers; producers need no curvature."""
        return self.consumers

    @property
    def has_costs(self) -> bool:
        """Whether anything narrower than a layer may be removed."""
        return bool(self.section.narrow_kinds)

    @property
    def ranks_experts(self) -> bool:
        """Whether whole experts may be removed."""
        return "experts" in self.section.groups

    @property
    def beside(self) -> SumsBeside:
        """Sums beside A and G, for the costs of whole experts."""
        if not self.ranks_experts:
            return NOTHING_BESIDE
        from ray_surgeon.pruning.experts import ExpertSumsBeside

        return ExpertSumsBeside()

    def goal(self, shot: int) -> float:
        """Return the largest need that the model may have after a shot."""
        return self.section.goal(self.budget.dense, shot)

    def need(self, left: Iterable[tuple[str, int]]) -> float:
        """Return the need of the model without the removed layers; see `Budget.of`.

        Args:
            left: (kind, number of groups left) of each consumer outside the removed layers.
        """
        budget = self.budget
        return budget.of(left) - budget.saved_without(self.removed)

    def is_there(self, groups: GroupSet) -> bool:
        """Whether the layer of the groups is still in the model."""
        part = "attention_layers" if groups.kind == "attention" else "ffn_layers"
        return self.removed.isdisjoint({("blocks", groups.block), (part, groups.block)})

    def multiple(self, kind: str, shot: int) -> int:
        """Return the divisor of the number of groups left.

        Widths are rounded in the shots that reach a size of the model.
        """
        if kind == "attention" or shot not in self.section.size_shots:
            return 1
        return self.section.multiple

    def unit_of(self, kind: str) -> float:
        """Return the divisor that makes costs of groups of different kinds comparable."""
        return self.budget.size(kind)

    def allocate(self, scores: GroupScores, shot: int) -> Allocation:
        """Return how many groups every block loses."""
        groups = self._ranked(scores)
        costs = sorted(scores.costs, key=lambda c: c.consumer)
        missing = self.need((c.kind, c.num_left) for c in costs) - self.goal(shot)
        fewest_experts = self.fewest.get("experts", 0)
        if self.section.uniform:
            return allocate_uniformly(groups, missing, fewest_experts=fewest_experts)
        return allocate_globally(
            groups,
            missing,
            per_unit=True,
            fewest_experts=fewest_experts,
        )

    def _ranked(self, scores: GroupScores) -> list[ConsumerCosts]:
        """Return the costs of all consumers that have groups left, with their needs."""
        groups = list[ConsumerCosts]()
        for c in sorted(scores.costs, key=lambda c: c.consumer):
            if c.num_left or c.kind != "expert_channels":
                groups.append(replace(c, needs=self.budget.by_left[c.kind]))
        return groups

    def loss_curve(self, scores: GroupScores) -> list[tuple[float, float]]:
        """Return the predicted loss increase of other sparsities than that of the shot.

        Args:
            scores: costs of all consumers.

        Returns:
            (sparsity after the shot, predicted loss increase in the shot in nats per token), as far
            as the paths were followed.
        """
        groups = self._ranked(scores)
        num_parameters = [c.num_parameters for c in groups]
        fewest_experts = self.fewest.get("experts", 0)
        if self.section.uniform:
            points = loss_curve_uniformly(
                groups,
                num_parameters,
                most_points=_CURVE_POINTS,
                fewest_experts=fewest_experts,
            )
        else:
            points = loss_curve_globally(
                groups,
                num_parameters,
                per_unit=True,
                most_points=_CURVE_POINTS,
                fewest_experts=fewest_experts,
            )
        curve = list[tuple[float, float]]()
        for removed, cost in points:
            curve.append((1 - (scores.num_kept - removed) / scores.num_parameters, cost))
        return curve

    def choose(self, cluster: Cluster, scores: GroupScores, shot: int) -> Choice:
        """Choose how many groups every block loses."""
        allocation = self.allocate(scores, shot)
        counts = allocation.counts
        num_kept = scores.num_kept
        left = list[tuple[str, int]]()
        for c in scores.costs:
            num_removed = counts.get(c.consumer, 0)
            num_kept -= num_removed * c.num_parameters
            left.append((c.kind, c.num_left - num_removed))
        need = self.need(left)
        facts: dict[str, Any] = {
            "groups": sum(counts.values()),
            "sparsity": 1 - num_kept / scores.num_parameters,
            "need": need,
            "unit": self.budget.unit,
        }
        record: dict[str, Any] = {
            "groups_removed": counts,
            "budget": {
                "need": need,
                "unit": self.budget.unit,
                "dense": self.budget.dense,
                "goal": self.goal(shot),
            },
        }
        if self.used_curvature.is_of_loss:
            record["loss_curve"] = self.loss_curve(scores)
        experts = dict[str, float]()
        expert_costs = dict[str, float]()
        for c in scores.costs:
            if c.consumer in allocation.experts:
                experts[c.consumer] = c.whole
            if math.isfinite(c.whole):
                expert_costs[c.consumer] = c.whole
        if self.ranks_experts:
            facts["experts"] = len(experts)
            record["experts_removed"] = experts
            record["expert_costs"] = expert_costs
        return Choice(
            threshold=allocation.threshold,
            facts=facts,
            removed=(counts, experts),
            record=record,
        )

    @property
    def reconstruction(self) -> Reconstruction | None:
        """The reconstruction of layers that lose groups, if there is one."""
        section = self.section.reconstruction
        kinds = FEED_FORWARD_OF_ALL & set(self.section.groups)
        if section is None or not kinds:
            return None
        curvature = self.used_curvature
        num_backward = curvature.sequences_backward
        if curvature.gathers == "A":
            num_backward = 0
        return Reconstruction(section, kinds, num_backward)

    # On a worker

    def sets(self, worker: Worker) -> list[GroupSet]:
        """Return the groups of a worker that may be pruned.

        Experts are sets of channels, whether or not their channels may be pruned singly.
        """
        kinds = set(self.section.groups)
        if "experts" in kinds:
            kinds.remove("experts")
            kinds.add("expert_channels")
        return [g for g in worker.group_sets if g.kind in kinds and self.is_there(g)]

    def costs(self, worker: Worker, reach: Reaches | None, shot: int) -> Scores[Any]:
        """Compute the marginal costs of the owned consumers' groups and keep them for `prune`.

        Args:
            worker: worker with curvature.
            reach: consumers whose paths are followed -> how far; None for the cost of each group on
                its own, of all consumers.
            shot: number of the shot.

        Raises:
            FloatingPointError: a factor or a cost is not usable; names the linear.
        """
        if reach is None:
            worker.state.group_costs = {}
            worker.state.factors = KeptFactors()
        scored = worker.state.group_costs
        owned = list[GroupSet]()
        for groups in self.sets(worker):
            is_wanted = reach is None or groups.consumer in reach
            if is_wanted and worker.owns(groups.consumer):
                owned.append(groups)
        names = [groups.consumer for groups in owned]
        whole = self._expert_costs(worker, shot)
        by_name = self._costs_of_batches(worker, _batches(worker, owned), reach, shot)
        costs = list[ConsumerCosts]()
        raised = list[RaisedDamping]()
        for name in names:
            c = by_name[name]
            cost_of_expert = math.inf
            if c.num_left:
                cost_of_expert = whole.get(name, math.inf)
            costs.append(replace(c, whole=cost_of_expert))
            if name in scored:
                basis, _ = scored[name]
                raised.extend(basis.raised_damping)
        num_parameters, num_kept = sizes(worker)
        return Scores(
            costs=tuple(costs),
            num_parameters=num_parameters,
            num_kept=num_kept,
            raised_damping=tuple(raised),
        )

    def _costs_of_batches(
        self,
        worker: Worker,
        batches: Sequence[Sequence[GroupSet]],
        reach: Reaches | None,
        shot: int,
    ) -> dict[str, ConsumerCosts]:
        consumers = [groups.consumer for groups in chain.from_iterable(batches)]
        # a batch is computed when the progress reaches its first consumer
        by_first = {batch[0].consumer: batch for batch in batches}
        costs = dict[str, ConsumerCosts]()
        for name in worker.each(consumers):
            if name in by_first:
                costs.update(self._costs_of_batch(worker, by_first[name], reach, shot))
        return costs

    def _costs_of_batch(
        self, worker: Worker, batch: Sequence[GroupSet], reach: Reaches | None, shot: int
    ) -> dict[str, ConsumerCosts]:
        """Return owned consumer -> the costs of its groups, and keep them; see `costs`.

        The consumers of a batch have one shape.
        """
        costs = dict[str, ConsumerCosts]()
        limits = dict[str, Limits]()
        for groups in batch:
            name = groups.consumer
            is_left = worker.mask(name, StructuredMask).columns[groups.columns].all(1)
            num_left = int(is_left.sum())
            costs[name] = ConsumerCosts(
                consumer=name,
                kind=groups.kind,
                costs=torch.full((len(groups.columns),), torch.inf),
                num_left=num_left,
                allowed=frozenset((num_left,)),
                num_parameters=groups.num_parameters,
                layer=groups.block,
            )
            if not num_left or worker.layout.shapes[name].role not in self.consumers:
                continue  # none of its groups may be removed singly
            path = None if reach is None else reach[name]
            limits[name] = self._path_limits(groups, num_left, path, shot)
            costs[name] = replace(
                costs[name],
                allowed=self._allowed(worker, groups, shot),
                limit=-math.inf if path is None else path.limit,
            )
        if not limits:
            return costs
        marginals = costs_of_groups(
            [self.linear(worker, name) for name in limits],
            masks=[worker.mask(name, StructuredMask) for name in limits],
            columns=batch[0].columns,
            limits=list(limits.values()),
            factors=worker.state.factors,
        )
        for name, (basis, marginal) in zip(limits, marginals, strict=True):
            worker.state.group_costs[name] = basis, marginal.float()
            costs[name] = replace(costs[name], costs=marginal.float())
        return costs

    def _path_limits(
        self, groups: GroupSet, num_left: int, path: Reach | None, shot: int
    ) -> Limits:
        # these are removed at any cost, so that a multiple is left
        num_odd = num_left % self.multiple(groups.kind, shot)
        least = self.section.fewest_groups[groups.kind]
        if path is None:
            return Limits(limit=None, needed=num_odd, least=least)
        limit = path.limit * self.unit_of(groups.kind)
        most = _MOST_TIMES_LIMIT * limit
        if self.section.uniform or num_odd:
            most = math.inf
        needed = max(path.needed, num_odd)
        return Limits(limit=limit, needed=needed, most=most, least=least)

    def _expert_costs(self, worker: Worker, shot: int) -> dict[str, float]:
        if not self.ranks_experts:
            return {}
        from ray_surgeon.pruning.experts import whole_expert_costs

        return whole_expert_costs(
            worker,
            kind=self.section.expert_costs,
            shot=shot,
            first_order=getattr(self.curvature, "fisher", None) == "empirical",
        )

    def _allowed(self, worker: Worker, groups: GroupSet, shot: int) -> Container[int]:
        section = self.section
        if groups.kind == "attention":
            devices = section.tensor_parallel
            numbers = kv_heads_left(worker.layout, devices, uniform=section.uniform)
            return frozenset(numbers)
        num_groups = len(groups.columns)
        multiple = self.multiple(groups.kind, shot)
        if num_groups % multiple == 0:
            return range(0, num_groups + 1, multiple)  # needs no memory; experts are many
        return frozenset((*range(0, num_groups, multiple), num_groups))

    def try_rates(self, worker: Worker, counts: Counts) -> list[tuple[float, float]]:
        """Train layers briefly with several learning rates, without changing the weights.

        These are the layers at one third and two thirds of those that lose groups.

        Args:
            worker: worker after `costs`.
            counts: consumer -> number of its groups to remove.

        Returns:
            A rate and the relative error held aside after it, for every rate and each of the layers
            that the worker owns.
        """
        reconstruction = self.reconstruction
        assert reconstruction is not None
        losing = list[GroupSet]()
        for groups in worker.layout.group_sets:
            if groups.kind in reconstruction.kinds and counts.get(groups.consumer):
                losing.append(groups)
        if not losing:
            return []
        layers = dict[str, GroupSet]()
        for third in (1, 2):
            groups = losing[len(losing) * third // 3]
            layers[groups.consumer] = groups
        tried = list[tuple[float, float]]()
        for name, groups in layers.items():
            if name not in worker.state.group_costs:
                continue
            removal, mask = self.removal(worker, groups, counts[name])
            kept = mask.columns[groups.columns].all(dim=1)
            if kept.any():
                tried += reconstruction.tried(worker, groups, removal.W, kept)
        return tried

    @collective
    def prune(
        self,
        worker: Worker,
        counts: Counts,
        experts: Mapping[str, float],
        rate: float,
    ) -> tuple[LinearSummary, ...]:
        """Remove the cheapest groups of every consumer, and the rows of its producers.

        Args:
            worker: worker after `costs`.
            counts: consumer -> number of its groups to remove.
            experts: consumer of each expert that is removed whole -> cost of its removal.
            rate: learning rate of reconstructions; 0 if there are none.
        """
        sets = self._sets_to_prune(worker, experts)
        reconstruction = self.reconstruction
        reconstructed = dict[str, GroupSet]()
        if reconstruction is not None:
            for name, groups in sets.items():
                if groups.kind in reconstruction.kinds and counts.get(name):
                    reconstructed[name] = groups
        predicted = {name: cost for name, cost in experts.items() if name in worker.masks}
        scored = worker.state.group_costs
        for name in worker.each([name for name in sets if name in scored]):
            removal, worker.masks[name] = self.removal(worker, sets[name], counts[name])
            predicted[name] = removal.predicted
            W = removal.W
            if reconstruction is not None and name in reconstructed:
                W = reconstruction.fitted(worker, sets[name], W, rate)
            worker.shard.set_weight(name, W)
        worker.state.group_costs = {}
        worker.shard.drop_curvature()
        worker.share_linears(sets)
        if reconstruction is not None:
            reconstruction.end(worker, reconstructed.values())
        for groups in sets.values():
            _remove_producers(worker, groups)
        if self.ranks_experts:
            from ray_surgeon.pruning.experts import remove_experts

            remove_experts(worker, experts)
        results = list[LinearSummary]()
        for name in worker.owned():
            results.append(worker.summary(name, predicted.get(name, 0.0), residual=0.0))
        return tuple(results)

    def _sets_to_prune(
        self,
        worker: Worker,
        experts: Container[str],
    ) -> dict[str, GroupSet]:
        sets = dict[str, GroupSet]()
        for groups in self.sets(worker):
            role = worker.layout.shapes[groups.consumer].role
            if groups.consumer not in experts and role in self.consumers:
                sets[groups.consumer] = groups
        return sets

    def removal(self, worker: Worker, groups: GroupSet, count: int) -> RemovalAndMask:
        """Return an owned consumer without its cheapest groups; see `prune_groups`.

        Args:
            worker: worker after `costs`.
            groups: the groups of the consumer.
            count: number of groups to remove.
        """
        basis, costs = worker.state.group_costs[groups.consumer]
        mask = worker.mask(groups.consumer, StructuredMask)
        linear = self.linear(worker, groups.consumer)
        to_prune = torch.zeros(len(mask.columns), dtype=torch.bool)
        to_prune[groups.columns[lowest(costs, count)].flatten()] = True
        return prune_groups(basis.curvature(linear), mask, to_prune)

    # On the coordinator

    def after_resuming(self, cluster: Cluster) -> None:
        """Let passes skip the experts and blocks that earlier shots removed."""
        if self.ranks_experts:
            from ray_surgeon.pruning.experts import go_around_removed

            cluster.run_all(go_around_removed)
        if self.section.layer_kinds:
            from ray_surgeon.pruning.layer_removal import layers_gone

            cluster.run_all(layers_gone, None)

    def around_pass(
        self,
        cluster: Cluster,
        text: CalibrationText,
    ) -> AbstractContextManager[None]:
        """Let workers keep the inputs of the layers that are reconstructed; see `Method`."""
        reconstruction = self.reconstruction
        if reconstruction is None:
            return nullcontext()
        return reconstruction.around_pass(cluster, text)

    def score(self, cluster: Cluster, shot: int) -> Scores[ConsumerCosts]:
        """Let every block follow its greedy path as far as the threshold needs."""
        scores = Paths(self, cluster, shot).far_enough()
        cluster.run_all(_forget_factors)
        return scores

    def apply(
        self,
        cluster: Cluster,
        tokens: Tokens,
        choice: Choice,
        shot: int,
    ) -> Applied:
        """Prune, update, and train layers with the learning rate that was best on some of them."""
        if not self.has_costs:
            dense = cluster.run_all(summaries)
            return list(chain.from_iterable(dense)), {}
        counts, experts = choice.removed
        section = self.section.reconstruction
        rate = 0.0 if section is None else section.learning_rate
        if rate is None:
            tried = chain.from_iterable(cluster.run_all(self.try_rates, counts))
            rate = Reconstruction.best_rate(list(tried))
        record = {} if section is None else {"reconstruction_rate": rate}
        cluster.progress.begin(unit="linears")
        pruned = cluster.run_all(self.prune, counts, experts, rate)
        return list(chain.from_iterable(pruned)), record


@dataclass(frozen=True)
class Paths:
    """The greedy paths of all blocks in one shot."""

    method: Groups
    cluster: Cluster
    shot: int

    def far_enough(self) -> GroupScores:
        """Let every block follow its path somewhat farther than single costs predict.

        Paths that turn out too short are followed farther.
        """
        scores = self.method.taken(self.cluster, None, self.shot)
        first = self.method.allocate(scores, self.shot)
        is_uniform = self.method.section.uniform
        counts = dict(first.counts)
        for name in first.experts:
            counts.pop(name, None)
        margin = _PATH_MARGIN
        limit = margin * max(0.0, first.threshold or 0.0)
        if is_uniform:
            limit = -1.0  # below every cost: uniform widths have no threshold
        following: Sequence[ConsumerCosts] = scores.costs
        while True:
            wanted = {name: math.ceil(margin * count) for name, count in counts.items()}
            scores = self._followed(scores, limit, self._and_one_step(following, wanted))
            try:
                allocation = self.method.allocate(scores, self.shot)
            except OutOfReachError:
                if math.isinf(limit):  # all paths were followed to their ends
                    raise
                margin = 2 * margin
                following = scores.costs
                limit = 4 * limit
                if margin >= _LARGEST_MARGIN:
                    limit = math.inf
                continue
            threshold = max(0.0, allocation.threshold or 0.0)
            following = [c for c in scores.costs if self._is_short(c, threshold)]
            if is_uniform or not following:
                return scores
            # once all paths reach it, the threshold is this one or lower
            limit = threshold

    def _followed(self, scores: GroupScores, limit: float, needed: Counts) -> GroupScores:
        """Return scores with those of the consumers in `needed` computed anew, up to a cost."""
        reach = {name: Reach(limit, count) for name, count in needed.items()}
        new = self.method.taken(self.cluster, reach, self.shot)
        costs = dict[str, ConsumerCosts]()
        for c in (*scores.costs, *new.costs):
            costs[c.consumer] = c
        raised = dict[tuple[str, str], RaisedDamping]()
        for event in (*scores.raised_damping, *new.raised_damping):
            raised[event.linear, event.factor] = event
        return replace(
            new,
            costs=tuple(costs.values()),
            raised_damping=tuple(raised.values()),
        )

    def _and_one_step(
        self,
        costs: Sequence[ConsumerCosts],
        counts: Counts,
    ) -> dict[str, int]:
        """Return consumer -> number of its groups and one step more.

        The step may be worth its mean cost even if its last group alone is not.
        """
        with_step = dict[str, int]()
        for c in costs:
            step = self.method.multiple(c.kind, self.shot)
            with_step[c.consumer] = counts.get(c.consumer, 0) + step
        return with_step

    def _is_short(self, costs: ConsumerCosts, threshold: float) -> bool:
        """Whether a path ends before a threshold although it could go on.

        It is long enough if its limit is above the threshold, or if it got there because its groups
        were needed.
        """
        if threshold <= costs.limit or self._has_ended(costs):
            return False
        reached = costs.costs[torch.isfinite(costs.costs)]
        return not (reached >= threshold * self.method.unit_of(costs.kind)).any()

    def _has_ended(self, costs: ConsumerCosts) -> bool:
        """Whether a path has all groups that may be removed."""
        return costs.num_reached >= costs.num_left - self.method.fewest.get(costs.kind, 0)


def _batches(worker: Worker, sets: Sequence[GroupSet]) -> list[list[GroupSet]]:
    """Return groups in batches whose costs are computed together.

    A batch has groups of one shape, as many as there is room for; on the CPU it has one set.
    """
    if worker.device.type == "cpu":
        return [[groups] for groups in sets]
    alike = defaultdict[tuple[str, int, int], list[GroupSet]](list)
    for groups in sets:
        shape = worker.layout.shapes[groups.consumer]
        alike[groups.kind, shape.num_rows, shape.num_columns].append(groups)
    batches = list[list[GroupSet]]()
    for (_, num_rows, num_columns), same in alike.items():
        most = max(1, most_at_once(num_rows, num_columns))
        num_batches = math.ceil(len(same) / most)
        size = math.ceil(len(same) / num_batches)
        for start in range(0, len(same), size):
            batches.append(same[start : start + size])
    return batches


def _forget_factors(worker: Worker) -> None:
    worker.state.factors = None


def _remove_producers(worker: Worker, groups: GroupSet) -> None:
    columns = worker.mask(groups.consumer, StructuredMask).columns
    pruned = ~columns[groups.columns].all(dim=1)
    for name, rows in groups.producers:
        mask = worker.mask(name, StructuredMask)
        removed = torch.zeros_like(mask.rows)
        removed[rows[pruned].flatten()] = True
        worker.masks[name] = mask.without(removed, torch.zeros_like(mask.columns))
        W = worker.shard.weight(name)
        W[removed.to(W.device)] = 0
        worker.shard.set_weight(name, W)
