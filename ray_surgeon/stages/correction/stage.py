"""The stage of low-rank corrections, after the update of every shot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ray_surgeon.plan.counts import ADAM_BYTES, Counted
from ray_surgeon.plan.needs import StepPlan, WorkerView
from ray_surgeon.runtime.dense_states import CALIBRATION
from ray_surgeon.stages.correction import training
from ray_surgeon.stages.correction.section import CorrectionSection
from ray_surgeon.stages.stage import Facts, RunState, Stage, Text

_PRODUCTS = 9
"""Launches of B A x forward and backward, beside a linear's own."""
_STEP = 30
_SYNCS = 4
"""Launches and syncs of an optimizer's step for a linear."""


@dataclass(frozen=True)
class Correction(Stage):
    """Trains corrections of all linears, and absorbs them if they help."""

    name = "correction"
    section: CorrectionSection
    num_held: int  # windows held aside, on which it is measured
    by_element: bool  # whether masks are of elements
    # whether the curvature pass keeps the dense model's states of the calibration text
    has_pass: bool

    def run(self, run: RunState, facts: Facts) -> None:
        """Train."""
        num_sequences = len(run.text.tokens)
        batches = training.batches_of(self.section, run.shot, run.num_shots, num_sequences)
        trained = training.Training(self.section, run.cluster, run.text, batches)
        trained.train(run.shot, run.record.get("divergence_held_aside"))
        facts |= trained.facts
        run.record |= trained.as_record()

    def texts_to_remember(self, run: RunState) -> Mapping[str, Text]:
        """Return the calibration text, unless a curvature pass sees it anyway."""
        if self.has_pass or self.section.loss != "kl":
            return {}
        return {CALIBRATION: (run.text.tokens, run.text.counts)}

    # For the plan

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the training of B A.

        It needs inputs, A, B and gradients (between replicas one copy more), Adam's moments at a
        linear's owner, and the best state so far.
        """
        N = worker.num_replicas
        num_states = int(self.num_held > 0)
        of_entry = 8 + (8 if N == 1 else 12 / N) + num_states * (4 + 8 / N)
        entries = sum(linear.num_rows + linear.num_columns for linear in worker.linears)
        adapters = of_entry * self.section.lora_rank * entries
        columns = sum(linear.num_columns for linear in worker.linears)
        inputs = worker.shapes.width * columns / worker.num_blocks
        forward, backward = self._num_passing(worker)
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
        flops += 2 * self.section.lora_rank * entries * (forward + (1 + runs) * backward)
        flops += worker.head_flops * (2 * forward + backward)
        flops *= worker.sequence_length
        moved = worker.moved(worker.stores.weights, loads)
        waves = -(-self.section.sequences_per_step // (N * worker.wave))
        bubble = (waves + worker.num_shards - 1) / waves
        counts = self._counts(worker, forward, backward)
        yield StepPlan(self.name, device, host, flops, 0.0, *moved, bubble, counts)

    def _counts(self, worker: WorkerView, forward: int, backward: int) -> Counted:
        """Return the counts of so many sequences that pass, and of the steps they make."""
        N = worker.num_replicas
        T = worker.sequence_length
        counts = worker.pass_counts(forward, T, 1.0, backward / forward)
        entries = sum(linear.num_rows + linear.num_columns for linear in worker.linears)
        calls = -(-backward // worker.together)
        counts += Counted(_PRODUCTS * len(worker.linears)).times(calls)
        size = self.section.lora_rank * entries
        optimizer = Counted(_STEP * len(worker.linears), _SYNCS * len(worker.linears), calls=2)
        optimizer += Counted(memory_bytes=ADAM_BYTES * size, sent_bytes=12.0 * size * (N > 1))
        per_step = max(1, -(-self.section.sequences_per_step // N))
        return counts + optimizer.times(backward / per_step)

    def _num_passing(self, worker: WorkerView) -> tuple[int, int]:
        """Return how many sequences pass a replica forward, and how many of them backward."""
        section = self.section
        size = section.sequences_per_step
        num_fitted = worker.num_sequences - self.num_held
        num_steps = section.steps_per_shot + section.final_epochs * -(-num_fitted // size)
        num_trials = 0
        num_checks = 0
        if self.num_held:
            # the second rate is taken most often, after the first one was tried
            num_trials = training.trial_steps(num_steps) * (section.learning_rate is None)
            num_checks = training.NUM_CHECKS + 2 + 2 * (section.learning_rate is None)
        N = worker.num_replicas
        backward = (num_steps + num_trials) * -(-size // N)
        return backward + num_checks * -(-self.num_held // N), backward

    def on_host(self, worker: WorkerView) -> float:
        """Return the dense model's states of the calibration text."""
        tokens = worker.num_sequences * worker.sequence_length
        return worker.remembered(tokens * (self.section.loss == "kl"))
