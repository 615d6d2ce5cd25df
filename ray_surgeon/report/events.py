"""Steps of a run: each is named once, measured, and emits its event when it ends.

Events set the metrics of a running job, ``ray_surgeon_*`` in Prometheus; `Recorder` passes them on.
`Trackers` sends the checks of a training to Weights & Biases and MLflow, which are configured by
their environment variables. Every process that runs a job begins a new run there.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ray_surgeon.checkpointing import Record, RunDirectory
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.processes import Usage, process_usage
from ray_surgeon.distributed.worker import Worker
from ray_surgeon.report import wording

CHECK = "check"
"""Step of the events of a training's measurements before it ends."""
Fact = str | int | float


@dataclass(frozen=True)
class Event:
    """The end of one step."""

    step: str  # e.g. "curvature"
    shot: int  # 0 for steps before the first shot
    num_shots: int  # of the run
    seconds: float  # wall clock of the step
    facts: dict[str, Fact]  # results of the step, by name
    # busy time of each worker, in the order of `placement.workers`
    worker_seconds: Sequence[float] = ()

    @property
    def line(self) -> str:
        """One line of the log, e.g. ``round 1/3  commit  0.4 s  saved, 114.6 M parameters``.

        It is JSON with all facts, for log collectors, if ``RAY_SURGEON_LOG`` is json.
        """
        if is_json_log():
            return json.dumps(asdict(self))
        found = wording.sentence(self.step, self.facts)
        return f"{_beginning(self)} {self.seconds:7.1f} s  {found}".rstrip()


def is_json_log() -> bool:
    """Whether lines of the log are JSON, as ``RAY_SURGEON_LOG`` says."""
    return os.environ.get("RAY_SURGEON_LOG") == "json"


PlannedStep = tuple[str, int]
"""Name of a step, and the shot in which it will run; 0 before the first."""


@dataclass(frozen=True)
class ProgressReport:
    """Progress of the present step."""

    step: str  # its name
    shot: int  # of the step
    num_shots: int  # of the run
    done: int  # finished units
    total: int  # all units; 0 while that is not known
    unit: str  # e.g. "sequences"
    tokens_each: int  # tokens of one unit; 0 if it has none
    elapsed_s: float  # since these units began
    to_come: tuple[PlannedStep, ...] = ()  # steps after this one

    @property
    def pace(self) -> str:
        """Unit, rate and remaining time, e.g. ``sequences, 134 tokens/s, 40 s left``."""
        parts = [self.unit]
        each_s = self.elapsed_s / max(1, self.done)
        if self.done and self.tokens_each and each_s:
            parts.append(f"{self.tokens_each / each_s:.0f} tokens/s")
        if self.done and self.total:
            parts.append(f"{each_s * (self.total - self.done):.0f} s left")
        return ", ".join(parts)

    @property
    def line(self) -> str:
        """One line of the log, e.g.

        ``round 1/3  curvature  12 of 64 sequences, 134 tokens/s, 40 s left``.
        """
        if not self.total:
            return f"{_beginning(self)} ..."
        return f"{_beginning(self)} {self.done} of {self.total} {self.pace}"


def place_of(shot: int, num_shots: int) -> str:
    """Return where in a run a step is: its pruning round, or the start."""
    return f"round {shot}/{num_shots}" if shot else "start"


def _beginning(news: Event | ProgressReport) -> str:
    """Return the beginning of the line of an event or a progress report."""
    return f"{place_of(news.shot, news.num_shots):<10} {news.step:<14}"


