"""The section `pruning` of a job spec: a union of the sections of all methods."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag

from ray_surgeon.config.base import Positive, Section, by_tag, tag
from ray_surgeon.config.curvature import AnyCurvature
from ray_surgeon.config.groups import GroupsSection, UniformGroupsSection
from ray_surgeon.config.schedule import SparsitySection
from ray_surgeon.errors import ConfigError
from ray_surgeon.maths import threshold as thresholds
from ray_surgeon.models.layout import ModelLayout

if TYPE_CHECKING:
    from ray_surgeon.maths.element_pruning import ElementUnits


class RowsColumnsSection(SparsitySection):
    """Rows and columns of every linear.

    Pruned entries become zeros: the tensors keep their shapes.
    """

    structure: Literal["rows_columns", "rows", "columns"] = "rows_columns"
    """Structures to prune"""
    method: Literal["llm_surgeon"] = "llm_surgeon"
    """One global threshold on costs, and updates"""
    costs: Literal["greedy", "obs", "obd"] | None = None
    """Predicted loss increase of a removal. greedy: after all cheaper removals in its linear, with
    the optimal update of the remaining weights; obs: alone, with that update; obd: alone, without
    an update. If not given: greedy, or obs with extended_kfac
    """
    rank_by: Literal["cost", "cost_per_parameter"] = "cost_per_parameter"
    """Quantity compared by the global threshold: the cost, or the cost per removed parameter"""
    update: Literal["full", "single", "none"] = "full"
    """Update of the kept weights. full: one update for all removals together; single: one update
    for each removal alone; none: no update
    """

    def problem_with(self, curvature: AnyCurvature) -> ConfigError | None:
        """Return the conflict between this section and a curvature, if there is one."""
        if self.costs == "greedy" and not curvature.has_greedy_paths:
            return ConfigError(
                field="pruning.costs",
                found="greedy needs one Kronecker term",
                remedy="choose obs, or kind kfac",
            )
        return None


class UpdateSection(Section):
    """Update of the kept elements; see `maths.conjugate.ElementUpdate`."""

    solver: Literal["conjugate_gradients", "single", "none"] = "conjugate_gradients"
    """conjugate_gradients: one update for all removals, by preconditioned conjugate gradients, to
    which the other fields apply; single: one update for each removal alone; none: no update (OBD)
    """
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of the products; bfloat16 is faster on hardware with bfloat16 instructions"""
    num_iterations: Positive = 16
    """Maximum number of iterations"""
    tolerance: float = Field(1e-3, ge=0, lt=1)
    """Relative residual at which the iterations stop"""


class PatternSection(SparsitySection):
    """Fields of all methods that prune single elements or N:M groups."""

    method: str
    structure: Literal["element", "n_m"]
    """Single elements, or N:M groups: N of every M consecutive inputs of a row are kept"""
    n_m: tuple[Positive, Positive] | None = None
    """[N, M] of structure n_m: N of M consecutive inputs of a row are kept; [2, 4] if not given"""
    # largest excess of a target over the sparsity of the pattern
    tolerated: ClassVar[float] = 0.0

    @property
    def units(self) -> ElementUnits:
        """The unit of removal."""
        from ray_surgeon.maths.element_pruning import ElementUnits

        if self.structure == "n_m":
            return ElementUnits(*(self.n_m or (2, 4)))
        return ElementUnits()

    @property
    def largest_sparsity(self) -> float:
        """The largest sparsity of a pattern."""
        return 1 - self.units.n / self.units.m

    def reach(self, layout: ModelLayout) -> float:
        """Return the largest possible target; biases count but are never removed."""
        weights = sum(s.num_rows * (s.num_columns - s.has_bias) for s in layout.linears)
        share = self.units.num_removed / self.units.m
        return weights * share / layout.linear_size + thresholds.SHORT

    def problems(self) -> Iterator[ConfigError]:
        """Yield conflicts between the pattern and the target, and impossible patterns."""
        n = self.units.n
        m = self.units.m
        if self.structure == "element" and self.n_m is not None:
            yield ConfigError(
                field="n_m",
                found="structure element has no pattern",
                remedy="remove it, or set structure n_m",
            )
        if not n < m <= 16:
            yield ConfigError(
                field="n_m",
                found=f"[{n}, {m}] needs N < M <= 16",
                remedy="give for example [2, 4] or [4, 8]",
            )
        if self.target_sparsity > self.largest_sparsity + self.tolerated:
            most = f"{n}:{m} can remove, {self.largest_sparsity:g}"
            yield ConfigError(
                field="target_sparsity",
                found=f"{self.target_sparsity:g} is more than {most}",
                remedy="lower it",
            )


