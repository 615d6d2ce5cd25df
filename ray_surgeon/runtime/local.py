"""All workers in this process, for notebooks, tests and debuggers.

Results equal those of the Ray cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.runtime.cluster import Cluster, Future, value_of
from ray_surgeon.runtime.collectives import ThreadReplica
from ray_surgeon.runtime.placement import Placement, WorkerIndex
from ray_surgeon.runtime.worker import Worker, clean_up

P = ParamSpec("P")
T = TypeVar("T")


class LocalCluster(Cluster):
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
        super().__init__(placement)
        self.workers = {
            index: Worker(layout, placement, index, num_threads, device)
            for index in placement.workers
        }
        copies = placement.num_replicas
        meetings = [(Barrier(copies), [torch.empty(0)] * copies) for _ in placement.blocks]
        for index, worker in self.workers.items():
            worker.on_progress = self._look
            if device == "cuda":
                worker.take_gpu()
            if copies > 1:
                worker.replicas = ThreadReplica(index.replica, *meetings[index.shard])

    def _start(
        self, index: WorkerIndex, num_futures: int, method: str, *args: Any, **kwargs: Any
    ) -> Any:
        return getattr(self.workers[index], method)(*args, **kwargs)

    def get(self, futures: Sequence[Future[T]]) -> list[T]:
        """Return the values."""
        return [value_of(future) for future in futures]

    def run_all(
        self, step: Callable[Concatenate[Worker, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> list[T]:
        """Run a step on every worker, one after the other.

        A step in which replicas wait for each other runs in threads.
        """
        for worker in self.workers.values():
            worker.position = (0, 0)
        if self.placement.num_replicas == 1 or not getattr(step, "is_collective", False):
            return super().run_all(step, *args, **kwargs)

        def run(worker: Worker) -> T:
            try:
                return worker.call(step, *args, **kwargs)
            except BaseException:
                assert isinstance(worker.replicas, ThreadReplica)
                worker.replicas.leave()
                raise

        with ThreadPoolExecutor(len(self.workers)) as pool:
            futures = [pool.submit(run, worker) for worker in self.workers.values()]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:  # the cause, rather than what it did to those that waited
            raise min(errors, key=lambda error: isinstance(error, BrokenBarrierError))
        return [future.result() for future in futures]

    def clean_up(self) -> None:
        """Remove what the workers have on the disk."""
        for worker in self.workers.values():
            clean_up(worker)

    def close(self) -> None:
        """Drop the workers and what they have on the disk."""
        self.clean_up()
        self.workers.clear()

    def _look(self) -> None:
        self.progress.reach_together(worker.position for worker in self.workers.values())
