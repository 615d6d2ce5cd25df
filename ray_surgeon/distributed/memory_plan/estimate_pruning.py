"""Needs of the pruning in a shot: curvature, costs and update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ray_surgeon.distributed.memory_plan.estimate_reconstruction import (
    estimate_reconstruction,
    kept_inputs,
)
from ray_surgeon.distributed.memory_plan.linear_needs import needs_of_linears
from ray_surgeon.distributed.memory_plan.planned_job import PlannedCurvature, PlannedJob
from ray_surgeon.distributed.memory_plan.step_plan import StepPlan
from ray_surgeon.distributed.memory_plan.worker_view import WorkerView
from ray_surgeon.maths.group_batch import KEPT_BYTES
from ray_surgeon.models.layout import LinearShape


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
