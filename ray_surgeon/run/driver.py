"""A run on Ray: the coordinator as an actor, polled by the driver, retries after losses."""

from __future__ import annotations

import logging
import os
from collections import Counter
from contextlib import closing
from dataclasses import asdict
from typing import Any

import ray
import tenacity
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayError, RayTaskError
from ray.util import metrics as ray_metrics
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_surgeon.checkpointing.run_directory import Attempt, RunDirectory, TakenOverError
from ray_surgeon.evaluation.texts import CollapseError
from ray_surgeon.job import run_job
from ray_surgeon.plan.device_resources import available_cpus
from ray_surgeon.preparation.inputs import Inputs
from ray_surgeon.report.display import Display
from ray_surgeon.report.events import CHECK, Event, Fact, Moment, Recorder
from ray_surgeon.runtime.cluster import NoRoomError, WorkerFailureError
from ray_surgeon.runtime.ray_cluster import RayCluster
from ray_surgeon.runtime.ray_nodes import nodes_alive
from ray_surgeon.spec.base import refusing
from ray_surgeon.spec.sections import RaySection

_Failure = WorkerFailureError | None
_LOSSES: tuple[type[RayError], ...] = (ObjectLostError, OutOfMemoryError)
_LOSSES += (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError)
"""What Ray raises where the coordinator itself is lost."""
_TOLD = (FloatingPointError, ValueError, OSError, CollapseError, TakenOverError, NoRoomError)
"""What the work raises that says all; anything else comes with Ray's words."""
_POLL_S = 0.5
_LOST_ITS_SERVER = "(?s).*Initialization failure from server"
"""What the cluster answers if it could not start what serves a client."""
_IN_VAIN = 10
"""Preemptions in a row without a commit, or a check of a training, after which they are losses."""
_TRIES = 4
"""Tries to connect by a Ray client.

Of the processes that serve clients, about one in twenty dies at its fork (Ray issue 63202).
"""


class Coordinator:
    """The Ray actor that runs the shots; it holds the workers, so they end with it.

    `news` answers while `run` runs.
    """

    def __init__(self) -> None:
        """Start without events."""
        self._events: list[Event | str] = []
        self._moment: Moment | None = None

    def run(self, inputs: Inputs, before: _Failure, attempt: Attempt) -> _Failure:
        """Run all shots that are not committed yet.

        Args:
            inputs: checked.
            before: the loss after which this goes on, for the record.
            attempt: this try, the same after losses.

        Returns:
            None at the end, or what failed.
        """
        spec = inputs.spec
        run = RunDirectory(spec.output.uri, attempt)
        metrics = Recorder(spec.name, ray_metrics.Gauge, ray_metrics.Counter)

        def listen(news: Event | Moment) -> None:
            if isinstance(news, Moment):
                self._moment = news
                return
            self._events.append(news)
            metrics.record(news)

        if before is not None:
            run.start(inputs.spec_yaml, inputs.fingerprints)
            facts: dict[str, Fact] = {"cause": before.cause, "message": before.message}
            event = Event("retry", 0, spec.schedule.shots, 0.0, facts)
            run.add_event(asdict(event))
            metrics.record(event)
        try:
            about = inputs.layout, inputs.placement, inputs.ray
            with closing(RayCluster(*about, self._events.append)) as cluster:
                run_job(inputs, cluster, run, listen)
        except WorkerFailureError as error:
            return error
        return None

    def news(self, seen: int) -> tuple[list[Event | str], Moment | None]:
        """Return events and lines after the first `seen` ones, and the present step's progress."""
        return self._events[seen:], self._moment


def run_on_ray(inputs: Inputs, display: Display, *, disconnects: bool) -> None:
    """Run on Ray; after a loss, continue from the last commit.

    Args:
        inputs: checked.
        display: shows events.
        disconnects: whether to leave the cluster afterwards even if this process belonged to it
            before; a Ray that was started on this machine ends then.

    Raises:
        ValueError: there is no cluster at the address.
        RuntimeError: losses of one cause are more than the job spec allows, or Ray itself fails.
        Exception: what the work raised, unwrapped from Ray's task errors.
    """
    if not ray.is_initialized():
        display.note(f"running on {connect(inputs.ray)}")
        disconnects = True
    try:
        _run_with_retries(inputs, display)
    except RayError as error:
        raise unwrapped(error) from error
    finally:
        if disconnects:
            ray.shutdown()


