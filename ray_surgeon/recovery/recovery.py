"""The stage of recovery: training after the update of a shot."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from ray_surgeon.data.streams import TextStream
from ray_surgeon.plan.device_resources import DEVICES
from ray_surgeon.recovery.batches import Batches, CalibrationBatches, StreamBatches
from ray_surgeon.recovery.rates import Check
from ray_surgeon.recovery.teacher import LoadTeacher
from ray_surgeon.recovery.training import Training
from ray_surgeon.report.events import CHECK
from ray_surgeon.run_state import CalibrationText, Facts, RunState, Text
from ray_surgeon.runtime.dense_states import CALIBRATION
from ray_surgeon.runtime.teacher import drop_teacher, load_teacher
from ray_surgeon.runtime.weights import ModelRecipe
from ray_surgeon.shot_weights import commit_part
from ray_surgeon.spec.recovery import RecoverySection
from ray_surgeon.spec.schedule import ScheduleSection


@dataclass(frozen=True)
class Recovery:
    """Trains towards the dense model, and keeps what helps."""

    name: ClassVar[str] = "recovery"  # of its step
    section: RecoverySection
    size_shots: Sequence[int]  # numbers of the shots that end at a size asked for
    # whether the curvature pass keeps the dense model's states of the calibration text
    has_pass: bool
    # windows of the texts to train on; None for those of the calibration
    stream: TextStream | None = field(default=None, repr=False)
    teacher: LoadTeacher | None = None  # what to train towards; None for the dense model

    def train(self, run: RunState, facts: Facts) -> None:
        """Train, from where an earlier try of the run has come."""

        def tell(check: Check) -> None:
            pace = (check.tokens_per_s or 0.0) / self.section.num_tokens
            share = share_of_peak(run.report.plan, run.model.dtype, pace) or None
            named = {"held_aside": check.value, "value": None, "rate": trained.rate}
            run.steps.tell(CHECK, vars(check) | named | {"share_of_peak": share})
            so_far = replace(trained, held=[*trained.held, check]).as_record()
            run.page.draw(run.report.as_record() | {"present": so_far}, final=False)

        trained = Training(self.section, run.cluster, run.text, self._batches(run), tell)
        trained.on_step = partial(self._commit, run, trained)
        if trained.batches.num_steps and run.part is None:
            # all weights change from the first step on
            self._commit(run, trained, at_once=self.section.rank == "all")
        has_teacher = self.section.has_teacher and trained.batches.num_steps > 0
        if has_teacher:
            scratch = run.scratch
            teacher = self.teacher
            recipe = teacher.recipe(scratch) if teacher else ModelRecipe(run.model, (), scratch)
            run.cluster.run_all(load_teacher, recipe, run.cluster.stores.teacher)
        trained.train(run.shot, run.part)
        if has_teacher:
            run.cluster.run_all(drop_teacher)
        facts.update(trained.facts)
        run.record.update(trained.as_record())

    def _commit(self, run: RunState, trained: Training, *, at_once: bool = False) -> None:
        """Commit how far the shot has come, if the last commit was long ago or it is wanted."""
        since_s = time.monotonic() - run.committed_s
        is_due = at_once or since_s > 60 * self.section.commit_minutes
        if is_due or run.cluster.notice():
            after = f"after {trained.done} steps of {self.name}"
            commit_part(run, self.name, after, trained.state(), trained.save)

    def _batches(self, run: RunState) -> Batches:
        if self.stream is None:
            last = self._num_steps(run.shot, run.text.tokens.shape[1])[-1]
            return CalibrationBatches(self.section, run.text, last, run.shot)
        num_steps = self._num_steps(run.shot, self.stream.sequence_length)
        first = sum(num_steps[:-1]) * self.section.sequences_per_step
        # the checks are of text that is not trained on
        stream = replace(self.stream, calibration=run.text.tokens, held=run.text.held)
        return StreamBatches(self.section, stream, run.cluster, num_steps[-1], first)

    def _num_steps(self, last: int, length: int) -> list[int]:
        """Return how many steps there are after every shot up to one."""
        ends = [shot in self.size_shots for shot in range(1, last + 1)]
        return [self.section.num_steps(length, ends=each) for each in ends]

    def texts_to_remember(self, text: CalibrationText) -> Mapping[str, Text]:
        """Return the calibration text, unless a curvature pass sees it anyway."""
        if self.has_pass or not self.sees_calibration:
            return {}
        return {CALIBRATION: (text.tokens, text.counts)}

    @property
    def sees_calibration(self) -> bool:
        """Whether it wants the dense model's states of the calibration text."""
        return self.section.loss == "kl" and not self.section.texts


def share_of_peak(plan: Mapping[str, Any], dtype: str, per_s: float) -> float:
    """Return the operations of a training as a share of those that GPUs are sold with.

    Args:
        plan: of the run, as its report has it; on CPUs the share is 0.
        dtype: of the weights.
        per_s: trainings per second, a small part of one.
    """
    peak = DEVICES[plan["device"]].peak_flops.get(dtype, math.inf)
    # a replica's operations, with its share of the tokens, are those of as many workers as shards
    return float(plan["flops"][Recovery.name] / len(plan["disk_bytes"]) * per_s / peak)


def stream_of(
    section: RecoverySection, schedule: ScheduleSection, length: int, tokenizer: Any
) -> TextStream | None:
    """Return the windows that a recovery reads; None without texts or a tokenizer.

    Raises:
        ValueError: a text on this machine is too short, or cannot be read.
    """
    if tokenizer is None or not section.texts:
        return None
    texts = [(text, f"recovery.texts.{i}") for i, text in enumerate(section.texts)]
    stream = TextStream(texts, length, tokenizer, section.seed)
    num_ends = len(schedule.size_shots)
    num_steps = num_ends * section.num_steps(length)
    num_steps += (schedule.shots - num_ends) * section.num_steps(length, ends=False)
    stream.check_length(num_steps * section.sequences_per_step)
    return stream
