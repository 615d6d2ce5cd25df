"""The training after pruning, on the coordinator: its sequences, learning rates and checks.

Checks measure the model on windows held aside, and select the learning rate and the best state.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ray_surgeon.checkpointing import CommittedPart
from ray_surgeon.config.sections import RecoverySection
from ray_surgeon.data.texts import TextEndedError, TextStream
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.dense_states import CALIBRATION, STREAM, forget_states
from ray_surgeon.distributed.microbatch import Counts, Labels, Tokens
from ray_surgeon.distributed.passes import (
    forward_and_backward,
    num_counted,
    pass_up_to_the_head,
)
from ray_surgeon.distributed.weights import SavedFile
from ray_surgeon.maths.reconstruction import rate_factor
from ray_surgeon.recovery import steps
from ray_surgeon.run_state import CalibrationText, Facts, held_aside

SEQUENCES_AHEAD = 32
"""Number of sequences in one pass of the teacher.

The teacher's weights are moved, and the shards synchronised, once per pass.
"""


def steps_ahead(sequences_per_step: int) -> int:
    """Return the number of steps whose sequences are in one pass of the teacher."""
    return max(1, SEQUENCES_AHEAD // sequences_per_step)


class Batch(NamedTuple):
    """The sequences of one step."""

    tokens: Tokens  # [num_sequences, T], includes sequences of other steps
    counts: Counts  # [num_sequences, T], which tokens count
    numbers: Sequence[int]  # indices of the step's sequences
    text: str  # name under which workers keep the dense model's states of `tokens`


class Batches(ABC):
    """The sequences of all training steps after a shot."""

    num_steps: int
    tokens_of_step: int  # tokens of a full step

    @abstractmethod
    def batch(self, number: int) -> Batch:
        """Return the sequences of a step.

        Steps are requested in order, possibly again from the first one.

        Raises:
            TextEndedError: there are no more sequences.
        """

    @abstractmethod
    def resize(self, num_steps: int) -> None:
        """Change the number of steps, and start again."""


@dataclass
class CalibrationBatches(Batches):
    """Windows of the calibration text, shuffled anew for every pass over them."""

    section: RecoverySection
    text: CalibrationText
    num_steps: int
    shot: int

    def __post_init__(self) -> None:
        num_sequences, length = self.text.tokens.shape
        size = min(self.section.sequences_per_step, num_sequences)
        per_pass = -(-num_sequences // size)
        self.tokens_of_step = size * length
        generator = np.random.default_rng((self.section.seed, self.shot))
        parts = []
        for _ in range(-(-self.num_steps // per_pass)):
            order = generator.permutation(num_sequences).tolist()
            for start in range(0, num_sequences, size):
                parts.append(order[start : start + size])
        self._numbers = parts[: self.num_steps]

    def resize(self, num_steps: int) -> None:
        """Change the number of steps, and draw all windows again."""
        self.num_steps = num_steps
        self.__post_init__()

    def batch(self, number: int) -> Batch:
        """Return the windows of a step; the last step of a pass may have fewer."""
        return Batch(
            tokens=self.text.tokens,
            counts=self.text.counts,
            numbers=self._numbers[number],
            text=CALIBRATION,
        )


class StreamBatches(Batches):
    """Windows of a stream of texts; one pass of the teacher covers several steps."""

    def __init__(
        self,
        section: RecoverySection,
        stream: TextStream,
        cluster: Cluster,
        num_steps: int,
        first: int,
    ) -> None:
        """Prepare to read from a window on.

        Args:
            section: section `recovery` of the job spec.
            stream: stream of windows.
            cluster: cluster whose workers have a teacher, if the section needs one.
            num_steps: number of steps.
            first: index of the first window; those before it were used after earlier shots.
        """
        self.num_steps = num_steps
        self._size = section.sequences_per_step
        self.tokens_of_step = self._size * stream.sequence_length
        self._has_teacher = section.has_teacher
        self._stream = stream
        self._cluster = cluster
        self._first = first
        self._steps_ahead = steps_ahead(self._size)
        self._windows: Iterator[NDArray[np.int64]] = iter(())
        self._part = -1  # number of the current part; a part has `_steps_ahead` steps
        self._tokens: Tokens = np.zeros((0, stream.sequence_length), dtype=np.int64)
        self._ended: TextEndedError | None = None

    def resize(self, num_steps: int) -> None:
        """Change the number of steps, and start again."""
        self.num_steps = num_steps
        self._part = -1

    def batch(self, number: int) -> Batch:
        """Return the windows of a step."""
        part, place = divmod(number, self._steps_ahead)
        if part != self._part:
            self._read(part)
        numbers = range(place * self._size, (place + 1) * self._size)
        if numbers.stop > len(self._tokens) and self._ended is not None:
            raise self._ended
        return Batch(tokens=self._tokens, counts=None, numbers=numbers, text=STREAM)

    def _read(self, part: int) -> None:
        """Read the windows of a part and pass them through the teacher."""
        size = self._steps_ahead * self._size
        if part != self._part + 1 or part == 0:
            self._windows = self._stream.windows(self._first + part * size)
        self._part = part
        windows = list[NDArray[np.int64]]()
        num_left = self.num_steps * self._size - part * size
        try:
            for _ in range(min(size, num_left)):
                windows.append(next(self._windows))
        except TextEndedError as error:
            self._ended = error
        if not windows:
            self._tokens = self._tokens[:0]
            return
        self._tokens = np.stack(windows)
        if self._has_teacher:
            self._cluster.run_all(forget_states, STREAM)
            pass_up_to_the_head(
                self._cluster,
                self._tokens,
                None,
                STREAM,
                "the dense model",
                True,
            )


RATES = (1e-3, 5e-4, 2.5e-4)
"""Learning rates that are tried in turn, relative to the root mean square of each weight.

