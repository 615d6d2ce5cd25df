"""The stages of a job, in the order in which they run. A feature is a line here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_surgeon.export.for_engines import Shrinking
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.stages.answers.answers import BeforeCorrection, DenseAnswers, PrunedAnswers
from ray_surgeon.stages.answers.prompts import yardstick_for
from ray_surgeon.stages.correction.stage import Correction
from ray_surgeon.stages.curvature.stage import Curvature
from ray_surgeon.stages.evaluation import DenseEvaluation, Evaluation, Tasks
from ray_surgeon.stages.prune.groups_section import CoupledSection
from ray_surgeon.stages.prune.method import Method
from ray_surgeon.stages.prune.methods import Costs, Latency, Threshold, Update
from ray_surgeon.stages.reconstruction.stage import ReconstructionStage
from ray_surgeon.stages.search.search import SearchStage
from ray_surgeon.stages.self_text.stage import SelfText
from ray_surgeon.stages.stage import Stage
from ray_surgeon.stages.weights import Commit, Load, exports_of
from ray_surgeon.storage.texts import Windows


@dataclass(frozen=True)
class Stages:
    """The stages of a job."""

    before_shots: tuple[Stage, ...]
    of_a_shot: tuple[Stage, ...]
    after_shots: tuple[Stage, ...]

    @property
    def all(self) -> tuple[Stage, ...]:
        """All of them."""
        return (*self.before_shots, *self.of_a_shot, *self.after_shots)


def stages_of(
    spec: JobSpec,
    layout: ModelLayout,
    method: Method,
    tokenizer: Any,
    further: Windows,
    first_text: NDArray[np.int64],
    after_shots: tuple[Stage, ...],
) -> Stages:
    """Return the stages of a job.

    Args:
        spec: of the job.
        layout: of its model.
        method: of pruning.
        tokenizer: of the model; None for a plan from config.json alone.
        further: windows beside the calibration, for a stage that reads some.
        first_text: [num_windows, sequence_length] of the first evaluation text.
        after_shots: of `stages_after_shots`, which is checked before there is a method.

    Raises:
        ValueError: a stage cannot work; names the field, what was found, and the remedy.
    """
    tasks = spec.evaluation.tasks
    config = layout.config
    held = spec.num_held
    texts = [(text.num_sequences, text.sequence_length) for text in spec.evaluation.texts]
    texts += [(held, spec.calibration.sequence_length)] * (held > 0)
    self_text = SelfText.of(spec.calibration, tokenizer, config)
    yardstick, self_text = yardstick_for(
        spec.evaluation.generation, self_text, tokenizer, config, first_text
    )
    has_costs = method.has_costs
    correction = None
    if spec.correction is not None:
        correction = Correction(spec.correction, held, method.by_element, has_costs)
    keeps_states = correction is not None and correction.needs_dense_states
    return Stages(
        _present(
            Load(method),
            Latency.of(method),
            self_text,
            DenseAnswers(yardstick) if yardstick else None,
            DenseEvaluation(),
            Tasks.of(tasks) if tokenizer else None,
        ),
        _present(
            Curvature(method, keeps_states) if has_costs else None,
            Costs(method) if has_costs else None,
            SearchStage.of(method, further),
            Threshold() if has_costs else None,
            Update(method),
            ReconstructionStage.of(method),
            BeforeCorrection() if yardstick and correction else None,
            correction,
            Evaluation(texts, spec.evaluation.stop_above),
            PrunedAnswers(yardstick) if yardstick else None,
            Commit(spec.pruning.targets, spec.output.keep_shots),
        ),
        after_shots,
    )


def stages_after_shots(spec: JobSpec, layout: ModelLayout) -> tuple[Stage, ...]:
    """Return the stages that write what a run leaves; they do not depend on the method.

    Raises:
        ValueError: the model cannot be written so; names the field, and the remedy.
    """
    return exports_of(spec.output, spec.evaluation.tasks, layout, _shrinking(spec))


def _present(*stages: Stage | None) -> tuple[Stage, ...]:
    return tuple(stage for stage in stages if stage is not None)


def _shrinking(spec: JobSpec) -> Shrinking | None:
    """Return what pruning may leave of widths and heads; None if it leaves all shapes."""
    pruning = spec.pruning
    if not isinstance(pruning, CoupledSection):
        return None
    fewest = pruning.fewest_groups
    return Shrinking(
        {kind: fewest.get(kind, 0) for kind in pruning.groups},
        pruning.multiple,
        pruning.tensor_parallel,
        pruning.uniform,
    )
