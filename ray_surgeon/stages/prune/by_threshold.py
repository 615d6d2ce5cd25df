"""What methods have in common that remove whatever costs at most one threshold over the model."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ray_surgeon.maths.linear import Linear, Removal
from ray_surgeon.maths.masks import Mask
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.worker import LinearSummary, Worker, collective, sizes
from ray_surgeon.stages.prune.method import Applied, Choice, Method, Scores, Tokens


@dataclass
class Scored:
    """What the costs leave on a worker for the update, by linear."""

    candidates: dict[str, Any]


@dataclass(frozen=True)
class ByThreshold(Method):
    """A method that ranks what it may remove from every linear on the linear's own."""

    # On a worker

    def scores(
        self, worker: Worker, candidates: dict[str, Any], costs: tuple[Any, ...] = ()
    ) -> Scores[Any]:
        """Keep candidates, by linear, for the update, and return what the coordinator gets."""
        worker.keep(Scored(candidates))
        raised = tuple(event for c in candidates.values() for event in c.raised_damping)
        clipped = tuple(event for c in candidates.values() for event in c.clipping)
        return Scores(costs, *sizes(worker), raised, clipped)

    @abstractmethod
    def pruned(
        self, linear: Linear, mask: Any, candidates: Any, threshold: float
    ) -> tuple[Removal, Mask]:
        """Return a linear without what costs at most the threshold, and its new mask."""

    def share(self, worker: Worker) -> None:
        """Send all linears from their owners to the other replicas."""
        worker.share_linears(worker.shard.linears)

    @collective
    def prune(self, worker: Worker, threshold: float) -> tuple[LinearSummary, ...]:
        """Remove what costs at most the threshold, update the rest, and send it to replicas."""
        candidates = worker.drop(Scored).candidates
        removals = dict[str, tuple[float, float]]()
        for name in worker.each(list(candidates)):
            removal, worker.masks[name] = self.pruned(
                self.linear(worker, name), worker.masks[name], candidates.pop(name), threshold
            )
            worker.shard.set_weight(name, removal.W)
            removals[name] = removal.predicted, removal.residual
        worker.shard.drop_curvature()
        self.share(worker)
        return tuple(worker.summary(name, *removal) for name, removal in removals.items())

    # On the coordinator

    def apply(self, cluster: Cluster, tokens: Tokens, choice: Choice, shot: int) -> Applied:
        """Prune and update."""
        assert choice.threshold is not None
        cluster.progress.begin(unit="linears")
        return list(chain.from_iterable(cluster.run_all(self.prune, choice.threshold))), {}
