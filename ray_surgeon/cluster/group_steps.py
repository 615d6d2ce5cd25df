"""The part of a worker that prunes coupled groups."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ray_surgeon.cluster.messages import CurvatureOptions, DampingEvent, GroupOptions, GroupsReply, LinearSummary, ReaderCosts
from ray_surgeon.cluster.state import ShardState
from ray_surgeon.models.couplings import GroupSet
from ray_surgeon.models.narrow import plain_kv_heads
from ray_surgeon.surgery.groups import GroupSurgery, lowest


class GroupSteps(ShardState):
    """Called in the order of `methods.prune_groups`, after the curvature pass."""

    _group_surgeries: dict[str, GroupSurgery]
    _group_heights: dict[str, Tensor]

    def _group_sets(self, kinds: tuple[str, ...]) -> list[GroupSet]:
        return [groups for groups in self.group_sets if groups.kind in kinds]

    def group_costs(self, options: GroupOptions, curvature: CurvatureOptions) -> GroupsReply:
        """Return the heights of the owned readers' groups, and keep them for `prune_groups`.

        Raises:
            FloatingPointError: a factor or a cost is not usable; names the linear.
        """
        self._group_surgeries, self._group_heights = {}, {}
        costs, events = [], []
        damping = {"damping_a": curvature.damping_a, "damping_g": curvature.damping_g, "max_damping": curvature.max_damping}
        for groups in self._group_sets(options.kinds):
            name = groups.reader
            if self.owner(name) != self.replicas.rank:
                continue
            mask = self.structured(name)
            surgery = GroupSurgery(name, self.shard.weight(name), self.shard.factors(name), mask, **damping)
            left = int(mask.columns[groups.columns].all(dim=1).sum())
            limit = None if options.limit is None else options.limit * options.sizes[groups.kind]
            needed = max(options.needed.get(groups.kind, 0), left % options.multiples.get(groups.kind, 1))
            heights = surgery.heights(groups.columns, options.least[groups.kind], limit, needed)
            self._group_surgeries[name], self._group_heights[name] = surgery, heights
            allowed = self._allowed(groups, options)
            costs.append(ReaderCosts(name, groups.kind, heights.float().numpy(), left, groups.num_parameters, allowed))
            for factor, asked, found in (("A", curvature.damping_a, surgery.curvature.A), ("G", curvature.damping_g, surgery.curvature.G)):
                if found.damping != asked or found.float64_retry:
                    events.append(DampingEvent(name, factor, asked, found.damping, found.float64_retry))
        masks = [self.masks[name] for name in self.owned()]
        sizes = sum(m.num_parameters for m in masks), sum(m.num_kept for m in masks)
        return GroupsReply(tuple(costs), *sizes, tuple(events))

    def _allowed(self, groups: GroupSet, options: GroupOptions) -> frozenset[int]:
        whole, multiple = len(groups.columns), options.multiples.get(groups.kind, 1)
        if groups.kind == "attention" and options.uniform:
            return frozenset(plain_kv_heads(self.shard.config))
        return frozenset((*range(0, whole, multiple), whole))

    def prune_groups(self, options: GroupOptions, counts: Mapping[str, int], step: float) -> tuple[LinearSummary, ...]:
        """Remove the cheapest groups of every reader and what writes to them.

        Args:
            options: those of `group_costs`.
            counts: reader -> number of its groups that go.
            step: of the first-order correction of the readers, see `LinearCurvature.without`.
        """
        predicted: dict[str, float] = {}
        sets = self._group_sets(options.kinds)
        for groups in sets:
            name = groups.reader
            if name in self._group_surgeries:
                gone = torch.zeros(len(self.structured(name).columns), dtype=torch.bool)
                gone[groups.columns[lowest(self._group_heights[name], counts[name])].flatten()] = True
                W, self.masks[name], predicted[name] = self._group_surgeries[name].prune(gone, step)
                self.shard.set_weight(name, W)
        self._group_surgeries, self._group_heights = {}, {}
        self.shard.drop_curvature()
        self.share_linears(groups.reader for groups in sets)
        for groups in sets:
            self._remove_writers(groups)
        return tuple(self.summary(name, predicted.get(name, 0.0), 0.0) for name in self.owned())

    def _remove_writers(self, groups: GroupSet) -> None:
        gone = ~self.structured(groups.reader).columns[groups.columns].all(dim=1)
        for name, rows in groups.writers:
            mask = self.structured(name)
            removed = torch.zeros_like(mask.rows)
            removed[rows[gone].flatten()] = True
            self.masks[name] = mask.without(removed, torch.zeros_like(mask.columns))
            W = self.shard.weight(name)
            W[removed.to(W.device)] = 0
            self.shard.set_weight(name, W)
