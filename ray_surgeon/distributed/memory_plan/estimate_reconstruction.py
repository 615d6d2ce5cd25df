"""Needs of the reconstruction of layers, which is a part of the update."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from ray_surgeon.distributed.memory_plan.planned_job import PlannedReconstruction
from ray_surgeon.distributed.memory_plan.step_plan import StepPlan
from ray_surgeon.distributed.memory_plan.worker_view import WorkerView
from ray_surgeon.maths.reconstruction import TOKENS_AT_A_TIME
from ray_surgeon.models.layout import LinearShape

_FLOAT32_STEP_BYTES = 40.0
_NARROW_STEP_BYTES = 24.0
"""Bytes of a step for a parameter, in float32 and in a narrower dtype: Adam's, gradients, products.
"""
_HIDDEN = 7.0
_WIDE = 15.0
"""Entries that pass the memory for each of a token's hidden states and channels."""


class KeptInputs(NamedTuple):
    """Bytes on the host of the layers' inputs, in bfloat16."""

    in_curvature: float  # while the curvature pass collects them
    until_update: float  # from then to the end of the update


class _Traffic(NamedTuple):
    memory_bytes: float  # read or written in the device's own memory
    sent_bytes: float  # between workers


def estimate_reconstruction(
    worker: WorkerView, reconstruction: PlannedReconstruction
) -> StepPlan | None:
    """Return the training of one layer at a time, with inputs and outputs of all tokens.

    None if the worker has no such layer.
    """
    sizes = _trained_layers(worker, reconstruction)
    if not sizes:
        return None
    section = reconstruction.section
    flops_of_token: dict[int, float] = defaultdict(float)
    memory_bytes: dict[int, float] = defaultdict(float)
    sent_bytes: dict[int, float] = defaultdict(float)
    for linear, size in sizes.items():
        owner = worker.owners[linear.name]
        # whole, and in every epoch what is left, its weights' gradients and those of hidden entries
        flops_of_token[owner] += 2 * size + section.num_epochs * (
            4 * size + 2 * linear.size
        )
        traffic = _traffic(worker, reconstruction, linear, size, section.num_epochs)
        memory_bytes[owner] += traffic.memory_bytes
        sent_bytes[owner] += traffic.sent_bytes
    slowest = max(flops_of_token, key=lambda owner: flops_of_token[owner])
    if section.learning_rate is None:
        linear, size = next(iter(sizes.items()))
        num_layers = min(2, len(sizes))  # whose dense outputs serve all rates
        num_trials = reconstruction.num_rates * num_layers
        of_trial = reconstruction.trial_epochs * (4 * size + 2 * linear.size)
        flops_of_token[slowest] += num_layers * 2 * size + num_trials * of_trial
        traffic = _traffic(
            worker, reconstruction, linear, size, reconstruction.trial_epochs
        )
        memory_bytes[slowest] += num_trials * traffic.memory_bytes
        sent_bytes[slowest] += num_trials * traffic.sent_bytes
    return StepPlan(
        name="update",
        device=_device_bytes(worker, reconstruction, sizes),
        host=worker.host,
        flops=worker.num_sequences * worker.sequence_length * flops_of_token[slowest],
        memory_bytes=memory_bytes[slowest],
        sent_bytes=sent_bytes[slowest],
    )


def kept_inputs(worker: WorkerView, reconstruction: PlannedReconstruction) -> KeptInputs:
    """Return the bytes of the inputs of layers, from the curvature pass to the update."""
    layers = _trained_layers(worker, reconstruction)
    owners = [worker.owners[linear.name] for linear in layers]
    of_layer = 2.0 * worker.num_sequences * worker.sequence_length * worker.hidden_size
    most_owned = max(Counter(owners).values(), default=0)
    return KeptInputs(
        in_curvature=of_layer * _layers_at_once(worker, reconstruction, owners),
        until_update=of_layer * most_owned,
    )


def _trained_layers(
    worker: WorkerView, reconstruction: PlannedReconstruction
) -> dict[LinearShape, int]:
    """Return the last linears of a worker's trained layers, with the parameters of each layer.

    A fused producer is counted once.
    """
    layout = worker.shapes.layout
    sizes = {}
    for groups in layout.group_sets:
        if groups.kind in reconstruction.kinds:
            names = {groups.consumer, *(name for name, _ in groups.producers)}
            sizes[groups.consumer] = sum(layout.shapes[name].size for name in names)
    return {
        linear: sizes[linear.name] for linear in worker.linears if linear.name in sizes
    }


def _device_bytes(
    worker: WorkerView,
    reconstruction: PlannedReconstruction,
    sizes: dict[LinearShape, int],
) -> float:
    width = worker.shapes.width
    hidden = worker.hidden_size
    tokens = worker.num_sequences * worker.sequence_length
    # hidden entries: forward alone, or backward, too
    tokens_per_step = min(tokens, reconstruction.section.tokens_per_step)
    together = max(4 * TOKENS_AT_A_TIME, 7 * tokens_per_step)
    widest = max(linear.num_columns for linear in sizes)
    at_a_time = together * (width * widest + 4 * hidden)
    # float32: the whole layer, what is left of it, weights, gradients and two moments; narrow ones
    # take as much; and the consumer that is returned
    states = max(sizes.values()) * 24 + 4 * max(linear.size for linear in sizes)
    device = worker.idle + states + tokens * hidden * (2 + 2 * width) + at_a_time
    if worker.stores.factors == "device":
        return device + worker.all_factors / worker.num_replicas
    return device


def _traffic(
    worker: WorkerView,
    reconstruction: PlannedReconstruction,
    linear: LinearShape,
    size: int,
    num_epochs: float,
) -> _Traffic:
    """Return the traffic of the training of one layer.

    Args:
        worker: that owns the layer.
        reconstruction: of the job.
        linear: the last one of the layer.
        size: parameters of the layer.
        num_epochs: passes over the calibration tokens.
    """
    tokens = worker.num_sequences * worker.sequence_length
    tokens_per_step = min(tokens, reconstruction.section.tokens_per_step)
    num_batches = max(1, int(num_epochs * (tokens // tokens_per_step)))
    step_bytes = _NARROW_STEP_BYTES if worker.shapes.width < 4 else _FLOAT32_STEP_BYTES
    entries = _HIDDEN * worker.hidden_size + _WIDE * linear.num_columns
    memory_bytes = (1 + num_epochs) * tokens * worker.shapes.width * entries
    memory_bytes += num_batches * (step_bytes * size)
    sent_bytes = 0.0
    if worker.num_replicas > 1:  # the inputs of all replicas come to the owner
        sent_bytes = 2.0 * tokens * worker.hidden_size
    return _Traffic(memory_bytes, sent_bytes)


def _layers_at_once(
    worker: WorkerView, reconstruction: PlannedReconstruction, owners: Sequence[int]
) -> float:
    """Return the largest number of layers whose inputs a replica has at the same time.

    These are a part of those that are not sent yet, and all of its own.
    """
    N = worker.num_replicas
    if N == 1:
        return len(owners)
    total = worker.num_sequences
    backward = reconstruction.num_backward
    if backward is None:
        backward = total
    part = (-(-backward // N) + -(-(total - backward) // N)) / total
    most = 0.0
    for number in range(1, len(owners) + 1):
        own = max(Counter(owners[:number]).values())
        # one part more is on its way
        num_parts = len(owners) - number + 2
        most = max(most, own + num_parts * part)
    return most
