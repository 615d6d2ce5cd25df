"""Costs of coupled groups as workers send them, and how far their paths are to be followed."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ray_surgeon.stages.prune.method import Scores

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


@dataclass(frozen=True)
class Reach:
    """How far the greedy paths are followed."""

    limit: float | None = (
        None  # largest scaled cost, per unit likewise; None for the cost of each group on its own
    )
    needed: Mapping[str, int] | None = (
        None  # consumer -> its groups that may be needed even if they cost more
    )
    only: frozenset[str] | None = None  # consumers whose paths are followed anew; None for all
    # those of `ConsumerCosts`; 1 if not given
    scales: Mapping[Unit, float] = field(default_factory=dict)


def renewed(before: Scores[ConsumerCosts], after: Scores[ConsumerCosts]) -> Scores[ConsumerCosts]:
    """Return scores in which those of some consumers were taken anew."""
    costs = {c.consumer: c for c in (*before.costs, *after.costs)}
    raised = {
        (event.linear, event.factor): event
        for event in (*before.raised_damping, *after.raised_damping)
    }
    return replace(after, costs=tuple(costs.values()), raised_damping=tuple(raised.values()))
