"""What the coordinator asks of a cluster, of Ray actors or of objects in this process."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier, BrokenBarrierError
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch

from ray_surgeon.memory.stores import Stores
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.runtime.collectives import ThreadReplica
from ray_surgeon.runtime.placement import Placement, WorkerIndex
from ray_surgeon.runtime.worker import Step, Worker, clean_up

P = ParamSpec("P")
T = TypeVar("T")
U = TypeVar("U")


class NoRoomError(RuntimeError):
    """The cluster cannot hold the workers."""


_LOST = {"worker": "a worker was lost", "node": "a machine was lost"}
_LOST |= {"coordinator": "the coordinator was lost", "memory": "a machine ran out of memory"}
_LOST |= {"communication": "replicas could not communicate"}
_LOST |= {"preemption": "a machine is taken away"}
"""Cause of a failure -> what the user reads."""


class WorkerFailureError(RuntimeError):
    """Part of the cluster is lost.

    A new group of workers can continue from the last committed shot.
    """

    def __init__(self, cause: str, message: str | BaseException) -> None:
        """Say what is lost.

        Args:
            cause: "worker", "node", "coordinator", "communication" or "memory", see
                `RetriesSection`; or "preemption", after which a run always goes on.
            message: a line, or an error, of which the beginning is taken.
        """
        self.cause = cause
        self.message = " ".join(str(message).split())[:300]
        super().__init__(cause, self.message)

    def __str__(self) -> str:
        """Return what is lost and why, for people."""
        return f"{_LOST[self.cause]}: {self.message}"


@dataclass
class Progress:
    """How far the present step has come."""

    done: int = 0  # units that are done
    total: int = 0  # units in all; 0 while that is not known
    unit: str = ""  # e.g. "sequences" or "linears"
    tokens_each: int = 0  # tokens of one unit; 0 if it has none
    started_s: float = 0.0  # clock at the beginning
    # is called after every change
    listener: Callable[[], None] | None = field(default=None, repr=False)

    def begin(self, total: int = 0, unit: str = "", tokens_each: int = 0) -> None:
        """Start to count."""
        self.done = 0
        self.total = total
        self.unit = unit
        self.tokens_each = tokens_each
        self.started_s = time.monotonic()
        self._tell()

    def reach(self, done: int, total: int | None = None) -> None:
        """Say how many units are done, and how many there are in all if that was not known."""
        if done != self.done:
            self.done = done
            self.total = self.total if total is None else total
            self._tell()

    def reach_together(self, positions: Iterable[tuple[int, int]]) -> None:
        """Say how many linears each worker has done, of how many; nothing in other steps."""
        if self.unit == "linears":
            counts = list(positions)
            self.reach(sum(done for done, _ in counts), sum(total for _, total in counts))

    def _tell(self) -> None:
        if self.listener is not None:
            self.listener()


class Future(Generic[T]):
    """Stands for what a step returns until `Cluster.get` waits for it."""


def value_of(future: Future[T]) -> T:
    """Return a future as the argument of a further step, which gets its value.

    The value goes from worker to worker, and not through the coordinator.
    """
    return cast(T, future)


def at_hand(value: T) -> Future[T]:
    """Return a value as a future for `value_of`, where some values come from steps."""
    return cast(Future[T], value)


class Cluster(ABC):
    """Workers that run steps.

    A step is a function, or a method of a pruning method, whose first argument is the worker:
    ``forward(worker, 3, inputs)`` there is ``cluster.submit(index, forward, 3, inputs)`` here.
    """

    def __init__(self, placement: Placement) -> None:
        """Start without workers; `placement` says what each of them holds."""
        self.placement = placement
        self.progress = Progress()
        self.stores = Stores()  # of the loaded workers

    def submit(
        self, index: WorkerIndex, step: Step[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        """Start a step on one worker; its steps run in the order of submission.

        Args:
            index: which worker.
            step: what it does.
            args: of the step; see `value_of` for those that other steps return.
            kwargs: plain values.
        """
        return cast(Future[T], self._start(index, 1, step, *args, **kwargs))

    def submit_pair(
        self, index: WorkerIndex, step: Callable[..., tuple[T, U]], *args: Any
    ) -> tuple[Future[T], Future[U]]:
        """Start a step that returns a pair of which each half gets a future of its own."""
        first, second = self._start(index, 2, step, *args)
        return first, second

    @abstractmethod
    def _start(self, index: WorkerIndex, num_futures: int, *step: Any, **kwargs: Any) -> Any:
        """Start a step with its arguments; what it returns becomes so many futures."""

    @abstractmethod
    def get(self, futures: Sequence[Future[T]]) -> list[T]:
        """Wait for futures and return their values; what a worker raised is raised here."""

    def run_all(self, step: Step[P, T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """Run a step on every worker at the same time.

        Results come in the order of `placement.workers`.
        """
        return self.get([self.submit(i, step, *args, **kwargs) for i in self.placement.workers])

    def notice(self) -> str:
        """Return which machines of workers are about to be taken away, in words; "" if none."""
        return ""

    def leave_if_told(self) -> None:
        """End the work here before it is lost; is called where all of it is committed.

        Raises:
            WorkerFailureError: a machine is about to be taken away.
        """
        if notice := self.notice():
            raise WorkerFailureError("preemption", notice)

    def clean_up(self) -> None:
        """Let workers remove what they have on their disks, after an error.

        A worker that is still inside of a step may be left out.
        """
        self.run_all(clean_up)

    @abstractmethod
    def close(self) -> None:
        """End the workers."""


class LocalCluster(Cluster):
    """Workers as objects of this process, for notebooks, tests and debuggers.

    A submitted step runs at once, so its future is simply the value. Results are those of Ray's.
    """

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
        torch.set_num_threads(num_threads)
        self.workers = {i: Worker(layout, placement, i, device) for i in placement.workers}
        copies = placement.num_replicas
        meetings = [(Barrier(copies), [torch.empty(0)] * copies) for _ in placement.blocks]
        for index, worker in self.workers.items():
            worker.on_progress = self._look
            if device != "cpu":
                worker.take_gpu()
            if copies > 1:
                worker.replicas = ThreadReplica(index.replica, *meetings[index.shard])

    def _start(self, index: WorkerIndex, num_futures: int, *step: Any, **kwargs: Any) -> Any:
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
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:  # the cause, rather than what it did to those that waited
            raise min(errors, key=lambda error: isinstance(error, BrokenBarrierError))
        return [future.result() for future in futures]

    def close(self) -> None:
        """Drop the workers and what they have on the disk."""
        self.clean_up()
        self.workers.clear()

    def _look(self) -> None:
        self.progress.reach_together(worker.position for worker in self.workers.values())