class Steps:
    """``with step("curvature", shot) as facts:`` measures a step and emits its event when it ends.

    Attributes:
        to_come: steps after the present one, as `announce` was told.
        record: entries of the report about the present shot's steps. These are by step:
            ``seconds`` (wall clock, including that of an earlier attempt that the step continues),
            ``cpu_seconds`` (of all processes), ``worker_seconds`` (busy time of each worker, in the
            order of `placement.workers`), ``packing_seconds`` (time of each worker to pack and
            unpack what goes between workers), and ``peak_bytes`` (peak of each worker, of its GPU's
            memory, or on the CPU of its process's anonymous memory). ``peak_rss_bytes`` is the sum
            over the workers' processes since they started, ``peak_gpu_bytes`` the sum over their
            GPUs in this shot.
    """

    def __init__(
        self,
        cluster: Cluster,
        run: RunDirectory,
        num_shots: int,
        listen: Callable[[Event], None],
        ended: list[Record],
    ) -> None:
        """Start with no steps.

        Args:
            cluster: whose workers are measured.
            run: directory that gets the events.
            num_shots: of the run.
            listen: called with every event.
            ended: list that gets the event of every step; it may hold those of earlier tries.
        """
        self._ended = ended
        self._cluster = cluster
        self._run = run
        self._num_shots = num_shots
        self._listen = listen
        self.latest_s: dict[str, float] = {}  # seconds of the latest step of each name
        self.new_shot({})
        self._present = ("", 0)
        self.to_come: tuple[PlannedStep, ...] = ()

    def announce(self, steps: Iterable[PlannedStep]) -> None:
        """Set the steps that are to come, for the display."""
        self.to_come = tuple(steps)

    def new_shot(self, earlier: Record) -> None:
        """Forget the steps of the shot before.

        Args:
            earlier: record of an earlier attempt at this shot; empty if there is none.
        """
        self.record: dict[str, Any] = {
            "seconds": {},
            "cpu_seconds": {},
            "worker_seconds": {},
            "packing_seconds": {},
            "peak_rss_bytes": 0,
            "peak_gpu_bytes": 0,
            "peak_bytes": {},
            **earlier,
        }

    def record_so_far(self) -> dict[str, Any]:
        """Return a copy of the record, with the seconds of the present step until now."""
        record = copy.deepcopy(self.record)
        seconds = time.perf_counter() - self._started_s
        record["seconds"][self._present[0]] = self._earlier_s + seconds
        return record

    @contextmanager
    def __call__(self, name: str, shot: int = 0) -> Iterator[dict[str, Fact]]:
        """Measure one step; the facts that the caller adds go into its event."""
        self._present = (name, shot)
        if self._present in self.to_come:
            self.to_come = self.to_come[self.to_come.index(self._present) + 1 :]
        self._cluster.progress.begin()
        facts: dict[str, Fact] = {}
        # spent in this shot by an earlier attempt, or by an earlier step of this name
        self._earlier_s = self.record["seconds"].get(name, 0.0)
        self._started_s = time.perf_counter()
        before = self._usages()
        yield facts
        after = self._usages()
        seconds = time.perf_counter() - self._started_s
        if "num_tokens" in facts:
            facts["tokens_per_s"] = float(facts.pop("num_tokens")) / seconds
        busy = self._add_usage(name, before, after)
        self.record["seconds"][name] = self._earlier_s + seconds
        self.latest_s[name] = seconds
        event = Event(
            step=name,
            shot=shot,
            num_shots=self._num_shots,
            seconds=round(seconds, 3),
            facts=facts,
            worker_seconds=busy,
        )
        self._ended.append(asdict(event))
        self._emit(event)

    def _add_usage(
        self, name: str, before: list[Usage], after: list[Usage]
    ) -> list[float]:
        """Record the usage of a step and return the busy time of each worker."""
        busy = []
        packing = []
        for start, end in zip(before[1:], after[1:], strict=True):
            busy.append(round(end.busy_s - start.busy_s, 3))
            packing.append(round(end.packing_s - start.packing_s, 3))
        gpu = largest_of_processes(after, "peak_gpu_bytes")
        anonymous = largest_of_processes(after, "peak_anonymous_bytes")
        peaks = [gpu[usage.process] or anonymous[usage.process] for usage in after[1:]]
        record = self.record
        record["cpu_seconds"][name] = _total(after, "cpu_s") - _total(before, "cpu_s")
        record["worker_seconds"][name] = busy
        record["packing_seconds"][name] = packing
        record["peak_rss_bytes"] = _total(after[1:], "peak_rss_bytes")
        record["peak_gpu_bytes"] = max(record["peak_gpu_bytes"], sum(gpu.values()))
        record["peak_bytes"][name] = peaks
        return busy

    def tell(self, name: str, facts: Mapping[str, float | None]) -> None:
        """Emit an event inside of the present step, with the time since its units began.

        Facts that are not known or not finite are left out.
        """
        told: dict[str, Fact] = {}
        for fact, value in facts.items():
            if value is not None and value < math.inf:
                told[fact] = value
        now = self.progress_report()
        event = Event(
            step=name,
            shot=now.shot,
            num_shots=now.num_shots,
            seconds=round(now.elapsed_s, 3),
            facts=told,
        )
        self._emit(event)

    def _emit(self, event: Event) -> None:
        self._run.add_event(asdict(event))
        self._listen(event)

    def progress_report(self) -> ProgressReport:
        """Return the progress of the present step."""
        progress = self._cluster.progress
        step, shot = self._present
        return ProgressReport(
            step=step,
            shot=shot,
            num_shots=self._num_shots,
            done=progress.done,
            total=progress.total,
            unit=progress.unit,
            tokens_each=progress.tokens_each,
            elapsed_s=time.monotonic() - progress.started_s,
            to_come=self.to_come,
        )

    def _usages(self) -> list[Usage]:
        return [process_usage(torch.device("cpu")), *self._cluster.run_all(Worker.usage)]


