"""Needs of the pruning in a shot: curvature, costs and update."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ray_surgeon.config.pruning import (
    ElementsSection,
    RowsColumnsSection,
    SparseGPTSection,
    WandaSection,
)
from ray_surgeon.distributed.memory_plan.estimate_training import (
    estimate_reconstruction,
    kept_inputs,
)
from ray_surgeon.distributed.memory_plan.planned_job import (
    PlannedCurvature,
    PlannedGroups,
    PlannedJob,
    StepPlan,
)
from ray_surgeon.distributed.memory_plan.worker_view import WorkerView
from ray_surgeon.maths.greedy import num_at_once
from ray_surgeon.maths.group_batch import KEPT_BYTES, bytes_needed, most_at_once
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


def estimate_curvature(
    worker: WorkerView, job: PlannedJob, curvature: PlannedCurvature
) -> StepPlan:
    """Return the passes over the calibration text that gather A and G."""
    T = worker.sequence_length
    backward = _num_backward(worker, curvature)
    num_passes = curvature.num_passes
    loads = (worker.num_waves + -(-backward // worker.wave)) * worker.all_blocks
    weights = worker.moved(worker.stores.weights, loads)
    factors = worker.moved(
        worker.stores.factors, 2 * worker.num_waves * worker.all_factors
    )
    host_bytes = num_passes * (weights[0] + factors[0])
    disk_bytes = num_passes * (weights[1] + factors[1])

    on_device = worker.all_factors
    if worker.stores.factors != "device":
        on_device = worker.largest_factors
        if not worker.device_is_host:  # those of the next block are copied ahead
            on_device *= 2
    changes = curvature.num_changes * worker.hidden_size
    passing = worker.passing(more_kept=4 * changes, more_in_a_moment=12 * changes)
    device = worker.weights + on_device + passing
    host = worker.host
    if worker.stores.factors == "host" and worker.device_is_host:
        host += worker.all_factors
    host += worker.travelling(T)
    device += _whole_copies(worker, curvature)
    if job.reconstruction is not None:
        host += kept_inputs(worker, job.reconstruction).in_curvature

    memory_bytes, sent_bytes = _curvature_traffic(worker, job, backward)
    return StepPlan(
        name="curvature",
        device=device,
        host=host,
        flops=num_passes * T * _curvature_flops(worker, job, curvature, backward),
        host_bytes=host_bytes,
        disk_bytes=disk_bytes,
        bubble=worker.bubble(worker.sequences, worker.stores),
        memory_bytes=num_passes * memory_bytes,
        sent_bytes=num_passes * sent_bytes,
    )


def _num_backward(worker: WorkerView, curvature: PlannedCurvature) -> int:
    """Return the sequences that pass backward on the replica that has most of them."""
    section = curvature.section
    if section.gathers == "A":
        return 0
    of_all = section.sequences_backward or worker.num_sequences
    return -(-of_all // worker.num_replicas)


def _gathered(worker: WorkerView, job: PlannedJob) -> list[LinearShape]:
    return [linear for linear in worker.linears if linear.name in job.gathered]


def _curvature_flops(
    worker: WorkerView, job: PlannedJob, curvature: PlannedCurvature, backward: int
) -> float:
    """Return the operations of one pass for one place in every sequence."""
    part_of_tokens = worker.shapes.layout.part_of_tokens
    # half of each product is left out
    of_A: dict[int, float] = {}
    G_flops = 0.0
    for linear in _gathered(worker, job):
        part = part_of_tokens(linear)
        of_A[linear.shared_input] = part * linear.num_columns**2
        G_flops += part * linear.num_rows**2
    num_forward = 2 if curvature.num_changes else 1
    forward = num_forward * 2 * worker.active + sum(of_A.values())
    head = worker.head_flops * (backward or worker.sequences)
    runs = worker.num_runs_forward
    further = runs * 2 * worker.active + 2 * worker.head_flops + G_flops
    return worker.sequences * forward + head + backward * further


def _curvature_traffic(
    worker: WorkerView, job: PlannedJob, backward: int
) -> tuple[float, float]:
    """Return the bytes of one pass in the device's memory, and those between workers."""
    T = worker.sequence_length
    runs = worker.num_runs_forward
    forward_only = worker.sequences - backward
    heads = 0.0 if backward else 1.0
    memory_bytes = worker.pass_bytes(forward_only, T, heads=heads)
    memory_bytes += worker.pass_bytes(backward, T, forward=runs, backward=1.0)
    sent_bytes = worker.sent_bytes(forward_only * T, num_passes=1)
    sent_bytes += worker.sent_bytes(backward * T, num_passes=runs + 1)
    columns: dict[int, int] = {}
    of_G = 0.0
    for linear in _gathered(worker, job):
        columns[linear.shared_input] = linear.num_columns
        of_G += 4.0 * linear.num_rows**2
    of_A = sum(4.0 * number**2 for number in columns.values())
    memory_bytes += -(-worker.sequences // worker.together) * of_A
    memory_bytes += -(-backward // worker.together) * of_G
    if worker.num_replicas > 1:  # every factor goes to its owner
        sent_bytes += worker.all_factors
    return memory_bytes, sent_bytes


def _whole_copies(worker: WorkerView, curvature: PlannedCurvature) -> float:
    """Return the bytes of copies of A and G as whole matrices."""
    squares = sum(linear.num_rows**2 + linear.num_columns**2 for linear in worker.linears)
    return curvature.num_copies * 4.0 * squares


def estimate_costs(worker: WorkerView, job: PlannedJob) -> StepPlan:
    """Return the costs of everything that may be pruned, linear by linear or in batches."""
    needs = needs_of_linears(worker, job)
    flops = sum(own.costs_flops for _, own in needs)
    kept_bytes = sum(own.kept_bytes for _, own in needs)
    largest = max((own.costs_bytes for _, own in needs), default=0.0)
    memory_bytes = 0.0
    reused_bytes = 0.0
    numbers = Counter(key for key, _ in needs)
    for key, own in dict(needs).items():
        number = numbers[key]
        memory_bytes += number * own.costs_memory_bytes
        reused_bytes += number * own.reused_bytes
        if not worker.device_is_host:  # a CPU has no batches
            largest = max(largest, min(number, own.together) * own.batch_bytes)
    if worker.device_is_host:
        largest += min(KEPT_BYTES, reused_bytes / worker.num_replicas)
    step = _linear_by_linear(
        worker,
        "costs",
        largest=largest,
        flops=flops,
        kept_bytes=kept_bytes,
        memory_bytes=memory_bytes,
    )
    return _beside_curvature(step, worker, job)


def estimate_update(worker: WorkerView, job: PlannedJob) -> list[StepPlan]:
    """Return the update of what stays, and the reconstruction of layers in it.

    Methods without costs update block by block. There is no step if nothing narrower than a layer
    is pruned.
    """
    needs = needs_of_linears(worker, job)
    if job.curvature is None:
        if not needs:
            return []
        of_linears = [(own.update_bytes, own.update_flops) for _, own in needs]
        return [block_by_block(worker, "update", of_linears)]
    numbers = Counter(key for key, _ in needs)
    memory_bytes = 0.0
    for key, own in dict(needs).items():
        memory_bytes += numbers[key] * own.update_memory_bytes
    step = _linear_by_linear(
        worker,
        "update",
        largest=max((own.update_bytes for _, own in needs), default=0.0),
        flops=sum(own.update_flops for _, own in needs),
        kept_bytes=sum(own.kept_bytes for _, own in needs),
        memory_bytes=memory_bytes,
    )
    if job.reconstruction is not None:
        training = estimate_reconstruction(worker, job.reconstruction)
        if training is not None:
            step = step.then(training)
    return [_beside_curvature(step, worker, job)]


def _beside_curvature(step: StepPlan, worker: WorkerView, job: PlannedJob) -> StepPlan:
    """Return a step with what the curvature pass leaves until the end of the update."""
    device = step.device
    host = step.host
    if job.curvature is not None:
        device += _whole_copies(worker, job.curvature)
    if job.reconstruction is not None:
        host += kept_inputs(worker, job.reconstruction).until_update
    return replace(step, device=device, host=host)


def _linear_by_linear(
    worker: WorkerView,
    name: str,
    *,
    largest: float,
    flops: float,
    kept_bytes: float,
    memory_bytes: float,
) -> StepPlan:
    """Return a step that treats linears one by one, each on the replica that owns it.

    Args:
        worker: of one replica.
        name: of the step.
        largest: the most bytes on the device for one linear.
        flops: of all linears, in float32.
        kept_bytes: on the device for all linears together.
        memory_bytes: read or written for all linears.
    """
    N = worker.num_replicas
    place = worker.stores.factors
    factors = worker.all_factors / N
    device: float = worker.idle
    if place == "device":
        device += factors
    device = device + kept_bytes / N + largest
    host = worker.host
    if place == "host" and worker.device_is_host:
        host += factors
    host_bytes, disk_bytes = worker.moved(place, factors)
    return StepPlan(
        name=name,
        device=device,
        host=host,
        float32_flops=flops / N,
        host_bytes=host_bytes,
        disk_bytes=disk_bytes,
        memory_bytes=(1 / N) * memory_bytes,
    )


def block_by_block(
    worker: WorkerView, name: str, of_linears: Sequence[tuple[float, float]]
) -> StepPlan:
    """Return a step that changes linears, block by block, while all sequences pass.

    The second moments of one block are on the device, and one linear at a time.

    Args:
        worker: of one replica.
        name: of the step.
        of_linears: bytes on the device and operations in float32 of each linear.
    """
    T = worker.sequence_length
    largest = 0.0
    for block in worker.shapes.linears[worker.blocks.first : worker.blocks.last]:
        largest = max(largest, sum(4.0 * linear.num_columns**2 for linear in block))
    widest = max(linear.num_columns for linear in worker.linears)
    states = worker.sequences * T * worker.hidden_size * worker.shapes.width
    passing = states + worker.forward_bytes(T) + 4 * T * widest
    host = worker.host
    if worker.stores.factors == "host":
        host += largest
    host_bytes, disk_bytes = worker.moved(worker.stores.weights, 2 * worker.all_blocks)
    return StepPlan(
        name=name,
        device=worker.weights + passing + largest + max(size for size, _ in of_linears),
        host=host,
        flops=worker.sequences * T * 4 * worker.active,
        float32_flops=sum(flops for _, flops in of_linears) / worker.num_replicas,
        host_bytes=host_bytes,
        disk_bytes=disk_bytes,
        memory_bytes=worker.pass_bytes(
            worker.sequences, T, forward=2.0, heads=0.0, together=1
        ),
        sent_bytes=worker.sent_bytes(worker.sequences * T, num_passes=2),
    )
