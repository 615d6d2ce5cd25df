"""Steps of a run: each is named once, measured, and emits its event when it ends.

Events set the metrics of a running job, ``ray_surgeon_*`` in Prometheus; `Recorder` passes them on.
"""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ray_surgeon.checkpointing.run_directory import Record, RunDirectory
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.usage import Usage, process_usage
from ray_surgeon.runtime.worker import Worker

CHECK = "check"
"""The event of a training that was measured on the way."""
Fact = str | int | float


@dataclass(frozen=True)
class Event:
    """The end of one step."""

    step: str  # e.g. "curvature"
    shot: int  # 0 for what is done before the first shot
    num_shots: int  # in all
    seconds: float  # wall clock of the step
    facts: dict[str, Fact]  # what there is to say about it
    # how long each worker was busy in it, in the order of `placement.workers`
    worker_seconds: Sequence[float] = ()

    @property
    def line(self) -> str:
        """One line of the log, e.g. ``shot 1/3  curvature  61.2 s  tokens_per_s=134``.

        For who collects logs it is JSON, if ``RAY_SURGEON_LOG`` is json.
        """
        if os.environ.get("RAY_SURGEON_LOG") == "json":
            return json.dumps(asdict(self))
        shown = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in self.facts.items()}
        facts = "  ".join(f"{key}={value}" for key, value in shown.items())
        return f"{_place(self)} {self.seconds:7.1f} s  {facts}"


@dataclass(frozen=True)
class Moment:
    """How far the present step has come."""

    step: str  # its name
    shot: int  # of the step
    num_shots: int  # in all
    done: int  # units that are done
    total: int  # units in all; 0 while that is not known
    unit: str  # e.g. "sequences"
    tokens_each: int  # tokens of one unit; 0 if it has none
    elapsed_s: float  # since these units began

    @property
    def pace(self) -> str:
        """What comes after the numbers of units, e.g. ``sequences, 134 tokens/s, 40 s left``."""
        each_s = self.elapsed_s / max(1, self.done)
        is_known = self.done and self.tokens_each and each_s
        rate = f", {self.tokens_each / each_s:.0f} tokens/s" if is_known else ""
        left = f", {each_s * (self.total - self.done):.0f} s left"
        return f"{self.unit}{rate}{left * bool(self.done and self.total)}"

    @property
    def line(self) -> str:
        """One line of the log, e.g.

        ``shot 1/3  curvature  12 of 64 sequences, 134 tokens/s, 40 s left``.
        """
        units = f"{self.done} of {self.total} {self.pace}" if self.total else "..."
        return f"{_place(self)} {units}"


def _place(news: Event | Moment) -> str:
    """Return how the line of an event or a moment begins."""
    shot = f"shot {news.shot}/{news.num_shots}" if news.shot else "start"
    return f"{shot:<10} {news.step:<10}"


