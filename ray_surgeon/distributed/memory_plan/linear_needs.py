"""Needs of each pruning method for one linear, in its costs and in its update."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ray_surgeon.config.pruning import (
    ElementsSection,
    RowsColumnsSection,
    SparseGPTSection,
    WandaSection,
)
from ray_surgeon.distributed.memory_plan.planned_job import PlannedGroups, PlannedJob
from ray_surgeon.distributed.memory_plan.worker_view import WorkerView
from ray_surgeon.maths.greedy import num_at_once
from ray_surgeon.maths.group_batch import bytes_needed, most_at_once
from ray_surgeon.models.layout import LinearShape

_HEAD = 128
"""Columns of a group of attention."""

ShapeKey = tuple[str, int, int]  # role, rows and columns


@dataclass(frozen=True)
class LinearNeeds:
    """Needs of a method for one linear beside its weight and packed factors.

    Bytes are on the device, while that linear is treated.
    """

    costs_bytes: float = 0.0
    costs_flops: float = 0.0
    update_bytes: float = 0.0
    update_flops: float = 0.0
    # from its costs to its update, of all linears at the same time
    kept_bytes: float = 0.0
    batch_bytes: float = 0.0  # of one linear in a batch, see `together`
    reused_bytes: float = 0.0  # on a CPU, kept while costs are computed, up to a limit
    together: int = 1  # the largest number of linears of one shape in a batch of costs
    # read or written in the device's memory beside products
    costs_memory_bytes: float = 0.0
    update_memory_bytes: float = 0.0


def needs_of_linears(
    worker: WorkerView, job: PlannedJob
) -> list[tuple[ShapeKey, LinearNeeds]]:
    """Return the needs of a worker's linears that are ranked, or updated by their factors.

    They are computed once for all linears of a shape; a mixture has thousands of these.
    """
    of_shapes: dict[ShapeKey, LinearNeeds] = {}
    needs = []
    for linear in worker.linears:
        if linear.name not in job.gathered:
            continue
        key = (linear.role, linear.num_rows, linear.num_columns)
        if key not in of_shapes:
            of_shapes[key] = _needs_of_linear(job, linear)
        needs.append((key, of_shapes[key]))
    return needs


def _needs_of_linear(job: PlannedJob, shape: LinearShape) -> LinearNeeds:
    pruning = job.pruning
    if isinstance(pruning, RowsColumnsSection):
        return _for_rows_and_columns(pruning, shape)
    if isinstance(pruning, ElementsSection):
        return _for_elements(pruning, shape)
    if isinstance(pruning, SparseGPTSection | WandaSection):
        return _for_layerwise(shape)
    assert job.groups is not None
    return _for_consumers(job.groups, shape)


def _for_rows_and_columns(section: RowsColumnsSection, shape: LinearShape) -> LinearNeeds:
    """Both factors of every linear are factorised, then the parts that stay."""
    R = shape.num_rows
    C = shape.num_columns
    reach = min(1.0, 2 * section.target_sparsity)
    return LinearNeeds(
        costs_bytes=4 * ((2 + reach) * (C**2 + R**2) + max(R, C) ** 2 + 6 * R * C),
        costs_flops=5.0 * (C**3 + R**3) + 6 * R * C * (R + C),
        update_bytes=4 * (C**2 + R**2 + 1.7 * max(R, C) ** 2 + 7 * R * C),
        update_flops=2.0 * (C**3 + R**3),
    )


def _for_elements(section: ElementsSection, shape: LinearShape) -> LinearNeeds:
    """Both factors are factorised for the costs.

    The update multiplies by both in every iteration of its solver.
    """
    R = shape.num_rows
    C = shape.num_columns
    units = section.units
    num_patterns = 0  # that are tried in every group of an N:M structure
    if section.costs == "obs" and units.m > 1:
        num_patterns = math.comb(units.m, units.n)
    num_iterations = 2
    if section.update.solver == "conjugate_gradients":
        num_iterations = section.update.num_iterations
    of_patterns = num_patterns * 2.0 * R * (C // units.m) * units.num_removed**2
    kept_bytes = 0.0
    if section.structure != "element":
        kept_bytes = 12.0 * R * C / units.m
    return LinearNeeds(
        costs_bytes=4 * (2 * (C**2 + R**2) + max(R, C) ** 2 + 5 * R * C),
        costs_flops=1.5 * (C**3 + R**3) + of_patterns,
        update_bytes=4 * (2.5 * (C**2 + R**2) + 10 * R * C),
        update_flops=num_iterations * 2.0 * R * C * (R + C),
        kept_bytes=kept_bytes,
    )


def _for_layerwise(shape: LinearShape) -> LinearNeeds:
    """SparseGPT and Wanda need A's Cholesky factor and its inverse."""
    R = shape.num_rows
    C = shape.num_columns
    return LinearNeeds(
        update_bytes=4 * (4 * C**2 + 4 * R * C),
        update_flops=2 / 3 * C**3 + 2 * R * C**2,
    )


def _for_consumers(groups: PlannedGroups, shape: LinearShape) -> LinearNeeds:
    """A consumer's A is factorised, then the part of it that stays."""
    R = shape.num_rows
    C = shape.num_columns
    # the mean of the layer and the shrunk factors, packed
    shrinking = 0 if shape.sees_all_tokens else 4 * (R**2 + C**2)
    num_groups = C // _HEAD if "att" in shape.role else C
    length = _length_of_path(num_groups, min(1.0, groups.share) * num_groups)
    # the first where nearly all stays
    measured = max(3.75 * C**2 + 2 * R * C, 2.2 * C**2 + 5 * R * C)
    together = most_at_once(R, C)
    batch_bytes = 0.0
    if together > 0:
        batch_bytes = bytes_needed(R, C)
    return LinearNeeds(
        costs_bytes=shrinking
        + 4 * ((2.6 + groups.reach) * C**2 + 2 * R**2 + 4.2 * R * C),
        costs_flops=5.0 * C**3 + R**3 + 4 * R**2 * C,
        update_bytes=shrinking + 4 * (measured + R**2),
        update_flops=2.0 * C**3,
        batch_bytes=batch_bytes,
        reused_bytes=4.0 * C**2,
        together=max(1, together),
        costs_memory_bytes=4.0 * (2 * C**2 + 6 * R * C) * length,
        update_memory_bytes=4.0 * (4 * C**2 + 6 * R * C),
    )


@functools.cache
def _length_of_path(num_groups: int, num_removed: float) -> int:
    """Return the length of a greedy path; each of its steps removes several groups at once."""
    left = num_groups
    length = 0
    while num_groups - left < num_removed:
        left -= num_at_once(left, 0)
        length += 1
    return length
