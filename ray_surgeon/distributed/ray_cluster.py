"""Workers as Ray actors, one bundle of a placement group each."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util import scheduling_strategies as strategies
from ray.util.placement_group import remove_placement_group

from ray_surgeon.config.sections import RaySection
from ray_surgeon.distributed.cluster import Cluster, Future, WorkerFailureError
from ray_surgeon.distributed.collectives import (
    CollectiveError,
    ProcessReplica,
    open_meeting,
)
from ray_surgeon.distributed.placement import Placement, WorkerIndex
from ray_surgeon.distributed.processes import versions
from ray_surgeon.distributed.ray_nodes import (
    Say,
    nodes_alive,
    nodes_leaving,
    nodes_preempted,
    reserve,
    say_differences,
)
from ray_surgeon.distributed.worker import Worker, clean_up
from ray_surgeon.models.layout import ModelLayout

T = TypeVar("T")

_COMES_AGAIN = ("out of memory", "device-side assert")
"""Texts of CUDA errors that a new process would have, too."""
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    # with a list of one device a worker, NCCL hung (Ray issue 61073)
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
}
_UNLESS_SET = {
    # memory of GPUs grows in place, so that tensors of other sizes than before find room
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # a collective that fails raises where it is waited for; else a thread of torch's ends the
    # process without a message
    "TORCH_NCCL_BLOCKING_WAIT": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
}
_OF_NODES = (ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError)
"""Errors that a lost machine has, if Ray does not say more of it."""
LOOK_S = 2.0
"""How often a step over linears is asked how many are done."""
ANSWER_S = 30.0
"""In which a machine must start a process that answers, if a worker on it does not."""


@ray.remote(num_cpus=0, max_retries=0)
def _answer() -> None:
    """Do nothing; that it ends says that its machine lives."""


class RayCluster(Cluster):
    """One actor per shard and replica; a lost one is not restarted alone, but all of them."""

    def __init__(
        self,
        layout: ModelLayout,
        placement: Placement,
        section: RaySection,
        say: Say = lambda _: None,
    ) -> None:
        """Reserve room for all workers together and start them.

        Args:
            layout: of the whole model.
            placement: what each of them holds.
            section: what each of them gets, where, and how long to wait.
            say: is told what is waited for, and what is odd.

        Raises:
            RuntimeError: the cluster has no room within the time; names what was asked for and what
                there is.
        """
        super().__init__(placement)
        self._ping_timeout_s = section.ping_timeout_s
        self._group = reserve(len(placement.workers), section, say)
        actor_class = ray.remote(concurrency_groups={"ping": 1})(Worker)  # type: ignore[call-overload]
        layout_reference = ray.put(layout)
        self._actors: dict[WorkerIndex, Any] = {
            index: actor_class.options(
                num_cpus=section.cpus_per_worker,
                num_gpus=section.gpus_per_worker,
                runtime_env={"env_vars": worker_environment(section.cpus_per_worker)},
                scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(
                    self._group, i
                ),
            ).remote(layout_reference, placement, index, section.device)
            # Ray fills one machine after the other; replicas of a shard send most to each other
            for i, index in enumerate(sorted(placement.workers))
        }
        self._nodes: dict[WorkerIndex, str] = {}  # once all have started
        self._told = set[
            str
        ]()  # machines that Ray has called leaving, which it forgets once gone
        self._nodes_at_start = nodes_alive()
        try:
            started = [
                self.submit(i, settle, section.cpus_per_worker) for i in placement.workers
            ]
            nodes, of_workers = zip(
                *self._wait(started, section.start_timeout_s), strict=True
            )
            self._nodes = dict(zip(placement.workers, nodes, strict=True))
            say_differences(of_workers, say)
            if placement.num_replicas > 1:
                (address,) = self.get([self.submit(placement.workers[0], _open_meeting)])
                self.run_all(_join_replicas, address, section.step_timeout_s)
        except BaseException:
            self.close()
            raise

    def _start(
        self, index: WorkerIndex, num_futures: int, *step: Any, **kwargs: Any
    ) -> Any:
        return (
            self._actors[index]
            .call.options(num_returns=num_futures)
            .remote(*step, **kwargs)
        )

    def get(self, futures: Sequence[Future[T]]) -> list[T]:
        """Wait for futures and return their values.

        Raises:
            WorkerFailureError: a worker's process ended, or does not answer any more.
        """
        return self._wait(futures, self._ping_timeout_s / 2)

    def _wait(self, futures: Sequence[Future[T]], patience_s: float) -> list[T]:
        """Wait; if nothing ends within `patience_s`, ask whether the workers are alive."""
        values: dict[Any, Any] = {}
        pending: list[Any] = list(dict.fromkeys(futures))
        heard = time.monotonic()
        look_s = min(patience_s, LOOK_S)
        try:
            # in the order of completion, so that a failure is seen while the others still run
            while pending:
                done, pending = ray.wait(pending, timeout=look_s, fetch_local=False)
                values.update(zip(done, ray.get(done), strict=True))
                if done:
                    heard = time.monotonic()
                    continue
                self._told.update(nodes_leaving())
                # those that do not answer at once left out
                if self.progress.unit == "linears":
                    self.progress.reach_together(self._ping(1.0)[0])
                if time.monotonic() - heard >= patience_s:
                    self._check_that_all_answer(self._ping_timeout_s / 2)
                    heard = time.monotonic()
        except RayError as error:
            raise self.as_failure(error) from error
        return [values[future] for future in futures]

    def _ping(self, timeout_s: float) -> tuple[list[tuple[int, int]], list[WorkerIndex]]:
        """Ask every worker how many of how many linears it has done.

        Returns the answers, and which workers have not answered in time.

        Raises:
            RayError: a worker's process ended.
        """
        actors = self._actors.items()
        group = {"concurrency_group": "ping"}
        pings = {actor.ping.options(**group).remote(): index for index, actor in actors}
        count = len(pings)
        done, silent = ray.wait(
            [*pings], num_returns=count, timeout=timeout_s, fetch_local=False
        )
        return ray.get(done), [pings[ping] for ping in silent]

    def _check_that_all_answer(self, timeout_s: float) -> None:
        """Ping every worker.

        Raises:
            RayError: a worker's process ended.
            WorkerFailureError: one does not answer, stopped or cut off.
        """
        _, silent = self._ping(timeout_s)
        if silent:
            index = silent[0]
            cause = "worker" if self._machine_answers(index) else "node"
            if self._nodes.get(index) in self._told | nodes_leaving():
                cause = "preemption"
            who = f"shard {index.shard} of replica {index.replica}"
            message = f"did not answer for {timeout_s:g} s when asked whether it lives"
            raise WorkerFailureError(cause, f"{who} {message}")

    def _machine_answers(self, index: WorkerIndex) -> bool:
        """Whether the machine of a worker still runs anything.

        Of one that is cut off, Ray itself says so after a minute only.
        """
        if index not in self._nodes:
            return True
        beside = strategies.NodeAffinitySchedulingStrategy(self._nodes[index], soft=False)
        try:
            ray.get(
                _answer.options(scheduling_strategy=beside).remote(), timeout=ANSWER_S
            )
        except RayError:
            return False
        return True

    def as_failure(self, error: RayError) -> Exception:
        """Return the failure behind an error, or the error itself if the work raised it."""
        while isinstance(error, RayTaskError) and isinstance(error.cause, RayError):
            # a task failed because what it was to take was lost with another worker
            error = error.cause
        if isinstance(error, RayTaskError):
            return self._failure_of_step(error)
        if isinstance(error, ray.exceptions.ActorUnavailableError):
            error = self._what_became_of_it(error)
        if isinstance(error, ray.exceptions.OutOfDiskError):
            return error  # it would be as full again
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            return WorkerFailureError("memory", error)
        alive = nodes_alive()
        taken_away = self._told | nodes_leaving() | nodes_preempted()
        if taken_away & {*self._nodes.values()} or getattr(error, "preempted", False):
            return WorkerFailureError("preemption", error)
        num_gone = sum(node not in alive for node in self._nodes.values())
        if num_gone or (not self._nodes and not self._nodes_at_start <= alive):
            return WorkerFailureError(
                "node", f"{num_gone or 'some'} workers were on lost machines"
            )
        return WorkerFailureError(
            "node" if isinstance(error, _OF_NODES) else "worker", error
        )

    def _failure_of_step(self, error: RayTaskError) -> Exception:
        """Return the failure behind what a step raised, or the error itself if it is the work's."""
        # a GPU that fell off the bus, which its process can use no more
        comes_again = any(text in str(error.cause) for text in _COMES_AGAIN)
        if isinstance(error.cause, torch.AcceleratorError) and not comes_again:
            return WorkerFailureError("worker", error.cause)
        if not isinstance(error.cause, CollectiveError):
            return error  # it would come again
        try:
            self._check_that_all_answer(min(5.0, self._ping_timeout_s))
        except RayError as dead:  # the other end of the collective
            return self.as_failure(dead)
        except WorkerFailureError as failure:
            return failure
        return WorkerFailureError("communication", error.cause)

    def _what_became_of_it(self, error: RayError) -> RayError:
        """Ask until Ray knows whether a worker is dead, or its machine is.

        This takes seconds after a connection broke.
        """
        deadline = time.monotonic() + self._ping_timeout_s
        while time.monotonic() < deadline:
            try:
                if not self._ping(1.0)[1]:
                    break
            except RayError as newer:
                if not isinstance(newer, ray.exceptions.ActorUnavailableError):
                    return newer
            time.sleep(0.5)
        return error

    def notice(self) -> str:
        """Return of how many workers the machines are drained, in words."""
        leaving = nodes_leaving()
        self._told.update(leaving)
        count = sum(node in leaving for node in self._nodes.values())
        return f"Ray drains the machines of {count} workers" if count else ""

    def clean_up(self) -> None:
        """Let workers remove what they have on their disks.

        Workers that wait for one that has failed are not waited for.
        """
        futures: list[Any] = [
            self.submit(index, clean_up) for index in self.placement.workers
        ]
        ray.wait(
            futures,
            num_returns=len(futures),
            timeout=self._ping_timeout_s,
            fetch_local=False,
        )

    def close(self) -> None:
        """Kill the workers and give the resources back."""
        for actor in self._actors.values():
            ray.kill(actor)
        remove_placement_group(self._group)


