"""The sequences of every step of a recovery, and the dense model's states of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ray_surgeon.config.recovery import RecoverySection
from ray_surgeon.data.streams import TextEndedError, TextStream
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.dense_states import CALIBRATION, STREAM, forget_states
from ray_surgeon.distributed.microbatch import Counts, Tokens
from ray_surgeon.distributed.passes import pass_up_to_the_head
from ray_surgeon.run_state import CalibrationText

SEQUENCES_AHEAD = 32
"""Sequences that the teacher sees in one pass.

Its weights are moved, and shards wait for each other, once for all of them.
"""


def steps_ahead(sequences_per_step: int) -> int:
    """Return the number of steps whose sequences the teacher sees in one pass."""
    return max(1, SEQUENCES_AHEAD // sequences_per_step)


class Batch(NamedTuple):
    """The sequences of one step."""

    tokens: Tokens  # [num_sequences, T], not only those of this step
    counts: Counts  # [num_sequences, T], which tokens count
    numbers: Sequence[int]  # indices of the step's sequences
    text: str  # name under which workers keep the dense model's states of `tokens`


class Batches(ABC):
    """The sequences of all steps after a shot."""

    num_steps: int
    tokens_of_step: int  # tokens of a whole step

    @abstractmethod
    def batch(self, number: int) -> Batch:
        """Return the sequences of a step.

        Steps are requested in order, possibly again from the first one.

        Raises:
            TextEndedError: there are no more sequences.
        """


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

    def batch(self, number: int) -> Batch:
        """Return the windows of a step; the last step of a pass may have fewer."""
        return Batch(
            tokens=self.text.tokens,
            counts=self.text.counts,
            numbers=self._numbers[number],
            text=CALIBRATION,
        )


class StreamBatches(Batches):
    """Windows of a stream of texts; the teacher sees those of several steps at once."""

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
            section: of the recovery.
            stream: of windows.
            cluster: whose workers have a teacher, if the section wants one.
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
