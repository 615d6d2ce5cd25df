"""The section `pruning` of a job spec: a union of those of all methods, and the method of each."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Tag

from ray_surgeon.spec.base import by_tag, tag
from ray_surgeon.stages.prune.elements import Elements, ElementsSection, NMSection
from ray_surgeon.stages.prune.groups import Groups
from ray_surgeon.stages.prune.groups_section import GroupsSection, UniformGroupsSection
from ray_surgeon.stages.prune.layerwise import Layerwise, SparseGPTSection, WandaSection
from ray_surgeon.stages.prune.method import Method
from ray_surgeon.stages.prune.rows_columns import RowsColumns, RowsColumnsSection

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


def _tag_of(get: Any) -> str | None:
    method = get("method", "llm_surgeon")
    structure = get("structure", "rows_columns")
    if method in ("sparsegpt", "wanda"):
        return str(method)
    if method != "llm_surgeon":
        return None
    if structure in ("rows", "columns"):
        return "rows_columns"
    if structure == "groups" and get("allocation", "global") == "uniform":
        return "groups, allocation uniform"
    return structure if structure in ("rows_columns", "element", "n_m", "groups") else None


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