def largest_of_processes(usages: list[Usage], field: str) -> dict[str, Any]:
    """Return the largest value of a field by process.

    Of several workers in one process, only the first reports peaks; reading them resets them.
    """
    largest: dict[str, Any] = {}
    for usage in usages:
        largest[usage.process] = max(largest.get(usage.process, 0), getattr(usage, field))
    return largest


def _total(usages: list[Usage], field: str) -> Any:
    return sum(largest_of_processes(usages, field).values())


_DOCUMENT = Path(__file__).with_name("metrics.yaml").read_text(encoding="utf-8")
_METRICS: dict[str, dict[str, list[str]]] = yaml.safe_load(_DOCUMENT)
GAUGES = _METRICS["gauges"]
"""Name -> description, and names of its tags beside the run."""


def readings(event: Event) -> Iterator[tuple[str, float, dict[str, str]]]:
    """Yield the metrics of an event: name, value, and tags beside the run."""
    if event.step == "retry":
        yield "retries", 1.0, {"cause": str(event.facts["cause"])}
        return
    step = {"step": event.step}
    yield "steps", 1.0, step
    yield "shot", event.shot, {}
    yield "num_shots", event.num_shots, {}
    yield "step_seconds", event.seconds, step
    for worker, seconds in enumerate(event.worker_seconds):
        yield "worker_busy_seconds", seconds, {**step, "worker": str(worker)}
    if event.worker_seconds and event.seconds:
        yield "efficiency", statistics.fmean(event.worker_seconds) / event.seconds, step
    prefix = "training_" if event.step == CHECK else ""
    for name, value in event.facts.items():
        metric, _, text = f"{prefix}{name}".partition(" ")
        if name == "size_bytes":
            yield "export_bytes", float(value), {"kind": str(event.facts["kind"])}
        elif metric in GAUGES:
            yield metric, float(value), dict.fromkeys(GAUGES[metric][1:], text)


