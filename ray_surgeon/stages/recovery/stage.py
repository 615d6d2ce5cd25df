"""The stage of recovery: training after the update of a shot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_surgeon.memory.stores import ScratchNames
from ray_surgeon.plan.counts import ADAM_BYTES, Counted, StepPlan
from ray_surgeon.plan.needs import WorkerView
from ray_surgeon.runtime.dense_states import CALIBRATION
from ray_surgeon.runtime.weights import ModelRecipe, drop_teacher, load_teacher
from ray_surgeon.stages.recovery.batches import Batches, CalibrationBatches, StreamBatches
from ray_surgeon.stages.recovery.section import RecoverySection
from ray_surgeon.stages.recovery.teacher import LoadTeacher
from ray_surgeon.stages.recovery.training import Training, steps_between_checks, trial_steps
from ray_surgeon.stages.stage import Facts, RunState, Stage, Text
from ray_surgeon.storage.streams import TextStream

_PRODUCTS = 9
"""Launches of B A x forward and backward, beside a linear's own."""
_STEP = 22
"""Launches of an optimizer's step for a linear."""
_START = 28
_SYNCS_OF_START = 4
"""Launches and syncs for a linear at the start and the end."""


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
    teacher: LoadTeacher | None = None  # what to train towards; None for the dense model

    def run(self, run: RunState, facts: Facts) -> None:
        """Train."""
        trained = Training(self.section, run.cluster, run.text, self._batches(run))
        if trained.batches.num_steps and self.section.has_teacher:
            scratch = run.kept(ScratchNames)
            teacher = self.teacher
            recipe = teacher.recipe(scratch) if teacher else ModelRecipe(run.model, (), scratch)
            run.cluster.run_all(load_teacher, recipe, run.cluster.stores.weights)
        trained.train(run.shot, run.record.get("divergence_held_aside"))
        if trained.batches.num_steps and self.section.has_teacher:
            run.cluster.run_all(drop_teacher)
        facts |= trained.facts
        run.record |= trained.as_record()

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

    @property
    def _rank(self) -> int:
        assert isinstance(self.section.rank, int)
        return self.section.rank

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the training of B A.

        It needs inputs, A, B and gradients (between replicas one copy more), Adam's moments at a
        linear's owner, and the best state so far.
        """
        N = worker.num_replicas
        num_states = int(self.num_held > 0)
        of_entry = 8 + (8 if N == 1 else 12 / N) + num_states * (4 + 8 / N)
        entries = sum(linear.num_rows + linear.num_columns for linear in worker.linears)
        adapters = of_entry * self._rank * entries
        columns = sum(linear.num_columns for linear in worker.linears)
        inputs = worker.shapes.width * columns / worker.num_blocks
        num_steps, num_checks = self._num_steps(worker)
        backward = num_steps * -(-self.section.sequences_per_step // N)
        forward = backward + num_checks * -(-self.num_held // N)
        # B A and copies: of elements in every pass, of others when absorbed
        product = 16.0 * max(linear.size for linear in worker.linears)
        passing = worker.passing(more_kept=inputs) + product * self.by_element
        # on a CPU masks of elements are those of the host
        masks = sum(linear.size for linear in worker.linears) * self.by_element
        on_device = masks * (not worker.device_is_host)
        loads = worker.all_blocks * -(-(forward + backward) // worker.wave)
        device = worker.weights + adapters + on_device + max(passing, product)
        host = worker.host + worker.travelling(worker.sequence_length)
        runs = 1 + (worker.stores.activations == "recompute")
        # weights get no gradients; A and B do
        flops = 2 * worker.active * (forward + runs * backward)
        flops += 2 * self._rank * entries * (forward + (1 + runs) * backward)
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
        entries = sum(linear.num_rows + linear.num_columns for linear in worker.linears)
        size = self._rank * entries
        runs = 1 + (worker.stores.activations == "recompute")
        calls = -(-per_step // worker.stores.in_a_call(per_step, worker.num_shards))
        step = worker.pass_counts(per_step, T, runs, 1.0)
        step += Counted((_PRODUCTS * calls + _STEP) * num_linears, 2, calls=2)
        # parameters and two moments, read and written, and gradients
        step += Counted(memory_bytes=ADAM_BYTES * size, sent_bytes=12.0 * size * (N > 1))
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
