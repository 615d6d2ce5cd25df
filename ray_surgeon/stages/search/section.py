"""The section of a job spec on the search."""

from __future__ import annotations

from pydantic import Field

from ray_surgeon.spec.base import Positive, Section


class SearchSection(Section):
    """The search for how many groups every block loses; see `ray_surgeon.stages.search.search`."""

    rounds: Positive = 1
    """Allocations that are tried after the first one, each with scales from the one before"""
    num_sequences: int = Field(16, ge=2)
    """Sequences on which the divergence from the dense model is measured. Every round measures it
    once for every kind of groups in every block that loses any, and once more. They are cut from
    the calibration's texts, apart from its own sequences
    """