def worker_environment(num_threads: int) -> dict[str, str]:
    """Return the variables of a worker's process; some of them are the user's if they are set."""
    # an older name
    users = {name.replace("PYTORCH_CUDA_", "PYTORCH_") for name in os.environ}
    ours = {name: value for name, value in _UNLESS_SET.items() if name not in users}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(num_threads))
    return _ENVIRONMENT | ours | threads


def settle(worker: Worker, num_threads: int) -> tuple[str, dict[str, str]]:
    """Set torch's threads and take the GPU that Ray gave, of all that the machine shows.

    Returns the machine's identity, and its versions.
    """
    torch.set_num_threads(num_threads)
    context = ray.get_runtime_context()
    if worker.device.type != "cpu":
        (name,) = context.get_accelerator_ids()["GPU"]
        worker.take_gpu(name)
    return str(context.get_node_id()), versions()


def _open_meeting(worker: Worker) -> str:
    """Let a worker open where all of them meet; return the address, which Ray itself reaches."""
    meeting = open_meeting(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    worker.state.meeting = meeting
    return f"{meeting.host}:{meeting.port}"


def _join_replicas(worker: Worker, address: str, timeout_s: float) -> None:
    """Let a worker join the process group of all workers; see `ProcessReplica`."""
    worker.replicas = ProcessReplica(
        worker.placement,
        worker.index,
        worker.device.type,
        address=address,
        timeout_s=timeout_s,
    )
