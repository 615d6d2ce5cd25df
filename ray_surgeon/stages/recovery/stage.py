"""The stage of recovery: training after the update of a shot."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ray_surgeon.memory.stores import ScratchNames
from ray_surgeon.plan.counts import ADAM_BYTES, Counted, StepPlan
from ray_surgeon.plan.needs import WorkerView
from ray_surgeon.report.events import CHECK
from ray_surgeon.report.html_report import LivePage
from ray_surgeon.runtime.dense_states import CALIBRATION
from ray_surgeon.runtime.weights import ModelRecipe, drop_teacher, load_teacher
from ray_surgeon.stages.recovery.batches import Batches, CalibrationBatches, StreamBatches
from ray_surgeon.stages.recovery.rates import Check, steps_between_checks, trial_steps
from ray_surgeon.stages.recovery.section import RecoverySection
from ray_surgeon.stages.recovery.training import Training
from ray_surgeon.stages.stage import Facts, RunState, Stage, Text
from ray_surgeon.stages.weights import commit_part
from ray_surgeon.storage.streams import TextStream

_PRODUCTS = 9
"""Launches of B A x forward and backward, beside a linear's own."""
_GRADIENTS = 2
"""Launches of the gradient of a weight and its sum, likewise."""
_STEP = 22
"""Launches of an optimizer's step for a linear."""
_START = 28
_SYNCS_OF_START = 4
"""Launches and syncs for a linear at the start and the end."""
_STEP_BYTES = 12.0
"""Of a weight in float32 while it makes a step: its gradient, and two numbers of Adam's."""


