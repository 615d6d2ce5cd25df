"""Ways to prune.

A file holds one: its section of the job spec, what it does on a worker and what it does on the
coordinator.

Coupled groups, the longest, have further files: their section, costs as workers send them, whole
experts, the search, and the reconstruction of layers. Corrections and further Kronecker terms,
which go with several ways, have files of their own.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Tag

from ray_surgeon.spec.base import by_tag, tag
from ray_surgeon.stages.correction.section import CorrectionSection
from ray_surgeon.stages.correction.training import Corrections
from ray_surgeon.stages.prune.elements import Elements, ElementsSection, NMSection
from ray_surgeon.stages.prune.groups import Groups
from ray_surgeon.stages.prune.groups_section import (
    CoupledSection,
    GroupsSection,
    UniformGroupsSection,
)
from ray_surgeon.stages.prune.layerwise import Layerwise, SparseGPTSection, WandaSection
from ray_surgeon.stages.prune.method import Choice, Method, Scores
from ray_surgeon.stages.prune.rows_columns import RowsColumns, RowsColumnsSection

__all__ = [
    "METHODS",
    "Choice",
    "CorrectionSection",
    "Corrections",
    "CoupledSection",
    "Groups",
    "GroupsSection",
    "Method",
    "PruningSection",
    "Scores",
    "UniformGroupsSection",
]

METHODS: dict[type, type[Method]] = {
    RowsColumnsSection: RowsColumns,
    ElementsSection: Elements,
    NMSection: Elements,
    GroupsSection: Groups,
    UniformGroupsSection: Groups,
    SparseGPTSection: Layerwise,
    WandaSection: Layerwise,
}
"""Section -> the method that takes it."""

_STRUCTURES = {
    "rows_columns": "rows_columns",
    "rows": "rows_columns",
    "columns": "rows_columns",
    "element": "element",
    "n_m": "n_m",
}


def _tag_of(get: Any) -> str | None:
    method = get("method", "llm_surgeon")
    structure = get("structure", "rows_columns")
    if method in ("sparsegpt", "wanda"):
        return str(method)
    if method == "llm_surgeon" and structure == "groups":
        return (
            "groups, allocation uniform" if get("allocation", "global") == "uniform" else "groups"
        )
    return _STRUCTURES.get(str(structure)) if method == "llm_surgeon" else None


PruningSection = Annotated[
    Annotated[RowsColumnsSection, Tag(tag("rows_columns"))]
    | Annotated[ElementsSection, Tag(tag("element"))]
    | Annotated[NMSection, Tag(tag("n_m"))]
    | Annotated[GroupsSection, Tag(tag("groups"))]
    | Annotated[UniformGroupsSection, Tag(tag("groups, allocation uniform"))]
    | Annotated[SparseGPTSection, Tag(tag("sparsegpt"))]
    | Annotated[WandaSection, Tag(tag("wanda"))],
    by_tag(
        _tag_of,
        "structure rows_columns, rows, columns, element, n_m or groups with method llm_surgeon, or "
        "element or n_m with sparsegpt or wanda",
    ),
]
