"""The steps of a job with their settings, as `ray_surgeon.job` runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray_surgeon.data.self_text import SelfText
from ray_surgeon.data.written_text import Language
from ray_surgeon.evaluation.answers import DenseAnswers, PrunedAnswers
from ray_surgeon.evaluation.prompts import prompt_set_for
from ray_surgeon.evaluation.texts import Evaluation, Tasks
from ray_surgeon.export.exports import Export, LoadSize, Size
from ray_surgeon.export.kinds import check_exports
from ray_surgeon.export.quantise import Quantise
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.width_limits import WidthLimits
from ray_surgeon.preparation.reading import Texts
from ray_surgeon.pruning.calibration import Curvature
from ray_surgeon.pruning.coupled_groups import Groups
from ray_surgeon.pruning.depth import Depth, depth_of
from ray_surgeon.pruning.method import Method
from ray_surgeon.recovery.reconstruction import Reconstruction
from ray_surgeon.recovery.recovery import Recovery, stream_of
from ray_surgeon.recovery.teacher import LoadTeacher
from ray_surgeon.shot_weights import Commit
from ray_surgeon.spec.evaluation import TasksSection
from ray_surgeon.spec.groups import CoupledSection
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.spec.sections import OutputSection

WritingStep = Export | Quantise
ExportStep = LoadSize | WritingStep


@dataclass(frozen=True)
class Stages:
    """The steps that a job has, each with its settings; None for those that it leaves out."""

    teacher: LoadTeacher | None
    self_text: SelfText | None
    dense_answers: DenseAnswers | None
    tasks: Tasks | None
    depth: Depth | None
    curvature: Curvature | None
    reconstruction: Reconstruction | None
    recovery: Recovery | None
    evaluation: Evaluation
    answers: PrunedAnswers | None
    commit: Commit
    exports: tuple[ExportStep, ...]  # with the loading of the weights that they need


def stages_of(
    spec: JobSpec,
    layout: ModelLayout,
    method: Method,
    texts: Texts,
    exports: tuple[WritingStep, ...],
) -> Stages:
    """Return the steps of a job.

    Args:
        spec: of the job.
        layout: of its model.
        method: of pruning.
        texts: that were read.
        exports: of `stages_after_shots`, which is checked before there is a method.

    Raises:
        ValueError: a step cannot work; names the field, what was found, and the remedy.
    """
    held = spec.num_held
    language = None
    if texts.tokenizer:
        language = Language(texts.tokenizer, layout.config)
    self_text = SelfText.of(spec.calibration, language)
    first = next(iter(texts.measured.values()), texts.calibration).tokens
    prompt_set, self_text = prompt_set_for(spec.evaluation.generation, self_text, language, first)
    groups = method if isinstance(method, Groups) else None
    recovery = _recovery(spec, method, texts)
    sees_calibration = recovery is not None and recovery.sees_calibration
    return Stages(
        teacher=texts.teacher,
        self_text=self_text,
        dense_answers=DenseAnswers(prompt_set) if prompt_set else None,
        tasks=_tasks(spec, texts),
        depth=depth_of(method, layout, held),
        curvature=Curvature(method, sees_calibration) if method.has_costs else None,
        reconstruction=groups.reconstruction if groups is not None else None,
        recovery=recovery,
        evaluation=Evaluation(spec.evaluation.stop_above),
        answers=PrunedAnswers(prompt_set) if prompt_set else None,
        commit=Commit(spec.schedule.targets, spec.output.keep_shots, _kept(spec)),
        exports=_loads_sizes(method, exports),
    )


def _tasks(spec: JobSpec, texts: Texts) -> Tasks | None:
    section = spec.evaluation.tasks
    if section is None or not texts.tokenizer:
        return None
    return Tasks(section, texts.teacher.model if texts.teacher else None)


def _recovery(spec: JobSpec, method: Method, texts: Texts) -> Recovery | None:
    section = spec.recovery
    if section is None:
        return None
    schedule = spec.schedule
    stream = stream_of(section, schedule, spec.calibration.sequence_length, texts.tokenizer)
    return Recovery(
        section=section,
        size_shots=schedule.size_shots,
        has_pass=method.has_costs,
        stream=stream,
        teacher=texts.teacher,
    )


def stages_after_shots(spec: JobSpec, layout: ModelLayout) -> tuple[WritingStep, ...]:
    """Return the stages that write what a run leaves; they do not depend on the method.

    Raises:
        ValueError: the model cannot be written so; names the field, and the remedy.
    """
    pruning = spec.pruning
    if isinstance(pruning, CoupledSection):  # others leave the shapes as they are
        check_exports(spec.output, layout, pruning.shrinking(pruning.fewest_groups))
    if pruning is None:
        check_exports(spec.output, layout, WidthLimits({}, 1, 1, uniform=True))
    schedule = spec.schedule
    values = getattr(pruning, "sizes", None) or (None,)
    pairs = zip(schedule.size_shots, values, strict=True)
    sizes = [Size(shot, size, shot == schedule.shots) for shot, size in pairs]
    return _exports_of(spec.output, spec.evaluation.tasks, sizes)


def _exports_of(
    output: OutputSection, tasks: TasksSection | None, sizes: Sequence[Size]
) -> tuple[WritingStep, ...]:
    """Return a stage for every export, with tasks that it is measured on, and a quantised copy.

    The last of the sizes that a run passes through comes first: its weights are there. See
    `_loads_sizes` for those of the others.
    """
    stages = list[WritingStep]()
    for size in reversed(sizes):
        if output.sizes is None or size.value in output.sizes:
            stages += [Export(size, kind, output, tasks) for kind in output.exports]
            stages += [] if output.quantize is None else [Quantise(size, output.quantize)]
    return tuple(stages)


def _loads_sizes(method: Method, stages: Sequence[WritingStep]) -> tuple[ExportStep, ...]:
    """Return the stages of exports, with the loading of every size that is not the last."""
    loaded = list[ExportStep]()
    size = None
    for stage in stages:
        if stage.size != size and not stage.size.is_last:
            loaded.append(LoadSize(method, stage.size))
        size = stage.size
        loaded.append(stage)
    return tuple(loaded)


def _kept(spec: JobSpec) -> tuple[int, ...]:
    """Return the shots of a family's sizes, from which exports may be wanted later."""
    return spec.schedule.size_shots if getattr(spec.pruning, "sizes", None) else ()
