"""The section of a job spec on the search."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ray_surgeon.spec.base import Positive, Section
from ray_surgeon.spec.schedule import FamilySection


class SearchSection(Section):
    """The search for how many groups every block loses; see `ray_surgeon.stages.search.search`."""

    is_checked: ClassVar[bool] = True

    rounds: Positive = 1
    """Allocations that are tried after the first one, each with scales from the one before"""
    num_sequences: int = Field(16, ge=2)
    """Sequences on which the divergence from the dense model is measured. Every round measures it
    once for every kind of groups in every block that loses any, and once more. They are cut from
    the calibration's texts, apart from its own sequences
    """


class Searched(FamilySection):
    """Pruning whose costs a search may scale."""

    groups: tuple[str, ...]
    search: SearchSection | None = None
    """In every shot, after the costs: for one block after the other, undo the removals of one kind
    of groups and scale their costs by how far the divergence from the dense model falls; then
    compute the threshold again. null: no search
    """

    @property
    def num_further_windows(self) -> int:
        """Windows that the search measures on."""
        return 0 if self.search is None else self.search.num_sequences
