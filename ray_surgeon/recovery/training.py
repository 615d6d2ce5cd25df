"""A training after pruning, on the coordinator.

It measures itself on windows held aside, chooses its rate, and keeps its best state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import chain
from statistics import fmean
from typing import Any

from ray_surgeon.checkpointing.committed import CommittedPart
from ray_surgeon.data.streams import TextEndedError
from ray_surgeon.maths.reconstruction import rate_factor
from ray_surgeon.recovery import rates, steps
from ray_surgeon.recovery.batches import Batches
from ray_surgeon.recovery.rates import Check
from ray_surgeon.run_state import CalibrationText, Facts, held_aside
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.passes import num_counted
from ray_surgeon.runtime.pipelines import forward_and_backward
from ray_surgeon.runtime.wave import Labels
from ray_surgeon.runtime.weights import SavedFile
from ray_surgeon.spec.recovery import RecoverySection

_STATE = ("done", "losses", "rate", "before", "num_tokens", "num_in_vain")
_CLOCKS = ("started_s", "checked_s")
"""Fields from which a training goes on; of clocks, how long ago they were read."""


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
    done: int = 0  # steps that were made; of trials, those of the rate taken
    num_tokens: int = 0  # that were trained on in them
    num_in_vain: int = 0  # checks in a row that brought nothing
    started_s: float = field(default_factory=time.monotonic)
    checked_s: float = field(default_factory=time.monotonic)
    # is called after a step, but in trials, if another one follows: `state` and `save` can be used
    on_step: Callable[[], None] = field(default=lambda: None, repr=False)

    def train(self, shot: int, part: CommittedPart | None = None) -> None:
        """Train, and keep what is best.

        Args:
            shot: number of the shot.
            part: what an earlier try has committed of this training.
        """
        if not self.batches.num_steps:
            return
        self.cluster.run_all(steps.start, self.section, shot)
        self.rate = self.section.learning_rate or rates.RATES[1]
        self._begin_steps()
        if part is not None and part.record["state"]:
            self._go_on(part)
        elif len(self.text.held):
            self._begin_checked()
        self._train_on()
        if len(self.text.held):  # otherwise the last state is kept
            undone = self._back_to_the_best()
            why = "" if self.ended is None else f"; {self.ended}"
            self.undone = None if undone is None else f"{undone}{why}"
        of_workers = self.cluster.run_all(steps.end, self.undone is None)
        arrived, wanted = map(sum, zip(*of_workers, strict=True))
        self.absorbed = arrived / wanted if wanted else float(self.undone is None)

    def state(self) -> dict[str, Any]:
        """Return what becomes JSON, and a training goes on from; nothing before the first step."""
        if not self.done:
            return {}
        state = {name: getattr(self, name) for name in _STATE}
        state |= {name: time.monotonic() - getattr(self, name) for name in _CLOCKS}
        return state | {"tried": list(self.tried.items()), "held": list(map(asdict, self.held))}

    def save(self, folder: str) -> list[SavedFile]:
        """Let workers write what they go on from beside `state`."""
        of_workers = self.cluster.run_all(steps.save, folder, self.done) if self.done else []
        return list(chain.from_iterable(of_workers))

    def _go_on(self, part: CommittedPart) -> None:
        """Go back to what `state` and `save` have left."""
        state = part.record["state"]
        vars(self).update({name: state[name] for name in _STATE})
        vars(self).update({name: time.monotonic() - state[name] for name in _CLOCKS})
        self.tried = dict(state["tried"])
        self.held = [Check(**check) for check in state["held"]]
        self.cluster.run_all(steps.go_on, part.of_stage)
        self.cluster.run_all(steps.share)
        self._begin_steps()

    def _begin_checked(self) -> None:
        start = self._measured(0)
        self.before = start.value
        if not math.isfinite(self.before):
            raise FloatingPointError("the pruned model's outputs are not finite; check the weights")
        self._note_if_best(start)
        if self.section.learning_rate is None:
            self._try_rates(rates.trial_steps(self.batches.num_steps))

    def _try_rates(self, count: int) -> None:
        """Take the first steps with the highest harmless rate, or else the lowest."""
        check = Check(0, math.inf)
        for rate in rates.RATES:
            self.rate = rate
            self.cluster.run_all(steps.take_best)
            self.losses = []
            self.num_tokens = 0
            is_finite = all(map(self._step, range(count)))
            check = self._measured(count, is_finite)
            self.tried[rate] = check.value
            if check.value <= self.before * (1 if self.section.rank == "all" else rates.HARMLESS):
                break
        self._note_if_best(check)
        self.done = count

    def _train_on(self) -> None:
        """Make the steps that are left."""
        while not self._has_ended():
            is_finite = self._step(self.done)
            self.done += 1
            if len(self.text.held):
                self._check_on_the_way(is_finite)
            if self.ended is None and self.done < self.batches.num_steps:
                self.on_step()

    def _check_on_the_way(self, is_finite: bool) -> None:
        """Measure after some steps, and after the last one; see what follows from that."""
        done = self.done
        num_steps = self.batches.num_steps
        is_last = done == num_steps
        if is_finite and not is_last and done % rates.steps_between_checks(num_steps):
            return
        check = self._measured(done, is_finite, rounded=is_last)
        is_better = self._note_if_best(check)
        self.num_in_vain = 0 if is_better else self.num_in_vain + 1
        if is_better or is_last:
            return
        if self.num_in_vain == rates.PATIENCE:
            self.ended = f"it ended after {done} steps, because {rates.PATIENCE} checks in a row "
            self.ended += f"were no better than {self._best.value:.4g}"
        elif check.value <= rates.TOLERATED * self._best.value:
            return
        elif self.section.learning_rate is None:
            self.rate /= 2
            self.cluster.run_all(steps.take_best)
        elif check.value > rates.GIVEN_UP * self.before:
            rise = f"{self.before:.4g} became {check.value:.4g}"
            self.ended = f"it was given up after {done} steps, because it diverged: {rise}"

    def _has_ended(self) -> bool:
        """Whether no step follows: all are made, or the training has ended early, as a text may."""
        if self.ended is None and self.done < self.batches.num_steps:
            try:
                self.batches.batch(self.done)
            except TextEndedError as error:
                self.ended = str(error)
                if len(self.text.held):
                    self._note_if_best(self._measured(self.done))
        return self.ended is not None or self.done == self.batches.num_steps

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
        num_steps = self.batches.num_steps
        factor = rate_factor(number, num_steps, rates.rising_steps(num_steps))
        self.cluster.run_all(steps.step, num_tokens, self.rate * factor)
        self.num_tokens += len(numbers) * tokens.shape[1]
        self.cluster.progress.reach(number + 1)
        return True

    def _measured(self, num_steps: int, is_finite: bool = True, rounded: bool = False) -> Check:
        """Measure the state after so many steps; the value is infinite if it is no number.

        With `rounded` it is that of the weights as they will be, in their dtype, and no step may
        follow.
        """
        if rounded and is_finite:
            self.cluster.run_all(steps.round_as_absorbed)
        now_s = time.monotonic()
        num_before = self.held[-1].tokens if self.held else 0
        pace = max(0, self.num_tokens - num_before) / (now_s - self.checked_s)
        losses = self.losses[self.held[-1].steps if self.held else 0 :]
        about = (self.cluster, self.text, self.section.loss)
        measure = held_aside(*about) if is_finite else (math.inf, None)
        loss = fmean(losses) if losses and is_finite else None
        check = Check(num_steps, *measure, self.num_tokens, loss, pace or None)
        self.on_check(check)
        self.checked_s = time.monotonic()
        self._begin_steps()
        return check

    @property
    def _best(self) -> Check:
        """The smallest measure so far, of the state that workers keep."""
        return min(self.held, key=lambda check: (check.value, check.steps))

    def _begin_steps(self) -> None:
        batches = self.batches
        progress = self.cluster.progress
        progress.begin(batches.num_steps, "steps", batches.tokens_of_step)
        progress.started_s = self.started_s
        progress.reach(self.done)

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
