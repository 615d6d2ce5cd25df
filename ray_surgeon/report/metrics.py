"""Which metrics the events of a running job set, ``ray_surgeon_*`` in Prometheus.

`Recorder` passes them on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ray_surgeon.report.events import Event

GAUGES = {
    "shot": "Shot that the last step belonged to",
    "num_shots": "Shots of the job",
    "sparsity": "Removed fraction of the parameters of the blocks' linears",
    "perplexity": "Perplexity of the last evaluation",
    "divergence": "Divergence from the dense model in the last evaluation, in nats per token",
    "tokens_per_s": "Calibration tokens per second of the last curvature pass",
    "step_seconds": "Seconds of the last such step",
    "worker_busy_seconds": "Seconds of the last such step that a worker was busy",
    "efficiency": "Fraction of the last such step in which the workers were busy, on average",
    "parameters": "Parameters of the model after the last shot, zeros not counted",
    "peak_rss_bytes": "Peak resident memory of all workers together",
    "export_bytes": "Bytes of the weights of an export",
}
"""Name -> description."""
COUNTERS = {"steps": "Steps that have ended", "retries": "Losses after which the run went on"}
"""Likewise."""
_TAGS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("perplexity", "divergence"), ("text",)),
    **dict.fromkeys(("step_seconds", "efficiency", "steps"), ("step",)),
    "worker_busy_seconds": ("step", "worker"),
    "export_bytes": ("kind",),
    "retries": ("cause",),
}
"""Name of a metric -> its own tags, if it has some."""

Reading = tuple[str, float, dict[str, str]]
"""(name, value, its own tags)"""


def readings(event: Event) -> Iterator[Reading]:
    """Yield what an event says about each metric."""
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
        offered_s = len(event.worker_seconds) * event.seconds
        yield "efficiency", sum(event.worker_seconds) / offered_s, step
    for name, value in event.facts.items():
        metric, _, text = name.partition(" ")
        if metric in ("perplexity", "divergence"):
            yield metric, float(value), {"text": text}
        elif name == "size_bytes":
            yield "export_bytes", float(value), {"kind": str(event.facts["kind"])}
        elif name in ("sparsity", "tokens_per_s", "parameters", "peak_rss_bytes"):
            yield name, float(value), {}


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
        self._gauges, self._counters = (
            {n: new(f"surgeon_{n}", text, ("run", *_TAGS.get(n, ()))) for n, text in texts.items()}
            for new, texts in ((gauge, GAUGES), (counter, COUNTERS))
        )

    def record(self, event: Event) -> None:
        """Set the gauges and add to the counters that an event says something of."""
        for name, value, tags in readings(event):
            with_run = {"run": self._run, **tags}
            if name in self._gauges:
                self._gauges[name].set(value, with_run)
            else:
                self._counters[name].inc(value, with_run)
