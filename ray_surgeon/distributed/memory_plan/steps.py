"""Bytes, operations and moved bytes of every step of a job on one worker.

One function a step, called one after the other in the order in which steps run. Those of pruning
and training have their own files, `estimate_pruning.py`, `estimate_reconstruction.py` and
`estimate_recovery.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ray_surgeon.config.groups import MEASURED
from ray_surgeon.config.sections import GenerationSection, QuantizeSection
from ray_surgeon.distributed.memory_plan.estimate_pruning import (
    block_by_block,
    estimate_costs,
    estimate_curvature,
    estimate_update,
)
from ray_surgeon.distributed.memory_plan.estimate_training import estimate_recovery
from ray_surgeon.distributed.memory_plan.planned_job import (
    PlannedDepth,
    PlannedExports,
    PlannedJob,
    PlannedTeacher,
    Shapes,
    StepPlan,
)
from ray_surgeon.distributed.memory_plan.worker_view import WorkerView
from ray_surgeon.distributed.placement import Placement
from ray_surgeon.distributed.weights import FILE_BYTES
from ray_surgeon.maths.products import PackedSymmetric
from ray_surgeon.memory.stores import Stores
from ray_surgeon.models.layout import ModelLayout

PROMPT_TOKENS = 256
"""Tokens of a prompt, chat template included; a guess."""
_PINNED_BYTES_PER_S = 4e9
"""Rate at which the host pins memory."""
_PROCESS_S = 8.0
"""Seconds until a fresh process has imported torch and transformers."""


@dataclass(frozen=True)
class WorkerPlan:
    """One worker, and the steps of the job on it."""

    view: WorkerView
    steps: tuple[StepPlan, ...]  # in their order, each name once


def plan_worker(
    shapes: Shapes, placement: Placement, stores: Stores, device_is_host: bool, shard: int
) -> WorkerPlan:
    """Plan the worker of a shard that has most to do.

    Args:
        shapes: sizes of the model, with the job.
        placement: of the job.
        stores: where idle weights and factors are kept.
        device_is_host: whether device and host have one memory.
        shard: of the worker.
    """
    job = shapes.job
    worker = WorkerView(
        shapes=shapes,
        placement=placement,
        stores=stores,
        device_is_host=device_is_host,
        shard=shard,
    )
    teacher = None
    if job.teacher is not None:
        teacher = _view_with_teacher(worker, job.teacher)
        worker.host += _kept_on_host(teacher, job)
    worker.host += _kept_on_host(worker, job)
    return WorkerPlan(view=worker, steps=tuple(_estimate_steps(worker, teacher, job)))


def _estimate_steps(
    worker: WorkerView, teacher: WorkerView | None, job: PlannedJob
) -> list[StepPlan]:
    """Return the steps of a job in their order.

    Args:
        worker: of one replica.
        teacher: the same worker with the teacher in place of the model, if there is one.
        job: that is planned.
    """
    parts = []
    parts.extend(_before_first_shot(worker, teacher, job))
    parts.extend(_in_a_shot(worker, job))
    if job.exports is not None:
        parts.extend(estimate_exports(worker, job.exports))
    steps = _joined(parts)
    if job.teacher is not None:
        return _with_head_of_teacher(steps, worker, job.teacher)
    return steps


def _before_first_shot(
    worker: WorkerView, teacher: WorkerView | None, job: PlannedJob
) -> list[StepPlan]:
    """Return the steps before the first shot; a teacher is there before the model is loaded."""
    parts = []
    if teacher is None:
        parts.append(estimate_load(worker))
    else:
        parts.extend(estimate_teacher(teacher, job))
    if job.written_texts:
        parts.append(worker.writing("sampling", job.written_texts))
    if job.answers is not None:
        parts.append(estimate_dense_answers(worker, job.answers))
    if teacher is not None:
        parts.append(estimate_load(worker))
    return parts


def _in_a_shot(worker: WorkerView, job: PlannedJob) -> list[StepPlan]:
    """Return the steps of a shot; a step may have several parts, one after the other."""
    parts = []
    if job.depth is not None:
        parts.append(estimate_depth(worker, job, job.depth))
    if job.curvature is not None:
        parts.append(estimate_curvature(worker, job, job.curvature))
        parts.append(estimate_costs(worker, job))
    parts.extend(estimate_update(worker, job))
    if job.recovery is not None:
        parts.extend(estimate_recovery(worker, job, job.recovery))
    parts.append(worker.measuring("evaluation", job.measured_texts))
    if job.answers is not None:
        parts.extend(estimate_pruned_answers(worker, job.answers))
    parts.append(estimate_commit(worker))
    return parts


def _joined(parts: Sequence[StepPlan]) -> list[StepPlan]:
    """Return one step for all parts of a name."""
    steps: dict[str, StepPlan] = {}
    for part in parts:
        if part.name in steps:
            steps[part.name] = steps[part.name].then(part)
        else:
            steps[part.name] = part
    return list(steps.values())


def _kept_on_host(worker: WorkerView, job: PlannedJob) -> float:
    """Return the host's bytes of masks of elements and of the dense model's states of texts.

    They are there in every step. Other masks are small.
    """
    size = 0.0
    if job.by_element:
        size += sum(linear.size for linear in worker.linears)
    if job.answers is not None:
        of_answer = PROMPT_TOKENS + job.answers.max_new_tokens
        size += worker.remembered(job.answers.num_prompts * of_answer)
    if job.recovery is not None and job.recovery.section.sees_calibration:
        size += worker.remembered(worker.num_sequences * worker.sequence_length)
    size += worker.remembered(sum(count * length for count, length in job.measured_texts))
    return size


# Before the first shot


def estimate_load(worker: WorkerView) -> StepPlan:
    """Return the loading of the weights, until they are where they stay."""
    size = worker.all_blocks + worker.outside
    moved = 0
    waiting_s = 0.0
    if not worker.device_is_host:
        moved = size
        waiting_s = worker.host / _PINNED_BYTES_PER_S
    return StepPlan(
        name="load",
        device=worker.weights,
        host=worker.host + worker.shapes.largest_tensor,
        host_bytes=moved,
        disk_bytes=size,
        memory_bytes=size,
        waiting_s=waiting_s,
    )


def estimate_teacher(teacher: WorkerView, job: PlannedJob) -> list[StepPlan]:
    """Return the work with the teacher, before the model is loaded, as parts of one step.

    Args:
        teacher: the worker with the teacher in place of the model.
        job: that is planned.
    """
    parts = []
    if job.answers is not None:
        parts.append(estimate_dense_answers(teacher, job.answers))
    parts.append(estimate_load(teacher))
    parts.append(teacher.measuring("evaluation", job.measured_texts))
    if job.answers is not None:
        parts.extend(estimate_pruned_answers(teacher, job.answers))
    return [replace(part, name="teacher") for part in parts]


def _view_with_teacher(worker: WorkerView, teacher: PlannedTeacher) -> WorkerView:
    """Return a worker with the teacher in place of the model."""
    job = worker.shapes.job
    return WorkerView(
        shapes=_shapes_of_teacher(
            teacher.layout, job.dtype, job.num_sequences, job.sequence_length
        ),
        placement=teacher.placement,
        stores=worker.stores,
        device_is_host=worker.device_is_host,
        shard=worker.shard,
    )


@functools.lru_cache(maxsize=1)
def _shapes_of_teacher(
    layout: ModelLayout, dtype: str, num_sequences: int, sequence_length: int
) -> Shapes:
    job = PlannedJob(dtype, num_sequences=num_sequences, sequence_length=sequence_length)
    return Shapes(layout, job)


def _with_head_of_teacher(
    steps: Sequence[StepPlan], worker: WorkerView, teacher: PlannedTeacher
) -> list[StepPlan]:
    """Return the steps with the teacher's head, which stays on the last shard's device."""
    if not worker.blocks.is_last:
        return list(steps)
    config = teacher.layout.config
    head = config.vocab_size * config.hidden_size * worker.shapes.width
    with_head = []
    for step in steps:
        if step.name == "teacher":
            with_head.append(step)
        else:
            with_head.append(replace(step, device=step.device + head))
    return with_head


def estimate_dense_answers(worker: WorkerView, section: GenerationSection) -> StepPlan:
    """Return the writing of the dense model's answers to prompts."""
    texts = [(section.num_prompts, section.max_new_tokens)]
    return worker.writing("answers", texts, PROMPT_TOKENS)


