"""What the coordinator may ask of a cluster, whether its workers are Ray actors or objects of this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ray_surgeon.cluster.messages import WorkerIndex
from ray_surgeon.cluster.placement import Placement


class Cluster(Protocol):
    """Workers that run the methods of `ShardWorker`."""

    placement: Placement

    def submit(self, index: WorkerIndex, method: str, *args: object, num_returns: int = 1) -> Any:
        """Start a method on one worker; its calls run in the order of submission.

        Args:
            index: which worker.
            method: a method of `ShardWorker`.
            args: its arguments; futures of other calls are allowed, and their values never pass the caller.
            num_returns: 2 for a method that returns a pair of which each half gets a future of its own.

        Returns:
            A future, or a list of `num_returns` futures.
        """

    def get(self, futures: Sequence[Any]) -> list[Any]:
        """Wait for futures and return their values; what a worker raised is raised here."""

    def run_all(self, method: str, *args: object, **kwargs: object) -> list[Any]:
        """Run a method on every worker at the same time and return the results in the order of `placement.workers`."""

    def close(self) -> None:
        """End the workers."""
