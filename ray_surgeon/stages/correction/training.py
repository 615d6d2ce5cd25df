"""Low-rank corrections: B A is trained beside every linear and absorbed into it.

This comes after every shot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ray_surgeon.maths.reconstruction import rate_factor
from ray_surgeon.models.low_rank import CorrectionState, LowRankCorrections
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.collectives import broadcast_together, reduce_together
from ray_surgeon.runtime.passes import forward_and_backward, num_counted
from ray_surgeon.runtime.wave import Labels
from ray_surgeon.runtime.worker import Worker, collective
from ray_surgeon.stages.calibration import CalibrationText, held_measure
from ray_surgeon.stages.correction.section import CorrectionSection

RATES = (1e-3, 5e-4, 2.5e-4)
"""Learning rates that are tried in turn, relative to the root mean square of each weight.

The first one that does no harm goes on. What is
best for few steps is no guide to what is best for many: on SmolLM2 the lowest of 6e-4, 1.2e-3 and
2.4e-3 is best for four steps and the second for sixty; on Qwen2.5-Coder-0.5B the last is best for
four and diverges later.
"""
HARMLESS = 1.05
"""Times the measure at the start, up to which the first steps with a rate do no harm."""
NUM_CHECKS = 3
"""How often corrections are measured on the windows held aside while they are trained."""
TOLERATED = 1.02
"""Times the best measure so far, up to which a training goes on as it is."""
GIVEN_UP = 1.5
"""Times the measure at the start, from which a training with a rate given by hand is given up."""


@dataclass(frozen=True)
class Trained:
    """What a training of corrections came to.

    Measures are of windows held aside: the divergence, or the loss if that is trained.
    """

    losses: list[
        float
        # mean loss of each step's sequences before the step, in nats per token; of trials, those of
        # the rate taken
    ]
    # share of the corrections that arrived in the weights, as `LowRankCorrections.absorb` has it
    absorbed: float
    rate: float  # the learning rate at the end
    # learning rate -> measure after its first steps; the last one was taken
    tried: dict[float, float] = field(default_factory=dict)
    # number of steps done -> measure; of the one kept at the end, too
    held: list[tuple[int, float]] = field(default_factory=list)
    undone: str | None = None  # why the model stays as it was; None if the corrections are kept

    @property
    def facts(self) -> dict[str, str | int | float]:
        """What the line of the step says.

        These are the measures before and after, the rate, and why it was undone, if it was.
        """
        facts: dict[str, str | int | float] = {"num_steps": len(self.losses), "rate": self.rate}
        if self.held:
            facts |= {"held aside before": self.held[0][1], "held aside after": self.held[-1][1]}
        elif self.losses:
            facts |= {"first_loss": self.losses[0], "last_loss": self.losses[-1]}
        return facts | (
            {"absorbed": self.absorbed} if self.undone is None else {"undone": self.undone}
        )

    def as_record(self) -> dict[str, Any]:
        """Return what the report says."""
        return {
            "correction_losses": [loss for loss in self.losses if math.isfinite(loss)],
            "correction_absorbed": self.absorbed,
            "correction_rate": self.rate,
            "correction_tried": [
                {"rate": rate, "held_aside": _number(value)} for rate, value in self.tried.items()
            ],
            "correction_held_aside": [
                {"steps": steps, "value": _number(value)} for steps, value in self.held
            ],
            "correction_undone": self.undone,
        }


def further_sequences(
    section: CorrectionSection, num_steps: int, num_measured: int
) -> tuple[int, int]:
    """Return how many sequences pass beside those of the steps, for the plan.

    The first number is of passes forward and backward in trials, the second of passes forward
    alone.

    Args:
        section: of the corrections.
        num_steps: of a training.
        num_measured: windows held aside on which it is measured.
    """
    if not num_measured:
        return 0, 0
    tried = (
        0
        if section.learning_rate is not None
        else (len(RATES) - 1) * _trial_steps(num_steps) * section.sequences_per_step
    )
    return tried, num_measured * (NUM_CHECKS + len(RATES) + 2)


def _trial_steps(num_steps: int) -> int:
    return min(num_steps, max(3, num_steps // 15))


def _number(value: float) -> float | None:
    """Return what JSON can hold: None for an infinite measure, of a training that diverged."""
    return value if math.isfinite(value) else None


@dataclass
class _Best:
    """The best state of the corrections so far, on a worker."""

    state: CorrectionState | None = None


@dataclass(frozen=True)
class Corrections:
    """The corrections of one run."""

    section: CorrectionSection

    # On a worker

    def start(self, worker: Worker, shot: int) -> None:
        """Put B A beside every linear; see `LowRankCorrections`."""
        section = self.section
        numbers = worker.layout.linear_numbers
        first = section.seed + 1_000_003 * shot
        seeds = {name: first + numbers[name] for name in worker.shard.linears}
        owned = {name for name in worker.shard.linears if worker.owns(name)}
        worker.keep(
            LowRankCorrections(
                worker.shard, worker.masks, owned, rank=section.lora_rank, seed_of=seeds
            )
        )
        worker.keep(_Best())

    @collective
    def step(self, worker: Worker, num_tokens: int, rate: float) -> None:
        """Sum the gradients to the owners, which make a step and send the result back."""
        corrections = worker.kept(LowRankCorrections)
        owned = [
            [name for name in worker.shard.linears if worker.owner(name) == rank]
            for rank in range(worker.placement.num_replicas)
        ]
        for owner, names in enumerate(owned):
            gradients = [
                gradient for name in names for gradient in corrections.gradients(name, num_tokens)
            ]
            reduce_together(worker.replicas, gradients, owner)
        corrections.step(rate)
        for owner, names in enumerate(owned):
            parts = [corrections.parts[name] for name in names]
            broadcast_together(
                worker.replicas, [x.detach() for part in parts for x in (part.A, part.B)], owner
            )

    def keep_state(self, worker: Worker) -> None:
        """Keep the present state as the best."""
        worker.kept(_Best).state = worker.kept(LowRankCorrections).state()

    def take_state(self, worker: Worker) -> None:
        """Go back to the best state."""
        best = worker.kept(_Best).state
        assert best is not None
        worker.kept(LowRankCorrections).restore(best)

    def round_as_absorbed(self, worker: Worker, rounds: bool) -> None:
        """See `LowRankCorrections.round_as_absorbed`."""
        worker.kept(LowRankCorrections).round_as_absorbed(rounds)

    def absorb(self, worker: Worker) -> tuple[float, float]:
        """Add every B A to its weight, and return how much of it arrived in the owned ones.

        See `LowRankCorrections.absorb`.
        """
        worker.drop(_Best)
        pairs = [
            about
            for name, about in worker.drop(LowRankCorrections).absorb().items()
            if worker.owns(name)
        ]
        return sum(arrived for arrived, _ in pairs), sum(wanted for _, wanted in pairs)

    def undo(self, worker: Worker) -> None:
        """Remove the corrections without a trace."""
        worker.drop(_Best)
        worker.drop(LowRankCorrections).remove()

    # On the coordinator

    def batches(self, shot: int, num_shots: int, num_sequences: int) -> list[list[int]]:
        """Return the calibration sequences of every step after a shot.

        The final epochs come after the last shot.

        The order is drawn anew in every pass over the sequences.
        """
        section = self.section
        order = np.random.default_rng((section.seed, shot))

        def epoch() -> list[list[int]]:
            shuffled = order.permutation(num_sequences).tolist()
            return [
                shuffled[i : i + section.sequences_per_step]
                for i in range(0, num_sequences, section.sequences_per_step)
            ]

        batches: list[list[int]] = []
        while len(batches) < section.steps_per_shot:
            batches += epoch()
        batches = batches[: section.steps_per_shot]
        if shot == num_shots:
            batches += [batch for _ in range(section.final_epochs) for batch in epoch()]
        return batches

    def train(
        self,
        cluster: Cluster,
        text: CalibrationText,
        shot: int,
        num_shots: int,
        before: float | None = None,
    ) -> Trained:
        """Train the corrections of all linears, and absorb the best state of them.

        Each batch is one step of the optimizer.

        Where windows are held aside, the corrections are measured on them before, on the way and at
        the end. A learning rate that is not given is the highest of three whose first steps do no
        harm, and is halved where the measure rises, from the best state on. A training that ends no
        better than it began is undone.

        Args:
            cluster: with the pruned weights and masks. With loss kl it has the dense model's states
                of the calibration text, and of the windows held aside that are measured under the
                name `HELD`.
            text: the calibration text.
            shot: number of the shot.
            num_shots: in all.
            before: the divergence of the windows held aside, if it has been measured already; see
                `held_measure`.
        """
        batches = self.batches(shot, num_shots, len(text.tokens))
        if not batches:
            return Trained([], 1.0, 0.0)
        cluster.run_all(self.start, shot)
        return _Training(self, cluster, text, batches).run(
            before if self.section.loss == "kl" else None
        )


class _Training:
    """One training of corrections, on the coordinator."""

    def __init__(
        self,
        corrections: Corrections,
        cluster: Cluster,
        text: CalibrationText,
        batches: list[list[int]],
    ) -> None:
        self._corrections = corrections
        self._cluster = cluster
        self._text = text
        self._batches = batches
        self._checks = len(text.held) > 0
        self._losses = list[float]()
        self._held = list[tuple[int, float]]()
        # the smallest measure so far, of the state that workers keep as "best"
        self._best = math.inf
        self._best_after = 0  # number of steps of that state
        self._every = max(1, round(len(batches) / NUM_CHECKS))

    def run(self, known: float | None) -> Trained:
        """Train, and absorb what is best; `known` is the measure of the start, if known."""
        rate_of_spec = self._corrections.section.learning_rate
        tried = dict[float, float]()
        if known is None:
            before = self._measure()
        else:
            before = known
            self._begin_steps()
        if self._checks and not math.isfinite(before):
            raise FloatingPointError(
                "the model is not finite on the windows held aside before its corrections; check "
                "the weights"
            )
        if self._checks:
            self._note_if_best(0, before)
        if rate_of_spec is not None or not self._checks:
            rate = RATES[1] if rate_of_spec is None else rate_of_spec
            first = 0
        else:
            rate, first, tried = self._try_rates()
        rate, stopped = self._train_from(first, rate, halves=rate_of_spec is None)
        undone = self._back_to_the_best(before) if self._checks else None
        if undone is not None:
            self._cluster.run_all(self._corrections.undo)
            absorbed = 0.0
        else:
            arrived, wanted = (
                sum(parts)
                for parts in zip(*self._cluster.run_all(self._corrections.absorb), strict=True)
            )
            absorbed = arrived / wanted if wanted else 1.0
        reason = None if undone is None else f"{undone}{stopped}"
        return Trained(self._losses, absorbed, rate, tried, self._held, reason)

    def _try_rates(self) -> tuple[float, int, dict[float, float]]:
        """Take the first steps with the highest harmless rate, or else the lowest.

        Returns the rate, the number of steps done, and all measures.
        """
        count = _trial_steps(len(self._batches))
        start = self._best
        measures = dict[float, float]()
        rate = RATES[-1]
        losses = list[float]()
        for rate in RATES:
            if measures:
                self._cluster.run_all(self._corrections.take_state)
            losses = []
            is_finite = all(self._step(number, rate, losses) for number in range(count))
            measures[rate] = self._measure() if is_finite else math.inf
            if measures[rate] <= HARMLESS * start:
                break
        self._losses += losses
        self._note_if_best(count, measures[rate])
        return rate, count, measures

    def _train_from(self, first: int, rate: float, *, halves: bool) -> tuple[float, str]:
        """Make the remaining steps and check on the way.

        Returns the rate at the end, and why the training ended early, if it did.
        """
        start = self._best
        for number in range(first, len(self._batches)):
            is_finite = self._step(number, rate, self._losses)
            is_last = number + 1 == len(self._batches)
            if not self._checks or not (
                is_last or not is_finite or (number + 1) % self._every == 0
            ):
                continue
            measure = self._measure(rounded=is_last) if is_finite else math.inf
            if self._note_if_best(number + 1, measure) or measure <= TOLERATED * self._best:
                continue
            if halves:
                rate /= 2
                self._cluster.run_all(self._corrections.take_state)
            elif measure > GIVEN_UP * start:
                return (
                    rate,
                    f"; it was given up after {number + 1} steps, because it diverged: {start:.4g} "
                    f"became {measure:.4g}",
                )
        return rate, ""

    def _step(self, number: int, rate: float, losses: list[float]) -> bool:
        """Make one step; return whether the loss was finite."""
        section = self._corrections.section
        batch = self._batches[number]
        total = len(self._batches)
        num_tokens = num_counted(self._text.tokens, self._text.counts, batch)
        if not num_tokens:
            return True
        labels = Labels(of_dense_model=section.loss == "kl", may_diverge=True)
        sums = forward_and_backward(
            self._cluster,
            self._text.tokens,
            labels,
            only=batch,
            counted=False,
            counts=self._text.counts,
        )
        losses.append(sum(sums) / num_tokens)
        if not math.isfinite(losses[-1]):
            return False
        self._cluster.run_all(self._corrections.step, num_tokens, rate * rate_factor(number, total))
        self._cluster.progress.reach(number + 1)
        return True

    def _measure(self, *, rounded: bool = False) -> float:
        """Return the measure of the present state; infinite if it is no number.

        With `rounded` it is that of the weights once they have absorbed the state.
        """
        if rounded:
            self._cluster.run_all(self._corrections.round_as_absorbed, True)
        measure = (
            held_measure(self._cluster, self._text, self._corrections.section.loss)
            if self._checks
            else math.inf
        )
        if rounded:
            self._cluster.run_all(self._corrections.round_as_absorbed, False)
        self._begin_steps()
        return measure

    def _begin_steps(self) -> None:
        self._cluster.progress.begin(
            len(self._batches), "steps", len(self._batches[0]) * self._text.tokens.shape[1]
        )

    def _note_if_best(self, num_steps: int, measure: float) -> bool:
        """Note a measure, and keep the state if it is the best so far; return whether it is."""
        self._held.append((num_steps, measure))
        if not measure < self._best:
            return False
        self._best = measure
        self._best_after = num_steps
        self._cluster.run_all(self._corrections.keep_state)
        return True

    def _back_to_the_best(self, before: float) -> str | None:
        """Go back to the best state; return why nothing is to be absorbed, if so."""
        if not self._best_after:
            return f"no state was better on the windows held aside than {before:.4g} before"
        if self._best_after == len(self._batches):  # which was measured rounded
            return None
        self._cluster.run_all(self._corrections.take_state)
        rounded = self._measure(rounded=True)
        self._held.append((self._best_after, rounded))
        if not rounded < before:
            return (
                f"rounded to the weights' dtype it was {rounded:.4g} on the windows held aside, "
                f"and {before:.4g} before"
            )
        return None
