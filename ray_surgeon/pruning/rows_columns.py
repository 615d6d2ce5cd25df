"""The LLM Surgeon on rows and columns.

Removals are zeros in the dense shapes, by one global threshold, with correlated updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ray_surgeon.maths import threshold as thresholds
from ray_surgeon.maths.greedy import Limits
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.structured import find_candidates
from ray_surgeon.maths.threshold import StructureCosts
from ray_surgeon.models.groups import propagate, shrinkable
from ray_surgeon.pruning.method import Applied, ByThreshold, Choice, Scores
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.wave import Tokens
from ray_surgeon.runtime.worker import Worker, collective
from ray_surgeon.spec.curvature import ExtendedKfacSection
from ray_surgeon.spec.pruning import RowsColumnsSection

_SAMPLED_BLOCKS = 4
"""One of so many blocks tells how far greedy paths must go."""
_MOST_LIMITS = 10
"""How often that is tried, four times as far each time, before paths are followed to their ends."""


@dataclass(frozen=True)
class RowsColumns(ByThreshold):
    """Rows and columns."""

    section: RowsColumnsSection

    @property
    def update(self) -> str:
        """See `Candidates`."""
        return self.section.update

    # On a worker

    def costs(self, worker: Worker, limit: float | None, every: int = 1) -> Scores[StructureCosts]:
        """Take the costs of the owned linears' rows and columns and keep them for `prune`.

        Args:
            worker: with curvature.
            limit: of the greedy path; None for the cost of each structure on its own.
            every: of so many blocks only the first is looked at.

        Raises:
            FloatingPointError: a factor or a cost is not usable; names the linear.
        """
        section = self.section
        limits = Limits(limit, per_parameter=section.rank_by == "cost_per_parameter")
        options = section.structure, "obd" if section.costs == "obd" else "obs", limits
        candidates = {}
        replies = []
        shapes = worker.layout.shapes
        names = [n for n in worker.shard.linears if worker.owns(n) and not shapes[n].block % every]
        for name in worker.each(names):
            mask = worker.mask(name, StructuredMask)
            candidates[name] = c = find_candidates(self.linear(worker, name), mask, *options)
            kept = int(mask.rows.sum()), int(mask.columns.sum())
            costs = (side[side.isfinite()].float().cpu() for side in (c.rows, c.columns))
            replies.append(StructureCosts(shapes[name].size, *kept, *costs))
        return self.scores(worker, candidates, replies)

    @collective
    def num_kept_at(self, worker: Worker, threshold: float) -> int:
        """Return the parameters that a shard keeps at a threshold, after propagation.

        Replica 0 answers for all.
        """
        masks = _masks(worker)
        for name, candidates in worker.state.candidates.items():
            masks[name] = masks[name].without(*candidates.to_prune(threshold))
        masks = worker.share_masks(masks)
        masks |= propagate(worker.layout, masks, worker.group_sets)
        return sum(mask.num_kept for mask in masks.values()) if worker.index.replica == 0 else 0

    def share(self, worker: Worker) -> None:
        """Send all linears to the other replicas, and remove what has no influence any more."""
        super().share(worker)
        for name, mask in propagate(worker.layout, _masks(worker), worker.group_sets).items():
            W = worker.shard.weight(name)
            mask.apply_(W)
            worker.shard.set_weight(name, W)
            worker.masks[name] = mask

    def num_shrinkable(self, worker: Worker) -> int:
        """Return the parameters of a shard in groups that are pruned whole.

        Replica 0 answers for all.
        """
        return shrinkable(_masks(worker), worker.group_sets) if worker.index.replica == 0 else 0

    # On the coordinator

    def score(self, cluster: Cluster, shot: int) -> Scores[StructureCosts]:
        """Take all costs; greedy paths are followed as far as the target needs.

        Their limit is at first twice the threshold of single costs on a sample of the blocks. It
        decides how much is computed, not what is chosen, which lies below it.
        """
        if self.section.costs in ("obs", "obd") or isinstance(self.curvature, ExtendedKfacSection):
            return self.taken(cluster, None)
        target = self.section.targets[shot - 1]
        scores = self.taken(cluster, None, _SAMPLED_BLOCKS)
        missing = target - (1 - scores.num_kept / scores.num_parameters)
        for limit in _limits(scores.costs, missing):
            scores = self.taken(cluster, limit)
            if thresholds.can_reach(scores.costs, target):
                break
        return scores

    def choose(self, cluster: Cluster, scores: Scores[StructureCosts], shot: int) -> Choice:
        """Find the smallest threshold that removes the target.

        What has no influence then is removed, too.
        """
        target = self.section.targets[shot - 1]
        enough = thresholds.structured_threshold(scores.costs, target)
        sides = [side.double() for c in scores.costs for side in (c.rows, c.columns)]
        values = torch.cat([torch.zeros(1, dtype=torch.float64), *sides]).sort().values

        def num_pruned(value: float) -> int:
            return scores.num_parameters - sum(cluster.run_all(self.num_kept_at, value))

        wanted = math.ceil(target * scores.num_parameters - 1e-6)
        value = thresholds.smallest_enough(values[values <= enough], num_pruned, wanted)
        sparsity = num_pruned(value) / scores.num_parameters
        return Choice(value, {"threshold": value, "sparsity": sparsity})

    def apply(self, cluster: Cluster, tokens: Tokens, choice: Choice, shot: int) -> Applied:
        """Prune and update, and report the fraction that could be cut out of the dense shapes."""
        linears, _ = super().apply(cluster, tokens, choice, shot)
        num_shrinkable = sum(cluster.run_all(self.num_shrinkable))
        return linears, {"shrinkable": num_shrinkable / sum(linear.size for linear in linears)}


def _masks(worker: Worker) -> dict[str, StructuredMask]:
    return {name: worker.mask(name, StructuredMask) for name in worker.shard.linears}


def _limits(sample: Sequence[StructureCosts], missing: float) -> Iterator[float]:
    """Yield how far greedy paths may be followed.

    First twice as far as single costs say, then farther and farther, at last to their ends.

    Args:
        sample: of the linears, with single costs.
        missing: fraction of all parameters that is still to go. Earlier shots may have taken more
            of the sample than of the others.
    """
    num_kept = sum(c.num_rows * c.num_columns for c in sample)
    wanted = 1 - num_kept / sum(c.num_parameters for c in sample) + max(0.0, missing)
    if thresholds.can_reach(sample, wanted):
        positive = torch.cat([side[side > 0] for c in sample for side in (c.rows, c.columns)])
        least = float(positive.min()) if len(positive) else 0.0
        first = max(2 * thresholds.structured_threshold(sample, wanted), least)
        yield from (first * 4**i for i in range(_MOST_LIMITS if first else 0))
    yield math.inf
