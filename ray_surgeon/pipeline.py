"""``python -m ray_surgeon.pipeline SPEC``: the whole job, from a job spec to a pruned checkpoint.

Exit codes: 0 done, 1 failed, 2 bad spec or input, weights that are not numbers included, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import reprlib
import signal
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from types import FrameType
from typing import Any

import ray
from pydantic import ValidationError
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ray_surgeon import storage
from ray_surgeon.checkpoint import RunDirectory
from ray_surgeon.cluster.local import LocalCluster
from ray_surgeon.cluster.messages import Lost
from ray_surgeon.cluster.placement import Placement
from ray_surgeon.cluster.ray_cluster import LostError, RayCluster, RayMetrics, RayResources, connect, num_nodes, on_this_node
from ray_surgeon.coordinator import CollapseError, run_shots
from ray_surgeon.job import Event, Job
from ray_surgeon.metrics import COUNTERS, GAUGES, readings
from ray_surgeon.models.shard import BadWeightsError
from ray_surgeon.plan import plan_table, plan_workers
from ray_surgeon.preflight import prepare
from ray_surgeon.report import LOG_WIDTH, export_lines, shots_table
from ray_surgeon.spec import JobSpec, parse_spec

_POLL_S = 0.5
_MAX_SPEC_BYTES = 2**20

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class Coordinator:
    """The Ray actor that runs the shots; it holds the workers, so they end with it. `events` answers while `run` runs."""

    def __init__(self) -> None:
        """Start without events."""
        self._events: list[Event] = []

    def run(self, job: Job, placement: Placement, before: Lost | None) -> Lost | None:
        """Run all shots that are not committed yet.

        Args:
            job: checked.
            placement: of the workers.
            before: what ended the last try, for the record.

        Returns:
            None at the end, or what was lost.
        """
        spec, run = job.spec.cluster, RunDirectory(job.spec.output.uri)
        metrics = RayMetrics(job.spec.name, GAUGES, COUNTERS)
        if before is not None:
            run.start(job.spec_yaml, job.fingerprints)
            event = Event("retry", 0, job.spec.pruning.shots, 0.0, {"cause": before.cause, "message": before.message})
            run.add_event(asdict(event) | {"time": time.time()})
            _measure(metrics, event)
        timeouts = spec.start_timeout_s, spec.step_timeout_s, spec.ping_timeout_s
        cluster = None
        try:
            cluster = RayCluster(placement, RayResources(spec.cpus_per_worker, spec.gpus_per_worker, *timeouts))
            for event in run_shots(job, cluster, run):
                self._events.append(event)
                _measure(metrics, event)
        except LostError as error:
            return error.lost
        finally:
            if cluster is not None:
                cluster.close()
        return None

    def events(self, seen: int) -> list[Event]:
        """Return the events after the first `seen` ones."""
        return self._events[seen:]


def _measure(metrics: RayMetrics, event: Event) -> None:
    for reading in readings(event):
        metrics.record(*reading)


def run_on_ray(job: Job, placement: Placement, console: Console) -> Iterator[Event]:
    """Run the job on Ray and yield its events as they happen; after a loss, go on from the last committed shot.

    Raises:
        RuntimeError: losses of one cause are more than the job spec allows.
    """
    try:
        console.print(f"{placement.num_shards} shards x {placement.num_replicas} replicas")
        if num_nodes() > 1 and "://" not in job.spec.output.uri:
            console.print(f"note: the cluster has several machines; {job.spec.output.uri} must be a folder that they share")
        left = job.spec.cluster.retries.model_dump()
        lost = yield from _try(job, placement, None)
        while lost is not None:
            if not left[lost.cause]:
                allowed = getattr(job.spec.cluster.retries, lost.cause)
                raise RuntimeError(
                    f"lost a {lost.cause}: {lost.message}. cluster.retries.{lost.cause} allows {allowed}; committed shots are kept. "
                    f"Look for the reason in Ray's logs, or raise cluster.retries.{lost.cause}"
                )
            left[lost.cause] -= 1
            note = f"lost a {lost.cause}: {lost.message}; going on from the last committed shot, {left[lost.cause]} such retries left"
            console.print(note, soft_wrap=True, highlight=False)
            lost = yield from _try(job, placement, lost)
    finally:
        ray.shutdown()


def _try(job: Job, placement: Placement, before: Lost | None) -> Generator[Event, None, Lost | None]:
    """Run a coordinator to its end and return what was lost, if anything."""
    actor_class = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(Coordinator)
    coordinator: Any = actor_class.options(
        max_concurrency=2,
        runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},
        scheduling_strategy=on_this_node(),
    ).remote()
    patience_s, seen, running = job.spec.cluster.start_timeout_s, 0, True
    try:
        ray.get(coordinator.events.remote(0), timeout=patience_s)
        patience_s = job.spec.cluster.ping_timeout_s
        run = coordinator.run.remote(job, placement, before)
        while running:
            done, _ = ray.wait([run], timeout=_POLL_S)
            running = not done
            events = ray.get(coordinator.events.remote(seen), timeout=patience_s)
            seen += len(events)
            yield from events
        lost: Lost | None = ray.get(run)
    except GetTimeoutError:
        return Lost("coordinator", f"the coordinator has not answered for {patience_s:g} s")
    except (RayActorError, ObjectLostError, WorkerCrashedError) as error:
        if isinstance(error, RayTaskError):  # the coordinator lives and tells of another error
            raise
        return Lost.by("coordinator", error)
    finally:
        ray.kill(coordinator)
    return lost


def run_in_process(job: Job, placement: Placement) -> Iterator[Event]:
    """Run the job with all workers in this process and yield its events."""
    device = "cuda" if job.spec.cluster.gpus_per_worker else "cpu"
    cluster = LocalCluster(placement, job.spec.cluster.cpus_per_worker, device)
    try:
        yield from run_shots(job, cluster, RunDirectory(job.spec.output.uri))
    finally:
        cluster.close()


def run_job(job: Job, placement: Placement, console: Console) -> None:
    """Run a checked job and show its progress: a bar on a terminal, one line per step in a log."""
    on_ray = job.spec.cluster.backend == "ray"
    events = run_on_ray(job, placement, console) if on_ray else run_in_process(job, placement)
    num_once = 2 + job.needs_latencies + (job.measures.tasks is not None) + len(job.spec.output.exports)
    num_steps = num_once + job.spec.pruning.shots * len(job.steps_of_a_shot)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(job.spec.name, total=num_steps)
        for event in events:
            progress.console.print(event_line(event), soft_wrap=True, highlight=False)
            progress.advance(task, 1 + int(event.facts.get("resumed_after_shot", 0)) * len(job.steps_of_a_shot))


def _goal(job: Job) -> str:
    pruning, budget = job.spec.pruning, job.budget
    if pruning.target is None:
        return f"{pruning.target_sparsity:.1%}"
    of = "" if budget is None else f" of {budget.dense:.6g}"
    return f"{pruning.target.allowed:.6g}{of} {pruning.target.unit}"


def event_line(event: Event) -> str:
    """Return one line of the log, e.g. ``shot 1/3  curvature  61.2 s  tokens_per_s=134``."""
    facts = "  ".join(f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in event.facts.items())
    place = f"shot {event.shot}/{event.num_shots}" if event.shot else "start"
    return f"{place:<10} {event.step:<10} {event.seconds:7.1f} s  {facts}"


def _cause(error: BaseException) -> BaseException:
    """Return an error without the ways it came through Ray."""
    while isinstance(error, RayTaskError):
        error = error.cause
    return error


def _reason(error: BaseException) -> str:
    """Return what to say of a failure: with the ways it came through Ray only if it may be a defect of ours."""
    cause = _cause(error)
    return str(cause if isinstance(cause, (FloatingPointError, ValueError, OSError, CollapseError)) else error)


def _interrupt_on_sigterm() -> None:
    """Treat SIGTERM, with which Ray and Kubernetes stop jobs, like Ctrl-C. Again after ray.init, which has a handler of its own."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ray_surgeon.pipeline", description="Prune a language model as a job spec says.")
    parser.add_argument("spec", nargs="?", help="job spec: a YAML or JSON file, local or on any fsspec URI")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, and stop")
    parser.add_argument("--resume", action="store_true", help="go on after the last committed shot of this run")
    parser.add_argument("--set", action="append", default=[], metavar="section.field=value", help="override a field; repeatable")
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of the job spec and stop")
    arguments = parser.parse_args(argv)
    if not arguments.schema and arguments.spec is None:
        parser.error("a job spec is needed, for instance pipelines/quickstart.yaml")
    return arguments


