"""Needs of a recovery: steps of training, checks, and the dense model beside the pruned one.

It is checked on the windows held aside. The dense model, where it is beside the pruned one, sees
the sequences of several steps at once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from ray_surgeon.distributed.collectives import MESSAGE_BYTES
from ray_surgeon.distributed.memory_plan.planned_job import PlannedJob, PlannedRecovery
from ray_surgeon.distributed.memory_plan.step_plan import StepPlan
from ray_surgeon.distributed.memory_plan.worker_view import WorkerView

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
