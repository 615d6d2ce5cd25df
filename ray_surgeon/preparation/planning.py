"""The description of a job for its plan."""

from __future__ import annotations

from collections.abc import Sequence

from ray_surgeon.config.calibration import CalibrationSection
from ray_surgeon.config.job import JobSpec
from ray_surgeon.config.recovery import RecoverySection
from ray_surgeon.config.sections import OutputSection
from ray_surgeon.distributed.memory_plan.planned_job import (
    PlannedCurvature,
    PlannedDepth,
    PlannedExports,
    PlannedGroups,
    PlannedJob,
    PlannedReconstruction,
    PlannedRecovery,
    PlannedTeacher,
)
from ray_surgeon.export.exports import Export
from ray_surgeon.export.quantise import Quantise
from ray_surgeon.export.rounding import NUM_BACKWARD
from ray_surgeon.factors.kinds import kind_of
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.preparation.stages import ExportStep, Stages
from ray_surgeon.pruning.coupled_groups import Groups
from ray_surgeon.pruning.depth import TOKENS_EACH, Depth
from ray_surgeon.pruning.method import Method
from ray_surgeon.recovery.batches import steps_ahead
from ray_surgeon.recovery.rates import steps_between_checks, trial_steps
from ray_surgeon.recovery.reconstruction import RATES, TRIAL_PART

_GLOBAL_MARGIN = 1.25
"""Times as many groups as are removed are on the paths that are followed."""


def describe_job(
    spec: JobSpec, layout: ModelLayout, method: Method, stages: Stages
) -> PlannedJob:
    """Return the inputs of a plan beside model, placement and memory.

    Args:
        spec: of the job.
        layout: of its model.
        method: of pruning.
        stages: steps of the job.
    """
    calibration = spec.calibration
    texts = [(text.num_sequences, text.sequence_length) for text in spec.evaluation.texts]
    if spec.num_held > 0:
        texts.append((spec.num_held, calibration.sequence_length))
    teacher = None
    if stages.teacher is not None:
        teacher = PlannedTeacher(stages.teacher.layout, stages.teacher.placement)
    return PlannedJob(
        dtype=spec.model.dtype,
        num_sequences=calibration.num_sequences,
        sequence_length=calibration.sequence_length,
        num_held=spec.num_held,
        factors="none" if method.curvature is None else method.curvature.gathers,
        gathered=_gathered(spec, layout, method),
        by_element=method.by_element,
        pruning=spec.pruning,
        groups=_groups(method),
        depth=None if stages.depth is None else _depth(stages.depth),
        curvature=_curvature(layout, method) if method.has_costs else None,
        reconstruction=_reconstruction(stages),
        recovery=_recovery(spec.recovery, calibration.sequence_length),
        teacher=teacher,
        written_texts=_written_texts(stages),
        answers=None if stages.answers is None else stages.answers.prompt_set.section,
        measured_texts=tuple(texts),
        exports=_exports(spec.output, stages.exports),
    )


def _gathered(spec: JobSpec, layout: ModelLayout, method: Method) -> frozenset[str]:
    """Return the linears that are ranked, or updated by their factors."""
    if spec.pruning is None:
        return frozenset()
    roles = method.gathers
    return frozenset(
        linear.name for linear in layout.linears if roles is None or linear.role in roles
    )


def _groups(method: Method) -> PlannedGroups | None:
    if not isinstance(method, Groups):
        return None
    section = method.section
    budget = method.budget
    most = max(budget.dense - budget.least(method.fewest), 1e-9 * budget.dense)
    # in the first shot, where all consumers lose the same fraction
    share = min(1.0, (budget.dense - method.goal(1)) / most)
    if not section.uniform:
        share *= _GLOBAL_MARGIN
    reach = min(1.0, 2 * (section.last_sparsity or 0.5))
    return PlannedGroups(reach=reach, share=share)


def _depth(depth: Depth) -> PlannedDepth:
    pruning = depth.method.section
    section = depth.section
    num_layers = len(depth.layers)
    in_all_shots = section.num_removed or num_layers * (pruning.last_sparsity or 0.2)
    return PlannedDepth(
        section=section,
        num_layers=num_layers,
        num_removed=max(1, round(in_all_shots / pruning.shots)),
        tokens_per_input=TOKENS_EACH,
    )


def _curvature(layout: ModelLayout, method: Method) -> PlannedCurvature:
    section = method.used_curvature
    kind = kind_of(section)
    return PlannedCurvature(
        section=section,
        num_changes=method.beside.num_changes(layout),
        num_passes=kind.num_passes,
        num_copies=kind.num_copies,
    )


def _reconstruction(stages: Stages) -> PlannedReconstruction | None:
    reconstruction = stages.reconstruction
    if reconstruction is None:
        return None
    return PlannedReconstruction(
        section=reconstruction.section,
        kinds=reconstruction.kinds,
        num_backward=reconstruction.num_backward,
        num_rates=len(RATES),
        trial_epochs=TRIAL_PART,
    )


def _recovery(
    section: RecoverySection | None, sequence_length: int
) -> PlannedRecovery | None:
    if section is None:
        return None
    num_steps = section.num_steps(sequence_length)
    return PlannedRecovery(
        section=section,
        num_steps=num_steps,
        num_trial_steps=trial_steps(num_steps),
        steps_between_checks=steps_between_checks(num_steps),
        steps_ahead=steps_ahead(section.sequences_per_step),
    )


def _written_texts(stages: Stages) -> tuple[tuple[int, int], ...]:
    if stages.self_text is None:
        return ()
    section: CalibrationSection = stages.self_text.section
    sizes = []
    for text, count in section.shares:
        if text.is_written:
            sizes.append(text.sizes(count, section.sequence_length))
    return tuple(sizes)


def _exports(output: OutputSection, steps: Sequence[ExportStep]) -> PlannedExports:
    kinds = tuple(step.kind for step in steps if isinstance(step, Export))
    num_processes = 1
    if output.speed is not None:  # the dense model and the pruned one are timed
        num_processes += 2
    return PlannedExports(
        kinds=kinds,
        num_processes=num_processes,
        quantize=output.quantize,
        num_quantized=sum(isinstance(step, Quantise) for step in steps),
        num_backward=NUM_BACKWARD,
    )