The first one that does no harm is kept. The best rate for few steps does not predict the best rate
for many: on SmolLM2 the lowest of 6e-4, 1.2e-3 and 2.4e-3 is best for four steps and the second for
sixty; on Qwen2.5-Coder-0.5B the last is best for four and diverges later.
"""
HARMLESS = 1.05
"""Largest measure after the first steps, relative to the start, at which a rate is harmless.

This is the limit for corrections. If all weights are trained, the measure must not rise: a model
that is already close to the dense one loses more by a high rate than a few steps can recover.
"""
_WARM_UP = 0.1
"""Fraction of the steps in which the rate rises."""
_MOST_WARM_UP = 20
"""Limit on the number of steps in which the rate rises, so that a trial reaches the full rate."""
_STEPS_OF_A_CHECK = 100
"""Steps between measures on the windows held aside; a third of all steps if that is less."""
PATIENCE = 4
"""Consecutive checks without an improvement, after which a training ends."""
TOLERATED = 1.02
"""Largest measure relative to the best one at which a training continues unchanged."""
GIVEN_UP = 1.5
"""Largest measure relative to the start at which a training with a given rate continues."""


_MOST_PASSES = 8
"""Maximum number of epochs over the calibration text if the job's time limits the recovery."""
_MOST_TOKENS = 100_000_000
_PARAMETERS_PER_TOKEN = 100
"""Parameters of the model per token of such a recovery: small models need fewer tokens."""
_FURTHER_CHECKS = 6
"""Time for trying learning rates and for the end of a training, in units of a check."""
_TIMED_STEPS = 3
"""Number of steps timed before a training with a time limit."""


def most_useful_tokens(num_parameters: int, calibration_tokens: int) -> int:
    """Return the maximum number of tokens of a recovery that the job's time limits.

    Args:
        num_parameters: parameters of the model.
        calibration_tokens: tokens of the text used for training.
    """
    return min(
        _MOST_TOKENS,
        num_parameters // _PARAMETERS_PER_TOKEN,
        _MOST_PASSES * calibration_tokens,
    )


