"""The interface of a cluster of workers, and a cluster of objects in this process."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier, BrokenBarrierError
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch

from ray_surgeon.distributed.collectives import ThreadReplica
from ray_surgeon.distributed.placement import Placement, WorkerIndex
from ray_surgeon.distributed.worker import Step, Worker, clean_up
from ray_surgeon.memory.stores import Stores
from ray_surgeon.models.layout import ModelLayout

P = ParamSpec("P")
T = TypeVar("T")
U = TypeVar("U")


class NoRoomError(RuntimeError):
    """The cluster cannot hold the workers."""


_LOST = {
    "worker": "a worker was lost",
    "node": "a machine was lost",
    "coordinator": "the coordinator was lost",
    "memory": "a machine ran out of memory",
    "communication": "replicas could not communicate",
    "preemption": "a machine is taken away",
}
"""Cause of a failure -> text for the user."""


class WorkerFailureError(RuntimeError):
    """Part of the cluster is lost; new workers can continue from the last committed shot."""

    def __init__(self, cause: str, message: str | BaseException) -> None:
        """Describe the loss.

        Args:
            cause: "worker", "node", "coordinator", "communication" or "memory", see
                `RetriesSection`; or "preemption", after which a run always continues.
            message: a line, or an error, whose first 300 characters are shown.
        """
        self.cause = cause
        self.message = " ".join(str(message).split())[:300]
        super().__init__(cause, self.message)

    def __str__(self) -> str:
        """Return the cause and the message for the user."""
        return f"{_LOST[self.cause]}: {self.message}"


@dataclass
class Progress:
    """Progress of the present step."""

    done: int = 0  # units that are done
    total: int = 0  # all units; 0 while the number is unknown
    unit: str = ""  # e.g. "sequences" or "linears"
    tokens_each: int = 0  # tokens per unit; 0 if units have none
    started_s: float = 0.0  # monotonic clock at the beginning
    # called after every change
    listener: Callable[[], None] | None = field(default=None, repr=False)

    def begin(self, total: int = 0, unit: str = "", tokens_each: int = 0) -> None:
        """Start to count; see the attributes for the arguments."""
        self.done = 0
        self.total = total
        self.unit = unit
        self.tokens_each = tokens_each
        self.started_s = time.monotonic()
        self._tell()

    def reach(self, done: int, total: int | None = None) -> None:
        """Set the number of units that are done, and the number of all units if it is given."""
        if done == self.done:
            return
        self.done = done
        if total is not None:
            self.total = total
        self._tell()

    def reach_together(self, positions: Iterable[tuple[int, int]]) -> None:
        """Set the progress to the sum over workers in a step that counts linears.

        Args:
            positions: (done, total) linears of each worker.
        """
        if self.unit != "linears":
            return
        sum_done = 0
        sum_total = 0
        for done, total in positions:
            sum_done += done
            sum_total += total
        self.reach(sum_done, sum_total)

    def _tell(self) -> None:
        if self.listener is not None:
            self.listener()


class Future(Generic[T]):
    """Stands for the result of a step until `Cluster.get` waits for it."""


def value_of(future: Future[T]) -> T:
    """Return a future as an argument for another step, which receives the value.

    The value travels from worker to worker, not through the coordinator.
    """
    return cast(T, future)


def at_hand(value: T) -> Future[T]:
    """Return a value as a future for `value_of`, for code that also handles results of steps."""
    return cast(Future[T], value)


class Cluster(ABC):
    """Workers that run steps.

    A step is a function, or a method of a pruning method, whose first argument is the worker:
    ``forward(worker, 3, inputs)`` there is ``cluster.submit(index, forward, 3, inputs)`` here.
    """

    def __init__(self, placement: Placement) -> None:
        """Start without workers.

        Args:
            placement: blocks and groups of each worker.
        """
        self.placement = placement
        self.progress = Progress()
        self.stores = Stores()  # where the loaded workers keep weights and factors

    def submit(
        self, index: WorkerIndex, step: Step[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        """Start a step on one worker; the steps of a worker run in the order of submission.

        Args:
            index: which worker.
            step: the function to run.
            args: arguments of the step; see `value_of` for results of other steps.
            kwargs: keyword arguments of the step, which are plain values.
        """
        return cast(Future[T], self._start(index, 1, step, *args, **kwargs))

    def submit_pair(
        self, index: WorkerIndex, step: Callable[..., tuple[T, U]], *args: Any
    ) -> tuple[Future[T], Future[U]]:
        """Start a step that returns a pair, and return a future for each half."""
        first, second = self._start(index, 2, step, *args)
        return first, second

    @abstractmethod
    def _start(
        self, index: WorkerIndex, num_futures: int, *step: Any, **kwargs: Any
    ) -> Any:
        """Start a step with its arguments, and return one future or a pair of futures."""

    @abstractmethod
    def get(self, futures: Sequence[Future[T]]) -> list[T]:
        """Wait for futures and return their values; errors of workers are raised here."""

    def run_all(self, step: Step[P, T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """Run a step on every worker at the same time.

        Returns:
            Results in the order of `placement.workers`.
        """
        futures: list[Future[T]] = []
        for index in self.placement.workers:
            futures.append(self.submit(index, step, *args, **kwargs))
        return self.get(futures)

    def notice(self) -> str:
        """Return a sentence that names the machines about to be taken away; "" if none is."""
        return ""

    def leave_if_told(self) -> None:
        """Stop before work is lost; called when all work is committed.

        Raises:
            WorkerFailureError: a machine is about to be taken away.
        """
        notice = self.notice()
        if notice:
            raise WorkerFailureError("preemption", notice)

    def clean_up(self) -> None:
        """Let workers remove their files on local disks, after an error.

        A worker that is still running a step may be skipped.
        """
        self.run_all(clean_up)

    @abstractmethod
    def close(self) -> None:
        """End the workers."""


class LocalCluster(Cluster):
    """Workers as objects of this process, for notebooks, tests and debuggers.

    A submitted step runs at once, so a future is simply the value. Results are the same as with
    Ray.
    """

    def __init__(
        self,
        layout: ModelLayout,
        placement: Placement,
        num_threads: int,
        device: str = "cpu",
    ) -> None:
        """Create the workers.

        Args:
            layout: layout of the whole model.
            placement: blocks and groups of each worker.
            num_threads: number of torch threads of this process from now on; the caller restores
                an earlier number.
            device: "cpu" or "cuda".
        """
        super().__init__(placement)
        torch.set_num_threads(num_threads)
        self.workers = {
            i: Worker(layout, placement, i, device) for i in placement.workers
        }
        for worker in self.workers.values():
            worker.on_progress = self._update_progress
            if device != "cpu":
                worker.take_gpu()
        if placement.num_replicas > 1:
            self._connect_replicas()

    def _connect_replicas(self) -> None:
        num_replicas = self.placement.num_replicas
        for shard in range(self.placement.num_shards):
            barrier = Barrier(num_replicas)
            brought = [torch.empty(0)] * num_replicas
            for replica in range(num_replicas):
                worker = self.workers[WorkerIndex(shard, replica)]
                worker.replicas = ThreadReplica(replica, barrier, brought)

    def _start(
        self, index: WorkerIndex, num_futures: int, *step: Any, **kwargs: Any
    ) -> Any:
        return self.workers[index].call(*step, **kwargs)

    def get(self, futures: Sequence[Future[T]]) -> list[T]:
        """Return the values."""
        return [value_of(future) for future in futures]

    def run_all(self, step: Step[P, T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
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
        _raise_cause([future.exception() for future in futures])
        return [future.result() for future in futures]

    def close(self) -> None:
        """Drop the workers and their files on the local disk."""
        self.clean_up()
        self.workers.clear()

    def _update_progress(self) -> None:
        self.progress.reach_together(worker.position for worker in self.workers.values())


def _raise_cause(outcomes: Iterable[BaseException | None]) -> None:
    """Raise the first error that is not a replica's broken wait for another one, if any."""
    errors = [error for error in outcomes if error is not None]
    for error in errors:
        if not isinstance(error, BrokenBarrierError):
            raise error
    if errors:
        raise errors[0]