def _run_with_retries(inputs: Inputs, display: Display) -> None:
    section = inputs.ray
    if len(nodes_alive()) > 1 and "://" not in inputs.spec.output.uri:
        needed = f"{inputs.spec.output.uri} must be a folder that they share"
        display.note(f"note: the cluster has several machines; {needed}")
    left = section.retries.model_dump()
    attempt = Attempt()
    failure: _Failure = None
    seen = Counter[str]()  # events by their steps
    came_to = num_in_vain = 0
    while (failure := _try(inputs, failure, attempt, display, seen)) is not None:
        cause = failure.cause
        num_in_vain = num_in_vain + 1 if came_to == seen["commit"] + seen[CHECK] else 0
        came_to = seen["commit"] + seen[CHECK]
        if cause == "preemption" and num_in_vain < _IN_VAIN:  # not a defect, so not counted
            display.note(f"{failure}; continuing from the last commit")
            continue
        cause = "node" if cause == "preemption" else cause
        if not left[cause]:
            allowed = f"cluster.retries.{cause} allows {getattr(section.retries, cause)}"
            remedy = f"Look for the reason in Ray's logs, or raise cluster.retries.{cause}"
            raise RuntimeError(f"{failure}. {allowed}; committed shots are kept. {remedy}")
        left[cause] -= 1
        retries = f"{left[cause]} such retries left"
        display.note(f"{failure}; continuing from the last commit, {retries}")


def connect(section: RaySection) -> str:
    """Connect this process to Ray, starting one on this machine if none is named.

    Args:
        section: of the job spec. If it has no address, ``RAY_ADDRESS`` is used. A local Ray has a
            logical CPU for each of the workers', at least; more workers than cores take turns.

    Returns:
        What it is connected to, for the log.

    Raises:
        ValueError: there is no cluster at the address.
        RuntimeError: a local Ray cannot be started.
    """
    target = section.address or os.environ.get("RAY_ADDRESS")
    if target:
        lost_its_server = tenacity.retry_if_exception_message(match=_LOST_ITS_SERVER)
        stop = tenacity.stop_after_attempt(_TRIES)
        tries = tenacity.Retrying(retry=lost_its_server, stop=stop, reraise=True)
        remedy = "start it, check RAY_AUTH_MODE and RAY_AUTH_TOKEN, or leave the address out"
        kinds = (ConnectionError, TimeoutError)
        with refusing(f"cluster.address: cannot reach Ray at {target!r}", remedy, kinds):
            tries(ray.init, address=target, log_to_driver=False)
        return target
    num_cpus = max(available_cpus(), section.num_workers * section.cpus_per_worker)
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    # its warning
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel("ERROR")
    try:
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
    except OSError as error:
        needs = f"a writable home ({os.path.expanduser('~')}) and temporary folder"
        raise RuntimeError(f"cannot start a local Ray: {error}; it needs {needs}") from error
    return f"a local Ray with {num_cpus} CPUs"


def unwrapped(error: BaseException) -> BaseException:
    """Return what the work raised, unwrapped from Ray's task errors.

    What may be a defect of ours keeps its traceback.
    """
    cause = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    return cause if isinstance(cause, _TOLD) else RuntimeError(str(error))


def _start_coordinator() -> Any:
    node = ray.get_runtime_context().get_node_id()
    # beside this process, so that it is not lost with a machine of workers. Not soft: Ray 2.60
    # takes a soft affinity of an actor without CPUs for none at times
    beside = NodeAffinitySchedulingStrategy(node, soft=False)
    threads = {"OMP_NUM_THREADS": str(available_cpus())}  # of its container, not of the machine
    environment = {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"} | threads}
    actor_class = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(Coordinator)
    options = {"max_concurrency": 2, "runtime_env": environment, "scheduling_strategy": beside}
    return actor_class.options(**options).remote()


def _try(
    inputs: Inputs, before: _Failure, attempt: Attempt, show: Display, counts: Counter[str]
) -> _Failure:
    """Run a coordinator to its end, count its events, and return what failed, if anything."""
    section = inputs.ray
    coordinator = _start_coordinator()
    patience_s = section.start_timeout_s
    seen = 0
    running = True
    silence = f"not started within {patience_s:g} s; raise cluster.start_timeout_s"
    try:
        ray.get(coordinator.news.remote(0), timeout=patience_s)
        patience_s = section.ping_timeout_s
        silence = f"not answered for {patience_s:g} s"
        run = coordinator.run.remote(inputs, before, attempt)
        while running:
            done, _ = ray.wait([run], timeout=_POLL_S)
            running = not done
            events, moment = ray.get(coordinator.news.remote(seen), timeout=patience_s)
            seen += len(events)
            for event in events:
                if isinstance(event, str):
                    show.note(event)
                    continue
                attempt.has_begun = True
                counts[event.step] += 1
                show(event)
            if moment is not None and running:
                show(moment)
        failure: _Failure = ray.get(run)
    except ray.exceptions.GetTimeoutError:
        return WorkerFailureError("coordinator", f"the coordinator has {silence}")
    except _LOSSES as error:
        if isinstance(error, RayTaskError):  # the coordinator lives and reports another error
            raise
        cause = "memory" if isinstance(error, OutOfMemoryError) else "coordinator"
        return WorkerFailureError(cause, error)
    finally:
        ray.kill(coordinator)
    return failure
