"""The LLM Surgeon on single elements and N:M groups.

Removals are zeros in the dense shapes, by one global threshold, with correlated updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_surgeon.config.pruning import ElementsSection
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.worker import Worker
from ray_surgeon.maths import threshold as thresholds
from ray_surgeon.maths.conjugate import ElementUpdate
from ray_surgeon.maths.element_pruning import ElementCandidates, find_elements
from ray_surgeon.maths.masks import ElementMask
from ray_surgeon.pruning.method import ByThreshold, Choice, Scores


@dataclass(frozen=True)
class Elements(ByThreshold):
    """The LLM Surgeon on single elements or N:M groups; their costs never leave the workers."""

    by_element: ClassVar[bool] = True
    section: ElementsSection

    @property
    def update(self) -> ElementUpdate:
        """Options of the update; see `ElementCandidates`."""
        return ElementUpdate(**self.section.update.model_dump())

    # On a worker

    def costs(self, worker: Worker) -> Scores[None]:
        """Prepare the costs of the owned linears, and keep them for `histogram` and `prune`.

        Raises:
            FloatingPointError: a factor is not usable; names the linear.
        """
        units = self.section.units
        kind = self.section.costs
        candidates = dict[str, ElementCandidates]()
        for name in worker.owned():
            candidates[name] = find_elements(self.linear(worker, name), units, kind)
        return self.scores(worker, candidates)

    def histogram(self, worker: Worker, high: int | None) -> NDArray[np.int64]:
        """Count the costs of the owned linears' units by their bits; see `bit_histogram`."""
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for name, candidates in worker.state.candidates.items():
            mask = worker.mask(name, ElementMask)
            costs = candidates.costs(self.linear(worker, name), mask)
            counts += thresholds.bit_histogram(costs, high).cpu()
        return counts.numpy()

    # On the coordinator

    def choose(self, cluster: Cluster, scores: Scores[None], shot: int) -> Choice:
        """Find the exact k-th smallest cost in two rounds of counting.

        The costs stay on the workers.
        """
        num_parameters = scores.num_parameters
        num_pruned = num_parameters - scores.num_kept
        size = self.section.units.num_removed
        upper = self._counts(cluster, high=None)
        num_units = thresholds.units_to_remove(
            target=self.section.targets[shot - 1],
            num_parameters=num_parameters,
            num_pruned=num_pruned,
            num_per_unit=size,
            num_candidates=int(upper.sum()),
        )
        threshold = -1.0
        if num_units:
            high, rest = thresholds.bucket_of(upper, num_units)
            lower = self._counts(cluster, high)
            low, _ = thresholds.bucket_of(lower, rest)
            threshold = thresholds.cost_of_bits(high, low)
            num_pruned += int(upper[:high].sum() + lower[: low + 1].sum()) * size
        sparsity = num_pruned / num_parameters
        return Choice(threshold, {"threshold": threshold, "sparsity": sparsity})

    def _counts(self, cluster: Cluster, high: int | None) -> Tensor:
        """Return the sum of all workers' histograms; see `bit_histogram`."""
        return torch.from_numpy(np.sum(cluster.run_all(self.histogram, high), axis=0))