def _validation_message(error: ValidationError, origin: str) -> str:
    lines = [f"{origin} is not a valid job spec:"]
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"]) or "spec"
        given = "" if problem["type"] in ("missing", "value_error") else f" (got {reprlib.repr(problem['input'])[:80]})"
        remedy = "; remove it or correct its name, --schema lists the fields" if problem["type"] == "extra_forbidden" else ""
        lines.append(f"  {field}: {problem['msg'].removeprefix('Value error, ')}{given}{remedy}")
    return "\n".join(lines)


def _read_spec(uri: str, overrides: Sequence[str]) -> JobSpec:
    try:
        storage.check_size(uri, _MAX_SPEC_BYTES, "this is no job spec; see the files in pipelines/")
        text = storage.read_text(uri)
    except OSError as error:
        raise ValueError(f"cannot read the job spec {uri}: {error}; check the path, the permissions and the network") from error
    try:
        return parse_spec(text, overrides)
    except ValidationError as error:
        raise ValueError(_validation_message(error, uri)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments, console, errors = _arguments(argv), Console(width=None if sys.stdout.isatty() else LOG_WIDTH), Console(stderr=True)
    if arguments.schema:
        print(json.dumps(JobSpec.model_json_schema(), indent=2))  # noqa: T201 - the schema is the output
        return DONE
    _interrupt_on_sigterm()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        spec = _read_spec(arguments.spec, arguments.set)
        job, config, placement = prepare(spec, resume=arguments.resume, dry_run=arguments.dry_run)
        readers_only = spec.pruning.structure == "groups"
        plans = plan_workers(config, placement, spec.model.dtype, spec.calibration.sequence_length, readers_only=readers_only)
        console.print(plan_table(plans, placement.num_replicas))
        console.print(f"{spec.pruning.shots} shots to {_goal(job)}, {job.calibration.size} calibration tokens each")
        if arguments.dry_run:
            return DONE
        if spec.cluster.backend == "ray":
            console.print(f"running on {connect(spec.cluster.address, len(placement.workers) * spec.cluster.cpus_per_worker)}")
            _interrupt_on_sigterm()
    except ValueError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return BAD_INPUT
    except RuntimeError as error:
        errors.print(f"failed: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    resume_with = f"go on with: python -m ray_surgeon.pipeline {arguments.spec} --resume" + "".join(f" --set {s}" for s in arguments.set)
    run = RunDirectory(job.spec.output.uri)
    try:
        run_job(job, placement, console)
        report = storage.read_json(run.path("report.json"))
    except KeyboardInterrupt:
        errors.print(f"interrupted; {resume_with}", markup=False, soft_wrap=True)
        return INTERRUPTED
    except (RayError, RuntimeError, OSError, ValueError, FloatingPointError) as error:
        if isinstance(_cause(error), BadWeightsError):
            errors.print(f"error: {_reason(error)}", style="red", markup=False, highlight=False, soft_wrap=True)
            return BAD_INPUT
        errors.print(f"failed: {_reason(error)}\n{resume_with}", style="red", markup=False, highlight=False, soft_wrap=True)
        return FAILED
    console.print(shots_table(report))
    for line in export_lines(report):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"report: {run.path('report.html')} and report.json, plots in {run.path('plots')}", soft_wrap=True)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
