"""The shots of a run. Knows the Cluster protocol, not Ray; never sees A, G or weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial

from ray_surgeon import storage
from ray_surgeon.checkpoint import RunDirectory
from ray_surgeon.cluster.messages import ModelRecipe
from ray_surgeon.cluster.protocol import Cluster
from ray_surgeon.evaluate import perplexity
from ray_surgeon.export.kinds import export
from ray_surgeon.export.latency import latency_budget
from ray_surgeon.export.tasks import evaluate_tasks
from ray_surgeon.job import Event, Job, StepMeter
from ray_surgeon.methods import correct, method_of
from ray_surgeon.page import page
from ray_surgeon.plots import inline_svg, run_figures, save
from ray_surgeon.report import Fact, RunReport


def run_shots(job: Job, cluster: Cluster, run: RunDirectory) -> Iterator[Event]:
    """Prune the model shot by shot; every shot is committed, and the run goes on after the last committed one.

    Args:
        job: checked.
        cluster: workers without weights.
        run: a run directory that was checked for this job.

    Yields:
        The end of every step.

    Raises:
        FloatingPointError: a loss, factor or cost is not usable; committed shots stay.
        CollapseError: perplexity is above the limit of the spec; committed shots stay.
    """
    spec, targets, num_shots = job.spec, job.spec.pruning.targets, job.spec.pruning.shots
    run.start(job.spec_yaml, job.fingerprints)
    done = [run.read_shot(index) for index in run.committed_indices()]
    report = RunReport(spec.model_dump(mode="json"), job.fingerprints, job.environment, job.num_parameters)
    report.shots.extend(shot.record for shot in done)
    report.retries.extend(run.retries())

    def ended(step: str, shot: int, meter: StepMeter, **facts: Fact) -> Event:
        event = Event(step, shot, num_shots, round(meter.seconds[step], 3), facts, meter.worker_seconds[step])
        run.add_event(asdict(event) | {"time": time.time()})
        return event

    meter = StepMeter(cluster)
    with meter.step("load"):
        dense = ModelRecipe(job.model_source, spec.model.dtype)
        resumed = ModelRecipe(job.model_source, spec.model.dtype, done[-1].files) if done else dense
        cluster.run_all("load", resumed, job.cost_options.by_element)
    yield ended("load", len(done), meter, workers=len(cluster.placement.workers), resumed_after_shot=len(done))

    if job.needs_latencies:
        with meter.step("latency"):
            job = job.with_budget(latency_budget(cluster, job.model_source, job.latency_options, run.path("latency.json")))
        yield ended("latency", 0, meter, dense_s=job.known_budget.dense)

    if done:
        report.dense = done[-1].record["dense"]
    else:
        with meter.step("evaluation"):
            report.dense = {"perplexity": _perplexities(job, cluster)}
        yield ended("evaluation", 0, meter, **_named("perplexity", report.dense["perplexity"]))
        if job.measures.tasks is not None:
            with meter.step("tasks"):
                report.dense["tasks"] = evaluate_tasks(cluster, job.model_source, job.measures.tasks)
            yield ended("tasks", 0, meter)

    last_page_s = time.monotonic()
    for shot in range(len(done) + 1, num_shots + 1):
        meter = StepMeter(cluster)
        at_shot = partial(ended, shot=shot, meter=meter)
        prune = method_of(job)
        pruned = yield from prune(job, cluster, meter, at_shot, shot)
        losses = yield from correct(job, cluster, meter, at_shot, shot)

        with meter.step("evaluation"):
            values = _perplexities(job, cluster)
        yield ended("evaluation", shot, meter, sparsity=pruned.sparsity, **_named("perplexity", values))
        _check_for_collapse(values, report.dense["perplexity"], spec.evaluation.stop_above, shot)

        with meter.step("commit"):
            name = "shard-{shard:04d}.safetensors"
            files = cluster.run_all("save", run.shot_folder(shot), name, linears_only=True, masks="masks-{shard:04d}.safetensors")
            record = {
                "index": shot,
                "target_sparsity": targets[shot - 1] if targets else None,
                "sparsity": pruned.sparsity,
                "threshold": pruned.threshold,
                "perplexity": values,
                "calibration_loss": pruned.calibration_loss,
                "correction_losses": losses,
                **pruned.record,
                "seconds": dict(meter.seconds),
                "cpu_seconds": dict(meter.cpu_seconds),
                "worker_seconds": dict(meter.worker_seconds),
                "peak_rss_bytes": meter.peak_bytes("peak_rss_bytes"),
                "peak_gpu_bytes": meter.peak_bytes("peak_gpu_bytes"),
                "linears": report.linear_records(pruned.linears),
                "num_nonzero": job.num_parameters - sum(s.num_rows * s.num_columns - s.num_nonzero for s in pruned.linears),
                "dense": report.dense,
            }
            run.commit_shot(shot, [file for worker in files for file in worker], record)
            report.shots.append(record)
            run.write_report(report.as_record())
            last_page_s = _draw(run, report, last_page_s)
            if spec.output.keep_shots and shot > spec.output.keep_shots:
                run.drop_tensors(shot - spec.output.keep_shots)
        sizes = {"parameters": record["num_nonzero"], "peak_rss_bytes": record["peak_rss_bytes"]}
        yield ended("commit", shot, meter, uri=run.shot_folder(shot), **sizes)

    for kind in spec.output.exports:
        meter = StepMeter(cluster)
        with meter.step("export"):
            facts, linears = report.model_card_facts(), report.shots[-1]["linears"]
            uri, tokens = run.path("export", kind), job.calibration[0]
            entry = export(kind, cluster, job.model_source, uri, tokens, facts, linears, job.measures)
        report.exports.append(entry)
        difference = entry["reload_max_logit_difference"]
        size = entry["size_bytes"]
        yield ended("export", num_shots, meter, kind=kind, uri=uri, size_bytes=size, reload_max_logit_difference=difference)
    run.write_report(report.as_record())
    _draw(run, report, None)


_PAGE_EVERY_S = 60.0


def _draw(run: RunDirectory, report: RunReport, last_page_s: float | None) -> float:
    """Write report.html, once a minute while the run goes on, and at its end (`last_page_s` None) with the plots.

    A failure is recorded and no more: a drawing must not end a run of hours, and `python -m ray_surgeon.report` can make it later.
    """
    now = time.monotonic()
    if last_page_s is not None and now - last_page_s < _PAGE_EVERY_S:
        return last_page_s
    try:
        record = report.as_record()
        figures = run_figures(record)
        drawn = {name: inline_svg(figure, name) for name, figure in figures.items()}
        run.write_page(page([record], {0: drawn}))
        for name, figure in figures.items() if last_page_s is None else ():
            storage.write_text(run.path("plots", f"{name}.svg"), drawn[name])
            save(figure, run.path("plots", f"{name}.png"))
    except Exception as error:  # whatever a plotting library raises
        run.add_event({"step": "drawing failed", "reason": repr(error), "time": time.time()})
    return now


class CollapseError(RuntimeError):
    """The model is worse than the spec allows."""


def _check_for_collapse(after: Mapping[str, float], before: Mapping[str, float], limit: float | None, shot: int) -> None:
    if limit is None:
        return
    for text, value in after.items():
        if not value <= limit * before[text]:
            raise CollapseError(
                f"after shot {shot} the perplexity on {text} is {value:.4g}, {value / before[text]:.3g} times the dense model's; "
                f"evaluation.stop_above allows {limit:g}. The shots before are committed; prune less, or raise evaluation.stop_above"
            )


def _named(prefix: str, values: Mapping[str, float]) -> dict[str, Fact]:
    return {f"{prefix} {name}": value for name, value in values.items()}


def _perplexities(job: Job, cluster: Cluster) -> dict[str, float]:
    return {name: perplexity(cluster, windows) for name, windows in job.evaluation.items()}