@dataclass(frozen=True)
class Recovery(Stage):
    """Trains towards the dense model, and keeps what helps."""

    name = "recovery"
    section: RecoverySection
    num_held: int  # windows held aside, on which it is measured
    by_element: bool  # whether masks are of elements
    # whether the curvature pass keeps the dense model's states of the calibration text
    has_pass: bool
    # windows of the texts to train on; None for those of the calibration
    stream: TextStream | None = field(default=None, repr=False)

    def run(self, run: RunState, facts: Facts) -> None:
        """Train."""

        def tell(check: Check) -> None:
            named = {"held_aside": check.value, "value": None, "rate": trained.rate}
            run.steps.tell(CHECK, vars(check) | named)
            so_far = replace(trained, held=[*trained.held, check]).as_record()
            run.kept(LivePage).draw(run.report.as_record() | {"present": so_far}, final=False)

        trained = Training(self.section, run.cluster, run.text, self._batches(run), tell)
        trained.on_step = partial(self._commit, run, trained)
        if trained.batches.num_steps and run.part is None:
            # all weights change from the first step on
            self._commit(run, trained, at_once=self.section.rank == "all")
        if trained.batches.num_steps and self.section.has_teacher:
            recipe = ModelRecipe(run.model, (), run.kept(ScratchNames))
            run.cluster.run_all(load_teacher, recipe, run.cluster.stores.weights)
        trained.train(run.shot, run.part)
        if trained.batches.num_steps and self.section.has_teacher:
            run.cluster.run_all(drop_teacher)
        facts |= trained.facts
        run.record |= trained.as_record()

    def _commit(self, run: RunState, trained: Training, *, at_once: bool = False) -> None:
        """Commit how far the shot has come, if the last commit was long ago or it is wanted."""
        since_s = time.monotonic() - run.committed_s
        if at_once or since_s > 60 * self.section.commit_minutes:
            after = f"after {trained.done} steps of {self.name}"
            commit_part(run, self.name, after, trained.state(), trained.save)

    def _batches(self, run: RunState) -> Batches:
        if self.stream is None:
            return CalibrationBatches(self.section, run.text, run.shot, run.num_shots)
        num_steps = [
            self.section.num_steps(shot, run.num_shots, self.stream.sequence_length)
            for shot in range(1, run.shot + 1)
        ]
        first = sum(num_steps[:-1]) * self.section.sequences_per_step
        return StreamBatches(self.section, self.stream, run.cluster, num_steps[-1], first)

    def texts_to_remember(self, run: RunState) -> Mapping[str, Text]:
        """Return the calibration text, unless a curvature pass sees it anyway."""
        if self.has_pass or not self.sees_calibration:
            return {}
        return {CALIBRATION: (run.text.tokens, run.text.counts)}

    @property
    def sees_calibration(self) -> bool:
        """Whether it wants the dense model's states of the calibration text."""
        return self.section.loss == "kl" and not self.section.texts

    # For the plan

    def _size(self, worker: WorkerView) -> float:
        """Return how many numbers are trained."""
        if self.section.rank == "all":
            width: int = worker.shapes.width
            return worker.all_blocks / width
        return self.section.rank * sum(s.num_rows + s.num_columns for s in worker.linears)

    def _trained(self, worker: WorkerView) -> tuple[float, float]:
        """Return the bytes on the device and the host of what is trained.

        For corrections these are A, B and gradients (between replicas one copy more), Adam's
        moments at a linear's owner, and the best state so far. For all weights, gradients; masters
        and moments at the owner, and of one block what a step makes of them; and on the host the
        weights as they were, and the best so far.
        """
        N = worker.num_replicas
        size = self._size(worker)
        num_states = int(self.num_held > 0)
        if self.section.rank != "all":
            return (8 + (8 if N == 1 else 12 / N) + num_states * (4 + 8 / N)) * size, 0.0
        if worker.stores.weights != "device":
            return math.inf, 0.0  # there it cannot be trained
        is_on_device = worker.stores.factors == "device"
        # weights in float32 are their own masters
        has_masters = worker.shapes.width < 4 or not (is_on_device or worker.device_is_host)
        of_factors = (8 + 4 * has_masters) * size / N + _STEP_BYTES * size / worker.num_blocks
        copies = (1 + num_states) * worker.all_blocks
        on_device = worker.all_blocks + of_factors * is_on_device
        return on_device, copies + of_factors * (not is_on_device)

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the training: what is trained, and what passes."""
        N = worker.num_replicas
        trains_all = self.section.rank == "all"
        trained, more_on_host = self._trained(worker)
        columns = sum(linear.num_columns for linear in worker.linears)
        inputs = worker.shapes.width * columns / worker.num_blocks
        num_steps, num_checks = self._num_steps(worker)
        backward = num_steps * -(-self.section.sequences_per_step // N)
        forward = backward + num_checks * -(-self.num_held // N)
        # B A and copies: of elements in every pass, of others when absorbed
        product = 16.0 * max(linear.size for linear in worker.linears) * (not trains_all)
        passing = worker.passing(more_kept=inputs) + product * self.by_element
        # on a CPU masks of elements are those of the host
        masks = sum(linear.size for linear in worker.linears) * self.by_element
        on_device = masks * (not worker.device_is_host)
        loads = worker.all_blocks * -(-(forward + backward) // worker.wave)
        device = worker.weights + trained + on_device + max(passing, product)
        host = worker.host + worker.travelling(worker.sequence_length) + more_on_host
        runs = 1 + (worker.stores.activations == "recompute")
        # weights get gradients only where all are trained
        flops = 2 * worker.active * (forward + (runs + trains_all) * backward)
        if not trains_all:
            flops += 2 * self._size(worker) * (forward + (1 + runs) * backward)
        flops += worker.head_flops * (2 * forward + backward)
        flops *= worker.sequence_length
        moved = worker.moved(worker.stores.weights, loads)
        per_step = -(-self.section.sequences_per_step // N)
        waves = -(-per_step // worker.stores.wave_of(per_step, worker.num_shards))
        bubble = (waves + worker.num_shards - 1) / waves
        counts = self._counts(worker, num_steps, num_checks)
        yield StepPlan(self.name, device, host, flops, 0.0, *moved, bubble, counts)

    def _counts(self, worker: WorkerView, num_steps: int, num_checks: int) -> Counted:
        """Return the counts of so many steps, and measurements on the windows held aside."""
        N = worker.num_replicas
        T = worker.sequence_length
        num_linears = len(worker.linears)
        per_step = -(-self.section.sequences_per_step // N)
        trains_all = self.section.rank == "all"
        size = self._size(worker)
        # the gradients and the result, of A and B in float32
        of_entry = 2.0 * worker.shapes.width if trains_all else 12.0
        runs = 1 + (worker.stores.activations == "recompute")
        calls = -(-per_step // worker.stores.in_a_call(per_step, worker.num_shards))
        step = worker.pass_counts(per_step, T, runs, 1.0)
        products = _GRADIENTS if trains_all else _PRODUCTS
        step += Counted((products * calls + _STEP) * num_linears, 2, calls=2)
        # parameters and two moments, read and written, and gradients
        of_owner = ADAM_BYTES * size / (N if trains_all else 1)
        step += Counted(memory_bytes=of_owner, sent_bytes=of_entry * size * (N > 1))
        check = worker.pass_counts(-(-self.num_held // N), T)
        start = Counted(_START * num_linears, _SYNCS_OF_START * num_linears)
        return step.times(num_steps) + check.times(num_checks) + start

    def _num_steps(self, worker: WorkerView) -> tuple[int, int]:
        """Return how many steps are made in a shot, and how often windows held aside pass."""
        section = self.section
        num_steps = section.num_steps(1, 1, worker.sequence_length)
        if not self.num_held:
            return num_steps, 0
        # the second rate is taken most often, after the first one was tried
        tries = section.learning_rate is None
        num_checks = num_steps // steps_between_checks(num_steps)
        num_steps += trial_steps(num_steps) * tries
        return num_steps, num_checks + 2 + 2 * tries

    def on_host(self, worker: WorkerView) -> float:
        """Return the dense model's states of the calibration text."""
        tokens = worker.num_sequences * worker.sequence_length
        return worker.remembered(tokens * self.sees_calibration)


def stream_of(
    section: RecoverySection, num_shots: int, length: int, tokenizer: Any
) -> TextStream | None:
    """Return the windows that a recovery reads; None without texts or a tokenizer.

    Raises:
        ValueError: a text on this machine is too short, or cannot be read.
    """
    if tokenizer is None or not section.texts:
        return None
    texts = [(text, f"recovery.texts.{i}") for i, text in enumerate(section.texts)]
    stream = TextStream(texts, length, tokenizer, section.seed)
    num_steps = sum(section.num_steps(i, num_shots, length) for i in range(1, num_shots + 1))
    stream.check_length(num_steps * section.sequences_per_step)
    return stream
