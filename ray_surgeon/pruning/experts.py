"""Whole experts on a worker: their costs, their removal, and routers that skip removed ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import chain
from typing import ClassVar

import torch

from ray_surgeon.config.groups import ExpertCosts
from ray_surgeon.distributed.worker import Worker
from ray_surgeon.factors.collector import SumsBeside
from ray_surgeon.maths.experts import rerouting_costs
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.threshold import check_costs
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.pruning.baselines.experts import score_experts


class ExpertSumsBeside(SumsBeside):
    """Sums over the tokens of each expert; see `ray_surgeon.maths.experts.ExpertSums`."""

    options: ClassVar[Mapping[str, bool]] = {"experts": True}

    def num_changes(self, layout: ModelLayout) -> int:
        """Return the number of experts that a token goes to; each of them may be removed."""
        return layout.num_active_experts

    def weigh(self, worker: Worker, factor: float) -> None:
        """Multiply the changes of the loss that removals would cause by a factor."""
        for sums in worker.shard.expert_sums.values():
            sums.of("gains").mul_(factor)
            sums.of("squares").mul_(factor)

    def reduce(self, worker: Worker) -> None:
        """Sum over the replicas to the owners of the experts' first linears."""
        shard = worker.shard
        all_sums = shard.expert_sums.values()
        for experts, sums in zip(shard.expert_sets, all_sums, strict=True):
            worker.replicas.reduce(sums.total, worker.owner(experts.linears[0][0]))


def whole_expert_costs(
    worker: Worker, kind: ExpertCosts, shot: int, *, first_order: bool
) -> dict[str, float]:
    """Return the costs of the removal of the owned experts, by their consumers.

    Args:
        worker: worker after a pass that gathered sums of experts.
        kind: how costs are computed.
        shot: number of the shot.
        first_order: see `rerouting_costs`.

    Raises:
        FloatingPointError: a cost is not usable; names the experts.
    """
    by_expert = dict[str, float]()
    shard = worker.shard
    mixtures = shard.mixtures.values()
    all_sums = shard.expert_sums.values()
    for experts, mixture, sums in zip(shard.expert_sets, mixtures, all_sums, strict=True):
        consumers = [linears[-1] for linears in experts.linears]
        if not worker.owns(consumers[0]):
            continue
        if kind == "rerouting":
            costs = rerouting_costs(sums, mixture.num_chosen, first_order=first_order)
        else:
            seed = 1_000 * experts.block + shot
            costs = score_experts(kind, sums, mixture.num_chosen, seed)
        may_be_negative = kind == "rerouting" and first_order
        check_costs(experts.name, costs, may_be_negative=may_be_negative)
        if not mixture.can_spare_one:
            costs.fill_(math.inf)
        gone = experts.removed(worker.masks).tolist()
        for name, cost, is_gone in zip(consumers, costs.tolist(), gone, strict=True):
            if not is_gone:
                by_expert[name] = cost
    return by_expert


def go_around_removed(worker: Worker) -> None:
    """Let routers skip the experts that are removed; weights and masks must be loaded."""
    shard = worker.shard
    for experts, mixture in zip(shard.expert_sets, shard.mixtures.values(), strict=True):
        removed = experts.removed(worker.masks)
        # if all experts are removed, the choice does not matter
        if removed.any() and not removed.all():
            mixture.kept = ~removed


def remove_experts(worker: Worker, consumers: Collection[str]) -> None:
    """Remove the experts with these consumers whole; routers skip them."""
    all_linears = chain.from_iterable(
        experts.linears for experts in worker.shard.expert_sets
    )
    for linears in all_linears:
        if linears[-1] not in consumers:
            continue
        for name in linears:
            mask = worker.mask(name, StructuredMask)
            W = torch.zeros(len(mask.rows), len(mask.columns), device=worker.device)
            worker.masks[name] = mask.without(mask.rows, mask.columns)
            worker.shard.set_weight(name, W)
    go_around_removed(worker)