def estimate_pruned_answers(
    worker: WorkerView, section: GenerationSection
) -> list[StepPlan]:
    """Return the writing of a pruned model's answers, and their comparison with the dense ones."""
    length = PROMPT_TOKENS + section.max_new_tokens
    return [
        estimate_dense_answers(worker, section),
        worker.measuring("answers", [(section.num_prompts, length)]),
    ]


# Pruning


def estimate_depth(worker: WorkerView, job: PlannedJob, depth: PlannedDepth) -> StepPlan:
    """Return the passes in which whole layers are removed in a shot.

    Each measure is of half of the blocks for every layer in the mean; after the first about half of
    the layers are measured again.
    """
    num_removed = depth.num_removed
    T = worker.sequence_length
    held = 2.0 * job.num_held * num_removed
    if depth.section.costs in MEASURED:
        held += job.num_held * depth.num_layers / 2 * (1 + (num_removed - 1) / 2)
    widest = max(linear.num_columns for linear in worker.linears)
    states = (depth.num_layers + 1) * T * worker.hidden_size * worker.shapes.width
    fitted = 0.0
    sums = 0.0
    if depth.section.update:
        tokens = depth.tokens_per_input * widest
        fitted = min(worker.num_sequences, tokens / T) * num_removed / 2
        sums = 4.0 * (2 * widest**2 + 2 * widest * worker.hidden_size + T * widest)
    num_windows = max(1, round(held + fitted))
    step = worker.measuring("depth", [(num_windows, T)])
    return replace(step, device=step.device + 2 * states + sums)


