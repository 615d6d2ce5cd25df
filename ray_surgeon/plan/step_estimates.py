"""Estimates of steps that treat one linear, or one block, after the other."""

from __future__ import annotations

from collections.abc import Sequence

from ray_surgeon.plan.counts import NOTHING, Counted, StepPlan
from ray_surgeon.plan.estimate import WorkerView


def linear_by_linear(
    worker: WorkerView, name: str, largest: float, flops: float, kept: float, counts: Counted
) -> StepPlan:
    """Return a step that treats linears one by one, each on the replica that owns it.

    Args:
        worker: of one replica.
        name: of the step.
        largest: the most bytes on the device for one linear.
        flops: of all linears, in float32.
        kept: bytes on the device for all linears together.
        counts: of all linears.
    """
    N = worker.num_replicas
    place = worker.stores.factors
    factors = worker.all_factors / N
    device: float = worker.idle
    if place == "device":
        device += factors
    device = device + kept / N + largest
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
        counts=counts.times(1 / N),
    )


def block_by_block(
    worker: WorkerView,
    name: str,
    of_linears: Sequence[tuple[float, float]],
    counts: Counted = NOTHING,
) -> StepPlan:
    """Return a step that changes linears, block by block, while all sequences pass.

    The second moments of one block are on the device, and one linear at a time.

    Args:
        worker: of one replica.
        name: of the step.
        of_linears: bytes on the device and operations in float32 of each linear.
        counts: beside those of the passes.
    """
    T = worker.sequence_length
    largest = 0.0
    for block in worker.shapes.linears[worker.blocks.first : worker.blocks.last]:
        largest = max(largest, sum(4.0 * linear.num_columns**2 for linear in block))
    widest = max(linear.num_columns for linear in worker.linears)
    states = worker.sequences * T * worker.hidden_size * worker.shapes.width
    passing = states + worker.forward_bytes(T) + 4 * T * widest
    float32_flops = sum(flops for _, flops in of_linears) / worker.num_replicas
    host = worker.host
    if worker.stores.factors == "host":
        host += largest
    host_bytes, disk_bytes = worker.moved(worker.stores.weights, 2 * worker.all_blocks)
    passes = worker.pass_counts(worker.sequences, T, forward=2.0, heads=0.0, together=1)
    return StepPlan(
        name=name,
        device=worker.weights + passing + largest + max(size for size, _ in of_linears),
        host=host,
        flops=worker.sequences * T * 4 * worker.active,
        float32_flops=float32_flops,
        host_bytes=host_bytes,
        disk_bytes=disk_bytes,
        counts=counts + passes,
    )
