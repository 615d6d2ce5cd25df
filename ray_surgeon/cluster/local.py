"""All workers in this process: the same protocol for tests, debuggers and as the oracle of the Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import BrokenBarrierError
from typing import Any

from ray_surgeon.cluster.messages import WorkerIndex
from ray_surgeon.cluster.placement import Placement
from ray_surgeon.cluster.replicas import ThreadMeeting, ThreadReplica
from ray_surgeon.cluster.worker import ShardWorker

_MEETING_TIMEOUT_S = 600.0
_MEETINGS = ("finish_curvature", "start_term", "finish_power", "num_kept_at", "prune", "prune_blocks", "prune_groups", "step_corrections")
"""Methods inside which replicas wait for each other, and which therefore need a thread each; loading is not thread-safe."""


class LocalCluster:
    """Workers as objects. Calls run at once, in the order of submission, so a future is simply the value."""

    def __init__(self, placement: Placement, num_threads: int, device: str = "cpu") -> None:
        """Create the workers.

        Args:
            placement: what each of them holds.
            num_threads: torch threads of the process.
            device: "cpu" or "cuda".
        """
        self.placement = placement
        self._workers = {index: ShardWorker(placement, index, num_threads, device) for index in placement.workers}
        if placement.num_replicas > 1:
            for shard in range(placement.num_shards):
                meeting = ThreadMeeting(placement.num_replicas, _MEETING_TIMEOUT_S)
                for replica in range(placement.num_replicas):
                    self._workers[WorkerIndex(shard, replica)].replicas = ThreadReplica(meeting, replica)

    def submit(self, index: WorkerIndex, method: str, *args: object, num_returns: int = 1) -> Any:
        """Run a method now; see `Cluster.submit`."""
        return getattr(self._workers[index], method)(*args)

    def get(self, futures: Sequence[Any]) -> list[Any]:
        """Return the values."""
        return list(futures)

    def run_all(self, method: str, *args: object, **kwargs: object) -> list[Any]:
        """Run a method on every worker, one after the other unless replicas meet inside it."""
        workers = [self._workers[index] for index in self.placement.workers]
        if self.placement.num_replicas == 1 or method not in _MEETINGS:
            return [getattr(worker, method)(*args, **kwargs) for worker in workers]
        with ThreadPoolExecutor(len(workers)) as pool:
            futures = [pool.submit(_meet, worker, method, *args, **kwargs) for worker in workers]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]

    def close(self) -> None:
        """Drop the workers."""
        self._workers.clear()


def _meet(worker: ShardWorker, method: str, *args: object, **kwargs: object) -> Any:
    came_to_the_end = False
    try:
        result = getattr(worker, method)(*args, **kwargs)
        came_to_the_end = True
    finally:
        if not came_to_the_end and isinstance(worker.replicas, ThreadReplica):
            worker.replicas.leave()
    return result
