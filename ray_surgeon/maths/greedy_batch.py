"""Greedy paths of several linears of one shape, all at once, on a device that is not the CPU.

They are those of `ray_surgeon.maths.greedy`; but what is pruned is chosen on the device, and the
host reads once in every step how much that was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ray_surgeon.maths.downdated import Downdated, Elimination
from ray_surgeon.maths.greedy import Limits, num_at_once
from ray_surgeon.maths.threshold import check_costs


@dataclass
class _Left:
    """What is left of one linear, as the host counts it."""

    candidates: int  # that may be pruned; none when the path has ended
    rows: int  # with costs
    sets: int  # of columns, likewise
    needed: int  # see `Limits`
    least: int  # likewise

    @property
    def num_at_once(self) -> int:
        """How many may be pruned in the next step."""
        return num_at_once(self.candidates, self.least)

    def remove(self, rows: int, sets: int) -> None:
        """Count what a step has pruned; a path on which that is nothing has ended."""
        self.rows -= rows
        self.sets -= sets
        self.needed -= rows + sets
        self.candidates -= rows + sets if rows + sets else self.candidates


class _Step(NamedTuple):
    """What a step prunes."""

    costs: Tensor  # [B, num_structures]
    values: Tensor  # [B, q] costs of the cheapest, ascending
    indices: Tensor  # [B, q]
    is_pruned: Tensor  # [B, q] bool: the first few of every linear
    num_pruned: Tensor  # [B, num_sides] rows, if rows may go, and sets, if there are any
    num_failed: Tensor  # [B] of the decompositions in it
    elimination: Elimination


class GreedyBatch:
    """Paths of B linears."""

    def __init__(
        self,
        state: Downdated,
        may_prune: Tensor,
        limits: Sequence[Limits],
        names: Sequence[str],
        *,
        is_padded: bool = False,
    ) -> None:
        """Start with everything alive.

        Args:
            state: of the linears.
            may_prune: [B, num_structures] bool, on the CPU.
            limits: of each linear; `per_parameter` is the same for all.
            names: of what the costs belong to, for errors.
            is_padded: whether what may not be pruned is not there at all.
        """
        self.state = state
        self._names = names
        self._per_parameter = limits[0].per_parameter
        assert all(limit.per_parameter == self._per_parameter for limit in limits)
        like = state.tall
        device = like.device
        is_there = may_prune | (not is_padded)
        sides = may_prune, is_there[:, : state.first_set], is_there[:, state.first_set :]
        counts = [side.sum(dim=1).tolist() for side in sides]
        needed = [limit.needed for limit in limits]
        least = [limit.least for limit in limits]
        self._left = list(map(_Left, *counts, needed, least))
        largest = torch.finfo(like.dtype).max
        # costs are at least this: huge for what stays, infinite for what is gone
        penalty = torch.zeros(may_prune.shape, dtype=like.dtype)
        penalty.masked_fill_(~may_prune, torch.inf if is_padded else largest)
        self._penalty = penalty.to(device)
        self._limit, self._most = _bounds(limits, largest / 2).to(device, like.dtype).unbind()
        # of each linear candidates and `needed`, as the device counts them
        self._budget = torch.tensor([counts[0], needed]).T.contiguous().to(device)
        every = range(max(counts[0]) + 1)
        tables = {number: [num_at_once(left, number) for left in every] for number in set(least)}
        self._at_once = torch.tensor([tables[number] for number in least]).to(device)
        self._ranks = torch.arange(max(map(max, tables.values())), device=device)
        self._entries = torch.tensor([state.W.shape[1:]] * len(like)).to(device)
        self._numbers = torch.arange(may_prune.shape[1], device=device).expand(len(like), -1)
        self._members = torch.arange(len(like), device=device)
        self._marginal = like.new_full((len(like), may_prune.shape[1] + 1), torch.inf)
        self._highest = like.new_zeros(len(like), 1)
        self._steps = list[tuple[Tensor, Tensor, Tensor]]()
        self._are_rows = torch.tensor([[True], [False]]).to(device)
        self._zero, self._infinity = torch.tensor([0.0, math.inf]).to(device, like.dtype)

    def single_costs(self) -> Tensor:
        """Return the cost of each structure on its own, [B, num_structures].

        Raises:
            FloatingPointError: a cost is not usable.
        """
        costs, num_failed = self._costs(repair=False)
        if num_failed is not None and num_failed.any():
            costs, _ = self._costs(repair=True)
        self._check(costs, self._is_bad(costs).tolist())
        return costs

    def follow(self) -> Tensor:
        """Follow the paths.

        Returns:
            [B, num_structures]: the marginal cost at which each is pruned, see `greedy_costs`.

        Raises:
            FloatingPointError: a cost of the first step is not usable.
        """
        is_first = True
        while num_at_most := max(of_one.num_at_once for of_one in self._left):
            step, num_pruned = self._looked_at(num_at_most, is_first=is_first)
            is_first = False
            if not any(map(sum, num_pruned)):
                break
            self.state.remove(step.elimination)
            gone = torch.where(step.is_pruned, self._infinity, self._zero)
            self._penalty.scatter_add_(1, step.indices, gone)
            self._steps.append((step.indices, step.values, step.is_pruned))
            self._count(num_pruned, step.num_pruned)
        self._write()
        return self._marginal[:, :-1]

    # Costs

    def _costs(self, *, repair: bool) -> tuple[Tensor, Tensor | None]:
        """Return costs, and how many sets of each linear are to be repaired, if any can be."""
        state = self.state
        num_failed = None
        parts = []
        if state.wide is not None:
            by_row = state.row_costs()
            parts.append(by_row / self._entries[:, 1:] if self._per_parameter else by_row)
        if state.num_sets:
            penalty = self._penalty[:, state.first_set :]
            by_set, num_failed = state.set_costs(penalty, repair=repair)
            parts.append(by_set / self._entries[:, :1] if self._per_parameter else by_set)
        costs = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return torch.maximum(costs, self._penalty), num_failed

    def _is_bad(self, costs: Tensor) -> Tensor:
        """Return how many costs of candidates are no finite numbers, [B, 1]."""
        return ((self._penalty == 0) & ~(costs < torch.inf)).sum(dim=1, keepdim=True)

    def _check(self, costs: Tensor, num_bad: Sequence[Sequence[int]]) -> None:
        for linear, number in enumerate(num_bad):
            if any(number):
                check_costs(self._names[linear], costs[linear][self._penalty[linear] == 0])

    # A step

    def _step(self, num_at_most: int, *, repair: bool) -> _Step:
        """Return what goes next, at most so many of each linear."""
        state = self.state
        costs, num_failed = self._costs(repair=repair)
        values, indices = costs.topk(num_at_most, largest=False)
        is_pruned = values <= self._bounds(num_at_most)
        if len(values) > 1:
            at_once = self._at_once.gather(1, self._budget[:, :1])
            is_pruned &= self._ranks[:num_at_most] < at_once
        sides = is_pruned[:, None]
        if state.wide is not None and state.num_sets:
            sides = sides & ((indices < state.first_set)[:, None] == self._are_rows)
        elimination = state.elimination(indices, is_pruned, sides, repair=repair)
        failed = elimination.failed if num_failed is None else elimination.failed + num_failed
        return _Step(costs, values, indices, is_pruned, sides.sum(dim=2), failed, elimination)

    def _bounds(self, num_at_most: int) -> Tensor:
        """Return the largest costs at which the cheapest are pruned, [B, 1 or num_at_most]."""
        needed = [left.needed for left in self._left]
        if max(needed) <= 0:
            return self._limit
        if min(needed) >= num_at_most:
            return self._most
        left = self._budget[:, 1:] if len(needed) > 1 else needed[0]
        return torch.where(self._ranks[:num_at_most] < left, self._most, self._limit)

    def _looked_at(
        self, num_at_most: int, *, is_first: bool
    ) -> tuple[_Step, Sequence[tuple[int, int]]]:
        """Return a step, and how many rows and sets of each linear it prunes; the one read."""
        step = self._step(num_at_most, repair=False)
        reports = [step.num_failed[:, None], step.num_pruned]
        if is_first:
            reports.insert(0, self._is_bad(step.costs))
        report = torch.cat(reports, dim=1).tolist()
        if is_first:
            self._check(step.costs, [of_one[:1] for of_one in report])
            report = [of_one[1:] for of_one in report]
        if any(of_one[0] for of_one in report):
            step = self._step(num_at_most, repair=True)
            report = [[0, *of_one] for of_one in step.num_pruned.tolist()]
        if self.state.wide is None:
            return step, [(0, of_one[1]) for of_one in report]
        return step, [(of_one[1], sum(of_one[2:])) for of_one in report]

    # What is left

    def _count(self, num_pruned: Sequence[tuple[int, int]], on_device: Tensor) -> None:
        """Count what is left, and go on with less where half is gone.

        That are linears whose paths have ended, or rows, or sets.

        Args:
            num_pruned: rows and sets of each linear in the last step.
            on_device: likewise, see `_Step`.
        """
        for of_one, numbers in zip(self._left, num_pruned, strict=True):
            of_one.remove(*numbers)
        if len(num_pruned) > 1:
            self._budget -= on_device.sum(dim=1, keepdim=True)
        if self._per_parameter and on_device.shape[1] > 1:
            self._entries -= on_device
            if any(min(of_one.rows, of_one.sets) <= 0 for of_one in self._left):
                self._entries.clamp_(min=1)
        going = [n for n, numbers in enumerate(num_pruned) if any(numbers)]
        rows = max(1, *(self._left[n].rows for n in going))
        sets = max(1, *(self._left[n].sets for n in going))
        is_half = 2 * rows <= self.state.first_set or 2 * sets <= self.state.num_sets
        if 2 * len(going) > len(num_pruned) and not is_half:
            return
        self._write()
        if len(going) < len(num_pruned):
            # a stable sort puts those that go on first, in their order
            has_ended = (on_device.sum(dim=1) == 0).to(torch.uint8)
            self._select(going, has_ended.argsort(stable=True)[: len(going)])
        if is_half:
            self._restrict(rows, sets)

    def _select(self, going: Sequence[int], linears: Tensor) -> None:
        """Go on with some of the linears, given by their numbers here and on the device."""
        self._left = [self._left[n] for n in going]
        self._names = [self._names[n] for n in going]
        self.state.select(linears)
        self._penalty = self._penalty[linears]
        self._limit = self._limit[linears]
        self._most = self._most[linears]
        self._budget = self._budget[linears]
        self._at_once = self._at_once[linears]
        self._entries = self._entries[linears]
        self._numbers = self._numbers[linears]
        self._members = self._members[linears]
        self._highest = self._highest[linears]

    def _restrict(self, num_rows: int, num_sets: int) -> None:
        """Go on with so many rows and sets: all that are left, and others that are gone."""
        first = self.state.first_set
        is_gone = self._penalty.isinf().to(torch.uint8)
        rows = is_gone[:, :first].argsort(dim=1, stable=True)[:, :num_rows]
        sets = is_gone[:, first:].argsort(dim=1, stable=True)[:, :num_sets]
        kept = torch.cat([rows, first + sets], dim=1)
        self._penalty = self._penalty.gather(1, kept)
        self._numbers = self._numbers.gather(1, kept)
        self.state.restrict(rows, sets)

    def _write(self) -> None:
        """Write down the marginal costs of the steps since this was last done."""
        if not self._steps:
            return
        indices, values, is_pruned = (torch.cat(x, dim=1) for x in zip(*self._steps, strict=True))
        self._steps.clear()
        costs = torch.cat([self._highest, values.masked_fill(~is_pruned, -torch.inf)], dim=1)
        costs = costs.cummax(dim=1).values[:, 1:]
        self._highest = costs[:, -1:]
        # what was not pruned goes to a place that nobody reads
        places = self._numbers.gather(1, indices)
        places.masked_fill_(~is_pruned, self._marginal.shape[1] - 1)
        self._marginal[self._members] = self._marginal[self._members].scatter_(1, places, costs)


def _bounds(limits: Sequence[Limits], largest: float) -> Tensor:
    """Return `limit` and `most` of each linear, [2, B, 1] float64."""
    ends = [math.inf if limit.limit is None else limit.limit for limit in limits]
    most = [max(end, limit.most) for end, limit in zip(ends, limits, strict=True)]
    return torch.tensor([ends, most], dtype=torch.float64).clamp_(max=largest)[:, :, None]
