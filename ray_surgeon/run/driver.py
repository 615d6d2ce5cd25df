"""A run on Ray: the driver polls the coordinator, which is an actor, and retries after losses."""

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

from ray_surgeon.checkpointing import Attempt, RunDirectory, TakenOverError
from ray_surgeon.config.base import refusing
from ray_surgeon.config.sections import RaySection
from ray_surgeon.distributed.cluster import NoRoomError, WorkerFailureError
from ray_surgeon.distributed.memory_plan.device_resources import DEVICES, available_cpus
from ray_surgeon.distributed.ray_cluster import RayCluster
from ray_surgeon.distributed.ray_nodes import nodes_alive
from ray_surgeon.evaluation.texts import CollapseError
from ray_surgeon.job import run_job
from ray_surgeon.preparation.inputs import Inputs
from ray_surgeon.preparation.resolve import Machines
from ray_surgeon.report.display import Display
from ray_surgeon.report.events import CHECK, Event, Fact, ProgressReport, Recorder

_Failure = WorkerFailureError | None
_LOSSES: tuple[type[RayError], ...] = (
    ObjectLostError,
    OutOfMemoryError,
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
)
"""Errors that Ray raises if the coordinator itself is lost."""
_TOLD = (
    FloatingPointError,
    ValueError,
    OSError,
    CollapseError,
    TakenOverError,
    NoRoomError,
)
"""Errors of the work whose messages suffice; any other keeps Ray's traceback."""
_POLL_S = 0.5
_LOST_ITS_SERVER = "(?s).*Initialization failure from server"
"""Message of the cluster if it could not start the process that serves a client."""
_IN_VAIN = 10
"""Consecutive preemptions without a commit or a check, from which on they count as losses."""
_TRIES = 4
"""Number of tries to connect by a Ray client.

About one in twenty of the processes that serve clients dies at its fork (Ray issue 63202).
"""


class Coordinator:
    """The Ray actor that runs the shots; it owns the workers, so they end with it.

    `news` can be called while `run` runs.
    """

    def __init__(self) -> None:
        """Initialize without events."""
        self._events: list[Event | str] = []
        self._progress: ProgressReport | None = None

    def run(self, inputs: Inputs, before: _Failure, attempt: Attempt) -> _Failure:
        """Run all shots that are not committed yet.

        Args:
            inputs: checked.
            before: the loss after which the run resumes, for the record.
            attempt: this try, the same after losses.

        Returns:
            None at the end, or the failure.
        """
        spec = inputs.spec
        run = RunDirectory(spec.output.uri, attempt)
        metrics = Recorder(spec.name, ray_metrics.Gauge, ray_metrics.Counter)

        def listen(news: Event | ProgressReport) -> None:
            if isinstance(news, ProgressReport):
                self._progress = news
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
            cluster = RayCluster(
                inputs.layout,
                inputs.placement,
                inputs.ray,
                self._events.append,
            )
            with closing(cluster):
                run_job(inputs, cluster, run, listen)
        except WorkerFailureError as error:
            return error
        return None

    def news(self, seen: int) -> tuple[list[Event | str], ProgressReport | None]:
        """Return events and lines after the first `seen` ones, and the current step's progress."""
        return self._events[seen:], self._progress