# After the update


def estimate_commit(worker: WorkerView) -> StepPlan:
    """Return the writing of a shot, a file at a time."""
    of_file = min(FILE_BYTES, worker.all_blocks + worker.outside)
    return StepPlan(
        name="commit",
        device=worker.idle,
        host=worker.host + max(of_file, worker.shapes.largest_stored),
        host_bytes=0 if worker.device_is_host else worker.all_blocks,
        disk_bytes=worker.all_blocks,
    )


def estimate_exports(worker: WorkerView, exports: PlannedExports) -> list[StepPlan]:
    """Return the exports of all sizes, and their quantised copies.

    Tasks are not planned.
    """
    parts = []
    for kind in exports.kinds:
        if kind == "gguf":
            parts.append(_mean_squares(worker))
        parts.append(_export(worker, exports.num_processes))
    if exports.quantize is not None:
        parts.extend(
            _quantised(worker, exports.quantize, exports) * exports.num_quantized
        )
    return parts


def _mean_squares(worker: WorkerView) -> StepPlan:
    """Return the pass that measures the inputs of linears for llama.cpp."""
    of_linears = [(8.0 * linear.num_columns**2, 0.0) for linear in worker.linears]
    return block_by_block(worker, "export", of_linears)


def _export(worker: WorkerView, num_processes: int) -> StepPlan:
    """Return the writing of an export, and the reading in processes of its own."""
    size = worker.all_blocks + worker.outside
    # one process reads what all shards have written
    whole = worker.shapes.width * worker.shapes.layout.num_parameters
    return StepPlan(
        name="export",
        device=worker.idle,
        host=worker.host + max(min(FILE_BYTES, size), worker.shapes.largest_stored),
        host_bytes=0 if worker.device_is_host else size,
        disk_bytes=size + num_processes * whole,
        waiting_s=num_processes * _PROCESS_S,
    )


def _quantised(
    worker: WorkerView, section: QuantizeSection, exports: PlannedExports
) -> list[StepPlan]:
    """Return the passes of rounding by the calibration text; the nearest number needs none."""
    if section.columns_together is None or not section.is_by_text:
        return []
    if section.rounding != "both_sides":
        return [block_by_block(worker, "quantise", _rounding_by_A(worker))]
    device_type = "cpu" if worker.device_is_host else "cuda"
    of_G = sum(
        4.0 * PackedSymmetric.size(s.num_rows, device_type) for s in worker.linears
    )
    step = block_by_block(worker, "quantise", _rounding_by_both(worker))
    return [
        _pass_for_G(worker, of_G, exports.num_backward),
        replace(step, device=step.device + of_G / worker.num_replicas),
    ]


def _rounding_by_A(worker: WorkerView) -> list[tuple[float, float]]:
    """Return the bytes and operations of each linear that is rounded by A alone."""
    needs = []
    for linear in worker.linears:
        R = linear.num_rows
        C = linear.num_columns
        needs.append((16.0 * (C**2 + R * C), 2 / 3 * C**3 + 2.0 * R * C * C))
    return needs


def _rounding_by_both(worker: WorkerView) -> list[tuple[float, float]]:
    """Return the bytes and operations of each linear that is rounded by A and G."""
    needs = []
    for linear in worker.linears:
        R = linear.num_rows
        C = linear.num_columns
        size = 16.0 * (C**2 + R * C) + 16.0 * R**2
        needs.append((size, 2 / 3 * (C**3 + R**3) + 2.0 * R * C * (C + R)))
    return needs


def _pass_for_G(worker: WorkerView, of_G: float, num_backward: int) -> StepPlan:
    """Return the pass forward and backward that sums A and G for the rounding.

    Args:
        worker: of one replica.
        of_G: bytes of all G.
        num_backward: sequences of all replicas that pass.
    """
    own = -(-min(num_backward, worker.num_sequences) // worker.num_replicas)
    tokens = own * worker.sequence_length
    columns = {s.shared_input: s.num_columns for s in worker.linears}.values()
    flops = 6.0 * worker.active + 3 * worker.head_flops
    flops += sum(C**2 for C in columns) + sum(s.num_rows**2 for s in worker.linears)
    sums = of_G + sum(2.0 * C**2 for C in columns)
    host = worker.host
    if worker.stores.factors == "host":
        host += sums
    host_bytes, disk_bytes = worker.moved(worker.stores.weights, 2 * worker.all_blocks)
    return StepPlan(
        name="quantise",
        device=worker.weights + sums + worker.passing(num_sequences=own),
        host=host,
        flops=tokens * flops,
        host_bytes=host_bytes,
        disk_bytes=disk_bytes,
        memory_bytes=worker.pass_bytes(
            own, worker.sequence_length, forward=1.0, backward=1.0
        ),
        sent_bytes=worker.sent_bytes(tokens, num_passes=2),
    )
