"""The state of a run, and the windows that are held aside."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_surgeon.checkpointing import CommittedPart, RunDirectory
from ray_surgeon.config.sections import ModelSection
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.microbatch import Counts, Tokens
from ray_surgeon.distributed.passes import compared, num_counted, sequence_losses
from ray_surgeon.distributed.worker import LinearSummary
from ray_surgeon.memory.stores import ScratchNames
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.report.events import Fact, Steps
from ray_surgeon.report.html_report import LivePage
from ray_surgeon.report.record import RunReport

HELD = "(held aside)"
"""Name of the windows held aside among the texts with states of the dense model.

No evaluation text can have this name.
"""

Facts = dict[str, Fact]
"""Facts that a step shows, by name."""


Text = tuple[Tokens, Counts]
"""Windows for comparisons with the dense model, and which of their tokens count."""


@dataclass(frozen=True, repr=False)
class CalibrationText:
    """Windows of the calibration, and which of their tokens count as predicted ones."""

    tokens: Tokens  # [num_sequences, sequence_length] on which stages are fitted
    # [num_sequences, sequence_length] whether a token counts; None if all do
    counts: Counts = None
    # [num_windows, sequence_length] on which no stage is fitted
    held: Tokens = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    # [num_windows, sequence_length] whether a token counts; None if all do
    held_counts: Counts = None

    @staticmethod
    def split(tokens: Tokens, counts: Counts, num_held: int) -> CalibrationText:
        """Hold some windows aside, spread evenly, so that every text gives its share.

        Args:
            tokens: [num_sequences, sequence_length].
            counts: [num_sequences, sequence_length], whether a token counts; None if all do.
            num_held: number of windows that are held aside.
        """
        is_held = np.zeros(len(tokens), dtype=bool)
        is_held[held_places(len(tokens), num_held)] = True
        text = CalibrationText(tokens=tokens[~is_held], held=tokens[is_held])
        if counts is None:
            return text
        return replace(text, counts=counts[~is_held], held_counts=counts[is_held])


def held_places(num_sequences: int, num_held: int) -> NDArray[np.int64]:
    """Return the indices of evenly spread windows: the middles of `num_held` equal parts."""
    middles = (np.arange(num_held) + 0.5) * num_sequences / max(1, num_held)
    return middles.astype(np.int64)


def held_aside(
    cluster: Cluster, text: CalibrationText, loss: str = "kl"
) -> tuple[float, float | None]:
    """Measure the current weights on the windows held aside.

    Returns:
        The divergence (kl) or the loss, in nats per counted token, infinite if it is not finite, as
        after a training that diverged; and with kl the acceptance, that is, the share of the dense
        model's tokens that would be accepted, else None.
    """
    tokens = text.held
    counts = text.held_counts
    num_tokens = max(1, num_counted(tokens, counts))
    acceptance = None
    if loss == "kl":
        comparisons = compared(cluster, HELD, tokens, counts, acceptance=True)
        mean = sum(each["divergence"] for each in comparisons) / num_tokens
        acceptance = sum(each["acceptance"] for each in comparisons) / num_tokens
    else:
        mean = sum(sequence_losses(cluster, tokens, counts)) / num_tokens
    if not math.isfinite(mean):
        mean = math.inf
    return mean, acceptance


def held_measure(cluster: Cluster, text: CalibrationText, loss: str = "kl") -> float:
    """Return the divergence or the loss alone; see `held_aside`."""
    measure, _ = held_aside(cluster, text, loss)
    return measure


@dataclass
class RunState:
    """The state of a run on the coordinator."""

    cluster: Cluster
    directory: RunDirectory
    report: RunReport
    steps: Steps
    layout: ModelLayout
    model: ModelSection  # the dense model, pinned to the files that were checked
    calibration: Tokens  # [num_sequences, sequence_length] tokens, all windows
    text: CalibrationText  # the same windows: those for fitting and those held aside
    texts: Mapping[str, Tokens]  # evaluation text -> windows
    scratch: ScratchNames  # folders of workers on their disks
    page: LivePage  # page with the report, updated during the run
    num_shots: int
    num_done: int  # shots that an earlier try has committed
    # committed part of the current shot; before the first one, of the shot in which the run resumes
    part: CommittedPart | None
    shot: int = 0  # number of the current shot; 0 before the first
    # entries of the report for the current shot
    record: dict[str, Any] = field(default_factory=dict)
    # linears after the update of the current shot
    linears: list[LinearSummary] = field(default_factory=list)
    committed_s: float = 0.0  # clock at the last commit, or at the beginning of the shot

    @property
    def resumes(self) -> bool:
        """Whether the workers' weights come from a commit, not from the dense model."""
        return self.num_done > 0 or self.part is not None

    @property
    def sparsity(self) -> float:
        """Removed fraction of the linears' parameters after the update of the shot."""
        kept = sum(linear.num_kept for linear in self.linears)
        return 1 - kept / sum(linear.size for linear in self.linears)

    def begin_shot(self, shot: int) -> None:
        """Reset the state for a new shot, or restore it from the shot's committed part."""
        earlier = {}
        if self.part is not None:
            earlier = self.part.record
        self.shot = shot
        self.record = earlier.get("shot", {})
        self.linears = [LinearSummary(**linear) for linear in earlier.get("linears", ())]
        self.steps.new_shot(earlier.get("steps", {}))
        self.committed_s = time.monotonic()
