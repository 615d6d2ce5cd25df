"""The stage of recovery: training after the update, towards the dense model or a teacher."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from ray_surgeon.config.schedule import ScheduleSection
from ray_surgeon.config.sections import ModelSection, RecoverySection
from ray_surgeon.data.texts import TextStream
from ray_surgeon.distributed.dense_states import CALIBRATION, drop_teacher, load_teacher
from ray_surgeon.distributed.memory_plan.device_resources import DEVICES
from ray_surgeon.distributed.placement import Placement
from ray_surgeon.distributed.weights import ModelRecipe, load
from ray_surgeon.memory.stores import ScratchNames
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.recovery.training import (
    Batches,
    CalibrationBatches,
    Check,
    StreamBatches,
    Training,
    most_useful_tokens,
)
from ray_surgeon.report.events import CHECK
from ray_surgeon.run_state import CalibrationText, Facts, RunState, Text, commit_part

_FEWEST_STEPS = 8
"""Minimum number of steps; a recovery with time for fewer steps is skipped."""


@dataclass(frozen=True, eq=False)
class LoadTeacher:
    """Loads the teacher before the model, to record its measures, answers and hidden states."""

    model: ModelSection  # pinned to the files that were checked
    layout: ModelLayout = field(repr=False)
    placement: Placement  # placement of its blocks on the workers of the model
    fingerprint: Any  # fingerprint of its weights; None if there are no weights to check

    def recipe(self, scratch: ScratchNames) -> ModelRecipe:
        """Return the recipe by which workers load the teacher."""
        return ModelRecipe(self.model, (), scratch, (self.layout, self.placement.blocks))

    def load(self, run: RunState) -> None:
        """Load the teacher in place of the model."""
        recipe = self.recipe(run.scratch)
        run.cluster.run_all(load, recipe, False, run.cluster.stores)


@dataclass(frozen=True)
class Recovery:
    """Trains towards the dense model, and keeps the training if it helps."""

    name: ClassVar[str] = "recovery"  # of its step
    section: RecoverySection
    size_shots: Sequence[int]  # numbers of the shots that end at a requested size
    # whether the curvature pass keeps the dense model's states of the calibration text
    has_pass: bool
    # windows of the texts to train on; None for those of the calibration
    stream: TextStream | None = field(default=None, repr=False)
    teacher: LoadTeacher | None = None  # None to train towards the dense model
    deadline_s: float | None = (
        None  # time.time() by which the job should end; None for no limit
    )

    def train(self, run: RunState, facts: Facts) -> None:
        """Train, and continue the training of an earlier attempt of the run if there is one."""

        def on_check(check: Check) -> None:
            self._show(run, training, check)

        training = Training(
            section=self.section,
            cluster=run.cluster,
            text=run.text,
            batches=self._batches(run),
            on_check=on_check,
        )
        if self.deadline_s is not None and run.shot == run.num_shots:
            training.steps_for = partial(
                self._steps_for, run, training.batches.num_steps, self.deadline_s
            )
        training.on_step = partial(self._commit, run, training)
        if training.batches.num_steps and run.part is None:
            # all weights change from the first step on
            self._commit(run, training, at_once=self.section.trains_all)
        has_teacher = self.section.has_teacher and training.batches.num_steps > 0
        if has_teacher:
            if self.teacher is not None:
                recipe = self.teacher.recipe(run.scratch)
            else:
                recipe = ModelRecipe(run.model, (), run.scratch)
            run.cluster.run_all(load_teacher, recipe, run.cluster.stores.teacher)
        training.train(run.shot, run.part)
        if has_teacher:
            run.cluster.run_all(drop_teacher)
        facts.update(training.facts)
        if self.section.loss != "kl":
            facts["measure"] = self.section.loss
        run.record.update(training.as_record())

    def _steps_for(
        self,
        run: RunState,
        planned: int,
        deadline_s: float,
        seconds_of_step: float,
        further_s: float,
    ) -> int:
        """Return the number of steps for which there is time before the exports.

        Args:
            run: run in its last shot.
            planned: planned number of steps.
            deadline_s: time.time() at which the job should end.
            seconds_of_step: measured seconds of a step.
            further_s: seconds of the training besides its steps.
        """
        plan_s: Mapping[str, float] = run.report.plan["seconds"]
        after_s = plan_s.get("export", 0.0)
        for name in ("evaluation", "answers", "commit"):
            after_s += run.steps.latest_s.get(name, plan_s.get(name, 0.0))
        left_s = deadline_s - time.time() - after_s - further_s
        text = run.text.tokens
        per_step = self.section.sequences_per_step * int(text.shape[1])
        most_tokens = most_useful_tokens(run.layout.num_parameters, int(text.size))
        most = max(planned, most_tokens // per_step)
        num_steps = min(most, int(left_s / seconds_of_step))
        return 0 if num_steps < _FEWEST_STEPS else num_steps

    def _show(self, run: RunState, training: Training, check: Check) -> None:
        """Emit an event for a check, and update the page."""
        tokens_per_s = check.tokens_per_s or 0.0
        share = share_of_peak(run.report.plan, run.model.dtype, tokens_per_s)
        facts = {
            **vars(check),
            "held_aside": check.value,
            "value": None,
            "rate": training.rate,
            "share_of_peak": share or None,
        }
        run.steps.tell(CHECK, facts)
        so_far = replace(training, held=[*training.held, check]).as_record()
        run.page.draw({**run.report.as_record(), "present": so_far}, final=False)

    def _commit(
        self,
        run: RunState,
        training: Training,
        *,
        at_once: bool = False,
    ) -> None:
        """Commit the progress of the shot, at once or if the last commit was long ago."""
        since_s = time.monotonic() - run.committed_s
        is_due = at_once or since_s > 60 * self.section.commit_minutes
        if is_due or run.cluster.notice():
            commit_part(
                run,
                stage=self.name,
                after=f"after {training.done} steps of {self.name}",
                state=training.state(),
                save=training.save,
            )

    def _batches(self, run: RunState) -> Batches:
        if self.stream is None:
            last = self._num_steps(run.shot, run.text.tokens.shape[1])[-1]
            return CalibrationBatches(self.section, run.text, last, run.shot)
        num_steps = self._num_steps(run.shot, self.stream.sequence_length)
        num_steps_before = sum(num_steps[:-1])
        # the windows held aside are not trained on
        stream = replace(self.stream, calibration=run.text.tokens, held=run.text.held)
        return StreamBatches(
            section=self.section,
            stream=stream,
            cluster=run.cluster,
            num_steps=num_steps[-1],
            first=num_steps_before * self.section.sequences_per_step,
        )

    def _num_steps(self, last: int, length: int) -> list[int]:
        """Return the number of steps after each shot up to `last`."""
        num_steps = []
        for shot in range(1, last + 1):
            ends = shot in self.size_shots
            num_steps.append(self.section.num_steps(length, ends=ends))
        return num_steps

    def texts_to_remember(self, text: CalibrationText) -> Mapping[str, Text]:
        """Return the calibration text if it is needed and no curvature pass sees it."""
        if self.has_pass or not self.section.sees_calibration:
            return {}
        return {CALIBRATION: (text.tokens, text.counts)}


def share_of_peak(plan: Mapping[str, Any], dtype: str, per_s: float) -> float:
    """Return a training's operations per second as a share of the GPUs' nominal peak.

    Args:
        plan: plan in the report of the run; on CPUs the share is 0.
        dtype: dtype of the weights.
        per_s: reciprocal of the seconds of the training.
    """
    peak = DEVICES[plan["device"]].peak_flops.get(dtype, math.inf)
    # a replica trains on a share of the tokens, and its shards share its operations
    return float(plan["flops"][Recovery.name] / len(plan["disk_bytes"]) * per_s / peak)


def stream_of(
    section: RecoverySection, schedule: ScheduleSection, length: int, tokenizer: Any
) -> TextStream | None:
    """Return the stream of windows that a recovery reads; None without texts or a tokenizer.

    Raises:
        ValueError: a text on this machine is too short, or cannot be read.
    """
    if tokenizer is None or not section.texts:
        return None
    texts = []
    for i, text in enumerate(section.texts):
        texts.append((text, f"recovery.texts.{i}"))
    stream = TextStream(texts, length, tokenizer, section.seed)
    num_ends = len(schedule.size_shots)
    num_steps = num_ends * section.num_steps(length)
    num_steps += (schedule.shots - num_ends) * section.num_steps(length, ends=False)
    stream.check_length(num_steps * section.sequences_per_step)
    return stream
