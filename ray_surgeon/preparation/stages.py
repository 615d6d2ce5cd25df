"""The stages of a job with their settings, as `ray_surgeon.job` runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ray_surgeon.config.groups import CoupledSection
from ray_surgeon.config.job import JobSpec
from ray_surgeon.config.sections import OutputSection, TasksSection
from ray_surgeon.data.self_text import SelfText
from ray_surgeon.data.written_text import Language
from ray_surgeon.evaluation.answers import DenseAnswers, PrunedAnswers, prompt_set_for
from ray_surgeon.evaluation.texts import Evaluation
from ray_surgeon.export.exports import Export, LoadSize, Size, check_exports
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import WidthLimits
from ray_surgeon.preparation.reading import Texts
from ray_surgeon.pruning.calibration import Curvature
from ray_surgeon.pruning.coupled_groups import Groups
from ray_surgeon.pruning.method import Method
from ray_surgeon.recovery.reconstruction import Reconstruction
from ray_surgeon.recovery.recovery import LoadTeacher, Recovery, stream_of
from ray_surgeon.report.events import PlannedStep
from ray_surgeon.run_state import Commit

if TYPE_CHECKING:
    from ray_surgeon.export.quantise import Quantise
    from ray_surgeon.export.tasks import Tasks
    from ray_surgeon.pruning.depth import Depth

WritingStep: TypeAlias = "Export | Quantise"
ExportStep: TypeAlias = "LoadSize | WritingStep"


@dataclass(frozen=True)
class Stages:
    """The stages of a job, each with its settings; None for those that it leaves out."""

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
    exports: tuple[ExportStep, ...]  # including the loading of the weights that they need

    def steps_before(self, num_done: int, *, resumes: bool) -> list[PlannedStep]:
        """Return the steps before the first shot of a try, in the order of `ray_surgeon.job`.

        Args:
            num_done: shots that an earlier try has committed.
            resumes: whether there is a commit to continue from.
        """
        load = ("load", num_done)
        names = []
        if self.self_text is not None:
            names.append("sampling")
        if self.dense_answers is not None:
            names.append("answers")
        if not resumes:
            names.append("evaluation")
            if self.tasks is not None:
                names.append("tasks")
        steps = [(name, 0) for name in names]
        if self.teacher is None:
            return [load, *steps]
        if resumes:
            return [*steps, load]
        return [("teacher", 0), *steps, load]

    def steps_of_shot(self, shot: int, *, in_recovery: bool) -> list[PlannedStep]:
        """Return the steps of a shot.

        Args:
            shot: its number.
            in_recovery: whether an earlier try has come as far as its recovery.
        """
        names = []
        if not in_recovery:
            if self.depth is not None:
                names.append("depth")
            if self.curvature is not None:
                names.extend(["curvature", "costs", "threshold"])
            names.append("update")
            if self.reconstruction is not None:
                names.append("reconstruction")
            if self.dense_answers is not None and self.recovery is not None:
                names.append("answers")
        if self.recovery is not None:
            names.append("recovery")
        names.append("evaluation")
        if self.answers is not None:
            names.append("answers")
        names.append("commit")
        return [(name, shot) for name in names]


def stages_of(
    spec: JobSpec,
    layout: ModelLayout,
    method: Method,
    texts: Texts,
    exports: tuple[WritingStep, ...],
    deadline_s: float | None = None,
) -> Stages:
    """Return the stages of a job.

    Args:
        spec: of the job.
        layout: of its model.
        method: of pruning.
        texts: of the job.
        exports: of `stages_after_shots`, which is checked before there is a method.
        deadline_s: time.time() by which the job should end; None for no limit.

    Raises:
        ValueError: a stage is not possible; names the field, the problem, and the remedy.
    """
    language = None
    if texts.tokenizer:
        language = Language(texts.tokenizer, layout.config)
    self_text = SelfText.of(spec.calibration, language)
    first_text = next(iter(texts.measured.values()), texts.calibration)
    prompt_set, self_text = prompt_set_for(
        spec.evaluation.generation, self_text, language, first_text.tokens
    )
    dense_answers = None
    answers = None
    if prompt_set is not None:
        dense_answers = DenseAnswers(prompt_set)
        answers = PrunedAnswers(prompt_set)
    recovery = _recovery(spec, method, texts, deadline_s)
    curvature = None
    if method.has_costs:
        sees_calibration = recovery is not None and recovery.section.sees_calibration
        curvature = Curvature(method, sees_calibration)
    return Stages(
        teacher=texts.teacher,
        self_text=self_text,
        dense_answers=dense_answers,
        tasks=_tasks(spec, texts),
        depth=_depth(spec, layout, method),
        curvature=curvature,
        reconstruction=method.reconstruction if isinstance(method, Groups) else None,
        recovery=recovery,
        evaluation=Evaluation(spec.evaluation.stop_above),
        answers=answers,
        commit=Commit(spec.schedule.targets, spec.output.keep_shots, _kept(spec)),
        exports=_loads_sizes(method, exports),
    )


def _depth(spec: JobSpec, layout: ModelLayout, method: Method) -> Depth | None:
    if not isinstance(method, Groups) or not method.section.layer_kinds:
        return None
    from ray_surgeon.pruning.depth import depth_of

    return depth_of(method, layout, spec.num_held)


def _tasks(spec: JobSpec, texts: Texts) -> Tasks | None:
    section = spec.evaluation.tasks
    if section is None or not texts.tokenizer:
        return None
    from ray_surgeon.export.tasks import Tasks

    if texts.teacher is None:
        return Tasks(section)
    return Tasks(section, texts.teacher.model)


def _recovery(
    spec: JobSpec, method: Method, texts: Texts, deadline_s: float | None
) -> Recovery | None:
    section = spec.recovery
    if section is None:
        return None
    schedule = spec.schedule
    stream = stream_of(
        section, schedule, spec.calibration.sequence_length, texts.tokenizer
    )
    return Recovery(
        section=section,
        size_shots=schedule.size_shots,
        has_pass=method.has_costs,
        stream=stream,
        teacher=texts.teacher,
        deadline_s=deadline_s,
    )


def stages_after_shots(spec: JobSpec, layout: ModelLayout) -> tuple[WritingStep, ...]:
    """Return the stages that write what a run leaves; they do not depend on the method.

    Raises:
        ValueError: an export is not possible; names the field, and the remedy.
    """
    pruning = spec.pruning
    if isinstance(pruning, CoupledSection):  # other methods keep the shapes
        check_exports(spec.output, layout, pruning.shrinking(pruning.fewest_groups))
    if pruning is None:
        check_exports(spec.output, layout, WidthLimits({}, 1, 1, uniform=True))
    schedule = spec.schedule
    values = getattr(pruning, "sizes", None) or (None,)
    sizes = []
    for shot, value in zip(schedule.size_shots, values, strict=True):
        sizes.append(Size(shot, value, is_last=shot == schedule.shots))
    return _exports_of(spec.output, spec.evaluation.tasks, sizes)


def _exports_of(
    output: OutputSection, tasks: TasksSection | None, sizes: Sequence[Size]
) -> tuple[WritingStep, ...]:
    """Return the stages of all exports and of quantised copies.

    The last size of a run comes first, because its weights are loaded already. For those of other
    sizes see `_loads_sizes`.
    """
    stages = list[WritingStep]()
    for size in reversed(sizes):
        if output.sizes is not None and size.value not in output.sizes:
            continue
        for kind in output.exports:
            stages.append(Export(size, kind, output, tasks))
        if output.quantize is not None:
            from ray_surgeon.export.quantise import Quantise

            stages.append(Quantise(size, output.quantize))
    return tuple(stages)


def _loads_sizes(method: Method, stages: Sequence[WritingStep]) -> tuple[ExportStep, ...]:
    """Return the stages of exports, each size that is not the last preceded by its loading."""
    loaded = list[ExportStep]()
    size = None
    for stage in stages:
        if stage.size != size and not stage.size.is_last:
            loaded.append(LoadSize(method, stage.size))
        size = stage.size
        loaded.append(stage)
    return tuple(loaded)


def _kept(spec: JobSpec) -> tuple[int, ...]:
    """Return the shots of a family's sizes, which may be exported later."""
    if getattr(spec.pruning, "sizes", None):
        return spec.schedule.size_shots
    return ()
