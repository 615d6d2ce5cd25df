"""A training after pruning, on the coordinator.

It measures itself on windows held aside, chooses its rate, and keeps its best state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.passes import num_counted
from ray_surgeon.runtime.pipelines import forward_and_backward
from ray_surgeon.runtime.wave import Labels
from ray_surgeon.stages.recovery import steps
from ray_surgeon.stages.recovery.batches import Batches
from ray_surgeon.stages.recovery.section import RecoverySection
from ray_surgeon.stages.stage import CalibrationText, Facts, held_aside

RATES = (1e-3, 5e-4, 2.5e-4)
"""Learning rates that are tried in turn, relative to the root mean square of each weight.

The first one that does no harm goes on. What is best for few steps is no guide to what is best for
many: on SmolLM2 the lowest of 6e-4, 1.2e-3 and 2.4e-3 is best for four steps and the second for
sixty; on Qwen2.5-Coder-0.5B the last is best for four and diverges later.
"""
HARMLESS = 1.05
"""Times the measure at the start, up to which the first steps with a rate do no harm."""
_WARM_UP = 0.1
"""Of the steps, those in which the rate rises,"""
_MOST_WARM_UP = 20
"""but no more than these, so that the trial of a rate reaches it."""
_STEPS_OF_A_CHECK = 100
"""After so many steps a training is measured on the windows held aside, or after a third of it."""
_PATIENCE = 4
"""Checks in a row that bring nothing, after which a training ends."""
TOLERATED = 1.02
"""Times the best measure so far, up to which a training goes on as it is."""
GIVEN_UP = 1.5
"""Times the measure at the start, from which a training with a rate given by hand is given up."""


def trial_steps(num_steps: int) -> int:
    """Return how many steps of a training are made with each learning rate that is tried."""
    return min(num_steps, max(3, min(_MOST_WARM_UP, num_steps // 15)))


def steps_between_checks(num_steps: int) -> int:
    """Return after how many steps a training is measured on the windows held aside."""
    return max(1, min(_STEPS_OF_A_CHECK, round(num_steps / 3)))


def rate_factor(number: int, num_steps: int) -> float:
    """Return the factor of the learning rate in a step: a short rise, then a fall to zero.

    Args:
        number: of the step, from 0.
        num_steps: in all.
    """
    rise = max(1, min(_MOST_WARM_UP, round(_WARM_UP * num_steps)))
    return min((number + 1) / rise, 1 - number / num_steps)


@dataclass(frozen=True)
class Check:
    """A training measured on the windows held aside."""

    steps: int  # that were made
    value: float  # divergence from the dense model, or loss, in nats per token
    acceptance: float | None = None  # share of the dense model's tokens; None with the loss
    tokens: int = 0  # that were trained on
    loss: float | None = None  # mean of the steps since the check before, nats per token
    tokens_per_s: float | None = None  # likewise


@dataclass
class Training:
    """A training, and what it came to.

    Measures are of windows held aside: the divergence, or the loss if that is trained.

    Where windows are held aside, the model is measured on them before, on the way and at the end.
    A learning rate that is not given is the highest of three whose first steps do no harm, and is
    halved where the measure rises, from the best state on. A training that brings nothing any more
    ends early, and one that ends no better than it began is undone.
    """

    section: RecoverySection
    # with the pruned weights and masks. With loss kl it has the dense model's states of the windows
    # held aside under the name `HELD`, and those of the batches
    cluster: Cluster = field(repr=False)
    text: CalibrationText
    batches: Batches
    on_check: Callable[[Check], object] = lambda _: None  # is called with every check
    # mean loss of each step's sequences before the step, in nats per token; of trials, those of the
    # rate taken
    losses: list[float] = field(default_factory=list)
    # share of the training that arrived in the weights, see `Trainee.absorb`
    absorbed: float = 1.0
    rate: float = 0.0  # the present learning rate; of no step if there is none
    # learning rate -> measure after its first steps; the last one was taken
    tried: dict[float, float] = field(default_factory=dict)
    held: list[Check] = field(default_factory=list)  # of the state kept at the end, too
    before: float = math.nan  # the measure of the start
    undone: str | None = None  # why the model stays as it was; None if the training is kept
    ended: str | None = None  # why it ended early; None if it did not
    _num_tokens: int = 0
    _checked_s: float = field(default_factory=time.perf_counter)

    def train(self, shot: int) -> None:
        """Train after a shot with this number, and keep what is best."""
        if not self.batches.num_steps:
            return
        self.cluster.run_all(steps.start, self.section, shot)
        self.rate = self.section.learning_rate or RATES[1]
        self._begin_steps()
        if len(self.text.held):
            self._train_checked()
        else:  # the last state is kept
            for number in range(self.batches.num_steps):
                self._step(number)
        of_workers = self.cluster.run_all(steps.end, self.undone is None)
        arrived, wanted = map(sum, zip(*of_workers, strict=True))
        self.absorbed = arrived / wanted if wanted else float(self.undone is None)

    def _train_checked(self) -> None:
        start = self._measured(0)
        self.before = start.value
        if not math.isfinite(self.before):
            raise FloatingPointError("the pruned model's outputs are not finite; check the weights")
        self._note_if_best(start)
        first = 0
        if self.section.learning_rate is None:
            first = trial_steps(self.batches.num_steps)
            self._try_rates(first)
        self._train_on(first)
        undone = self._back_to_the_best()
        why = "" if self.ended is None else f"; {self.ended}"
        self.undone = None if undone is None else f"{undone}{why}"

    def _try_rates(self, count: int) -> None:
        """Take the first steps with the highest harmless rate, or else the lowest."""
        check = Check(0, math.inf)
        for rate in RATES:
            self.rate = rate
            self.cluster.run_all(steps.take_best)
            self.losses = []
            self._num_tokens = 0
            is_finite = all(map(self._step, range(count)))
            check = self._measured(count, is_finite)
            self.tried[rate] = check.value
            if check.value <= HARMLESS * self.before:
                break
        self._note_if_best(check)

    def _train_on(self, first: int) -> None:
        """Make the steps from the one with number `first` on, and check on the way."""
        num_steps = self.batches.num_steps
        every = steps_between_checks(num_steps)
        num_in_vain = 0
        for number in range(first, num_steps):
            is_finite = self._step(number)
            done = number + 1
            is_last = done == num_steps
            if is_finite and not is_last and done % every:
                continue
            check = self._measured(done, is_finite, rounded=is_last)
            is_better = self._note_if_best(check)
            num_in_vain = 0 if is_better else num_in_vain + 1
            if is_better or is_last:
                continue
            if num_in_vain == _PATIENCE:
                self.ended = f"it ended after {done} steps, because {_PATIENCE} checks in a row "
                self.ended += f"were no better than {self._best.value:.4g}"
                return
            if check.value <= TOLERATED * self._best.value:
                continue
            if self.section.learning_rate is None:
                self.rate /= 2
                self.cluster.run_all(steps.take_best)
            elif check.value > GIVEN_UP * self.before:
                rise = f"{self.before:.4g} became {check.value:.4g}"
                self.ended = f"it was given up after {done} steps, because it diverged: {rise}"
                return

    def _step(self, number: int) -> bool:
        """Make one step; return whether the loss was finite."""
        tokens, counts, numbers, text = self.batches.batch(number)
        num_tokens = num_counted(tokens, counts, numbers)
        if not num_tokens:
            return True
        labels = Labels(dense=text if self.section.loss == "kl" else None, is_step=True)
        sums = forward_and_backward(self.cluster, tokens, labels, numbers, counts)
        self.losses.append(sum(sums) / num_tokens)
        if not math.isfinite(self.losses[-1]):
            return False
        rate = self.rate * rate_factor(number, self.batches.num_steps)
        self.cluster.run_all(steps.step, num_tokens, rate)
        self._num_tokens += len(numbers) * tokens.shape[1]
        self.cluster.progress.reach(number + 1)
        return True

    def _measured(self, num_steps: int, is_finite: bool = True, rounded: bool = False) -> Check:
        """Measure the state after so many steps; the value is infinite if it is no number.

        With `rounded` it is that of the weights as they will be, in their dtype, and no step may
        follow.
        """
        if rounded and is_finite:
            self.cluster.run_all(steps.round_as_absorbed)
        now_s = time.perf_counter()
        num_before = self.held[-1].tokens if self.held else 0
        pace = max(0, self._num_tokens - num_before) / (now_s - self._checked_s)
        losses = self.losses[self.held[-1].steps if self.held else 0 :]
        about = (self.cluster, self.text, self.section.loss)
        measure = held_aside(*about) if is_finite else (math.inf, None)
        loss = fmean(losses) if losses and is_finite else None
        check = Check(num_steps, *measure, self._num_tokens, loss, pace or None)
        self.on_check(check)
        self._checked_s = time.perf_counter()
        self._begin_steps()
        return check

    @property
    def _best(self) -> Check:
        """The smallest measure so far, of the state that workers keep."""
        return min(self.held, key=lambda check: (check.value, check.steps))

    def _begin_steps(self) -> None:
        batches = self.batches
        self.cluster.progress.begin(batches.num_steps, "steps", batches.tokens_of_step)

    def _note_if_best(self, check: Check) -> bool:
        """Note a measure, and keep the state if it is the best so far; return whether it is."""
        is_best = not self.held or check.value < self._best.value
        self.held.append(check)
        if is_best:
            self.cluster.run_all(steps.keep_best)
        return is_best

    def _back_to_the_best(self) -> str | None:
        """Go back to the best state; return why nothing is to be kept, if so."""
        before = f"{self.before:.4g} before"
        num_steps = self._best.steps
        if not num_steps:
            return f"no state was better on the windows held aside than {before}"
        if num_steps == self.batches.num_steps:  # which was measured rounded
            return None
        self.cluster.run_all(steps.take_best)
        rounded = self._measured(num_steps, rounded=True)
        self.held.append(rounded)
        if rounded.value < self.before:
            return None
        rounds = f"rounded to the weights' dtype it was {rounded.value:.4g}"
        return f"{rounds} on the windows held aside, and {before}"

    @property
    def facts(self) -> Facts:
        """What the line of the step says.

        These are the measures before and after, the rate, and why it was undone, if it was.
        """
        facts: Facts = {"num_steps": len(self.losses), "rate": self.rate}
        if self.held:
            measures = [check.value for check in self.held]
            facts |= {"held aside before": measures[0], "held aside after": measures[-1]}
        elif self.losses:
            facts |= {"first_loss": self.losses[0], "last_loss": self.losses[-1]}
        if self.undone is not None:
            return facts | {"undone": self.undone}
        return facts | {"absorbed": self.absorbed} | ({"ended": self.ended} if self.ended else {})

    def as_record(self) -> dict[str, Any]:
        """Return what the report says."""
        tried = self.tried.items()
        return {
            "recovery_losses": [loss for loss in self.losses if math.isfinite(loss)],
            "recovery_absorbed": self.absorbed,
            "recovery_rate": self.rate,
            "recovery_tried": [{"rate": rate, "held_aside": _number(x)} for rate, x in tried],
            "recovery_held_aside": [asdict(c) | {"value": _number(c.value)} for c in self.held],
            "recovery_undone": self.undone,
            "recovery_ended": self.ended,
        }


def _number(measure: float) -> float | None:
    """Return what JSON can hold: None for an infinite measure, of a training that diverged."""
    return measure if math.isfinite(measure) else None
