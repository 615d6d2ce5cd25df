"""Greedy paths of several linears of one shape at once, on a device other than the CPU.

The paths are those of `ray_surgeon.maths.greedy`. Here the device chooses the structures to prune,
and the host reads their number once in every step.
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
class _Remaining:
    """Structures of one linear that are not pruned yet, as counted by the host."""

    candidates: int  # structures that may be pruned; zero once the path has ended
    rows: int  # rows that have costs
    sets: int  # sets of columns that have costs
    needed: int  # see `Limits`
    least: int  # see `Limits`

    @property
    def num_at_once(self) -> int:
        """Largest number of structures that the next step may prune."""
        return num_at_once(self.candidates, self.least)

    def remove(self, rows: int, sets: int) -> None:
        """Subtract the structures that a step pruned; a step that pruned none ends the path."""
        num_pruned = rows + sets
        if num_pruned == 0:
            self.candidates = 0
            return
        self.rows -= rows
        self.sets -= sets
        self.needed -= num_pruned
        self.candidates -= num_pruned


class _Step(NamedTuple):
    """The structures that a step prunes."""

    costs: Tensor  # [B, num_structures]
    values: Tensor  # [B, q] costs of the cheapest structures, ascending
    indices: Tensor  # [B, q] of the cheapest structures
    is_pruned: Tensor  # [B, q] bool, true for the first few of each linear
    # [B, num_sides] rows, if rows may be pruned, and sets, if there are any
    num_pruned: Tensor
    num_failed: Tensor  # [B] failed decompositions
    elimination: Elimination


class GreedyBatch:
    """Greedy paths of B linears."""

    def __init__(
        self,
        state: Downdated,
        may_prune: Tensor,
        limits: Sequence[Limits],
        names: Sequence[str],
        *,
        is_padded: bool = False,
    ) -> None:
        """Start with every structure in place.

        Args:
            state: weights and inverses of the linears.
            may_prune: [B, num_structures] bool, on the CPU.
            limits: limits of each linear; `per_parameter` is the same for all.
            names: names of the linears, for errors.
            is_padded: whether structures that may not be pruned are padding.
        """
        self.state = state
        self._names = names
        self._per_parameter = limits[0].per_parameter
        assert all(limit.per_parameter == self._per_parameter for limit in limits)
        batch_size, num_structures = may_prune.shape
        dtype = state.tall.dtype
        device = state.tall.device
        has_cost = may_prune if is_padded else torch.ones_like(may_prune)
        self._remaining = _remaining(may_prune, has_cost, state.first_set, limits)
        largest = torch.finfo(dtype).max
        # lower bounds of the costs: huge for structures that stay, infinite for removed ones
        penalty = torch.zeros(may_prune.shape, dtype=dtype)
        penalty.masked_fill_(~may_prune, torch.inf if is_padded else largest)
        self._penalty = penalty.to(device)
        cost_limits = _cost_limits(limits, largest / 2).to(device, dtype)
        self._limit, self._most = cost_limits.unbind()
        # candidates and `needed` of each linear, as counted by the device
        budget = [[linear.candidates, linear.needed] for linear in self._remaining]
        self._budget = torch.tensor(budget).to(device)
        step_sizes = _step_sizes(self._remaining)
        self._step_sizes = step_sizes.to(device)
        self._ranks = torch.arange(int(step_sizes.max()), device=device)
        self._entries = torch.tensor([state.W.shape[1:]] * batch_size).to(device)
        self._numbers = torch.arange(num_structures, device=device).expand(batch_size, -1)
        self._members = torch.arange(batch_size, device=device)
        self._marginal = state.tall.new_full((batch_size, num_structures + 1), torch.inf)
        self._highest = state.tall.new_zeros(batch_size, 1)
        # indices, values and is_pruned of the steps that are not recorded yet
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []
        self._are_rows = torch.tensor([[True], [False]]).to(device)
        self._zero, self._infinity = torch.tensor([0.0, math.inf]).to(device, dtype)

    def single_costs(self) -> Tensor:
        """Return the cost of each structure on its own, [B, num_structures].

        Raises:
            FloatingPointError: a cost is not usable.
        """
        costs, num_failed = self._costs(repair=False)
        if num_failed is not None and num_failed.any():
            costs, _ = self._costs(repair=True)
        self._check(costs, self._num_bad(costs).flatten().tolist())
        return costs

    def follow(self) -> Tensor:
        """Follow the paths to their ends.

        Returns:
            [B, num_structures]: the marginal cost at which each is pruned, see `greedy_costs`.

        Raises:
            FloatingPointError: a cost of the first step is not usable.
        """
        is_first = True
        while True:
            num_at_most = max(linear.num_at_once for linear in self._remaining)
            if num_at_most == 0:
                break
            step, num_pruned = self._next_step(num_at_most, is_first=is_first)
            is_first = False
            if not any(rows + sets for rows, sets in num_pruned):
                break
            self.state.remove(step.elimination)
            added = torch.where(step.is_pruned, self._infinity, self._zero)
            self._penalty.scatter_add_(1, step.indices, added)
            self._steps.append((step.indices, step.values, step.is_pruned))
            self._count(num_pruned, step.num_pruned)
            self._shrink(num_pruned, step.num_pruned)
        self._record_steps()
        return self._marginal[:, :-1]

    # Costs

    def _costs(self, *, repair: bool) -> tuple[Tensor, Tensor | None]:
        """Return the costs, and the number of sets of each linear that need a repair, if known."""
        state = self.state
        num_failed = None
        parts = []
        if state.wide is not None:
            by_row = state.row_costs()
            if self._per_parameter:
                by_row = by_row / self._entries[:, 1:]
            parts.append(by_row)
        if state.num_sets:
            penalty = self._penalty[:, state.first_set :]
            by_set, num_failed = state.set_costs(penalty, repair=repair)
            if self._per_parameter:
                by_set = by_set / self._entries[:, :1]
            parts.append(by_set)
        costs = parts[0]
        if len(parts) > 1:
            costs = torch.cat(parts, dim=1)
        return torch.maximum(costs, self._penalty), num_failed

    def _num_bad(self, costs: Tensor) -> Tensor:
        """Return the number of candidates of each linear whose cost is not finite, [B, 1]."""
        return ((self._penalty == 0) & ~(costs < torch.inf)).sum(dim=1, keepdim=True)

    def _check(self, costs: Tensor, num_bad: Sequence[int]) -> None:
        for linear, number in enumerate(num_bad):
            if number > 0:
                is_candidate = self._penalty[linear] == 0
                check_costs(self._names[linear], costs[linear][is_candidate])

    # A step

    def _step(self, num_at_most: int, *, repair: bool) -> _Step:
        """Return the next step, which prunes at most `num_at_most` structures of each linear."""
        state = self.state
        costs, num_failed = self._costs(repair=repair)
        values, indices = costs.topk(num_at_most, largest=False)
        is_pruned = values <= self._bounds(num_at_most)
        if len(values) > 1:
            step_sizes = self._step_sizes.gather(1, self._budget[:, :1])
            is_pruned.logical_and_(self._ranks[:num_at_most] < step_sizes)
        sides = is_pruned[:, None]
        if state.wide is not None and state.num_sets:
            is_row = (indices < state.first_set)[:, None]
            sides = sides & (is_row == self._are_rows)
        elimination = state.elimination(indices, is_pruned, sides, repair=repair)
        all_failed = elimination.failed
        if num_failed is not None:
            all_failed = all_failed + num_failed
        return _Step(
            costs=costs,
            values=values,
            indices=indices,
            is_pruned=is_pruned,
            num_pruned=sides.sum(dim=2),
            num_failed=all_failed,
            elimination=elimination,
        )

    def _bounds(self, num_at_most: int) -> Tensor:
        """Return the largest costs at which structures are pruned, [B, 1 or num_at_most]."""
        needed = [linear.needed for linear in self._remaining]
        if max(needed) <= 0:
            return self._limit
        if min(needed) >= num_at_most:
            return self._most
        ranks = self._ranks[:num_at_most]
        if len(needed) == 1:
            return torch.where(ranks < needed[0], self._most, self._limit)
        return torch.where(ranks < self._budget[:, 1:], self._most, self._limit)

    def _next_step(
        self,
        num_at_most: int,
        *,
        is_first: bool,
    ) -> tuple[_Step, list[tuple[int, int]]]:
        """Return a step, and how many rows and sets of each linear it prunes.

        The host waits for the device here, and nowhere else in a step.
        """
        step = self._step(num_at_most, repair=False)
        columns = [step.num_failed[:, None], step.num_pruned]
        if is_first:
            columns.append(self._num_bad(step.costs))
        report = torch.cat(columns, dim=1).tolist()
        if is_first:
            self._check(step.costs, [numbers[-1] for numbers in report])
        if any(numbers[0] for numbers in report):
            step = self._step(num_at_most, repair=True)
            by_side = step.num_pruned.tolist()
        else:
            num_sides = step.num_pruned.shape[1]
            by_side = [numbers[1 : 1 + num_sides] for numbers in report]
        return step, [self._rows_and_sets(numbers) for numbers in by_side]

    def _rows_and_sets(self, num_pruned: Sequence[int]) -> tuple[int, int]:
        """Return the numbers of rows and of sets from one row of `_Step.num_pruned`."""
        if self.state.wide is None:
            return 0, num_pruned[0]
        if self.state.num_sets == 0:
            return num_pruned[0], 0
        return num_pruned[0], num_pruned[1]

    # Remaining structures

    def _count(self, num_pruned: Sequence[tuple[int, int]], on_device: Tensor) -> None:
        """Subtract pruned structures from the counts on the host and on the device.

        Args:
            num_pruned: rows and sets of each linear that the last step pruned.
            on_device: the same numbers on the device, see `_Step.num_pruned`.
        """
        for linear, (rows, sets) in zip(self._remaining, num_pruned, strict=True):
            linear.remove(rows, sets)
        if len(num_pruned) > 1:
            self._budget -= on_device.sum(dim=1, keepdim=True)
        if self._per_parameter and on_device.shape[1] > 1:
            self._entries -= on_device
            if any(min(linear.rows, linear.sets) <= 0 for linear in self._remaining):
                self._entries.clamp_(min=1)

    def _shrink(self, num_pruned: Sequence[tuple[int, int]], on_device: Tensor) -> None:
        """Make the batch smaller once half of the linears, rows or sets are finished.

        Linears whose paths have ended are left out, and so are structures that are removed. See
        `_count` for the arguments.
        """
        active = []
        num_rows = 1
        num_sets = 1
        for number, (rows, sets) in enumerate(num_pruned):
            if rows + sets == 0:
                continue
            active.append(number)
            num_rows = max(num_rows, self._remaining[number].rows)
            num_sets = max(num_sets, self._remaining[number].sets)
        few_rows = 2 * num_rows <= self.state.first_set
        few_sets = 2 * num_sets <= self.state.num_sets
        few_linears = 2 * len(active) <= len(num_pruned)
        if not (few_linears or few_rows or few_sets):
            return
        self._record_steps()
        if len(active) < len(num_pruned):
            # a stable sort puts the active linears first, in their order
            has_ended = (on_device.sum(dim=1) == 0).to(torch.uint8)
            self._select(active, has_ended.argsort(stable=True)[: len(active)])
        if few_rows or few_sets:
            self._restrict(num_rows, num_sets)

    def _select(self, active: Sequence[int], linears: Tensor) -> None:
        """Keep only the active linears, given by their numbers on the host and on the device."""
        self._remaining = [self._remaining[number] for number in active]
        self._names = [self._names[number] for number in active]
        self.state.select(linears)
        self._penalty = self._penalty[linears]
        self._limit = self._limit[linears]
        self._most = self._most[linears]
        self._budget = self._budget[linears]
        self._step_sizes = self._step_sizes[linears]
        self._entries = self._entries[linears]
        self._numbers = self._numbers[linears]
        self._members = self._members[linears]
        self._highest = self._highest[linears]

    def _restrict(self, num_rows: int, num_sets: int) -> None:
        """Keep the given numbers of rows and sets: all remaining ones, and some removed ones."""
        first = self.state.first_set
        is_removed = self._penalty.isinf().to(torch.uint8)
        rows = is_removed[:, :first].argsort(dim=1, stable=True)[:, :num_rows]
        sets = is_removed[:, first:].argsort(dim=1, stable=True)[:, :num_sets]
        kept = torch.cat([rows, first + sets], dim=1)
        self._penalty = self._penalty.gather(1, kept)
        self._numbers = self._numbers.gather(1, kept)
        self.state.restrict(rows, sets)

    def _record_steps(self) -> None:
        """Write the marginal costs of the steps that are not recorded yet."""
        if not self._steps:
            return
        all_indices, all_values, all_pruned = zip(*self._steps, strict=True)
        self._steps.clear()
        indices = torch.cat(all_indices, dim=1)
        values = torch.cat(all_values, dim=1)
        is_pruned = torch.cat(all_pruned, dim=1)
        values = values.masked_fill(~is_pruned, -torch.inf)
        costs = torch.cat([self._highest, values], dim=1).cummax(dim=1).values[:, 1:]
        self._highest = costs[:, -1:]
        # structures that were not pruned are written to the last column, which is never read
        places = self._numbers.gather(1, indices)
        places.masked_fill_(~is_pruned, self._marginal.shape[1] - 1)
        marginal = self._marginal[self._members]
        self._marginal[self._members] = marginal.scatter_(1, places, costs)


def _remaining(
    may_prune: Tensor,
    has_cost: Tensor,
    first_set: int,
    limits: Sequence[Limits],
) -> list[_Remaining]:
    """Return the counts of each linear at the start of its path."""
    candidates: list[int] = may_prune.sum(dim=1).tolist()
    rows: list[int] = has_cost[:, :first_set].sum(dim=1).tolist()
    sets: list[int] = has_cost[:, first_set:].sum(dim=1).tolist()
    remaining = []
    for number, limit in enumerate(limits):
        counts = _Remaining(
            candidates=candidates[number],
            rows=rows[number],
            sets=sets[number],
            needed=limit.needed,
            least=limit.least,
        )
        remaining.append(counts)
    return remaining


def _step_sizes(remaining: Sequence[_Remaining]) -> Tensor:
    """Return the largest step of each linear by its number of candidates.

    Returns:
        [B, n + 1], where n is the largest number of candidates.
    """
    num_candidates = max(linear.candidates for linear in remaining)
    tables = {}
    for least in {linear.least for linear in remaining}:
        tables[least] = [num_at_once(left, least) for left in range(num_candidates + 1)]
    return torch.tensor([tables[linear.least] for linear in remaining])


def _cost_limits(limits: Sequence[Limits], largest: float) -> Tensor:
    """Return `limit` and `most` of each linear, [2, B, 1] float64, none above `largest`."""
    ends = []
    most = []
    for limit in limits:
        end = math.inf if limit.limit is None else limit.limit
        ends.append(end)
        most.append(max(end, limit.most))
    return torch.tensor([ends, most], dtype=torch.float64).clamp_(max=largest)[:, :, None]
