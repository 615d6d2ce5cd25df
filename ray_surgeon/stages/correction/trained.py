"""What a training of low-rank corrections came to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ray_surgeon.stages.stage import Facts


@dataclass(frozen=True)
class Trained:
    """What a training of corrections came to.

    Measures are of windows held aside: the divergence, or the loss if that is trained.
    """

    # mean loss of each step's sequences before the step, in nats per token; of trials, those of the
    # rate taken
    losses: list[float]
    # share of the corrections that arrived in the weights, as `LowRankCorrections.absorb` has it
    absorbed: float
    rate: float  # the learning rate at the end
    # learning rate -> measure after its first steps; the last one was taken
    tried: dict[float, float] = field(default_factory=dict)
    # number of steps done -> measure; of the one kept at the end, too
    held: list[tuple[int, float]] = field(default_factory=list)
    undone: str | None = None  # why the model stays as it was; None if the corrections are kept

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
