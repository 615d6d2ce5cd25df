"""Which metrics the events of a running job set, ``ray_surgeon_*`` in Prometheus.

`RayMetrics` passes them to Ray.
"""

from __future__ import annotations

from collections.abc import Iterator

from ray_surgeon.report.events import Event

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "shot": ("Shot that the last step belonged to", ()),
    "num_shots": ("Shots of the job", ()),
    "sparsity": ("Removed fraction of the parameters of the blocks' linears", ()),
    "perplexity": ("Perplexity of the last evaluation", ("text",)),
    "divergence": (
        "Divergence from the dense model in the last evaluation, in nats per token",
        ("text",),
    ),
    "tokens_per_s": ("Calibration tokens per second of the last curvature pass", ()),
    "step_seconds": ("Seconds of the last such step", ("step",)),
    "worker_busy_seconds": (
        "Seconds of the last such step that a worker was busy",
        ("step", "worker"),
    ),
    "efficiency": (
        "Fraction of the last such step in which the workers were busy, on average",
        ("step",),
    ),
    "parameters": ("Parameters of the model after the last shot, zeros not counted", ()),
    "peak_rss_bytes": ("Peak resident memory of all workers together", ()),
    "export_bytes": ("Bytes of the weights of an export", ("kind",)),
}
"""name -> (description, its own tags)"""


COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "steps": ("Steps that have ended", ("step",)),
    "retries": ("Losses after which the run went on", ("cause",)),
}
"""likewise"""

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
