"""Needs of the reconstruction of layers, and of the training after pruning."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ray_surgeon.distributed.collectives import MESSAGE_BYTES
from ray_surgeon.distributed.memory_plan.planned_job import (
    PlannedJob,
    PlannedReconstruction,
    PlannedRecovery,
    StepPlan,
)
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


_ADAM_BYTES = 28.0
"""Bytes of a step of Adam for a parameter in float32: four read, three written."""
_GRADIENT_BYTES = 4.0
"""Bytes of a weight in float32 while it makes a step: its gradient."""
_PASS_BYTES = 16.0
"""Bytes of a product B A and its copies, for an entry."""


class _Kept(NamedTuple):
    device: float  # bytes
    host: float


def estimate_recovery(
    worker: WorkerView, job: PlannedJob, recovery: PlannedRecovery
) -> list[StepPlan]:
    """Return the parts of the training, one after the other."""
    T = worker.sequence_length
    num_steps = recovery.num_steps
    num_checks = 0
    if job.num_held:
        num_checks = 1 + -(-num_steps // recovery.steps_between_checks)
        if recovery.section.learning_rate is None:
            # the second rate is taken most often, after the first one was tried
            num_steps += recovery.num_trial_steps
            num_checks += 2
    parts = [
        _start(worker, recovery),
        _training_step(worker, job, recovery).times(num_steps),
    ]
    if job.num_held:
        check = worker.measuring("recovery", [(job.num_held, T)])
        parts.append(check.times(num_checks))
    if recovery.section.has_teacher:
        # those of a trial are seen again where they are many
        num_passes = -(-num_steps // recovery.steps_ahead)
        parts.append(_teacher_ahead(worker, recovery).times(num_passes))
    kept = _kept(worker, job, recovery)
    whole = []
    for part in parts:
        whole.append(
            replace(part, device=part.device + kept.device, host=part.host + kept.host)
        )
    return whole


def _teacher_ahead(worker: WorkerView, recovery: PlannedRecovery) -> StepPlan:
    """Return a pass of the dense model over the sequences of several steps."""
    num_ahead = _sequences_ahead(recovery)
    of_replica = -(-num_ahead // worker.num_replicas)
    step = worker.measuring(
        "recovery", [(num_ahead, worker.sequence_length)], of_teacher=True
    )
    return replace(step, bubble=worker.bubble(of_replica, worker.stores.of_teacher))


def _sequences_ahead(recovery: PlannedRecovery) -> int:
    """Return the sequences that the dense model sees in one pass."""
    num_steps = min(recovery.steps_ahead, recovery.num_steps)
    return num_steps * recovery.section.sequences_per_step


def _num_entries(worker: WorkerView, recovery: PlannedRecovery) -> float:
    """Return the number of trained parameters."""
    rank = recovery.section.rank
    if rank == "all":
        return worker.all_blocks / worker.shapes.width
    sizes = [linear.num_rows + linear.num_columns for linear in worker.linears]
    return float(rank * sum(sizes))


def _kept(worker: WorkerView, job: PlannedJob, recovery: PlannedRecovery) -> _Kept:
    """Return the bytes that stay while the training goes on."""
    if recovery.section.trains_all:
        device, host = _kept_of_weights(worker, job, recovery)
    else:
        device, host = _kept_of_corrections(worker, job, recovery)
    # on a CPU masks of elements are those of the host
    if job.by_element and not worker.device_is_host:
        device += sum(linear.size for linear in worker.linears)
    if recovery.section.has_teacher:
        of_teacher = worker.outside
        if worker.stores.teacher == "device":
            of_teacher += worker.all_blocks
        device += of_teacher
        if worker.stores.teacher == "host":
            host += worker.pinned_blocks
        host += worker.remembered(_sequences_ahead(recovery) * worker.sequence_length)
    return _Kept(device, host)


def _kept_of_corrections(
    worker: WorkerView, job: PlannedJob, recovery: PlannedRecovery
) -> _Kept:
    """Return the bytes of low-rank corrections.

    These are A, B and gradients (between replicas one copy more), Adam's moments at a linear's
    owner, and the best state so far.
    """
    N = worker.num_replicas
    of_entry = 8 + (8 if N == 1 else 12 / N)
    if job.num_held:
        of_entry += 4 + 8 / N
    return _Kept(of_entry * _num_entries(worker, recovery), 0.0)


def _kept_of_weights(
    worker: WorkerView, job: PlannedJob, recovery: PlannedRecovery
) -> _Kept:
    """Return the bytes of a training of all weights.

    These are gradients; masters and moments at the owner, and the gradients in float32 of one
    block; a message and its copy; and on the host the weights as they were, and the best so far.
    """
    N = worker.num_replicas
    entries = _num_entries(worker, recovery)
    is_on_device = worker.stores.factors == "device"
    of_entry = 8
    # weights in float32 are their own masters
    if worker.shapes.width < 4 or not (is_on_device or worker.device_is_host):
        of_entry += 4
    own = of_entry * entries / N
    own += _GRADIENT_BYTES * entries / worker.num_blocks
    device: float = worker.all_blocks
    host: float = worker.all_blocks
    if job.num_held:
        host += worker.all_blocks
    if is_on_device:
        device += own
    else:
        host += own
    if N > 1:
        device += 2 * MESSAGE_BYTES
    return _Kept(device, host)


def _start(worker: WorkerView, recovery: PlannedRecovery) -> StepPlan:
    """Return the work at the start and the end; the dense model is loaded."""
    device: float = worker.weights
    if not recovery.section.trains_all:  # products B A are absorbed
        device += _PASS_BYTES * max(linear.size for linear in worker.linears)
    size = 0
    moved = 0
    if recovery.section.has_teacher:
        size = worker.all_blocks + worker.outside
        if not worker.device_is_host:
            moved = size
    return StepPlan(
        name="recovery",
        device=device,
        host=worker.host,
        host_bytes=moved,
        disk_bytes=size,
        memory_bytes=size,
    )


def _training_step(
    worker: WorkerView, job: PlannedJob, recovery: PlannedRecovery
) -> StepPlan:
    """Return one step of the training."""
    T = worker.sequence_length
    N = worker.num_replicas
    stores = worker.stores
    entries = _num_entries(worker, recovery)
    per_step = _sequences_of_replica(worker, recovery)
    columns = sum(linear.num_columns for linear in worker.linears)
    inputs = worker.shapes.width * columns / worker.num_blocks
    device = worker.weights + worker.passing(more_kept=inputs, num_sequences=per_step)
    if job.by_element and not recovery.section.trains_all:
        device += _PASS_BYTES * max(linear.size for linear in worker.linears)
    loads = 2 * -(-per_step // stores.wave_of(per_step, worker.num_shards))
    host_bytes, disk_bytes = worker.moved(stores.weights, loads * worker.all_blocks)
    if recovery.section.trains_all and stores.factors != "device":
        # gradients and weights; masters and moments pass the host's memory
        host_bytes += (2 * worker.shapes.width + _ADAM_BYTES) * entries / N

    runs = worker.num_runs_forward
    memory_bytes = worker.pass_bytes(per_step, T, forward=runs, backward=1.0)
    sent_bytes = worker.sent_bytes(per_step * T, num_passes=runs + 1)
    # parameters and two moments, read and written; gradients and the result are sent
    if recovery.section.trains_all:
        memory_bytes += _ADAM_BYTES * entries / N
        of_entry = 2.0 * worker.shapes.width
    else:
        memory_bytes += _ADAM_BYTES * entries
        of_entry = 12.0
    if N > 1:
        sent_bytes += of_entry * entries
    return StepPlan(
        name="recovery",
        device=device,
        host=worker.host + worker.travelling(T),
        flops=_flops_of_token(worker, recovery) * per_step * T,
        host_bytes=host_bytes,
        disk_bytes=disk_bytes,
        bubble=worker.bubble(per_step, stores),
        memory_bytes=memory_bytes,
        sent_bytes=sent_bytes,
    )


def _sequences_of_replica(worker: WorkerView, recovery: PlannedRecovery) -> int:
    """Return the sequences of a step on the replica that has most of them."""
    return -(-recovery.section.sequences_per_step // worker.num_replicas)


def _flops_of_token(worker: WorkerView, recovery: PlannedRecovery) -> float:
    """Return the operations of a step for a token: forward, and backward to what is trained."""
    runs = worker.num_runs_forward
    if recovery.section.trains_all:
        flops = 2 * worker.active * (2 + runs)
    else:
        flops = 2 * worker.active * (1 + runs)
        flops += 2 * _num_entries(worker, recovery) * (2 + runs)
    num_heads = 3 if recovery.section.loss == "kl" else 2
    return flops + worker.head_flops * num_heads
