"""The sequences of every step of a recovery, and what the dense model says of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ray_surgeon.runtime.dense_states import CALIBRATION
from ray_surgeon.runtime.wave import Counts, Tokens
from ray_surgeon.stages.recovery.section import RecoverySection
from ray_surgeon.stages.stage import CalibrationText


class Batch(NamedTuple):
    """The sequences of one step."""

    tokens: Tokens  # [num_sequences, T], more than those of this step
    counts: Counts  # likewise, which tokens count
    numbers: Sequence[int]  # of the step's sequences among them
    text: str  # under which name workers keep the dense model's states of `tokens`


class Batches(ABC):
    """The sequences of all steps after a shot."""

    num_steps: int
    tokens_of_step: int  # tokens of a whole step

    @abstractmethod
    def batch(self, number: int) -> Batch:
        """Return the sequences of a step; steps are asked for in order, or again from the first.

        Raises:
            TextEndedError: there are no more.
        """


@dataclass
class CalibrationBatches(Batches):
    """Windows of the calibration text, in an order that is drawn anew in every pass over them."""

    section: RecoverySection
    text: CalibrationText
    shot: int
    num_shots: int

    def __post_init__(self) -> None:
        num_sequences, length = self.text.tokens.shape
        size = min(self.section.sequences_per_step, num_sequences)
        per_pass = -(-num_sequences // size)
        self.num_steps = self.section.num_steps(self.shot, self.num_shots, length)
        self.tokens_of_step = size * length
        draw = np.random.default_rng((self.section.seed, self.shot))
        orders = [
            draw.permutation(num_sequences).tolist() for _ in range(-(-self.num_steps // per_pass))
        ]
        parts = [own[i : i + size] for own in orders for i in range(0, num_sequences, size)]
        self._numbers = parts[: self.num_steps]

    def batch(self, number: int) -> Batch:
        """Return the windows of a step; the last step of a pass has what is left."""
        return Batch(self.text.tokens, self.text.counts, self._numbers[number], CALIBRATION)
