"""The LLM Surgeon on single elements and N:M groups.

Removals are zeros in the dense shapes, by one global threshold, with correlated updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ray_surgeon.maths import threshold as thresholds
from ray_surgeon.maths.conjugate import ElementUpdate
from ray_surgeon.maths.element_pruning import ElementUnits, find_elements
from ray_surgeon.maths.masks import ElementMask
from ray_surgeon.models.layout import LinearShape, ModelLayout
from ray_surgeon.plan.work import LinearNeeds
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.spec.base import Positive, Section
from ray_surgeon.spec.schedule import SparsitySection
from ray_surgeon.stages.prune.method import ByThreshold, Choice, Scores


class UpdateSection(Section):
    """How the kept elements make up for the pruned ones; see `maths.conjugate.ElementUpdate`."""

    solver: Literal["conjugate_gradients", "single", "none"] = "conjugate_gradients"
    """conjugate_gradients: for all removals at once, by preconditioned conjugate gradients, which
    the other fields are of; single: for each as if it were alone; none: no update (OBD)
    """
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of the products; bfloat16 is faster where the hardware has it"""
    num_iterations: Positive = 16
    """Iterations, at most"""
    tolerance: float = Field(1e-3, ge=0, lt=1)
    """Relative residual at which they stop"""


class PatternSection(SparsitySection):
    """What all methods have that prune single elements or N:M groups."""

    method: str
    structure: Literal["element", "n_m"]
    """Single elements, or N:M groups: of every M consecutive inputs of a row, N stay"""
    n_m: tuple[Positive, Positive] | None = None
    """[N, M] of structure n_m: N of M consecutive inputs of a row stay; [2, 4] if not given"""
    tolerated: ClassVar[float] = 0.0  # by how much a target may be above what a pattern removes

    @property
    def units(self) -> ElementUnits:
        """What is pruned as one."""
        return ElementUnits(*(self.n_m or (2, 4))) if self.structure == "n_m" else ElementUnits()

    @property
    def largest_sparsity(self) -> float:
        """The largest sparsity of a pattern."""
        return 1 - self.units.n / self.units.m

    def reach(self, layout: ModelLayout) -> float:
        """Return the largest target that a model's shapes allow; biases count and stay."""
        weights = sum(s.num_rows * (s.num_columns - s.has_bias) for s in layout.linears)
        share = self.units.num_removed / self.units.m
        return weights * share / layout.linear_size + thresholds.SHORT

    def problems(self) -> Iterator[str]:
        """Yield why a pattern is impossible, or cannot reach the target."""
        n = self.units.n
        m = self.units.m
        if self.structure == "element" and self.n_m is not None:
            yield "n_m: structure element has no pattern; remove it, or set structure n_m"
        if not n < m <= 16:
            yield f"n_m: [{n}, {m}] needs N < M <= 16; give for example [2, 4] or [4, 8]"
        if self.target_sparsity > self.largest_sparsity + self.tolerated:
            most = f"{n}:{m} can remove, {self.largest_sparsity:g}"
            yield f"target_sparsity: {self.target_sparsity:g} is more than {most}; lower it"


class ElementsSection(PatternSection):
    """The LLM Surgeon on single elements or N:M groups."""

    method: Literal["llm_surgeon"] = "llm_surgeon"
    """One global threshold on costs, and updates"""
    costs: Literal["obs", "obs_sum", "obd"] = "obs"
    """Predicted loss increase of a removal. obs: with the optimal update of the others, of an N:M
    group the exact joint cost of its best pattern; obs_sum: of an N:M group the sum of its smallest
    single costs, as in the paper; obd: without updates, of an N:M group likewise a sum
    """
    update: UpdateSection = UpdateSection()
    """How the kept weights make up for the pruned ones"""

    def problems(self) -> Iterator[str]:
        """Yield what fields have against each other."""
        if self.structure == "element" and self.costs == "obs_sum":
            yield "costs: obs_sum is of N:M groups; use obs or obd, or set structure n_m"
        solver = self.update.solver
        if solver != "conjugate_gradients" and self.update != UpdateSection(solver=solver):
            yield f"update: solver {solver} has no iterations; leave its other fields out"


@dataclass(frozen=True)
class Elements(ByThreshold):
    """Single elements or N:M groups; the costs of all of them never leave the workers."""

    by_element: ClassVar[bool] = True
    section: ElementsSection

    @property
    def update(self) -> ElementUpdate:
        """See `ElementCandidates`."""
        return ElementUpdate(**self.section.update.model_dump())

    def needs(self, shape: LinearShape) -> LinearNeeds:
        """Both factors are factorised for the costs.

        The update multiplies by both as often as its solver iterates.
        """
        R = shape.num_rows
        C = shape.num_columns
        units = self.section.units
        # each of which every group tries
        patterns = math.comb(units.m, units.n) if self.section.costs == "obs" and units.m > 1 else 0
        update = self.section.update
        iterations = update.num_iterations if update.solver == "conjugate_gradients" else 2
        return LinearNeeds(
            costs_bytes=4 * (2 * (C**2 + R**2) + max(R, C) ** 2 + 5 * R * C),
            costs_flops=1.5 * (C**3 + R**3)
            + patterns * 2.0 * R * (C // units.m) * units.num_removed**2,
            update_bytes=4 * (2.5 * (C**2 + R**2) + 10 * R * C),
            update_flops=iterations * 2.0 * R * C * (R + C),
            kept_bytes=0.0 if self.section.structure == "element" else 12.0 * R * C / units.m,
        )

    # On a worker

    def costs(self, worker: Worker) -> Scores[None]:
        """Take what the costs of the owned linears follow from, and keep it.

        `histogram` and `prune` use it.

        Raises:
            FloatingPointError: a factor is not usable; names the linear.
        """
        how = self.section.units, self.section.costs
        candidates = {n: find_elements(self.linear(worker, n), *how) for n in worker.owned()}
        return self.scores(worker, candidates)

    def histogram(self, worker: Worker, high: int | None) -> NDArray[np.int64]:
        """Count the costs of the owned linears' units by their bits; see `bit_histogram`."""
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for name, candidates in worker.state.candidates.items():
            costs = candidates.costs(self.linear(worker, name), worker.mask(name, ElementMask))
            counts += thresholds.bit_histogram(costs, high).cpu()
        return counts.numpy()

    # On the coordinator

    def choose(self, cluster: Cluster, scores: Scores[None], shot: int) -> Choice:
        """Find the exact k-th smallest cost by two rounds of counting.

        The costs stay where they are.
        """
        num_parameters = scores.num_parameters
        size = self.section.units.num_removed
        num_pruned = num_parameters - scores.num_kept

        def counts(high: int | None) -> Tensor:
            return torch.from_numpy(np.sum(cluster.run_all(self.histogram, high), axis=0))

        upper = counts(None)
        target = self.section.targets[shot - 1]
        most = int(upper.sum())
        num_units = thresholds.units_to_remove(target, num_parameters, num_pruned, size, most)
        value = -1.0
        if num_units:
            high, rest = thresholds.bucket_of(upper, num_units)
            lower = counts(high)
            low, _ = thresholds.bucket_of(lower, rest)
            value = thresholds.cost_of_bits(high, low)
            num_pruned += int(upper[:high].sum() + lower[: low + 1].sum()) * size
        return Choice(value, {"threshold": value, "sparsity": num_pruned / num_parameters})
