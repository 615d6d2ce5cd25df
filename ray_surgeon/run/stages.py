"""The stages of a job, in the order in which they run. A feature is a line here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ray_surgeon.export.for_engines import WidthLimits
from ray_surgeon.export.kinds import check_exports
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.run.reading import Texts
from ray_surgeon.spec.evaluation import TasksSection
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.spec.sections import OutputSection
from ray_surgeon.stages.answers.answers import BeforeRecovery, DenseAnswers, PrunedAnswers
from ray_surgeon.stages.answers.prompts import prompt_set_for
from ray_surgeon.stages.curvature.stage import Curvature
from ray_surgeon.stages.depth.stage import depth_of
from ray_surgeon.stages.evaluation import DenseEvaluation, Evaluation, Tasks
from ray_surgeon.stages.exports import Export, LoadSize, Size
from ray_surgeon.stages.prune.groups import Groups
from ray_surgeon.stages.prune.groups_section import CoupledSection
from ray_surgeon.stages.prune.method import Method
from ray_surgeon.stages.prune.methods import Costs, Latency, Threshold, Update
from ray_surgeon.stages.quantise.stage import Quantise
from ray_surgeon.stages.recovery.stage import Recovery, stream_of
from ray_surgeon.stages.self_text.requests import Language
from ray_surgeon.stages.self_text.stage import SelfText
from ray_surgeon.stages.stage import Stage
from ray_surgeon.stages.weights import Commit, Load


class Stages(NamedTuple):
    """The stages of a job."""

    before_shots: tuple[Stage, ...]
    of_a_shot: tuple[Stage, ...]
    after_shots: tuple[Stage, ...]

    @property
    def all(self) -> tuple[Stage, ...]:
        """All of them."""
        return (*self.before_shots, *self.of_a_shot, *self.after_shots)


def stages_of(
    spec: JobSpec, layout: ModelLayout, method: Method, texts: Texts, after_shots: tuple[Stage, ...]
) -> Stages:
    """Return the stages of a job.

    Args:
        spec: of the job.
        layout: of its model.
        method: of pruning.
        texts: that were read.
        after_shots: of `stages_after_shots`, which is checked before there is a method.

    Raises:
        ValueError: a stage cannot work; names the field, what was found, and the remedy.
    """
    tokenizer, calibration, measured, teacher = texts
    tasks = spec.evaluation.tasks
    held = spec.num_held
    sizes = [(text.num_sequences, text.sequence_length) for text in spec.evaluation.texts]
    length = spec.calibration.sequence_length
    sizes += [(held, length)] * (held > 0)
    language = Language(tokenizer, layout.config) if tokenizer else None
    self_text = SelfText.of(spec.calibration, language)
    first = next(iter(measured.values()), calibration).tokens
    prompt_set, self_text = prompt_set_for(spec.evaluation.generation, self_text, language, first)
    has_costs = method.has_costs
    recovery = _recovery(spec, method, texts)
    return Stages(
        _present(
            teacher or Load(method),
            Latency(method) if isinstance(method, Groups) and method.budget is None else None,
            self_text,
            DenseAnswers(prompt_set) if prompt_set else None,
            DenseEvaluation(),
            Tasks(tasks, teacher.model if teacher else None) if tokenizer and tasks else None,
            Load(method) if teacher else None,
        ),
        _present(
            depth_of(method, layout, held),
            Curvature(method, bool(recovery and recovery.sees_calibration)) if has_costs else None,
            Costs(method) if has_costs else None,
            Threshold() if has_costs else None,
            Update(method),
            method.reconstruction if isinstance(method, Groups) else None,
            BeforeRecovery() if prompt_set and recovery else None,
            recovery,
            Evaluation(sizes, spec.evaluation.stop_above),
            PrunedAnswers(prompt_set) if prompt_set else None,
            Commit(spec.schedule.targets, spec.output.keep_shots, _kept(spec)),
        ),
        _loads_sizes(method, after_shots),
    )


def _recovery(spec: JobSpec, method: Method, texts: Texts) -> Recovery | None:
    section = spec.recovery
    if section is None:
        return None
    schedule = spec.schedule
    stream = stream_of(section, schedule, spec.calibration.sequence_length, texts.tokenizer)
    about = (method.by_element, method.has_costs, stream, texts.teacher)
    return Recovery(section, spec.num_held, schedule.size_shots, *about)


def stages_after_shots(spec: JobSpec, layout: ModelLayout) -> tuple[Stage, ...]:
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
) -> tuple[Stage, ...]:
    """Return a stage for every export, with tasks that it is measured on, and a quantised copy.

    The last of the sizes that a run passes through comes first: its weights are there. See
    `_loads_sizes` for those of the others.
    """
    stages = list[Stage]()
    for size in reversed(sizes):
        if output.sizes is None or size.value in output.sizes:
            stages += [Export(size, kind, output, tasks) for kind in output.exports]
            stages += [] if output.quantize is None else [Quantise(size, output.quantize)]
    return tuple(stages)


def _loads_sizes(method: Method, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the stages of exports, with the loading of every size that is not the last."""
    loaded = list[Stage]()
    size = None
    for stage in stages:
        assert isinstance(stage, Export | Quantise)
        if stage.size != size and not stage.size.is_last:
            loaded.append(LoadSize(method, stage.size))
        size = stage.size
        loaded.append(stage)
    return tuple(loaded)


def _kept(spec: JobSpec) -> tuple[int, ...]:
    """Return the shots of a family's sizes, from which exports may be wanted later."""
    return spec.schedule.size_shots if getattr(spec.pruning, "sizes", None) else ()


def _present(*stages: Stage | None) -> tuple[Stage, ...]:
    return tuple(stage for stage in stages if stage is not None)