def run_on_ray(inputs: Inputs, display: Display, *, disconnects: bool) -> None:
    """Run on Ray; after a loss, continue from the last commit.

    Args:
        inputs: checked.
        display: shows events.
        disconnects: whether to disconnect afterwards even if this process was connected before; a
            Ray that was started on this machine ends then.

    Raises:
        ValueError: there is no cluster at the address.
        RuntimeError: there were more losses of one cause than the job spec allows, or Ray itself
            failed.
        Exception: the error of the work, unwrapped from Ray's task errors.
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
        display.note(
            "note: the cluster has several machines; "
            f"{inputs.spec.output.uri} must be a folder that they share"
        )
    left = section.retries.model_dump()
    attempt = Attempt()
    failure: _Failure = None
    seen = Counter[str]()  # events by their steps
    progress_before = 0
    num_in_vain = 0
    while (failure := _try(inputs, failure, attempt, display, seen)) is not None:
        cause = failure.cause
        progress = seen["commit"] + seen[CHECK]
        if progress == progress_before:
            num_in_vain += 1
        else:
            num_in_vain = 0
        progress_before = progress
        # not a defect, so not counted
        if cause == "preemption" and num_in_vain < _IN_VAIN:
            display.note(f"{failure}; continuing from the last commit")
            continue
        if cause == "preemption":
            cause = "node"
        if not left[cause]:
            raise RuntimeError(
                f"{failure}. cluster.retries.{cause} allows "
                f"{getattr(section.retries, cause)}; committed rounds are kept. Look for "
                f"the reason in Ray's logs, or raise cluster.retries.{cause}"
            )
        left[cause] -= 1
        retries = f"{left[cause]} such retries left"
        display.note(f"{failure}; continuing from the last commit, {retries}")


def connect(section: RaySection) -> str:
    """Connect this process to Ray, starting one on this machine if none is named.

    Args:
        section: of the job spec. If it has no address, ``RAY_ADDRESS`` is used. A local Ray has at
            least as many logical CPUs as the workers need; more workers than cores take turns.

    Returns:
        A description of the cluster, for the log.

    Raises:
        ValueError: there is no cluster at the address.
        RuntimeError: a local Ray cannot be started.
    """
    address = section.address or os.environ.get("RAY_ADDRESS")
    if address:
        if not ray.is_initialized():  # else it was asked for its hardware
            _connect_to(address)
        return address
    num_cpus = max(available_cpus(), section.num_workers * section.cpus_per_worker)
    # the warning that there is no token
    logger = logging.getLogger("ray._private.authentication.authentication_token_setup")
    logger.setLevel("ERROR")
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    except OSError as error:
        raise RuntimeError(
            f"cannot start a local Ray: {error}; it needs a writable home "
            f"({os.path.expanduser('~')}) and temporary folder"
        ) from error
    return f"a local Ray with {num_cpus} CPUs"


def hardware(section: RaySection) -> Machines:
    """Connect to a cluster, and return the hardware that it has.

    Raises:
        ValueError: there is no cluster at the address.
    """
    if not ray.is_initialized():
        connect(section)
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    known = []
    for name in resources:
        kind = name.removeprefix("accelerator_type:").lower()
        if kind != name:
            known += [device for device in DEVICES if device in kind]
    return Machines(
        num_cpus=max(1, int(resources.get("CPU", 1))),
        num_gpus=int(resources.get("GPU", 0)),
        gpu=max(known, key=len, default="h100"),
        where="the cluster",
    )


def _connect_to(address: str) -> None:
    """Connect this process to a cluster, with several tries if the client's server is lost."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_message(match=_LOST_ITS_SERVER),
        stop=tenacity.stop_after_attempt(_TRIES),
        reraise=True,
    )
    remedy = "start it, check RAY_AUTH_MODE and RAY_AUTH_TOKEN, or leave the address out"
    kinds = (ConnectionError, TimeoutError)
    with refusing(f"cluster.address: cannot reach Ray at {address!r}", remedy, kinds):
        retrying(ray.init, address=address, log_to_driver=False)


def unwrapped(error: BaseException) -> BaseException:
    """Return the error of the work, unwrapped from Ray's task errors.

    An error that may be a defect of this program keeps its traceback.
    """
    cause = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    if isinstance(cause, _TOLD):
        return cause
    return RuntimeError(str(error))


def _start_coordinator() -> Any:
    node = ray.get_runtime_context().get_node_id()
    # on this process's node, so that it is not lost with a machine of workers. Not soft: Ray 2.60
    # sometimes ignores a soft affinity of an actor without CPUs
    affinity = NodeAffinitySchedulingStrategy(node, soft=False)
    variables = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(available_cpus()),  # of its container, not of the machine
    }
    actor_class = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(Coordinator)
    options = actor_class.options(
        max_concurrency=2,
        runtime_env={"env_vars": variables},
        scheduling_strategy=affinity,
    )
    return options.remote()


def _try(
    inputs: Inputs,
    before: _Failure,
    attempt: Attempt,
    display: Display,
    counts: Counter[str],
) -> _Failure:
    """Run a coordinator to its end, count its events, and return the failure, if any."""
    section = inputs.ray
    coordinator = _start_coordinator()
    timeout_s = section.start_timeout_s
    silence = f"not started within {timeout_s:g} s; raise cluster.start_timeout_s"
    try:
        ray.get(coordinator.news.remote(0), timeout=timeout_s)
        timeout_s = section.ping_timeout_s
        silence = f"not answered for {timeout_s:g} s"
        run = coordinator.run.remote(inputs, before, attempt)
        seen = 0
        running = True
        while running:
            done, _ = ray.wait([run], timeout=_POLL_S)
            running = not done
            events, progress = ray.get(coordinator.news.remote(seen), timeout=timeout_s)
            seen += len(events)
            _show(events, attempt, display, counts)
            if progress is not None and running:
                display(progress)
        failure: _Failure = ray.get(run)
    except ray.exceptions.GetTimeoutError:
        return WorkerFailureError("coordinator", f"the coordinator has {silence}")
    except _LOSSES as error:
        # the coordinator lives and reports another error
        if isinstance(error, RayTaskError):
            raise
        cause = "memory" if isinstance(error, OutOfMemoryError) else "coordinator"
        return WorkerFailureError(cause, error)
    finally:
        ray.kill(coordinator)
    return failure


def _show(
    events: list[Event | str], attempt: Attempt, display: Display, counts: Counter[str]
) -> None:
    """Show events and lines, and count the events."""
    for event in events:
        if isinstance(event, str):
            display.note(event)
            continue
        attempt.has_begun = True
        counts[event.step] += 1
        display(event)
