"""Low-rank corrections: B A is trained beside every linear and absorbed into it.

This comes after every shot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ray_surgeon.maths.reconstruction import rate_factor
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.passes import num_counted
from ray_surgeon.runtime.pipelines import forward_and_backward
from ray_surgeon.runtime.wave import Labels
from ray_surgeon.stages.correction import steps
from ray_surgeon.stages.correction.section import CorrectionSection
from ray_surgeon.stages.stage import CalibrationText, Facts, held_measure

RATES = (1e-3, 5e-4, 2.5e-4)
"""Learning rates that are tried in turn, relative to the root mean square of each weight.

The first one that does no harm goes on. What is best for few steps is no guide to what is best for
many: on SmolLM2 the lowest of 6e-4, 1.2e-3 and 2.4e-3 is best for four steps and the second for
sixty; on Qwen2.5-Coder-0.5B the last is best for four and diverges later.
"""
HARMLESS = 1.05
"""Times the measure at the start, up to which the first steps with a rate do no harm."""
NUM_CHECKS = 3
"""How often corrections are measured on the windows held aside while they are trained."""
TOLERATED = 1.02
"""Times the best measure so far, up to which a training goes on as it is."""
GIVEN_UP = 1.5
"""Times the measure at the start, from which a training with a rate given by hand is given up."""


def trial_steps(num_steps: int) -> int:
    """Return how many steps of a training are made with each learning rate that is tried."""
    return min(num_steps, max(3, num_steps // 15))


def batches_of(
    section: CorrectionSection, shot: int, num_shots: int, num_sequences: int
) -> list[list[int]]:
    """Return the calibration sequences of every step after a shot.

    The final epochs come after the last shot.

    The order is drawn anew in every pass over the sequences.
    """
    size = section.sequences_per_step
    order = np.random.default_rng((section.seed, shot))

    def epochs(number: int) -> list[list[int]]:
        orders = [order.permutation(num_sequences).tolist() for _ in range(number)]
        return [own[i : i + size] for own in orders for i in range(0, num_sequences, size)]

    steps_per_epoch = -(-num_sequences // size)
    batches = epochs(-(-section.steps_per_shot // steps_per_epoch))[: section.steps_per_shot]
    return batches + epochs(section.final_epochs if shot == num_shots else 0)


@dataclass
class Training:
    """A training of the corrections of all linears, on the coordinator, and what it came to.

    Measures are of windows held aside: the divergence, or the loss if that is trained.

    Where windows are held aside, the corrections are measured on them before, on the way and at the
    end. A learning rate that is not given is the highest of three whose first steps do no harm, and
    is halved where the measure rises, from the best state on. A training that ends no better than
    it began is undone.
    """

    section: CorrectionSection
    # with the pruned weights and masks. With loss kl it has the dense model's states of the
    # calibration text, and of the windows held aside under the name `HELD`
    cluster: Cluster = field(repr=False)
    text: CalibrationText
    batches: list[list[int]]  # each is one step of the optimizer
    # mean loss of each step's sequences before the step, in nats per token; of trials, those of the
    # rate taken
    losses: list[float] = field(default_factory=list)
    # share of the corrections that arrived in the weights, as `LowRankCorrections.absorb` has it
    absorbed: float = 1.0
    rate: float = 0.0  # the present learning rate; of no step if there is none
    # learning rate -> measure after its first steps; the last one was taken
    tried: dict[float, float] = field(default_factory=dict)
    # number of steps done -> measure; of the one kept at the end, too
    held: list[tuple[int, float]] = field(default_factory=list)
    before: float = math.nan  # the measure of the start
    undone: str | None = None  # why the model stays as it was; None if the corrections are kept

    def train(self, shot: int, before: float | None = None) -> None:
        """Train, and absorb what is best.

        Args:
            shot: number of the shot.
            before: the divergence of the windows held aside, if it has been measured already; see
                `held_measure`.
        """
        if not self.batches:
            return
        self.cluster.run_all(steps.start, self.section, shot)
        self.rate = self.section.learning_rate or RATES[1]
        self._begin_steps()
        if len(self.text.held):
            self._train_checked(before if self.section.loss == "kl" else None)
        else:  # the last state is absorbed
            for number in range(len(self.batches)):
                self._step(number)
        of_workers = self.cluster.run_all(steps.end, self.undone is None)
        arrived, wanted = map(sum, zip(*of_workers, strict=True))
        self.absorbed = arrived / wanted if wanted else float(self.undone is None)

    def _train_checked(self, known: float | None) -> None:
        self.before = self._measure() if known is None else known
        if not math.isfinite(self.before):
            raise FloatingPointError("the pruned model's outputs are not finite; check the weights")
        self._note_if_best(0, self.before)
        first = 0
        if self.section.learning_rate is None:
            first = trial_steps(len(self.batches))
            self._try_rates(first)
        stopped = self._train_on(first)
        undone = self._back_to_the_best()
        self.undone = None if undone is None else f"{undone}{stopped}"

    def _try_rates(self, count: int) -> None:
        """Take the first steps with the highest harmless rate, or else the lowest."""
        for rate in RATES:
            self.rate = rate
            self.cluster.run_all(steps.take_state)
            self.losses = []
            measure = self._measure() if all(map(self._step, range(count))) else math.inf
            self.tried[rate] = measure
            if measure <= HARMLESS * self.before:
                break
        self._note_if_best(count, self.tried[rate])

    def _train_on(self, first: int) -> str:
        """Make the steps from the one with number `first` on, and check on the way.

        Returns why the training ended early, if it did.
        """
        every = max(1, round(len(self.batches) / NUM_CHECKS))
        for number in range(first, len(self.batches)):
            is_finite = self._step(number)
            num_steps = number + 1
            is_last = num_steps == len(self.batches)
            if is_finite and not is_last and num_steps % every:
                continue
            measure = self._measure(rounded=is_last) if is_finite else math.inf
            if self._note_if_best(num_steps, measure) or measure <= TOLERATED * self._best[0]:
                continue
            if self.section.learning_rate is None:
                self.rate /= 2
                self.cluster.run_all(steps.take_state)
            elif measure > GIVEN_UP * self.before:
                rise = f"{self.before:.4g} became {measure:.4g}"
                return f"; it was given up after {num_steps} steps, because it diverged: {rise}"
        return ""

    def _step(self, number: int) -> bool:
        """Make one step; return whether the loss was finite."""
        text = self.text
        batch = self.batches[number]
        num_tokens = num_counted(text.tokens, text.counts, batch)
        if not num_tokens:
            return True
        labels = Labels(of_dense_model=self.section.loss == "kl", is_step=True)
        sums = forward_and_backward(self.cluster, text.tokens, labels, batch, text.counts)
        self.losses.append(sum(sums) / num_tokens)
        if not math.isfinite(self.losses[-1]):
            return False
        rate = self.rate * rate_factor(number, len(self.batches))
        self.cluster.run_all(steps.step, num_tokens, rate)
        self.cluster.progress.reach(number + 1)
        return True

    def _measure(self, *, rounded: bool = False) -> float:
        """Return the measure of the present state; infinite if it is no number.

        With `rounded` it is that of the weights once they have absorbed the state, and no step may
        follow.
        """
        if rounded:
            self.cluster.run_all(steps.round_as_absorbed)
        measure = held_measure(self.cluster, self.text, self.section.loss)
        self._begin_steps()
        return measure

    @property
    def _best(self) -> tuple[float, int]:
        """The smallest measure so far, and the steps of its state, which workers keep."""
        return min((measure, num_steps) for num_steps, measure in self.held)

    def _begin_steps(self) -> None:
        num_tokens = len(self.batches[0]) * self.text.tokens.shape[1]
        self.cluster.progress.begin(len(self.batches), "steps", num_tokens)

    def _note_if_best(self, num_steps: int, measure: float) -> bool:
        """Note a measure, and keep the state if it is the best so far; return whether it is."""
        is_best = not self.held or measure < self._best[0]
        self.held.append((num_steps, measure))
        if is_best:
            self.cluster.run_all(steps.keep_state)
        return is_best

    def _back_to_the_best(self) -> str | None:
        """Go back to the best state; return why nothing is to be absorbed, if so."""
        before = f"{self.before:.4g} before"
        _, num_steps = self._best
        if not num_steps:
            return f"no state was better on the windows held aside than {before}"
        if num_steps == len(self.batches):  # which was measured rounded
            return None
        self.cluster.run_all(steps.take_state)
        rounded = self._measure(rounded=True)
        self.held.append((num_steps, rounded))
        if rounded < self.before:
            return None
        rounds = f"rounded to the weights' dtype it was {rounded:.4g}"
        return f"{rounds} on the windows held aside, and {before}"

    @property
    def facts(self) -> Facts:
        """What the line of the step says.

        These are the measures before and after, the rate, and why it was undone, if it was.
        """
        facts: Facts = {"num_steps": len(self.losses), "rate": self.rate}
        if self.held:
            facts |= {"held aside before": self.held[0][1], "held aside after": self.held[-1][1]}
        elif self.losses:
            facts |= {"first_loss": self.losses[0], "last_loss": self.losses[-1]}
        if self.undone is None:
            return facts | {"absorbed": self.absorbed}
        return facts | {"undone": self.undone}

    def as_record(self) -> dict[str, Any]:
        """Return what the report says."""
        tried = self.tried.items()
        return {
            "correction_losses": [loss for loss in self.losses if math.isfinite(loss)],
            "correction_absorbed": self.absorbed,
            "correction_rate": self.rate,
            "correction_tried": [{"rate": rate, "held_aside": _number(x)} for rate, x in tried],
            "correction_held_aside": [{"steps": n, "value": _number(x)} for n, x in self.held],
            "correction_undone": self.undone,
        }


def _number(measure: float) -> float | None:
    """Return what JSON can hold: None for an infinite measure, of a training that diverged."""
    return measure if math.isfinite(measure) else None
