"""The LLM Surgeon on rows and columns.

Removals are zeros in the dense shapes, by one global threshold, with correlated updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_surgeon.config.pruning import RowsColumnsSection
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.microbatch import Tokens
from ray_surgeon.distributed.worker import Worker, collective
from ray_surgeon.maths import threshold as thresholds
from ray_surgeon.maths.greedy import Limits
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.structured import Candidates, find_candidates
from ray_surgeon.maths.threshold import StructureCosts
from ray_surgeon.models.dependencies import propagate, shrinkable
from ray_surgeon.pruning.method import Applied, ByThreshold, Choice, Scores

_SAMPLED_BLOCKS = 4
"""Stride of the blocks sampled to estimate the length of greedy paths."""
_MOST_LIMITS = 10
"""Number of limits tried, each four times the last, before paths are followed to their ends."""


@dataclass(frozen=True)
class RowsColumns(ByThreshold):
    """The LLM Surgeon on rows and columns."""

    section: RowsColumnsSection

    @property
    def update(self) -> str:
        """Kind of the update; see `Candidates`."""
        return self.section.update

    # On a worker

    def costs(
        self,
        worker: Worker,
        limit: float | None,
        every: int = 1,
    ) -> Scores[StructureCosts]:
        """Compute the costs of the owned linears' rows and columns and keep them for `prune`.

        Args:
            worker: worker with curvature.
            limit: limit of the greedy path; None for the cost of each structure on its own.
            every: stride of the blocks whose costs are computed.

        Raises:
            FloatingPointError: a factor or a cost is not usable; names the linear.
        """
        section = self.section
        shapes = worker.layout.shapes
        limits = Limits(limit, per_parameter=section.rank_by == "cost_per_parameter")
        names = list[str]()
        for name in worker.shard.linears:
            if worker.owns(name) and shapes[name].block % every == 0:
                names.append(name)
        candidates = dict[str, Candidates]()
        costs = list[StructureCosts]()
        for name in worker.each(names):
            mask = worker.mask(name, StructuredMask)
            candidates[name] = find_candidates(
                self.linear(worker, name),
                mask,
                structure=section.structure,
                costs="obd" if section.costs == "obd" else "obs",
                limits=limits,
            )
            costs.append(
                StructureCosts(
                    num_parameters=shapes[name].size,
                    num_rows=int(mask.rows.sum()),
                    num_columns=int(mask.columns.sum()),
                    rows=_finite(candidates[name].rows),
                    columns=_finite(candidates[name].columns),
                )
            )
        return self.scores(worker, candidates, costs)

    @collective
    def num_kept_at(self, worker: Worker, threshold: float) -> int:
        """Return the parameters that a shard keeps at a threshold, after propagation.

        Replica 0 answers for all; the others return 0.
        """
        masks = _masks(worker)
        for name, candidates in worker.state.candidates.items():
            rows, columns = candidates.to_prune(threshold)
            masks[name] = masks[name].without(rows, columns)
        masks = worker.share_masks(masks)
        if worker.index.replica != 0:
            return 0
        masks.update(propagate(worker.layout, masks, worker.group_sets))
        return sum(mask.num_kept for mask in masks.values())

    def share(self, worker: Worker) -> None:
        """Send all linears to the other replicas, and remove rows and columns without influence."""
        super().share(worker)
        changed = propagate(worker.layout, _masks(worker), worker.group_sets)
        for name, mask in changed.items():
            W = worker.shard.weight(name)
            mask.apply_(W)
            worker.shard.set_weight(name, W)
            worker.masks[name] = mask

    def num_shrinkable(self, worker: Worker) -> int:
        """Return the parameters of a shard in groups that are pruned whole.

        Replica 0 answers for all; the others return 0.
        """
        if worker.index.replica != 0:
            return 0
        return shrinkable(_masks(worker), worker.group_sets)

    # On the coordinator

    def score(self, cluster: Cluster, shot: int) -> Scores[StructureCosts]:
        """Compute all costs; greedy paths are followed as far as the target needs.

        Their limit is at first twice the threshold of single costs on a sample of the blocks. It
        decides how much is computed, but not what is chosen, which lies below the limit.
        """
        wants_paths = self.section.costs not in ("obs", "obd")
        if not (wants_paths and self.used_curvature.has_greedy_paths):
            return self.taken(cluster, None)
        target = self.section.targets[shot - 1]
        scores = self.taken(cluster, None, _SAMPLED_BLOCKS)
        missing = target - (1 - scores.num_kept / scores.num_parameters)
        for limit in _limits(scores.costs, missing):
            scores = self.taken(cluster, limit)
            if thresholds.can_reach(scores.costs, target):
                break
        return scores

    def choose(
        self,
        cluster: Cluster,
        scores: Scores[StructureCosts],
        shot: int,
    ) -> Choice:
        """Find the smallest threshold that removes the target.

        Rows and columns that are left without influence count as removed.
        """
        target = self.section.targets[shot - 1]
        enough = thresholds.structured_threshold(scores.costs, target)
        sides = [torch.zeros(1, dtype=torch.float64)]
        for c in scores.costs:
            sides.append(c.rows.double())
            sides.append(c.columns.double())
        values = torch.cat(sides).sort().values

        def num_pruned(value: float) -> int:
            return scores.num_parameters - sum(cluster.run_all(self.num_kept_at, value))

        wanted = math.ceil(target * scores.num_parameters - 1e-6)
        value = thresholds.smallest_enough(values[values <= enough], num_pruned, wanted)
        sparsity = num_pruned(value) / scores.num_parameters
        return Choice(value, {"threshold": value, "sparsity": sparsity})

    def apply(
        self,
        cluster: Cluster,
        tokens: Tokens,
        choice: Choice,
        shot: int,
    ) -> Applied:
        """Prune, update, and report the fraction that could be cut out of the dense shapes."""
        linears, _ = super().apply(cluster, tokens, choice, shot)
        num_shrinkable = sum(cluster.run_all(self.num_shrinkable))
        num_parameters = sum(linear.size for linear in linears)
        return linears, {"shrinkable": num_shrinkable / num_parameters}


def _masks(worker: Worker) -> dict[str, StructuredMask]:
    return {name: worker.mask(name, StructuredMask) for name in worker.shard.linears}


def _finite(costs: Tensor) -> Tensor:
    return costs[costs.isfinite()].float().cpu()


def _limits(sample: Sequence[StructureCosts], missing: float) -> Iterator[float]:
    """Yield limits up to which greedy paths may be followed.

    The first is twice the limit that single costs predict, the next ones are larger and larger, and
    the last is infinite.

    Args:
        sample: single costs of the sampled linears.
        missing: fraction of all parameters that still has to be removed. Earlier shots may have
            removed more of the sample than of the other linears.
    """
    num_kept = sum(c.num_rows * c.num_columns for c in sample)
    wanted = 1 - num_kept / sum(c.num_parameters for c in sample) + max(0.0, missing)
    if thresholds.can_reach(sample, wanted):
        sides = list[Tensor]()
        for c in sample:
            sides.append(c.rows[c.rows > 0])
            sides.append(c.columns[c.columns > 0])
        positive = torch.cat(sides)
        least = float(positive.min()) if len(positive) else 0.0
        first = max(2 * thresholds.structured_threshold(sample, wanted), least)
        if first:
            for step in range(_MOST_LIMITS):
                yield first * 4**step
    yield math.inf
