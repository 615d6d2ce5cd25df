"""A run on Ray: the coordinator as an actor, polled by the driver, retries after losses."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.metrics import Counter, Gauge

from ray_surgeon.report.directory import Attempt, RunDirectory, TakenOverError
from ray_surgeon.report.display import Display
from ray_surgeon.report.events import Event, Moment
from ray_surgeon.report.metrics import COUNTERS, GAUGES, readings
from ray_surgeon.run.inputs import Inputs
from ray_surgeon.run.loop import run_shots
from ray_surgeon.runtime.cluster import WorkerFailureError
from ray_surgeon.runtime.ray_cluster import RayCluster
from ray_surgeon.runtime.ray_machines import NoRoomError, connect, nodes_alive, on_this_node
from ray_surgeon.spec.cluster import RaySection
from ray_surgeon.stages.evaluation import CollapseError

_POLL_S = 0.5
_PATIENCE_S = 60.0
"""How long memory that ended workers still hold is waited for."""
_LOST = {
    "worker": "a worker was lost",
    "node": "a machine was lost",
    "coordinator": "the coordinator was lost",
    "communication": "replicas could not communicate",
    "memory": "a machine ran out of memory",
}
"""Cause of a failure -> what the user reads."""


class RayMetrics:
    """The gauges and counters of a run, which Ray exports as ``ray_surgeon_*``.

    The process that holds them must belong to Ray.
    """

    def __init__(self, run: str) -> None:
        """Register them; the name of the run is a tag of all."""
        self._run = run
        self._gauges = {
            name: Gauge(f"surgeon_{name}", text, ("run", *tags))
            for name, (text, tags) in GAUGES.items()
        }
        self._counters = {
            name: Counter(f"surgeon_{name}", text, ("run", *tags))
            for name, (text, tags) in COUNTERS.items()
        }

    def record(self, event: Event) -> None:
        """Set the gauges and add to the counters that an event says something of."""
        for name, value, tags in readings(event):
            with_run = {"run": self._run, **tags}
            if name in self._gauges:
                self._gauges[name].set(value, with_run)
            else:
                self._counters[name].inc(value, with_run)


class Coordinator:
    """The Ray actor that runs the shots; it holds the workers, so they end with it.

    `news` answers while `run` runs.
    """

    def __init__(self) -> None:
        """Start without events."""
        self._events: list[Event] = []
        self._moment: Moment | None = None

    def run(
        self, inputs: Inputs, before: WorkerFailureError | None, attempt: Attempt
    ) -> WorkerFailureError | None:
        """Run all shots that are not committed yet.

        Args:
            inputs: checked.
            before: the loss after which this goes on, for the record.
            attempt: this try, the same after losses.

        Returns:
            None at the end, or what failed.
        """
        spec = inputs.spec
        run = RunDirectory(inputs.spec.output.uri, attempt)
        metrics = RayMetrics(spec.name)

        def listen(news: Event | Moment) -> None:
            if isinstance(news, Moment):
                self._moment = news
                return
            self._events.append(news)
            metrics.record(news)

        if before is not None:
            run.start(inputs.spec_yaml, inputs.fingerprints)
            event = Event(
                "retry",
                0,
                spec.pruning.shots,
                0.0,
                {"cause": before.cause, "message": before.message},
            )
            run.add_event(asdict(event) | {"time": time.time()})
            metrics.record(event)
        cluster = None
        try:
            assert isinstance(spec.cluster, RaySection)
            cluster = RayCluster(inputs.layout, inputs.placement, spec.cluster)
            run_shots(
                inputs, cluster, run, listen, patience_s=0.0 if before is None else _PATIENCE_S
            )
        except WorkerFailureError as error:
            return error
        finally:
            if cluster is not None:
                cluster.close()
        return None

    def news(self, seen: int) -> tuple[list[Event], Moment | None]:
        """Return the events after the first `seen` ones, and how far the present step has come."""
        return self._events[seen:], self._moment


def run_on_ray(inputs: Inputs, display: Display) -> None:
    """Run on Ray; after a loss, continue from the last committed shot.

    Args:
        inputs: checked.
        display: shows events.

    Raises:
        RuntimeError: losses of one cause are more than the job spec allows, or Ray itself fails.
        Exception: what the work raised, unwrapped from Ray's task errors.
    """
    section = inputs.spec.cluster
    assert isinstance(section, RaySection)
    try:
        if len(nodes_alive()) > 1 and "://" not in inputs.spec.output.uri:
            display.note(
                f"note: the cluster has several machines; {inputs.spec.output.uri} must be a "
                "folder that they share"
            )
        left = section.retries.model_dump()
        attempt = Attempt()
        failure = _try(inputs, section, None, attempt, display)
        while failure is not None:
            cause = failure.cause
            if not left[cause]:
                raise RuntimeError(
                    f"{_LOST[cause]}: {failure.message}. cluster.retries.{cause} allows "
                    f"{getattr(section.retries, cause)}; committed shots are kept. Look for the "
                    f"reason in Ray's logs, or raise cluster.retries.{cause}"
                )
            left[cause] -= 1
            display.note(
                f"{_LOST[cause]}: {failure.message}; continuing from the last committed shot, "
                f"{left[cause]} such retries left"
            )
            failure = _try(inputs, section, failure, attempt, display)
    except RayError as error:
        raise unwrapped(error) from error


def connect_to_ray(inputs: Inputs) -> str:
    """Connect to the cluster of the job spec, or start a Ray on this machine; return what it is.

    Raises:
        ValueError: there is no cluster at the address.
        RuntimeError: a local Ray cannot be started.
    """
    section = inputs.spec.cluster
    assert isinstance(section, RaySection)
    return connect(section.address, section.num_workers * section.cpus_per_worker)


def is_connected() -> bool:
    """Whether this process belongs to a Ray cluster already."""
    return bool(ray.is_initialized())


def disconnect() -> None:
    """Leave the cluster; a Ray that was started on this machine ends."""
    ray.shutdown()


def unwrapped(error: BaseException) -> BaseException:
    """Return what the work raised, unwrapped from Ray's task errors.

    What may be a defect of ours keeps its traceback.
    """
    cause = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    is_told = isinstance(
        cause, (FloatingPointError, ValueError, OSError, CollapseError, TakenOverError, NoRoomError)
    )
    return cause if is_told else RuntimeError(str(error))


def _try(
    inputs: Inputs,
    section: RaySection,
    before: WorkerFailureError | None,
    attempt: Attempt,
    show: Callable[[Event | Moment], None],
) -> WorkerFailureError | None:
    """Run a coordinator to its end and return what failed, if anything."""
    actor_class = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(Coordinator)
    coordinator: Any = actor_class.options(
        max_concurrency=2,
        runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},
        scheduling_strategy=on_this_node(),
    ).remote()
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
            attempt.has_begun |= seen > 0
            for event in events:
                show(event)
            if moment is not None and running:
                show(moment)
        failure: WorkerFailureError | None = ray.get(run)
    except GetTimeoutError:
        return WorkerFailureError("coordinator", f"the coordinator has {silence}")
    except (RayActorError, ObjectLostError, OutOfMemoryError, WorkerCrashedError) as error:
        if isinstance(error, RayTaskError):  # the coordinator lives and reports another error
            raise
        return WorkerFailureError(
            "memory" if isinstance(error, OutOfMemoryError) else "coordinator", error
        )
    finally:
        ray.kill(coordinator)
    return failure
