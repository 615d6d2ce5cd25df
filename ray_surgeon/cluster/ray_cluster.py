"""Workers as Ray actors, one bundle of a placement group each."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, NodeDiedError, ObjectLostError, OutOfMemoryError, RayError, RayTaskError
from ray.util.metrics import Counter, Gauge
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ray_surgeon.cluster.messages import Lost, WorkerIndex
from ray_surgeon.cluster.placement import Placement
from ray_surgeon.cluster.replicas import ReplicaLostError
from ray_surgeon.cluster.worker import ShardWorker


@dataclass(frozen=True)
class RayResources:
    """What a worker gets and how long to wait; see `spec.ClusterSection`."""

    cpus_per_worker: int
    gpus_per_worker: int
    start_timeout_s: float
    step_timeout_s: float
    ping_timeout_s: float = 60.0


class LostError(RuntimeError):
    """Part of the cluster is lost: what it held is in the last committed shot, and a new group of workers can go on from there."""

    def __init__(self, lost: Lost) -> None:
        """Say what is lost."""
        super().__init__(lost.message)
        self.lost = lost


def connect(address: str | None, num_cpus_needed: int) -> str:
    """Connect this process to Ray, starting one on this machine if none is named.

    Args:
        address: of the job spec; then ``RAY_ADDRESS`` counts.
        num_cpus_needed: logical CPUs of the local Ray, at least; more workers than cores take turns.

    Returns:
        What it is connected to, for the log.

    Raises:
        ValueError: there is no cluster at the address.
        RuntimeError: a local Ray cannot be started.
    """
    target = address or os.environ.get("RAY_ADDRESS")
    if target:
        try:
            ray.init(address=target, log_to_driver=False)
        except (ConnectionError, TimeoutError) as error:
            raise ValueError(f"cluster.address: cannot reach Ray at {target!r}: {error}; start it, or leave the address out") from error
        return target
    try:
        num_cpus = max(os.cpu_count() or 1, num_cpus_needed)
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, configure_logging=False)
    except OSError as error:
        home = os.path.expanduser("~")
        raise RuntimeError(f"cannot start a local Ray: {error}; it needs a writable home ({home}) and temporary folder") from error
    return f"a local Ray with {num_cpus} CPUs"


def num_nodes() -> int:
    """Return the number of machines that are alive in the cluster."""
    return len(_nodes_alive())


def _nodes_alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Return a strategy that places an actor beside this process, so that it is not lost with a machine of workers.

    Not soft: Ray 2.60 takes a soft affinity of an actor without CPUs for none at times.
    """
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


class RayMetrics:
    """Gauges and counters of Ray, which exports them as ``ray_surgeon_*``; the process that holds them must belong to Ray."""

    def __init__(
        self, run: str, gauges: Mapping[str, tuple[str, tuple[str, ...]]], counters: Mapping[str, tuple[str, tuple[str, ...]]]
    ) -> None:
        """Register metrics, each name -> (description, its own tags).

        Args:
            run: a tag of all of them.
            gauges: what is set.
            counters: what is counted.
        """
        self._run = run
        self._gauges = {name: Gauge(f"surgeon_{name}", text, ("run", *tags)) for name, (text, tags) in gauges.items()}
        self._counters = {name: Counter(f"surgeon_{name}", text, ("run", *tags)) for name, (text, tags) in counters.items()}

    def record(self, name: str, value: float, tags: Mapping[str, str]) -> None:
        """Set a gauge, or add to a counter."""
        with_run = {"run": self._run, **tags}
        if name in self._gauges:
            self._gauges[name].set(value, with_run)
        else:
            self._counters[name].inc(value, with_run)


