"""The calibration text: what stages are fitted on, and what is held aside from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.passes import compared, num_counted, sequence_losses

HELD = "(held aside)"
"""Name of the windows held aside among the texts that have dense states.

No evaluation text can have it.
"""


@dataclass(frozen=True, repr=False)
class CalibrationText:
    """Windows of the calibration, and which of their tokens count as predicted ones."""

    tokens: NDArray[np.int64]  # [num_sequences, sequence_length] what stages are fitted on
    counts: NDArray[np.bool_] | None = None  # likewise, whether a token counts; None if all do
    # [num_windows, sequence_length] what no stage is fitted on
    held: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    held_counts: NDArray[np.bool_] | None = None  # likewise

    @staticmethod
    def split(
        tokens: NDArray[np.int64], counts: NDArray[np.bool_] | None, num_held: int
    ) -> CalibrationText:
        """Hold some windows aside, spread evenly, so that every text gives its share.

        Args:
            tokens: [num_sequences, sequence_length].
            counts: likewise, whether a token counts; None if all do.
            num_held: how many windows are held aside.
        """
        is_held = np.zeros(len(tokens), dtype=bool)
        is_held[held_places(len(tokens), num_held)] = True
        of_fitted, of_held = (None, None) if counts is None else (counts[~is_held], counts[is_held])
        return CalibrationText(tokens[~is_held], of_fitted, tokens[is_held], of_held)


def held_places(num_sequences: int, num_held: int) -> NDArray[np.int64]:
    """Return the places of evenly spread windows: the middles of `num_held` equal parts."""
    return ((np.arange(num_held) + 0.5) * num_sequences / max(1, num_held)).astype(np.int64)


def held_measure(cluster: Cluster, text: CalibrationText, loss: str = "kl") -> float:
    """Return the divergence (kl) or the loss on the windows held aside.

    It is in nats per token that counts.

    It is infinite if it is no number, as where a training diverged.
    """
    windows = text.held
    counts = text.held_counts
    if loss == "kl":
        sums = [comparison.divergence for comparison in compared(cluster, HELD, windows, counts)]
    else:
        sums = sequence_losses(cluster, windows, counts)
    mean = sum(sums) / max(1, num_counted(windows, counts))
    return mean if math.isfinite(mean) else math.inf
