"""Workers as Ray actors, one bundle of a placement group each."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
import torch
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfDiskError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from ray_surgeon.memory.stores import Stores
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.runtime.cluster import LostError, Progress
from ray_surgeon.runtime.collectives import CollectiveError, ProcessReplica
from ray_surgeon.runtime.placement import Placement, WorkerIndex
from ray_surgeon.runtime.usage import Usage
from ray_surgeon.runtime.worker import Worker, clean_up
from ray_surgeon.spec.cluster import RaySection

P = ParamSpec("P")
T = TypeVar("T")
U = TypeVar("U")

_COMES_AGAIN = ("out of memory", "device-side assert")
"""What errors of CUDA say that a new process would have, too."""
_LOOK_S = 2.0
"""How often a step over linears is asked how many are done."""
_TRIES = 4
"""Tries to connect by a Ray client.

Of the processes that serve clients, about one in twenty dies at its fork (Ray issue 63202).
"""
_ANSWER_S = 30.0
"""In which a machine must start a process that answers, if a worker on it does not."""


@ray.remote(num_cpus=0, max_retries=0)
def _answer() -> None:
    """Do nothing; that it ends says that its machine lives."""


@dataclass(frozen=True)
class WorkerFailure:
    """A loss after which a run may continue from its last committed shot."""

    cause: str  # "worker", "node", "coordinator", "communication" or "memory"; see `RetriesSection`
    message: str  # one line

    @staticmethod
    def by(cause: str, error: BaseException) -> WorkerFailure:
        """Return a failure whose message is the beginning of an error.

        Errors may have many lines.
        """
        return WorkerFailure(cause, " ".join(str(error).split())[:300])


class NoRoomError(RuntimeError):
    """The cluster cannot hold the workers."""


class WorkerFailureError(LostError):
    """Part of the cluster is lost.

    A new group of workers can continue from the last committed shot.
    """

    def __init__(self, failure: WorkerFailure) -> None:
        """Say what is lost."""
        super().__init__(failure.message)
        self.failure = failure


def connect(address: str | None, num_cpus_needed: int) -> str:
    """Connect this process to Ray, starting one on this machine if none is named.

    Args:
        address: from the job spec. If it is None, ``RAY_ADDRESS`` is used.
        num_cpus_needed: logical CPUs of the local Ray, at least; more workers than cores take
            turns.

    Returns:
        What it is connected to, for the log.

    Raises:
        ValueError: there is no cluster at the address.
        RuntimeError: a local Ray cannot be started.
    """
    target = address or os.environ.get("RAY_ADDRESS")
    if target:
        try:
            _connect_to(target)
        except (ConnectionError, TimeoutError) as error:
            raise ValueError(
                f"cluster.address: cannot reach Ray at {target!r}: {error}; start it, check "
                "RAY_AUTH_MODE and RAY_AUTH_TOKEN, or leave the address out"
            ) from error
        return target
    try:
        num_cpus = max(os.cpu_count() or 1, num_cpus_needed)
        # its warning
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(
            logging.ERROR
        )
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    except OSError as error:
        home = os.path.expanduser("~")
        raise RuntimeError(
            f"cannot start a local Ray: {error}; it needs a writable home ({home}) and temporary "
            "folder"
        ) from error
    return f"a local Ray with {num_cpus} CPUs"


def _connect_to(address: str) -> None:
    """Connect, and again if the cluster answers that it could not start what serves a client."""
    for tries_left in reversed(range(_TRIES)):
        try:
            ray.init(address=address, log_to_driver=False)
            return
        except ConnectionError as error:
            if not tries_left or "Initialization failure from server" not in str(error):
                raise


def num_nodes() -> int:
    """Return the number of machines that are alive in the cluster."""
    return len(_nodes_alive())


def _nodes_alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Return a strategy that places an actor beside this process.

    So it is not lost with a machine of workers.

    Not soft: Ray 2.60 takes a soft affinity of an actor without CPUs for none at times.
    """
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


