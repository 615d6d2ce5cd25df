"""What a running job tells Ray's metrics, and with them Prometheus: ``ray_surgeon_*``, tagged with the run's name."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from ray_surgeon.job import Event

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "shot": ("Shot that the last step belonged to", ()),
    "num_shots": ("Shots of the job", ()),
    "sparsity": ("Removed fraction of the parameters of the blocks' linears", ()),
    "perplexity": ("Perplexity of the last evaluation", ("text",)),
    "tokens_per_s": ("Calibration tokens per second of the last curvature pass", ()),
    "step_seconds": ("Seconds of the last such step", ("step",)),
    "worker_busy_seconds": ("Seconds of the last such step that a worker was busy", ("step", "worker")),
    "efficiency": ("Fraction of the last such step in which the workers were busy, on average", ("step",)),
    "parameters": ("Parameters of the model after the last shot, zeros not counted", ()),
    "peak_rss_bytes": ("Peak resident memory of all workers together", ()),
    "export_bytes": ("Bytes of the weights of an export", ("kind",)),
}
"""name -> (description, its own tags)"""


class RunMetrics:
    """Gauges that follow the events of a run, and a counter of retries."""

    def __init__(self, run: str) -> None:
        """Register the metrics in this process, which must belong to Ray.

        Args:
            run: name of the run, their tag.
        """
        self._gauges = {name: Gauge(f"surgeon_{name}", text, ("run", *tags)) for name, (text, tags) in GAUGES.items()}
        self._steps = Counter("surgeon_steps", "Steps that have ended", ("run", "step"))
        self._retries = Counter("surgeon_retries", "Losses after which the run went on", ("run", "cause"))
        self._run = run

    def follow(self, event: Event) -> None:
        """Take over what an event says."""
        if event.step == "retry":
            self._retries.inc(1, {"run": self._run, "cause": str(event.facts["cause"])})
            return
        self._steps.inc(1, {"run": self._run, "step": event.step})
        self._set("shot", event.shot)
        self._set("num_shots", event.num_shots)
        self._set("step_seconds", event.seconds, step=event.step)
        for worker, seconds in enumerate(event.worker_seconds):
            self._set("worker_busy_seconds", seconds, step=event.step, worker=str(worker))
        if event.worker_seconds and event.seconds:
            self._set("efficiency", sum(event.worker_seconds) / (len(event.worker_seconds) * event.seconds), step=event.step)
        for name, value in event.facts.items():
            if name.startswith("perplexity "):
                self._set("perplexity", value, text=name.removeprefix("perplexity "))
            elif name == "size_bytes":
                self._set("export_bytes", value, kind=str(event.facts["kind"]))
            elif name in ("sparsity", "tokens_per_s", "parameters", "peak_rss_bytes"):
                self._set(name, value)

    def _set(self, name: str, value: str | float, **tags: str) -> None:
        self._gauges[name].set(float(value), {"run": self._run, **tags})
