"""All workers in this process, for notebooks, tests and debuggers.

Results equal those of the Ray cluster.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import BrokenBarrierError
from typing import Concatenate, ParamSpec, TypeVar

import torch

from ray_surgeon.memory.stores import Stores
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.runtime.cluster import Progress
from ray_surgeon.runtime.collectives import ThreadMeeting, ThreadReplica
from ray_surgeon.runtime.placement import Placement, WorkerIndex
from ray_surgeon.runtime.usage import Usage
from ray_surgeon.runtime.worker import Worker, clean_up

P = ParamSpec("P")
T = TypeVar("T")
U = TypeVar("U")


class LocalCluster:
    """Workers as objects. A submitted step runs at once, so its future is simply the value."""

    def __init__(
        self, layout: ModelLayout, placement: Placement, num_threads: int, device: str = "cpu"
    ) -> None:
        """Create the workers.

        Args:
            layout: of the whole model.
            placement: what each of them holds.
            num_threads: torch threads of the process from now on; who had others gives them back.
            device: "cpu" or "cuda".
        """
        self.placement = placement
        self.progress = Progress()
        self.stores = Stores()
        gpu = None
        if (
            device == "cuda"
            # by its number, which threads of a worker need, and by its name, which other processes
            # need
        ):
            number = torch.cuda.current_device()
            names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            device = f"cuda:{number}"
            gpu = names[number].strip() if number < len(names) and names[number] else str(number)
        self.workers = {
            index: Worker(layout, placement, index, num_threads, device)
            for index in placement.workers
        }
        self._positions: dict[WorkerIndex, tuple[int, int]] = {}
        for index, worker in self.workers.items():
            worker.gpu = gpu
            worker.report_position = partial(self._report, index)
        if placement.num_replicas > 1:
            for shard in range(placement.num_shards):
                meeting = ThreadMeeting(placement.num_replicas)
                for replica in range(placement.num_replicas):
                    self.workers[WorkerIndex(shard, replica)].replicas = ThreadReplica(
                        meeting, replica
                    )

    def submit(
        self,
        index: WorkerIndex,
        step: Callable[Concatenate[Worker, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run a step now; see `Cluster.submit`."""
        return self.workers[index].call(step, *args, **kwargs)

    def submit_pair(
        self,
        index: WorkerIndex,
        step: Callable[Concatenate[Worker, P], tuple[T, U]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> tuple[T, U]:
        """Run a step now; see `Cluster.submit_pair`."""
        return self.workers[index].call(step, *args, **kwargs)

    def get(self, futures: Sequence[T]) -> list[T]:
        """Return the values."""
        return list(futures)

    def run_all(
        self, step: Callable[Concatenate[Worker, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> list[T]:
        """Run a step on every worker, one after the other.

        A step in which replicas wait for each other runs in threads.
        """
        # whose keys no thread of a replica changes
        self._positions = dict.fromkeys(self.placement.workers, (0, 0))
        workers = [self.workers[index] for index in self.placement.workers]
        if self.placement.num_replicas == 1 or not getattr(step, "is_collective", False):
            return [worker.call(step, *args, **kwargs) for worker in workers]
        with ThreadPoolExecutor(len(workers)) as pool:
            futures = [
                pool.submit(_run_beside_replicas, worker, lambda w: w.call(step, *args, **kwargs))
                for worker in workers
            ]
        errors = [
            error for error in (future.exception() for future in futures) if error is not None
        ]
        for error in sorted(errors, key=lambda error: isinstance(error, BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]

    def usages(self) -> list[Usage]:
        """Return what each worker has used so far."""
        return [self.workers[index].usage() for index in self.placement.workers]

    def clean_up(self) -> None:
        """Remove what the workers have on the disk."""
        for worker in self.workers.values():
            clean_up(worker)

    def close(self) -> None:
        """Drop the workers and what they have on the disk."""
        self.clean_up()
        self.workers.clear()

    def _report(self, index: WorkerIndex, done: int, total: int) -> None:
        self._positions[index] = done, total
        if self.progress.unit == "linears":
            self.progress.reach(
                sum(done for done, _ in self._positions.values()),
                sum(total for _, total in self._positions.values()),
            )


def _run_beside_replicas(worker: Worker, run: Callable[[Worker], T]) -> T:
    came_to_the_end = False
    try:
        result = run(worker)
        came_to_the_end = True
    finally:
        if not came_to_the_end and isinstance(worker.replicas, ThreadReplica):
            worker.replicas.leave()
    return result