class RayCluster:
    """One actor per shard and replica.

    A lost actor is not restarted alone: its state is in the committed shot.
    """

    def __init__(self, layout: ModelLayout, placement: Placement, section: RaySection) -> None:
        """Reserve room for all workers together and start them.

        Args:
            layout: of the whole model.
            placement: what each of them holds.
            section: what each of them gets, and how long to wait.

        Raises:
            RuntimeError: the cluster has no room within the time; names what was asked for and what
                there is.
        """
        self.placement = placement
        self.progress = Progress()
        self.stores = Stores()
        self._group = _reserve(len(placement.workers), section)
        threads = str(section.cpus_per_worker)
        environment = {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            # with a list of one device a worker, NCCL hung (Ray issue 61073)
            "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        }
        actor_class = ray.remote(concurrency_groups={"ping": 1})(Worker)  # type: ignore[call-overload]
        self._ping_timeout_s = section.ping_timeout_s
        layout_reference = ray.put(layout)
        self._actors: dict[WorkerIndex, Any] = {}
        for bundle, index in enumerate(placement.workers):
            options = actor_class.options(
                num_cpus=section.cpus_per_worker,
                num_gpus=section.gpus_per_worker,
                max_restarts=0,
                max_task_retries=0,
                runtime_env={"env_vars": environment},
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, bundle),
            )
            self._actors[index] = options.remote(
                layout_reference, placement, index, section.cpus_per_worker, section.device
            )
        self._nodes: dict[WorkerIndex, str] = {}
        self._nodes_at_start = _nodes_alive()
        try:
            started = [actor.__ray_call__.remote(_node_id) for actor in self._actors.values()]
            self._nodes = dict(
                zip(self._actors, self._wait(started, section.start_timeout_s), strict=True)
            )
            self.run_all(_take_gpu)
            if placement.num_replicas > 1:
                first = placement.workers[0]
                (host,) = self.get([self._actors[first].__ray_call__.remote(_node_address)])
                (address,) = self.get([self.submit(first, _meeting_address, host)])
                self.run_all(_join_replicas, address, section.step_timeout_s)
        except BaseException:
            self.close()
            raise

    def submit(
        self,
        index: WorkerIndex,
        step: Callable[Concatenate[Worker, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Start a step on one worker; see `Cluster.submit`."""
        future: T = self._actors[index].call.remote(step, *args, **kwargs)
        return future

    def submit_pair(
        self,
        index: WorkerIndex,
        step: Callable[Concatenate[Worker, P], tuple[T, U]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> tuple[T, U]:
        """Start a step that returns a pair; see `Cluster.submit_pair`."""
        first, second = (
            self._actors[index].call.options(num_returns=2).remote(step, *args, **kwargs)
        )
        return first, second

    def get(self, futures: Sequence[T]) -> list[T]:
        """Wait for futures and return their values.

        Raises:
            WorkerFailureError: a worker's process ended, or does not answer any more.
        """
        return self._wait(futures, self._ping_timeout_s / 2)

    def _wait(self, futures: Sequence[T], patience_s: float) -> list[T]:
        """Wait; where nothing ends for so many seconds, ask whether the workers live."""
        values: dict[Any, Any] = {}
        pending: list[Any] = list(dict.fromkeys(futures))
        heard = time.monotonic()
        try:
            # in the order of completion, so that a failure is seen while the others still run
            while pending:
                done, pending = ray.wait(
                    pending, num_returns=1, timeout=min(patience_s, _LOOK_S), fetch_local=False
                )
                values.update(zip(done, ray.get(done), strict=True))
                if done:
                    heard = time.monotonic()
                elif self.progress.unit == "linears":
                    self._look()
                if time.monotonic() - heard >= patience_s:
                    self._check_that_all_answer(self._ping_timeout_s / 2)
                    heard = time.monotonic()
        except RayError as error:
            raise self._as_failure(error) from error
        return [values[future] for future in futures]

    def _look(self) -> None:
        """Ask the workers how many linears they have done.

        Workers that do not answer at once are left out.
        """
        pings = [
            actor.ping.options(concurrency_group="ping").remote() for actor in self._actors.values()
        ]
        done, _ = ray.wait(pings, num_returns=len(pings), timeout=1.0)
        positions = ray.get(done)
        self.progress.reach(
            sum(done for done, _ in positions), sum(total for _, total in positions)
        )

    def _check_that_all_answer(self, timeout_s: float) -> None:
        """Ping every worker.

        Raises:
            RayError: a worker's process ended.
            WorkerFailureError: one does not answer, stopped or cut off.
        """
        index = self._silent(timeout_s)
        if index is not None:
            cause = "worker" if self._machine_answers(index) else "node"
            message = (
                f"shard {index.shard} of replica {index.replica} did not answer for {timeout_s:g} "
                "s when asked whether it lives"
            )
            raise WorkerFailureError(WorkerFailure(cause, message))

    def _silent(self, timeout_s: float) -> WorkerIndex | None:
        """Ping every worker, and return one that does not answer.

        Raises RayError if a worker's process ended.
        """
        pings = {
            actor.ping.options(concurrency_group="ping").remote(): index
            for index, actor in self._actors.items()
        }
        done, silent = ray.wait(
            list(pings), num_returns=len(pings), timeout=timeout_s, fetch_local=False
        )
        ray.get(done)
        return pings[silent[0]] if silent else None

    def _machine_answers(self, index: WorkerIndex) -> bool:
        """Whether the machine of a worker still runs anything.

        Of one that is cut off, Ray itself says so after a minute only.
        """
        node = self._nodes.get(index)
        if node is None:
            return True
        on_node = NodeAffinitySchedulingStrategy(node, soft=False)
        answer = _answer.options(scheduling_strategy=on_node).remote()
        try:
            done, _ = ray.wait([answer], timeout=_ANSWER_S)
            ray.get(done)
        except RayError:
            return False
        return bool(done)

    def _as_failure(self, error: RayError) -> Exception:
        """Return the failure behind an error, or the error itself if the work raised it."""
        while isinstance(error, RayTaskError) and isinstance(error.cause, RayError):
            # a task failed because what it was to take was lost with another worker
            error = error.cause
        if isinstance(error, RayTaskError):
            # a GPU that fell off the bus, which its process can use no more; other errors would
            # come again
            if isinstance(error.cause, torch.AcceleratorError) and not any(
                said in str(error.cause) for said in _COMES_AGAIN
            ):
                return WorkerFailureError(WorkerFailure.by("worker", error.cause))
            if not isinstance(error.cause, CollectiveError):
                return error
            try:
                self._check_that_all_answer(min(5.0, self._ping_timeout_s))
            except RayError as dead:  # the other end of the collective
                return self._as_failure(dead)
            except WorkerFailureError as failure:
                return failure
            return WorkerFailureError(WorkerFailure.by("communication", error.cause))
        if isinstance(error, ActorUnavailableError):
            error = self._what_became_of_it(error)
        if isinstance(error, OutOfDiskError):
            return error  # it would be as full again
        if isinstance(error, OutOfMemoryError):
            return WorkerFailureError(WorkerFailure.by("memory", error))
        alive = _nodes_alive()
        gone = [index for index, node in self._nodes.items() if node not in alive]
        if gone or (not self._nodes and not self._nodes_at_start <= alive):
            return WorkerFailureError(
                WorkerFailure("node", f"{len(gone) or 'some'} workers were on lost machines")
            )
        if isinstance(error, (NodeDiedError, ObjectLostError)):
            return WorkerFailureError(WorkerFailure.by("node", error))
        return WorkerFailureError(WorkerFailure.by("worker", error))

    def _what_became_of_it(self, error: RayError) -> RayError:
        """Ask until Ray knows whether a worker is dead, or its machine is.

        This takes seconds after a connection broke.
        """
        deadline = time.monotonic() + self._ping_timeout_s
        while time.monotonic() < deadline:
            try:
                if self._silent(1.0) is None:
                    break
            except RayError as newer:
                if not isinstance(newer, ActorUnavailableError):
                    return newer
            time.sleep(0.5)
        return error

    def run_all(
        self, step: Callable[Concatenate[Worker, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> list[T]:
        """Run a step on every worker at the same time."""
        return self.get(
            [self.submit(index, step, *args, **kwargs) for index in self.placement.workers]
        )

    def usages(self) -> list[Usage]:
        """Return what each worker has used so far."""
        return self.get([self._actors[index].usage.remote() for index in self.placement.workers])

    def clean_up(self) -> None:
        """Let workers remove what they have on their disks.

        Workers that wait for one that has failed are not waited for.
        """
        futures: list[Any] = [self.submit(index, clean_up) for index in self.placement.workers]
        ray.wait(futures, num_returns=len(futures), timeout=self._ping_timeout_s, fetch_local=False)

    def close(self) -> None:
        """Kill the workers and give the resources back."""
        for actor in self._actors.values():
            ray.kill(actor)
        remove_placement_group(self._group)


def _node_id(worker: Worker) -> str:
    """Return the identity of the machine of a worker; runs there."""
    return str(ray.get_runtime_context().get_node_id())


def _take_gpu(worker: Worker) -> None:
    """Let a worker take the GPU that Ray gave it, of all that its machine shows.

    Runs on the worker.
    """
    if worker.device.type == "cuda":
        (name,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        worker.take_gpu(name, visible.split(",").index(name) if visible else int(name))


def _node_address(worker: Worker) -> str:
    """Return the address by which Ray itself reaches the machine of a worker; runs there."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _meeting_address(worker: Worker, host: str) -> str:
    """Return an address with a free port on a worker's machine, called `host`."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return f"tcp://{host}:{probe.getsockname()[1]}"


def _join_replicas(worker: Worker, address: str, timeout_s: float) -> None:
    """Let a worker join the process group of all workers; see `ProcessReplica`."""
    placement = worker.placement
    rank = placement.rank(worker.index)
    size = len(placement.workers)
    worker.replicas = ProcessReplica(
        address, rank, size, placement.num_shards, worker.device, timeout_s
    )


def _reserve(num_workers: int, section: RaySection) -> PlacementGroup:
    bundle: dict[str, float] = {"CPU": section.cpus_per_worker}
    if section.gpus_per_worker:
        bundle["GPU"] = section.gpus_per_worker
    group: PlacementGroup = placement_group([bundle] * num_workers, strategy="PACK")
    if not group.wait(section.start_timeout_s):
        total = ray.cluster_resources()  # type: ignore[no-untyped-call]
        free = ray.available_resources()  # type: ignore[no-untyped-call]
        remove_placement_group(group)
        shown = ", ".join(
            f"{key} {free.get(key, 0):g} free of {total.get(key, 0):g}" for key in bundle
        )
        raise NoRoomError(
            f"no room for {num_workers} workers of {bundle} within {section.start_timeout_s:g} s; "
            f"the cluster has {shown}. Ask for fewer shards or replicas, or add nodes"
        )
    return group