class Steps:
    """``with step("curvature", shot) as facts:`` measures a step and emits its event when it ends.

    Attributes:
        record: what the report says of the present shot's steps. ``seconds`` (wall clock, also of
            an earlier try from which the step goes on),
            ``cpu_seconds`` (of all processes), ``worker_seconds`` (how long each worker was busy,
            in the order of `placement.workers`) and ``packing_seconds`` (how long each took to pack
            and unpack what goes between workers) are by step. So is ``peak_bytes``: the peak of
            each worker, on a GPU of its memory, else of anonymous memory of its process.
            ``peak_rss_bytes`` is of the workers' processes together since they started,
            ``peak_gpu_bytes`` of their GPUs' memory together in this shot.
    """

    def __init__(
        self, cluster: Cluster, run: RunDirectory, num_shots: int, listen: Callable[[Event], None]
    ) -> None:
        """Start with no steps; `listen` is called with every event."""
        self._cluster = cluster
        self._run = run
        self._num_shots = num_shots
        self._listen = listen
        self.new_shot({})
        self._present = ("", 0)

    def new_shot(self, earlier: Record) -> None:
        """Forget the steps of the shot before; `earlier` is what an earlier try knows of this."""
        by_step = ("seconds", "cpu_seconds", "worker_seconds", "packing_seconds")
        self.record: dict[str, Any] = {name: {} for name in by_step}
        self.record |= {"peak_rss_bytes": 0, "peak_gpu_bytes": 0, "peak_bytes": {}, **earlier}

    def record_so_far(self) -> dict[str, Any]:
        """Return a copy of the record, with the seconds of the present step until now."""
        record = copy.deepcopy(self.record)
        seconds = time.perf_counter() - self._started_s
        record["seconds"][self._present[0]] = self._earlier_s + seconds
        return record

    @contextmanager
    def __call__(self, name: str, shot: int = 0) -> Iterator[dict[str, Fact]]:
        """Measure one step; whatever the caller puts into the facts goes into its event."""
        self._present = (name, shot)
        self._cluster.progress.begin()
        facts: dict[str, Fact] = {}
        # what an earlier try, or a step of this name, has spent in this shot
        self._earlier_s = self.record["seconds"].get(name, 0.0)
        self._started_s = time.perf_counter()
        before = self._usages()
        yield facts
        after = self._usages()
        seconds = time.perf_counter() - self._started_s
        pairs = list(zip(before[1:], after[1:], strict=True))
        busy = [round(b.busy_s - a.busy_s, 3) for a, b in pairs]
        gpu = largest_of_processes(after, "peak_gpu_bytes")
        anonymous = largest_of_processes(after, "peak_anonymous_bytes")
        record = self.record
        record["seconds"][name] = self._earlier_s + seconds
        record["cpu_seconds"][name] = _total(after, "cpu_s") - _total(before, "cpu_s")
        record["worker_seconds"][name] = busy
        record["packing_seconds"][name] = [round(b.packing_s - a.packing_s, 3) for a, b in pairs]
        record["peak_rss_bytes"] = _total(after[1:], "peak_rss_bytes")
        record["peak_gpu_bytes"] = max(record["peak_gpu_bytes"], sum(gpu.values()))
        record["peak_bytes"][name] = [gpu[u.process] or anonymous[u.process] for u in after[1:]]
        if "num_tokens" in facts:
            facts["tokens_per_s"] = float(facts.pop("num_tokens")) / seconds
        event = Event(name, shot, self._num_shots, round(seconds, 3), facts, busy)
        self._emit(event)

    def tell(self, name: str, facts: Mapping[str, float | None]) -> None:
        """Emit an event inside of the present step; its seconds are those since units began.

        Facts that are not known or not finite are left out.
        """
        told: dict[str, Fact] = {k: x for k, x in facts.items() if x is not None and x < math.inf}
        seconds = round(self.moment().elapsed_s, 3)
        self._emit(Event(name, self._present[1], self._num_shots, seconds, told))

    def _emit(self, event: Event) -> None:
        self._run.add_event(asdict(event))
        self._listen(event)

    def moment(self) -> Moment:
        """Return how far the present step has come."""
        now = self._cluster.progress
        step, shot = self._present
        units = (now.done, now.total, now.unit, now.tokens_each)
        return Moment(step, shot, self._num_shots, *units, time.monotonic() - now.started_s)

    def _usages(self) -> list[Usage]:
        return [process_usage(torch.device("cpu")), *self._cluster.run_all(Worker.usage)]


def largest_of_processes(usages: list[Usage], field: str) -> dict[str, Any]:
    """Return the largest value of a field by process; the first asked begins anew."""
    largest: dict[str, Any] = {}
    for usage in usages:
        largest[usage.process] = max(largest.get(usage.process, 0), getattr(usage, field))
    return largest


def _total(usages: list[Usage], field: str) -> Any:
    return sum(largest_of_processes(usages, field).values())


_DOCUMENT = Path(__file__).with_name("metrics.yaml").read_text(encoding="utf-8")
_METRICS: dict[str, dict[str, list[str]]] = yaml.safe_load(_DOCUMENT)
GAUGES = _METRICS["gauges"]
"""Name -> description, and its own tags."""


def readings(event: Event) -> Iterator[tuple[str, float, dict[str, str]]]:
    """Yield what an event says about each metric: its name, its value, its own tags."""
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

    def __init__(self, run: str, gauge: Callable[..., Any], counter: Callable[..., Any]) -> None:
        """Register them; the name of the run is a tag of all.

        Args:
            run: its name.
            gauge: makes one of a name, a description and names of tags, as `ray.util.metrics` does.
            counter: likewise.
        """
        self._run = run
        self._record: dict[str, Callable[..., None]] = {}  # by the name of a metric
        for new, texts, method in ((gauge, GAUGES, "set"), (counter, _METRICS["counters"], "inc")):
            for name, (text, *tags) in texts.items():
                self._record[name] = getattr(new(f"surgeon_{name}", text, ("run", *tags)), method)

    def record(self, event: Event) -> None:
        """Set the gauges and add to the counters that an event says something of."""
        for name, value, tags in readings(event):
            self._record[name](value, {"run": self._run, **tags})
