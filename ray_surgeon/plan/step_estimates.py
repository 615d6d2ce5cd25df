"""What steps need in which linears have their turns, or blocks."""

from __future__ import annotations

from collections.abc import Sequence

from ray_surgeon.plan.counts import NOTHING, Counted, StepPlan
from ray_surgeon.plan.estimate import WorkerView


def linear_by_linear(
    worker: WorkerView, name: str, largest: float, flops: float, kept: float, counts: Counted
) -> StepPlan:
    """Return a step in which linears have their turns, each on the replica that owns it.

    Args:
        worker: of one replica.
        name: of the step.
        largest: bytes on the device of one linear, at most.
        flops: of all linears, in float32.
        kept: bytes on the device of all linears together.
        counts: of all linears.
    """
    N = worker.num_replicas
    factors = worker.all_factors / N
    on_device = factors * (worker.stores.factors == "device")
    device = worker.idle + on_device + kept / N + largest
    host = worker.host + factors * (worker.stores.factors == "host" and worker.device_is_host)
    moved = worker.moved(worker.stores.factors, factors)
    return StepPlan(name, device, host, 0.0, flops / N, *moved, counts=counts.times(1 / N))


def block_by_block(
    worker: WorkerView,
    name: str,
    of_linears: Sequence[tuple[float, float]],
    counts: Counted = NOTHING,
) -> StepPlan:
    """Return a step in which linears change while all sequences pass.

    It needs a block's second moments and one linear at a time, of which `of_linears` has bytes
    and operations.
    """
    T = worker.sequence_length
    blocks = worker.shapes.linears[worker.blocks.first : worker.blocks.last]
    largest = max(sum(4.0 * linear.num_columns**2 for linear in block) for block in blocks)
    widest = max(linear.num_columns for linear in worker.linears)
    states = worker.sequences * T * worker.hidden_size * worker.shapes.width
    passing = states + worker.forward_bytes(T) + 4 * T * widest
    device = worker.weights + passing + largest + max(size for size, _ in of_linears)
    flops = worker.sequences * T * 4 * worker.active
    in_float32 = sum(flops for _, flops in of_linears) / worker.num_replicas
    host = worker.host + largest * (worker.stores.factors == "host")
    moved = worker.moved(worker.stores.weights, 2 * worker.all_blocks)
    counts += worker.pass_counts(worker.sequences, T, 2.0, heads=0.0, together=1)
    return StepPlan(name, device, host, flops, in_float32, *moved, counts=counts)