class Recorder:
    """The gauges and counters of a run; Ray exports its own as ``ray_surgeon_*``.

    The process that holds them must belong to Ray.
    """

    def __init__(
        self, run: str, gauge: Callable[..., Any], counter: Callable[..., Any]
    ) -> None:
        """Register the metrics; the name of the run is a tag of all of them.

        Args:
            run: its name.
            gauge: makes a gauge from a name, a description and names of tags, like
                `ray.util.metrics.Gauge`.
            counter: makes a counter from the same arguments.
        """
        self._run = run
        self._record: dict[str, Callable[..., None]] = {}  # by the name of a metric
        for name, (description, *tags) in GAUGES.items():
            made = gauge(f"surgeon_{name}", description, ("run", *tags))
            self._record[name] = made.set
        for name, (description, *tags) in _METRICS["counters"].items():
            made = counter(f"surgeon_{name}", description, ("run", *tags))
            self._record[name] = made.inc

    def record(self, event: Event) -> None:
        """Set the gauges and increase the counters of an event."""
        for name, value, tags in readings(event):
            self._record[name](value, {"run": self._run, **tags})


def leaves(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a spec by their dotted names."""
    items = dict(enumerate(section)) if isinstance(section, list) else section
    if not items or not isinstance(items, dict):
        return {prefix[:-1]: section} if prefix else {}
    found = {}
    for key, value in items.items():
        found.update(leaves(value, f"{prefix}{key}."))
    return found


_Run = tuple[Callable[[str], object], Callable[[dict[str, Any]], object]]
"""Functions that end a run as FINISHED or FAILED, and that log its numbers by name."""


def _wandb(wandb: Any, spec: Mapping[str, Any]) -> _Run:
    """Begin a run beside other runs of this process."""
    # do not capture the terminal's output, and do not wait long for a login
    settings = wandb.Settings(console="off", login_timeout=30)
    run = wandb.init(
        name=spec["name"], config=spec, settings=settings, reinit="create_new"
    )
    run.define_metric("*", step_metric="steps")

    def end(status: str) -> None:
        run.finish(exit_code=1 if status == "FAILED" else 0)

    return end, run.log


def _mlflow(mlflow: Any, spec: Mapping[str, Any]) -> _Run:
    """Begin a run, nested in the present one of this process if there is one."""
    run_id = mlflow.start_run(run_name=spec["name"], nested=True).info.run_id
    # old servers accept at most 500 characters
    mlflow.log_params({name: str(value)[:500] for name, value in leaves(spec).items()})

    def log(numbers: dict[str, Any]) -> None:
        mlflow.log_metrics(numbers, step=numbers["steps"], run_id=run_id)

    return mlflow.end_run, log


_TRACKERS = {
    "wandb": (("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE"), _wandb),
    "mlflow": (("MLFLOW_TRACKING_URI",), _mlflow),
}
"""Package -> variables, any of which enables it, and the function that begins a run."""


class Trackers(AbstractContextManager["Trackers"]):
    """``with Trackers(...) as trackers`` begins and ends runs; calls send them the checks.

    A tracker that is not installed, or that fails, causes one warning and is not used again.
    """

    def __init__(self, spec: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Begin the runs.

        Args:
            spec: the resolved job spec.
            say: shows a warning.
        """
        self._say = say
        self._runs: dict[str, _Run] = {}
        for package, (variables, begin) in _TRACKERS.items():
            with self._warning(package):
                if any(map(os.environ.get, variables)):
                    self._runs[package] = begin(importlib.import_module(package), spec)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for package, (end, _log) in list(self._runs.items()):
            with self._warning(package):
                end("FAILED" if kind else "FINISHED")

    def __call__(self, event: Event) -> None:
        """Send a check; other events are ignored."""
        if event.step != CHECK:
            return
        for package, (_end, log) in list(self._runs.items()):
            with self._warning(package):
                log({**event.facts, "shot": event.shot})

    @contextmanager
    def _warning(self, package: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a client raises must not end a run
            self._runs.pop(package, None)
            self._say(
                f"warning: {package} gets nothing more of this run: {error!r}; "
                f"pip install 'ray-surgeon[{package}]' brings its client"
            )
