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

from ray_surgeon.maths import threshold as thresholds
from ray_surgeon.maths.conjugate import ElementUpdate
from ray_surgeon.maths.element_pruning import find_elements
from ray_surgeon.maths.masks import ElementMask
from ray_surgeon.pruning.method import ByThreshold, Choice, Scores
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.spec.pruning import ElementsSection


@dataclass(frozen=True)
class Elements(ByThreshold):
    """Single elements or N:M groups; the costs of all of them never leave the workers."""

    by_element: ClassVar[bool] = True
    section: ElementsSection

    @property
    def update(self) -> ElementUpdate:
        """See `ElementCandidates`."""
        return ElementUpdate(**self.section.update.model_dump())

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