def trial_steps(num_steps: int) -> int:
    """Return the number of steps with which each learning rate is tried."""
    return min(num_steps, max(3, min(_MOST_WARM_UP, num_steps // 15)))


def steps_between_checks(num_steps: int) -> int:
    """Return the number of steps between measures on the windows held aside."""
    return max(1, min(_STEPS_OF_A_CHECK, round(num_steps / 3)))


def rising_steps(num_steps: int) -> int:
    """Return the number of steps in which the rate rises; see `rate_factor`."""
    return max(1, min(_MOST_WARM_UP, round(_WARM_UP * num_steps)))


@dataclass(frozen=True)
class Check:
    """A measure of a training on the windows held aside."""

    steps: int  # number of steps made
    value: float  # divergence from the dense model, or loss, in nats per token
    # accepted share of the dense model's tokens; None if the loss is measured
    acceptance: float | None = None
    tokens: int = 0  # number of tokens trained on
    loss: float | None = None  # mean of the steps since the last check, nats per token
    tokens_per_s: float | None = None  # since the last check


@dataclass
class Training:
    """Trains a pruned model and keeps its best state.

    Measures are taken on the windows held aside: the divergence from the dense model, or the loss
    if that is trained.

    If windows are held aside, the model is measured on them before, during and after the training.
    A learning rate that is not given is the highest of three whose first steps do no harm. It is
    halved, starting from the best state, whenever the measure rises. Training ends early once it
    brings no improvement, and it is undone if it ends no better than it began.
    """

    section: RecoverySection
    # with the pruned weights and masks; with loss kl also the dense model's states of the batches
    # and, under the name `HELD`, of the windows held aside
    cluster: Cluster = field(repr=False)
    text: CalibrationText
    batches: Batches
    on_check: Callable[[Check], object] = lambda _: None  # is called with every check
    # mean loss of each step's sequences before the step, in nats per token; for trials, only those
    # of the rate that was taken
    losses: list[float] = field(default_factory=list)
    # share of the training that arrived in the weights, see `Trainee.absorb`
    absorbed: float = 1.0
    rate: float = 0.0  # current learning rate; 0 if there are no steps
    # learning rate -> measure after its first steps; the last one was taken
    tried: dict[float, float] = field(default_factory=dict)
    # all checks; one of them is of the state kept at the end
    held: list[Check] = field(default_factory=list)
    before: float = math.nan  # measure at the start
    # reason for undoing the training; None if it is kept
    undone: str | None = None
    ended: str | None = None  # reason for ending early; None if it did not
    done: int = 0  # number of steps; for trials, only those of the rate that was taken
    num_tokens: int = 0  # number of tokens trained on in these steps
    num_in_vain: int = 0  # consecutive checks without an improvement
    started_s: float = field(default_factory=time.monotonic)
    checked_s: float = field(default_factory=time.monotonic)
    # returns the number of steps for the remaining time, given the seconds of a step and of other
    # work; None for the planned number
    steps_for: Callable[[float, float], int] | None = field(default=None, repr=False)
    seconds_of_step: float | None = None  # measured before the training, if it was
    # called after every step but the last one, except in trials; may use `state` and `save`
    on_step: Callable[[], None] = field(default=lambda: None, repr=False)

    def train(self, shot: int, part: CommittedPart | None = None) -> None:
        """Train, and keep the best state.

        Args:
            shot: number of the shot.
            part: state of this training committed by an earlier attempt.
        """
        if not self.batches.num_steps:
            return
        self.cluster.run_all(steps.start, self.section, shot)
        self.rate = self.section.learning_rate or RATES[1]
        self._begin_steps()
        if part is not None and part.record["state"]:
            self._go_on(part)
        elif len(self.text.held):
            self._begin_checked()
        self._train_on()
        if len(self.text.held):  # otherwise the last state is kept
            self.undone = self._back_to_the_best()
            if self.undone is not None and self.ended is not None:
                self.undone = f"{self.undone}; {self.ended}"
        self._absorb()

    def _absorb(self) -> None:
        """Let workers absorb the training, or remove it if it is undone."""
        absorbs = self.undone is None
        of_workers = self.cluster.run_all(steps.end, absorbs)
        arrived = sum(arrived_there for arrived_there, _ in of_workers)
        wanted = sum(wanted_there for _, wanted_there in of_workers)
        if wanted:
            self.absorbed = arrived / wanted
        else:
            self.absorbed = float(absorbs)

    def state(self) -> dict[str, Any]:
        """Return the state to resume from, as JSON values; empty before the first step."""
        if not self.done:
            return {}
        now_s = time.monotonic()
        return {
            "done": self.done,
            "num_steps": self.batches.num_steps,
            "losses": self.losses,
            "rate": self.rate,
            "before": self.before,
            "num_tokens": self.num_tokens,
            "num_in_vain": self.num_in_vain,
            "started_s": now_s - self.started_s,
            "checked_s": now_s - self.checked_s,
            "tried": list(self.tried.items()),
            "held": [asdict(check) for check in self.held],
        }

    def save(self, folder: str) -> list[SavedFile]:
        """Let workers write their part of the state to resume from; see `state`."""
        if not self.done:
            return []
        of_workers = self.cluster.run_all(steps.save, folder, self.done)
        return list(chain.from_iterable(of_workers))

    def _go_on(self, part: CommittedPart) -> None:
        """Restore a state written by `state` and `save`."""
        state = part.record["state"]
        now_s = time.monotonic()
        self.done = state["done"]
        if state["num_steps"] != self.batches.num_steps:
            self.batches.resize(state["num_steps"])
        self.losses = state["losses"]
        self.rate = state["rate"]
        self.before = state["before"]
        self.num_tokens = state["num_tokens"]
        self.num_in_vain = state["num_in_vain"]
        self.started_s = now_s - state["started_s"]
        self.checked_s = now_s - state["checked_s"]
        self.tried = dict(state["tried"])
        self.held = [Check(**check) for check in state["held"]]
        self.cluster.run_all(steps.go_on, part.of_stage)
        self.cluster.run_all(steps.share)
        self._begin_steps()

    def _begin_checked(self) -> None:
        start = self._measured(0)
        self.before = start.value
        if not math.isfinite(self.before):
            raise FloatingPointError(
                "the pruned model's outputs are not finite; check the weights"
            )
        self._note_if_best(start)
        if self.steps_for is not None:
            self._fit_to_the_time(self.steps_for)
        if not self.batches.num_steps:
            self.ended = "there was no time for a training"
            return
        if self.section.learning_rate is None:
            self._try_rates(trial_steps(self.batches.num_steps))

    def _fit_to_the_time(self, steps_for: Callable[[float, float], int]) -> None:
        """Time some steps, undo them, and choose the number of steps."""
        now_s = time.monotonic()
        check_s = now_s - self.started_s
        self.rate = RATES[-1]
        seconds = []
        for number in range(min(_TIMED_STEPS, self.batches.num_steps)):
            began_s = time.monotonic()
            self._step(number)
            seconds.append(time.monotonic() - began_s)
        self.cluster.run_all(steps.take_best)
        self.losses = []
        self.num_tokens = 0
        # the minimum, because the first step allocates memory; a step has its share of a check
        self.seconds_of_step = min(seconds) + check_s / _STEPS_OF_A_CHECK
        further_s = _FURTHER_CHECKS * check_s
        self.batches.resize(steps_for(self.seconds_of_step, further_s))
        self._begin_steps()

    def _try_rates(self, count: int) -> None:
        """Make the first steps with the highest harmless rate, or else with the lowest."""
        tolerated = self.before
        if self.section.rank != "all":
            tolerated = self.before * HARMLESS
        check = Check(0, math.inf)
        for rate in RATES:
            self.rate = rate
            self.cluster.run_all(steps.take_best)
            self.losses = []
            self.num_tokens = 0
            is_finite = all(map(self._step, range(count)))
            check = self._measured(count, is_finite)
            self.tried[rate] = check.value
            if check.value <= tolerated:
                break
        self._note_if_best(check)
        self.done = count

    def _train_on(self) -> None:
        """Make the remaining steps."""
        while not self._has_ended():
            is_finite = self._step(self.done)
            self.done += 1
            if len(self.text.held):
                self._check_on_the_way(is_finite)
            if self.ended is None and self.done < self.batches.num_steps:
                self.on_step()

    def _check_on_the_way(self, is_finite: bool) -> None:
        """Measure after some steps and after the last one, and act on the result."""
        done = self.done
        num_steps = self.batches.num_steps
        is_last = done == num_steps
        if is_finite and not is_last and done % steps_between_checks(num_steps):
            return
        check = self._measured(done, is_finite, rounded=is_last)
        is_better = self._note_if_best(check)
        if is_better:
            self.num_in_vain = 0
        else:
            self.num_in_vain += 1
        if not is_better and not is_last:
            self._react_to(check)

    def _react_to(self, check: Check) -> None:
        """End the training or halve its rate after a check that is no improvement, if needed."""
        best = self._best.value
        if self.num_in_vain == PATIENCE:
            self.ended = (
                f"training ended after {self.done} steps, because {PATIENCE} checks "
                f"in a row were no better than {best:.4g}"
            )
            return
        if check.value <= TOLERATED * best:
            return
        if self.section.learning_rate is None:
            self.rate /= 2
            self.cluster.run_all(steps.take_best)
        elif check.value > GIVEN_UP * self.before:
            self.ended = (
                f"training ended after {self.done} steps, because it diverged: "
                f"the measure rose from {self.before:.4g} to {check.value:.4g}"
            )

    def _has_ended(self) -> bool:
        """Return whether all steps are made, training ended early, or the text is exhausted."""
        if self.ended is not None or self.done == self.batches.num_steps:
            return True
        try:
            self.batches.batch(self.done)
        except TextEndedError as error:
            self.ended = str(error)
            if len(self.text.held):
                self._note_if_best(self._measured(self.done))
            return True
        return False

    def _step(self, number: int) -> bool:
        """Make one step; return whether the loss was finite."""
        tokens, counts, numbers, text = self.batches.batch(number)
        num_tokens = num_counted(tokens, counts, numbers)
        if not num_tokens:
            return True
        labels = Labels(is_step=True)
        if self.section.loss == "kl":
            labels = Labels(dense=text, is_step=True)
        sums = forward_and_backward(self.cluster, tokens, labels, numbers, counts)
        self.losses.append(sum(sums) / num_tokens)
        if not math.isfinite(self.losses[-1]):
            return False
        num_steps = self.batches.num_steps
        factor = rate_factor(number, num_steps, rising_steps(num_steps))
        self.cluster.run_all(steps.step, num_tokens, self.rate * factor)
        self.num_tokens += len(numbers) * tokens.shape[1]
        self.cluster.progress.reach(number + 1)
        return True

    def _measured(
        self,
        num_steps: int,
        is_finite: bool = True,
        rounded: bool = False,
    ) -> Check:
        """Measure the state after a number of steps; the value is infinite if it is not finite.

        With `rounded`, the final weights are measured, rounded to their dtype; no step may follow.
        """
        if rounded and is_finite:
            self.cluster.run_all(steps.round_as_absorbed)
        now_s = time.monotonic()
        steps_before = 0
        tokens_before = 0
        if self.held:
            steps_before = self.held[-1].steps
            tokens_before = self.held[-1].tokens
        tokens_per_s = max(0, self.num_tokens - tokens_before) / (now_s - self.checked_s)
        value = math.inf
        acceptance = None
        loss = None
        if is_finite:
            value, acceptance = held_aside(self.cluster, self.text, self.section.loss)
            losses = self.losses[steps_before:]
            if losses:
                loss = fmean(losses)
        check = Check(
            steps=num_steps,
            value=value,
            acceptance=acceptance,
            tokens=self.num_tokens,
            loss=loss,
            tokens_per_s=tokens_per_s or None,
        )
        self.on_check(check)
        self.checked_s = time.monotonic()
        self._begin_steps()
        return check

    @property
    def _best(self) -> Check:
        """The check with the smallest measure so far; workers keep its state."""
        return min(self.held, key=lambda check: (check.value, check.steps))

    def _begin_steps(self) -> None:
        batches = self.batches
        progress = self.cluster.progress
        progress.begin(batches.num_steps, "steps", batches.tokens_of_step)
        progress.started_s = self.started_s
        progress.reach(self.done)

    def _note_if_best(self, check: Check) -> bool:
        """Record a check, and keep the state if it is the best so far; return whether it is."""
        is_best = not self.held or check.value < self._best.value
        self.held.append(check)
        if is_best:
            self.cluster.run_all(steps.keep_best)
        return is_best

    def _back_to_the_best(self) -> str | None:
        """Restore the best state; return the reason if the training has to be undone."""
        num_steps = self._best.steps
        if not num_steps:
            return (
                "no state was better on the validation windows than the pruned model "
                f"({self.before:.4g})"
            )
        if num_steps == self.batches.num_steps:  # already measured with rounded weights
            return None
        self.cluster.run_all(steps.take_best)
        rounded = self._measured(num_steps, rounded=True)
        self.held.append(rounded)
        if rounded.value < self.before:
            return None
        return (
            f"rounded to the weights' dtype, the best state has {rounded.value:.4g} on the "
            f"validation windows, no better than the pruned model ({self.before:.4g})"
        )

    @property
    def facts(self) -> Facts:
        """Facts of the step: the measures before and after, the rate, and why it was undone."""
        facts: Facts = {"num_steps": len(self.losses), "rate": self.rate}
        if self.held:
            facts["held aside before"] = self.held[0].value
            facts["held aside after"] = self.held[-1].value
        elif self.losses:
            facts["first_loss"] = self.losses[0]
            facts["last_loss"] = self.losses[-1]
        if self.undone is not None:
            facts["undone"] = self.undone
            return facts
        facts["absorbed"] = self.absorbed
        if self.ended:
            facts["ended"] = self.ended
        return facts

    def as_record(self) -> dict[str, Any]:
        """Return the entries of the report."""
        tried = []
        for rate, measure in self.tried.items():
            tried.append({"rate": rate, "held_aside": _finite_or_none(measure)})
        held = []
        for check in self.held:
            held.append({**asdict(check), "value": _finite_or_none(check.value)})
        return {
            "recovery_steps": self.batches.num_steps,
            "recovery_seconds_of_step": self.seconds_of_step,
            "recovery_losses": [loss for loss in self.losses if math.isfinite(loss)],
            "recovery_absorbed": self.absorbed,
            "recovery_rate": self.rate,
            "recovery_tried": tried,
            "recovery_held_aside": held,
            "recovery_undone": self.undone,
            "recovery_ended": self.ended,
        }


def _finite_or_none(measure: float) -> float | None:
    """Return a measure, or None, which JSON can hold, if it is infinite."""
    return measure if math.isfinite(measure) else None