class ElementsSection(PatternSection):
    """The LLM Surgeon on single elements or N:M groups."""

    method: Literal["llm_surgeon"] = "llm_surgeon"
    """One global threshold on costs, and updates"""
    costs: Literal["obs", "obs_sum", "obd"] = "obs"
    """Predicted loss increase of a removal. obs: with the optimal update of the remaining weights;
    for an N:M group, the exact joint cost of its best pattern; obs_sum: for an N:M group, the sum
    of its smallest single costs, as in the paper; obd: without updates; for an N:M group also a sum
    """
    update: UpdateSection = UpdateSection()
    """Update of the kept weights"""

    def problems(self) -> Iterator[ConfigError]:
        """Yield conflicts between fields."""
        if self.structure == "element" and self.costs == "obs_sum":
            yield ConfigError(
                field="costs",
                found="obs_sum is of N:M groups",
                remedy="use obs or obd, or set structure n_m",
            )
        solver = self.update.solver
        if solver != "conjugate_gradients" and self.update != UpdateSection(
            solver=solver
        ):
            yield ConfigError(
                field="update",
                found=f"solver {solver} has no iterations",
                remedy="leave its other fields out",
            )


class _Layerwise(PatternSection):
    tolerated: ClassVar[float] = thresholds.SHORT

    @property
    def takes_curvature(self) -> bool:
        """False: A is collected block by block during pruning."""
        return False

    def reach(self, layout: ModelLayout) -> float:
        """Return the largest sparsity possible in every linear; 1 for a fixed pattern."""
        widths = [(s.num_columns - s.has_bias) / s.num_columns for s in layout.linears]
        return min(widths) if self.structure == "element" else 1.0

    def problems(self) -> Iterator[ConfigError]:
        """Yield conflicts between fields."""
        is_short = self.target_sparsity < self.largest_sparsity - thresholds.SHORT
        if self.structure == "n_m" and (self.shots > 1 or is_short):
            pattern = f"{self.units.n}:{self.units.m}"
            changes = (
                f"set target_sparsity to {self.largest_sparsity:g} and num_shots to 1"
            )
            yield ConfigError(
                field="n_m",
                found=f"takes every linear to {pattern} at once",
                remedy=f"{changes}",
            )


class SparseGPTSection(_Layerwise):
    """SparseGPT (Frantar & Alistarh 2023)."""

    method: Literal["sparsegpt"]
    """SparseGPT"""
    damping: float = Field(0.01, ge=0, le=10)
    """Damping of A, relative to the mean of its diagonal"""
    max_damping: float = Field(1.0, gt=0, le=10)
    """Maximum damping: the damping of a factor that is not positive definite is raised tenfold up
    to this; beyond it the run fails
    """

    def problems(self) -> Iterator[ConfigError]:
        """Yield conflicts between fields."""
        if self.max_damping < self.damping:
            yield ConfigError(
                field="max_damping",
                found=f"{self.max_damping:g} is below damping {self.damping:g}",
                remedy="raise it",
            )


class WandaSection(_Layerwise):
    """Wanda (Sun et al. 2023)."""

    method: Literal["wanda"]
    """Wanda"""


def _tag_of(get: Any) -> str:
    method = get("method", "llm_surgeon")
    structure = str(get("structure", "rows_columns"))
    if method != "llm_surgeon":
        return str(method)
    if structure == "groups" and get("allocation", "global") == "uniform":
        return "groups, allocation uniform"
    same = {"rows": "rows_columns", "columns": "rows_columns", "n_m": "element"}
    return same.get(structure, structure)


PruningSection = Annotated[
    Annotated[RowsColumnsSection, Tag(tag("rows_columns"))]
    | Annotated[ElementsSection, Tag(tag("element"))]
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
