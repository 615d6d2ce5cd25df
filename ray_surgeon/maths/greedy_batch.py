"""Greedy paths of several linears of one shape, all at once, on a device that is not the CPU.

They are the paths of `ray_surgeon.maths.greedy`, but the device chooses what is pruned. The host
reads once per step how many structures that was.
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
    """Numbers of structures that one linear still has, as counted by the host."""

    candidates: int  # structures that may be pruned; 0 once the path has ended
    rows: int  # rows with costs
    sets: int  # sets of columns with costs
    needed: int  # see `Limits`
    least: int  # see `Limits`

    @property
    def num_at_once(self) -> int:
        """Largest number of structures that the next step may prune."""
        return num_at_once(self.candidates, self.least)

    def remove(self, rows: int, sets: int) -> None:
        """Subtract the structures pruned by a step; the path ends if there are none."""
        num_pruned = rows + sets
        self.rows -= rows
        self.sets -= sets
        self.needed -= num_pruned
        if num_pruned:
            self.candidates -= num_pruned
        else:
            self.candidates = 0


class _Step(NamedTuple):
    """The structures that one step prunes."""

    costs: Tensor  # [B, num_structures]
    values: Tensor  # [B, q] costs of the cheapest, ascending
    indices: Tensor  # [B, q]
    is_pruned: Tensor  # [B, q] bool: the first few of every linear
    num_pruned: Tensor  # [B, num_sides] rows, if rows may go, and sets, if there are any
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
        """Start with everything alive.

        Args:
            state: weights and inverses of the linears.
            may_prune: [B, num_structures] bool, on the CPU.
            limits: limits of each linear; `per_parameter` is the same for all.
            names: names of the costs of each linear, for errors.
            is_padded: whether structures that may not be pruned do not exist at all.
        """
        self.state = state
        self._names = names
        self._per_parameter = limits[0].per_parameter
        self._remaining = _count_structures(may_prune, state.first_set, limits, is_padded=is_padded)
        like = state.tall
        device = like.device
        num_linears, num_structures = may_prune.shape
        largest = torch.finfo(like.dtype).max
        # costs are at least this: huge for what stays, infinite for what is gone
        penalty = torch.zeros(may_prune.shape, dtype=like.dtype)
        penalty.masked_fill_(~may_prune, torch.inf if is_padded else largest)
        self._penalty = penalty.to(device)
        bounds = _cost_bounds(limits, largest / 2).to(device, like.dtype)
        self._limit, self._most = bounds.unbind()
        # candidates and `needed` of each linear, as counted by the device
        budget = [[remaining.candidates, remaining.needed] for remaining in self._remaining]
        self._budget = torch.tensor(budget).to(device)
        step_sizes = _step_sizes(self._remaining)
        self._at_once = torch.tensor(step_sizes).to(device)
        self._ranks = torch.arange(max(map(max, step_sizes)), device=device)
        self._entries = torch.tensor([state.W.shape[1:]] * num_linears).to(device)
        numbers = torch.arange(num_structures, device=device)
        self._numbers = numbers.expand(num_linears, -1)
        self._members = torch.arange(num_linears, device=device)
        self._marginal = like.new_full((num_linears, num_structures + 1), torch.inf)
        self._highest = like.new_zeros(num_linears, 1)
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []
        self._are_rows = torch.tensor([[True], [False]]).to(device)
        self._zero, self._infinity = torch.tensor([0.0, math.inf]).to(device, like.dtype)

    def single_costs(self) -> Tensor:
        """Return the cost of pruning each structure alone, [B, num_structures].

        Raises:
            FloatingPointError: a cost is not usable.
        """
        costs, num_failed = self._costs(repair=False)
        if num_failed is not None and num_failed.any():
            costs, _ = self._costs(repair=True)
        self._check(costs, self._num_bad(costs).flatten().tolist())
        return costs

    def follow(self) -> Tensor:
        """Follow the paths.

        Returns:
            [B, num_structures]: the marginal cost at which each is pruned, see `greedy_costs`.

        Raises:
            FloatingPointError: a cost of the first step is not usable.
        """
        is_first = True
        while True:
            num_at_most = max(remaining.num_at_once for remaining in self._remaining)
            if num_at_most == 0:
                break
            step, num_pruned = self._read_step(num_at_most, is_first=is_first)
            is_first = False
            if not any(rows or sets for rows, sets in num_pruned):
                break
            self.state.remove(step.elimination)
            gone = torch.where(step.is_pruned, self._infinity, self._zero)
            self._penalty.scatter_add_(1, step.indices, gone)
            self._steps.append((step.indices, step.values, step.is_pruned))
            self._subtract(num_pruned, step.num_pruned)
            self._shrink(num_pruned, step.num_pruned)
        self._write()
        return self._marginal[:, :-1]

    # Costs

    def _costs(self, *, repair: bool) -> tuple[Tensor, Tensor | None]:
        """Return the costs, and the number of failed decompositions of each linear.

        The number is that of `Downdated.set_costs`, None if no decomposition can fail.
        """
        state = self.state
        num_failed = None
        parts = []
        if state.wide is not None:
            row_costs = state.row_costs()
            if self._per_parameter:
                row_costs = row_costs / self._entries[:, 1:]
            parts.append(row_costs)
        if state.num_sets:
            penalty = self._penalty[:, state.first_set :]
            set_costs, num_failed = state.set_costs(penalty, repair=repair)
            if self._per_parameter:
                set_costs = set_costs / self._entries[:, :1]
            parts.append(set_costs)
        costs = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return torch.maximum(costs, self._penalty), num_failed

    def _num_bad(self, costs: Tensor) -> Tensor:
        """Return how many candidates of each linear have costs that are not finite, [B, 1]."""
        return ((self._penalty == 0) & ~(costs < torch.inf)).sum(dim=1, keepdim=True)

    def _check(self, costs: Tensor, num_bad: Sequence[int]) -> None:
        for linear, number in enumerate(num_bad):
            if number:
                check_costs(self._names[linear], costs[linear][self._penalty[linear] == 0])

    # A step

    def _step(self, num_at_most: int, *, repair: bool) -> _Step:
        """Choose the next structures, at most `num_at_most` of each linear."""
        state = self.state
        costs, num_failed = self._costs(repair=repair)
        values, indices = costs.topk(num_at_most, largest=False)
        is_pruned = values <= self._largest_costs(num_at_most)
        if len(values) > 1:
            at_once = self._at_once.gather(1, self._budget[:, :1])
            is_pruned &= self._ranks[:num_at_most] < at_once
        sides = is_pruned[:, None]
        if state.wide is not None and state.num_sets:
            sides = sides & ((indices < state.first_set)[:, None] == self._are_rows)
        elimination = state.elimination(indices, is_pruned, sides, repair=repair)
        failed = elimination.failed
        if num_failed is not None:
            failed = failed + num_failed
        return _Step(
            costs=costs,
            values=values,
            indices=indices,
            is_pruned=is_pruned,
            num_pruned=sides.sum(dim=2),
            num_failed=failed,
            elimination=elimination,
        )

    def _largest_costs(self, num_at_most: int) -> Tensor:
        """Return the largest costs at which the cheapest are pruned, [B, 1 or num_at_most]."""
        needed = [remaining.needed for remaining in self._remaining]
        if max(needed) <= 0:
            return self._limit
        if min(needed) >= num_at_most:
            return self._most
        ranks = self._ranks[:num_at_most]
        is_needed = ranks < self._budget[:, 1:] if len(needed) > 1 else ranks < needed[0]
        return torch.where(is_needed, self._most, self._limit)

    def _read_step(
        self, num_at_most: int, *, is_first: bool
    ) -> tuple[_Step, Sequence[tuple[int, int]]]:
        """Return a step, and the numbers of rows and of sets that it prunes of each linear.

        The host reads from the device once, and once more if a decomposition failed.
        """
        step = self._step(num_at_most, repair=False)
        num_sides = step.num_pruned.shape[1]
        columns = [step.num_pruned, step.num_failed[:, None]]
        if is_first:
            columns.append(self._num_bad(step.costs))
        report = torch.cat(columns, dim=1).tolist()
        if is_first:
            self._check(step.costs, [numbers[-1] for numbers in report])
        if any(numbers[num_sides] for numbers in report):
            step = self._step(num_at_most, repair=True)
            report = step.num_pruned.tolist()
        num_pruned = []
        for numbers in report:
            if self.state.wide is None:
                num_pruned.append((0, numbers[0]))
            else:
                num_pruned.append((numbers[0], sum(numbers[1:num_sides])))
        return step, num_pruned

    # After a step

    def _subtract(self, num_pruned: Sequence[tuple[int, int]], on_device: Tensor) -> None:
        """Subtract the structures that a step pruned from those that remain.

        Args:
            num_pruned: rows and sets of each linear.
            on_device: the same numbers on the device, see `_Step`.
        """
        for remaining, (rows, sets) in zip(self._remaining, num_pruned, strict=True):
            remaining.remove(rows, sets)
        if len(num_pruned) > 1:
            self._budget -= on_device.sum(dim=1, keepdim=True)
        if self._per_parameter and on_device.shape[1] > 1:
            self._entries -= on_device
            if any(min(remaining.rows, remaining.sets) <= 0 for remaining in self._remaining):
                self._entries.clamp_(min=1)

    def _shrink(self, num_pruned: Sequence[tuple[int, int]], on_device: Tensor) -> None:
        """Leave out the linears whose paths have ended, rows or sets, where half of them are gone.

        Args:
            num_pruned: as for `_subtract`.
            on_device: as for `_subtract`.
        """
        going = []
        num_rows = 1
        num_sets = 1
        for n, (rows, sets) in enumerate(num_pruned):
            if rows or sets:
                going.append(n)
                num_rows = max(num_rows, self._remaining[n].rows)
                num_sets = max(num_sets, self._remaining[n].sets)
        has_half_rows = 2 * num_rows <= self.state.first_set
        has_half_sets = 2 * num_sets <= self.state.num_sets
        is_half = has_half_rows or has_half_sets
        if 2 * len(going) > len(num_pruned) and not is_half:
            return
        self._write()
        if len(going) < len(num_pruned):
            # a stable sort puts those that go on first, in their order
            has_ended = (on_device.sum(dim=1) == 0).to(torch.uint8)
            self._select(going, has_ended.argsort(stable=True)[: len(going)])
        if is_half:
            self._restrict(num_rows, num_sets)

    def _select(self, going: Sequence[int], linears: Tensor) -> None:
        """Keep some of the linears, given by their numbers on the host and on the device."""
        self._remaining = [self._remaining[n] for n in going]
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
        """Keep `num_rows` rows and `num_sets` sets: all that are left, and some that are gone."""
        first = self.state.first_set
        is_gone = self._penalty.isinf().to(torch.uint8)
        rows = is_gone[:, :first].argsort(dim=1, stable=True)[:, :num_rows]
        sets = is_gone[:, first:].argsort(dim=1, stable=True)[:, :num_sets]
        kept = torch.cat([rows, first + sets], dim=1)
        self._penalty = self._penalty.gather(1, kept)
        self._numbers = self._numbers.gather(1, kept)
        self.state.restrict(rows, sets)

    def _write(self) -> None:
        """Write the marginal costs of the steps since the last call."""
        if not self._steps:
            return
        all_indices, all_values, all_pruned = zip(*self._steps, strict=True)
        indices = torch.cat(all_indices, dim=1)
        values = torch.cat(all_values, dim=1)
        is_pruned = torch.cat(all_pruned, dim=1)
        self._steps.clear()
        costs = torch.cat([self._highest, values.masked_fill(~is_pruned, -torch.inf)], dim=1)
        costs = costs.cummax(dim=1).values[:, 1:]
        self._highest = costs[:, -1:]
        # costs of what was not pruned go to a last column that is never read
        places = self._numbers.gather(1, indices)
        places.masked_fill_(~is_pruned, self._marginal.shape[1] - 1)
        self._marginal[self._members] = self._marginal[self._members].scatter_(1, places, costs)


def _count_structures(
    may_prune: Tensor, first_set: int, limits: Sequence[Limits], *, is_padded: bool
) -> list[_Remaining]:
    """Return the numbers of structures of each linear; see `GreedyBatch` for the arguments."""
    exists = may_prune if is_padded else torch.ones_like(may_prune)
    candidates = may_prune.sum(dim=1).tolist()
    rows = exists[:, :first_set].sum(dim=1).tolist()
    sets = exists[:, first_set:].sum(dim=1).tolist()
    counts = []
    for n, limit in enumerate(limits):
        assert limit.per_parameter == limits[0].per_parameter
        counts.append(
            _Remaining(
                candidates=candidates[n],
                rows=rows[n],
                sets=sets[n],
                needed=limit.needed,
                least=limit.least,
            )
        )
    return counts


def _step_sizes(counts: Sequence[_Remaining]) -> list[list[int]]:
    """Return `num_at_once` of each linear for every number of candidates up to the largest."""
    max_candidates = max(count.candidates for count in counts)
    sizes_of: dict[int, list[int]] = {}  # by `least`
    for count in counts:
        if count.least not in sizes_of:
            sizes = [num_at_once(left, count.least) for left in range(max_candidates + 1)]
            sizes_of[count.least] = sizes
    return [sizes_of[count.least] for count in counts]


def _cost_bounds(limits: Sequence[Limits], largest: float) -> Tensor:
    """Return `limit` and `most` of each linear, [2, B, 1] float64."""
    ends = []
    most = []
    for limit in limits:
        end = math.inf if limit.limit is None else limit.limit
        ends.append(end)
        most.append(max(end, limit.most))
    return torch.tensor([ends, most], dtype=torch.float64).clamp_(max=largest)[:, :, None]