class RayCluster:
    """One actor per shard and replica. A lost actor is not restarted alone: its state is in the committed shot."""

    def __init__(self, placement: Placement, resources: RayResources) -> None:
        """Reserve room for all workers together and start them.

        Args:
            placement: what each of them holds.
            resources: of each worker.

        Raises:
            RuntimeError: the cluster has no room within the time; names what was asked for and what there is.
        """
        self.placement = placement
        self._group = _reserve(len(placement.workers), resources)
        threads = str(resources.cpus_per_worker)
        environment = {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
        }
        actor_class = ray.remote(concurrency_groups={"ping": 1})(ShardWorker)  # type: ignore[call-overload]
        self._ping_timeout_s = resources.ping_timeout_s
        device = "cuda" if resources.gpus_per_worker else "cpu"
        self._actors: dict[WorkerIndex, Any] = {}
        for bundle, index in enumerate(placement.workers):
            options = actor_class.options(
                num_cpus=resources.cpus_per_worker,
                num_gpus=resources.gpus_per_worker,
                max_restarts=0,
                max_task_retries=0,
                runtime_env={"env_vars": environment},
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, bundle),
            )
            self._actors[index] = options.remote(placement, index, resources.cpus_per_worker, device)
        self._nodes: dict[WorkerIndex, str] = {}
        self._nodes_at_start = _nodes_alive()
        try:
            started = [actor.__ray_call__.remote(_node_id) for actor in self._actors.values()]
            self._nodes = dict(zip(self._actors, self._wait(started, resources.start_timeout_s), strict=True))
            if placement.num_replicas > 1:
                first = placement.workers[0]
                (host,) = self.get([self._actors[first].__ray_call__.remote(_node_address)])
                address = self.get([self.submit(first, "meeting_address", host)])[0]
                self.run_all("join_replicas", address, resources.step_timeout_s)
        except BaseException:
            self.close()
            raise

    def submit(self, index: WorkerIndex, method: str, *args: object, num_returns: int = 1) -> Any:
        """Start a method on one worker; see `Cluster.submit`."""
        return getattr(self._actors[index], method).options(num_returns=num_returns).remote(*args)

    def get(self, futures: Sequence[Any]) -> list[Any]:
        """Wait for futures and return their values.

        Raises:
            LostError: a worker died, or does not answer any more.
        """
        return self._wait(futures, self._ping_timeout_s / 2)

    def _wait(self, futures: Sequence[Any], patience_s: float) -> list[Any]:
        """Wait; where nothing ends for so many seconds, ask whether the workers live."""
        values: dict[Any, Any] = {}
        pending = list(dict.fromkeys(futures))
        try:
            while pending:  # in the order of completion, so that a failure is seen while the others still run
                done, pending = ray.wait(pending, num_returns=1, timeout=patience_s, fetch_local=False)
                values.update(zip(done, ray.get(done), strict=True))
                if not done:
                    self._check_that_all_answer(self._ping_timeout_s / 2)
        except RayError as error:
            raise self._as_lost(error) from error
        return [values[future] for future in futures]

    def _check_that_all_answer(self, timeout_s: float) -> None:
        """Ping every worker.

        Raises:
            RayError: one is dead.
            LostError: one does not answer, stopped or cut off.
        """
        pings = {actor.ping.options(concurrency_group="ping").remote(): index for index, actor in self._actors.items()}
        done, silent = ray.wait(list(pings), num_returns=len(pings), timeout=timeout_s, fetch_local=False)
        ray.get(done)
        if silent:
            index = pings[silent[0]]
            raise LostError(Lost("worker", f"shard {index.shard} of replica {index.replica} has not answered for {timeout_s:g} s"))

    def _as_lost(self, error: RayError) -> Exception:
        """Return the loss behind an error, or the error itself if it is one of the work."""
        while isinstance(error, RayTaskError) and isinstance(error.cause, RayError):
            error = error.cause  # a task failed because what it was to take was lost with another worker
        if isinstance(error, RayTaskError):
            if not isinstance(error.cause, ReplicaLostError):
                return error
            try:
                self._check_that_all_answer(min(5.0, self._ping_timeout_s))
            except RayError as dead:  # the other end of the collective
                return self._as_lost(dead)
            except LostError as lost:
                return lost
            return LostError(Lost.by("communication", error.cause))
        if isinstance(error, ActorUnavailableError):
            error = self._what_became_of_it(error)
        if isinstance(error, OutOfMemoryError):
            return LostError(Lost.by("memory", error))
        alive = _nodes_alive()
        gone = [index for index, node in self._nodes.items() if node not in alive]
        if gone or (not self._nodes and not self._nodes_at_start <= alive):
            return LostError(Lost("node", f"{len(gone) or 'some'} workers were on machines that are gone"))
        if isinstance(error, (NodeDiedError, ObjectLostError)):
            return LostError(Lost.by("node", error))
        return LostError(Lost.by("worker", error))

    def _what_became_of_it(self, error: RayError) -> RayError:
        """Ask until Ray knows whether a worker to which the connection broke is dead, or its machine; it takes seconds."""
        deadline = time.monotonic() + self._ping_timeout_s
        while time.monotonic() < deadline:
            try:
                self._check_that_all_answer(1.0)
            except RayError as newer:
                if not isinstance(newer, ActorUnavailableError):
                    return newer
            except LostError:
                pass
            else:
                break
            time.sleep(0.5)
        return error

    def run_all(self, method: str, *args: object, **kwargs: object) -> list[Any]:
        """Run a method on every worker at the same time."""
        return self.get([getattr(self._actors[index], method).remote(*args, **kwargs) for index in self.placement.workers])

    def close(self) -> None:
        """Kill the workers and give the resources back."""
        for actor in self._actors.values():
            ray.kill(actor)
        remove_placement_group(self._group)


def _node_id(worker: ShardWorker) -> str:
    """Return the identity of the machine of a worker; runs there."""
    return str(ray.get_runtime_context().get_node_id())


def _node_address(worker: ShardWorker) -> str:
    """Return the address by which Ray itself reaches the machine of a worker; runs there."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _reserve(num_workers: int, resources: RayResources) -> PlacementGroup:
    bundle: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        bundle["GPU"] = resources.gpus_per_worker
    group: PlacementGroup = placement_group([bundle] * num_workers, strategy="PACK")
    if not group.wait(resources.start_timeout_s):
        total, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
        remove_placement_group(group)
        shown = ", ".join(f"{key} {free.get(key, 0):g} free of {total.get(key, 0):g}" for key in bundle)
        raise RuntimeError(
            f"no room for {num_workers} workers of {bundle} within {resources.start_timeout_s:g} s; the cluster has {shown}. "
            "Ask for fewer shards or replicas, or add nodes"
        )
    return group
