"""What a GPU does beside products: launches, waits, and bytes that pass its memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """Counts of a step, or of a part of it, on one worker."""

    launches: float = 0.0  # operators that start a kernel
    syncs: float = 0.0  # for which the host waits
    memory_bytes: float = 0.0  # of the device's own memory that are read and written
    sent_bytes: float = 0.0  # between workers
    waiting_s: float = 0.0  # until processes have started, and the like

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def times(self, number: float) -> Counts:
        """Return the counts of so many such parts."""
        return Counts(*(number * value for value in vars(self).values()))


NOTHING = Counts()
