"""One global threshold over all linears.

Source: method.md section 5; The LLM Surgeon, section 3.2 (all costs are in the same unit, so one threshold allocates the
sparsity of every linear).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StructureCosts:
    """Costs of the alive rows and columns of one linear, as the threshold sees them.

    Attributes:
        name: the linear.
        num_parameters: entries of the whole linear, bias included.
        num_rows: alive rows.
        num_columns: alive columns, bias included.
        rows: [num candidates <= num_rows] costs of rows that may go.
        columns: [num candidates <= num_columns] costs of columns that may go (never the bias's).
    """

    name: str
    num_parameters: int
    num_rows: int
    num_columns: int
    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Threshold:
    """The threshold of a shot and what it removes: every structure whose cost is at most `value`."""

    value: float
    num_removed: int
    num_parameters: int

    @property
    def sparsity(self) -> float:
        """Removed fraction of the parameters."""
        return self.num_removed / self.num_parameters


def check_costs(name: str, costs: Tensor) -> None:
    """Refuse costs that would prune at random.

    Raises:
        FloatingPointError: a cost is NaN, infinite or negative; taking it for zero would say "prune me first".
    """
    if not torch.isfinite(costs).all() or (costs < 0).any():
        bad = int((~torch.isfinite(costs) | (costs < 0)).sum())
        raise FloatingPointError(f"{name}: {bad} of {costs.numel()} costs are NaN, infinite or negative")


def structured_threshold(costs: Sequence[StructureCosts], target_sparsity: float) -> Threshold:
    """Find the smallest threshold that removes at least the target fraction of all parameters.

    A linear with alive rows R and columns C of which p and q go loses p C + q R - p q entries: the overlap counts once.
    Bisection over the sorted costs; each probe counts by binary search, so the work is O((n + linears log n) log n) for n
    structures and nothing of size linears x structures is formed.

    Args:
        costs: one entry a linear.
        target_sparsity: fraction of all parameters to be gone after this shot, earlier shots included.

    Raises:
        ValueError: everything that may go is less than the target.
        FloatingPointError: see `check_costs`.
    """
    for linear in costs:
        check_costs(f"{linear.name} rows", linear.rows)
        check_costs(f"{linear.name} columns", linear.columns)
    ordered = [(c, c.rows.double().sort().values, c.columns.double().sort().values) for c in costs]
    num_parameters = sum(c.num_parameters for c in costs)

    def num_removed(value: float) -> int:
        probe, removed = torch.tensor(value, dtype=torch.float64), 0
        for linear, rows, columns in ordered:
            p = int(torch.searchsorted(rows, probe, right=True))
            q = int(torch.searchsorted(columns, probe, right=True))
            removed += linear.num_parameters - (linear.num_rows - p) * (linear.num_columns - q)
        return removed

    zero = torch.zeros(1, dtype=torch.float64)
    candidates = torch.cat([zero, *(side for _, rows, columns in ordered for side in (rows, columns))]).sort().values
    wanted = math.ceil(target_sparsity * num_parameters - 1e-6)
    low, high = 0, len(candidates) - 1
    if num_removed(float(candidates[high])) < wanted:
        most = num_removed(float(candidates[high])) / num_parameters
        raise ValueError(f"pruning.target_sparsity: {target_sparsity:g} cannot be reached; all candidates together are {most:.4f}")
    while low < high:
        middle = (low + high) // 2
        if num_removed(float(candidates[middle])) >= wanted:
            high = middle
        else:
            low = middle + 1
    value = float(candidates[low])
    return Threshold(value, num_removed(value), num_parameters)
