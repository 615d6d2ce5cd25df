"""The state of a run, and the windows that are held aside."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_surgeon.checkpointing.committed import CommittedPart
from ray_surgeon.checkpointing.run_directory import RunDirectory
from ray_surgeon.memory.stores import ScratchNames
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.report.events import Fact, Steps
from ray_surgeon.report.html_report import LivePage
from ray_surgeon.report.record import RunReport
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.passes import compared, num_counted, sequence_losses
from ray_surgeon.runtime.wave import Counts, Tokens
from ray_surgeon.runtime.worker import LinearSummary
from ray_surgeon.spec.sections import ModelSection

HELD = "(held aside)"
"""Name of the windows held aside among the texts that have dense states.

No evaluation text can have it.
"""

Facts = dict[str, Fact]
"""What the line of a step says, by name."""


Text = tuple[Tokens, Counts]
"""Windows on which later weights are compared with the dense model, and which tokens count."""


@dataclass(frozen=True, repr=False)
class CalibrationText:
    """Windows of the calibration, and which of their tokens count as predicted ones."""

    tokens: Tokens  # [num_sequences, sequence_length] what stages are fitted on
    counts: Counts = None  # likewise, whether a token counts; None if all do
    # [num_windows, sequence_length] what no stage is fitted on
    held: Tokens = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    held_counts: Counts = None  # likewise

    @staticmethod
    def split(tokens: Tokens, counts: Counts, num_held: int) -> CalibrationText:
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


def held_aside(
    cluster: Cluster, text: CalibrationText, loss: str = "kl"
) -> tuple[float, float | None]:
    """Measure the present weights on the windows held aside.

    Returns:
        The divergence (kl) or the loss, in nats per token that counts; infinite if it is no number,
        as where a training diverged. With kl, the acceptance, too: the share of the dense model's
        tokens that would be accepted.
    """
    held = text.held, text.held_counts
    num_tokens = max(1, num_counted(*held))
    acceptance = None
    if loss == "kl":
        comparisons = compared(cluster, HELD, *held, acceptance=True)
        mean = sum(each["divergence"] for each in comparisons) / num_tokens
        acceptance = sum(each["acceptance"] for each in comparisons) / num_tokens
    else:
        mean = sum(sequence_losses(cluster, *held)) / num_tokens
    return (mean if math.isfinite(mean) else math.inf), acceptance


def held_measure(cluster: Cluster, text: CalibrationText, loss: str = "kl") -> float:
    """Return the measure of `held_aside` alone."""
    return held_aside(cluster, text, loss)[0]


@dataclass
class RunState:
    """The state of a run on the coordinator."""

    cluster: Cluster
    directory: RunDirectory
    report: RunReport
    steps: Steps
    layout: ModelLayout
    model: ModelSection  # the dense model, pinned to what was checked
    calibration: Tokens  # [num_sequences, sequence_length] tokens, all windows
    text: CalibrationText  # the same in two parts
    texts: Mapping[str, Tokens]  # evaluation text -> windows
    scratch: ScratchNames  # folders of workers on their disks
    page: LivePage  # the report as a page while the run goes on
    num_shots: int
    num_done: int  # shots that an earlier try has committed
    # what is committed of the present shot, before the first one of the shot in which a run goes on
    part: CommittedPart | None
    shot: int = 0  # number of the present one; 0 before the first
    record: dict[str, Any] = field(default_factory=dict)  # of the present shot, for the report
    linears: list[LinearSummary] = field(default_factory=list)  # what the update of the shot left
    committed_s: float = 0.0  # clock at the last commit, or at the beginning of the shot

    @property
    def resumes(self) -> bool:
        """Whether the workers' weights are those of a commit, not the dense model's."""
        return self.num_done > 0 or self.part is not None

    @property
    def sparsity(self) -> float:
        """Removed fraction of the linears' parameters after the update of the shot."""
        kept = sum(linear.num_kept for linear in self.linears)
        return 1 - kept / sum(linear.size for linear in self.linears)

    def begin_shot(self, shot: int) -> None:
        """Forget what belongs to the shot before, and know what a committed part of this knows."""
        earlier = {} if self.part is None else self.part.record
        self.shot = shot
        self.record = earlier.get("shot", {})
        self.linears = [LinearSummary(**linear) for linear in earlier.get("linears", ())]
        self.steps.new_shot(earlier.get("steps", {}))
        self.committed_s = time.monotonic()
