"""The shots of a run. Knows the Cluster protocol, not Ray; never sees A, G or weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ray_surgeon.checkpoint import RunDirectory
from ray_surgeon.cluster.messages import CostOptions, CostsReply, CurvatureOptions, LinearSummary, ModelRecipe, PruneOptions, Usage
from ray_surgeon.cluster.protocol import Cluster
from ray_surgeon.cluster.steps import collect_curvature
from ray_surgeon.cluster.usage import process_usage
from ray_surgeon.evaluate import perplexity
from ray_surgeon.export.masked import export_masked
from ray_surgeon.report import Fact, RunReport
from ray_surgeon.sources import ModelSource
from ray_surgeon.spec import JobSpec
from ray_surgeon.surgery.element_surgery import ElementUnits, ElementUpdate
from ray_surgeon.surgery.threshold import (
    StructureCosts,
    Threshold,
    bucket_of,
    cost_of_bits,
    structured_threshold,
    units_to_remove,
)


@dataclass(frozen=True)
class Job:
    """A checked job spec and everything that was read for it.

    Attributes:
        spec: what was asked for.
        spec_yaml: the same, resolved, as it is kept in the run directory.
        model_source: where the weights are, pinned to what was checked.
        calibration: [num_sequences, sequence_length] tokens.
        evaluation: text name -> windows.
        fingerprints: of model, tokenizer, texts and method.
        environment: versions and machine, for the report.
        num_parameters: of the whole model.
    """

    spec: JobSpec
    spec_yaml: str
    model_source: ModelSource
    calibration: NDArray[np.int64] = field(repr=False)
    evaluation: Mapping[str, NDArray[np.int64]] = field(repr=False)
    fingerprints: Mapping[str, Any]
    environment: Mapping[str, str]
    num_parameters: int

    @property
    def cost_options(self) -> CostOptions:
        """How costs are taken."""
        curvature, pruning = self.spec.curvature, self.spec.pruning
        options = CurvatureOptions(curvature.kind, curvature.damping.a, curvature.damping.g, curvature.max_damping)
        n, m = pruning.n_m
        units = ElementUnits(n, m, pruning.group_costs == "joint") if pruning.structure == "n_m" else ElementUnits()
        return CostOptions(pruning.structure, pruning.rank_by, pruning.costs, units, options)

    @property
    def prune_options(self) -> PruneOptions:
        """How the weights that stay are updated."""
        updates = self.spec.updates
        update = ElementUpdate(
            updates.correlations, updates.solver, updates.num_iterations, updates.tolerance, updates.max_correlate, updates.precision
        )
        return PruneOptions(updates.joint, update)


@dataclass(frozen=True)
class Event:
    """The end of one step.

    Attributes:
        step: e.g. "curvature".
        shot: 0 for what is done before the first shot.
        num_shots: in all.
        seconds: wall clock of the step.
        facts: what there is to say about it.
    """

    step: str
    shot: int
    num_shots: int
    seconds: float
    facts: dict[str, Fact]


STEPS = ("curvature", "costs", "threshold", "update", "evaluation", "commit")
"""The steps of a shot, in order; each one is an event."""


class StepMeter:
    """Wall clock and CPU time of steps, over all the workers' processes."""

    def __init__(self, cluster: Cluster) -> None:
        """Start with no steps."""
        self._cluster = cluster
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    def _cpu_s(self) -> float:
        usages: list[Usage] = [process_usage(torch.device("cpu")), *self._cluster.run_all("usage")]
        return sum({usage.process: usage.cpu_s for usage in usages}.values())

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure one step."""
        wall, cpu = time.perf_counter(), self._cpu_s()
        yield
        self.seconds[name] = time.perf_counter() - wall
        self.cpu_seconds[name] = self._cpu_s() - cpu

    def peak_bytes(self, field_name: str) -> int:
        """Return the sum over the workers' processes of a peak of `Usage`."""
        return sum({usage.process: getattr(usage, field_name) for usage in self._cluster.run_all("usage")}.values())


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
    """
    spec, targets = job.spec, job.spec.pruning.targets
    num_shots = len(targets)
    run.start(job.spec_yaml, job.fingerprints)
    done = [run.read_shot(index) for index in run.committed_indices()]
    report = RunReport(spec.model_dump(mode="json"), job.fingerprints, job.environment, job.num_parameters)
    report.shots.extend(shot.record for shot in done)

    def ended(step: str, shot: int, meter: StepMeter, **facts: Fact) -> Event:
        event = Event(step, shot, num_shots, round(meter.seconds[step], 3), facts)
        run.add_event(asdict(event) | {"time": time.time()})
        return event

    meter = StepMeter(cluster)
    with meter.step("load"):
        dense = ModelRecipe(job.model_source, spec.model.dtype)
        resumed = ModelRecipe(job.model_source, spec.model.dtype, done[-1].files) if done else dense
        cluster.run_all("load", resumed, job.cost_options.by_element)
    yield ended("load", len(done), meter, workers=len(cluster.placement.workers), resumed_after_shot=len(done))

    if done:
        report.dense = done[-1].record["dense"]
    else:
        with meter.step("evaluation"):
            report.dense = {"perplexity": _perplexities(job, cluster)}
        yield ended("evaluation", 0, meter, **_named("perplexity", report.dense["perplexity"]))

    for shot in range(len(done) + 1, num_shots + 1):
        meter = StepMeter(cluster)
        target = targets[shot - 1]
        with meter.step("curvature"):
            sampled = spec.curvature.fisher == "sampled"
            seed = spec.curvature.seed + shot * len(job.calibration) if sampled else None
            loss = collect_curvature(cluster, job.calibration, spec.curvature.kind, seed)
        tokens_per_s = job.calibration.size / meter.seconds["curvature"]
        yield ended("curvature", shot, meter, calibration_loss=loss, tokens_per_s=tokens_per_s)

        with meter.step("costs"):
            replies: list[CostsReply] = cluster.run_all("costs", job.cost_options)
        damping = [asdict(event) for reply in replies for event in reply.damping]
        yield ended("costs", shot, meter, damping_raised=len(damping))

        with meter.step("threshold"):
            threshold = _threshold(cluster, job.cost_options, replies, target)
        yield ended("threshold", shot, meter, threshold=threshold.value, sparsity=threshold.sparsity)

        with meter.step("update"):
            summaries = cluster.run_all("prune", threshold.value, job.prune_options, job.cost_options)
        linears: list[LinearSummary] = [summary for worker in summaries for summary in worker]
        predicted = sum(linear.predicted_loss_increase for linear in linears)
        residuals = sorted(linear.residual for linear in linears)
        residual = {"median": residuals[len(residuals) // 2], "max": residuals[-1]}
        yield ended("update", shot, meter, predicted_loss_increase=predicted, max_residual=residual["max"])

        with meter.step("evaluation"):
            values = _perplexities(job, cluster)
        yield ended("evaluation", shot, meter, sparsity=threshold.sparsity, **_named("perplexity", values))

        with meter.step("commit"):
            name = "shard-{shard:04d}.safetensors"
            files = cluster.run_all("save", run.shot_folder(shot), name, linears_only=True, masks="masks-{shard:04d}.safetensors")
            record = {
                "index": shot,
                "target_sparsity": target,
                "sparsity": threshold.sparsity,
                "threshold": threshold.value,
                "perplexity": values,
                "calibration_loss": loss,
                "predicted_loss_increase": predicted,
                "update_residual": residual,
                "seconds": dict(meter.seconds),
                "cpu_seconds": dict(meter.cpu_seconds),
                "peak_rss_bytes": meter.peak_bytes("peak_rss_bytes"),
                "peak_gpu_bytes": meter.peak_bytes("peak_gpu_bytes"),
                "damping_used": damping,
                "linears": report.linear_records(linears),
                "dense": report.dense,
            }
            run.commit_shot(shot, [file for worker in files for file in worker], record)
            report.shots.append(record)
            run.write_report(report.as_record())
            if spec.output.keep_shots and shot > spec.output.keep_shots:
                run.drop_tensors(shot - spec.output.keep_shots)
        yield ended("commit", shot, meter, uri=run.shot_folder(shot))

    for kind in spec.output.exports:
        meter = StepMeter(cluster)
        with meter.step("export"):
            export = export_masked(cluster, job.model_source, run.path("export", kind), job.calibration[0], report.model_card_facts())
        report.exports.append(export)
        yield ended(
            "export", num_shots, meter, kind=kind, uri=export["uri"], reload_max_logit_difference=export["reload_max_logit_difference"]
        )
    run.write_report(report.as_record())


def _named(prefix: str, values: Mapping[str, float]) -> dict[str, Fact]:
    return {f"{prefix} {name}": value for name, value in values.items()}


def _perplexities(job: Job, cluster: Cluster) -> dict[str, float]:
    return {name: perplexity(cluster, windows) for name, windows in job.evaluation.items()}


def _threshold(cluster: Cluster, options: CostOptions, replies: list[CostsReply], target_sparsity: float) -> Threshold:
    if options.by_element:
        return _element_threshold(cluster, options, replies, target_sparsity)
    linears = sorted((linear for reply in replies for linear in reply.costs), key=lambda linear: linear.name)
    costs = [
        StructureCosts(c.name, c.num_parameters, c.num_rows, c.num_columns, torch.tensor(c.rows), torch.tensor(c.columns)) for c in linears
    ]
    return structured_threshold(costs, target_sparsity)


def _element_threshold(cluster: Cluster, options: CostOptions, replies: list[CostsReply], target_sparsity: float) -> Threshold:
    """Find the exact k-th smallest cost by two rounds of counting; the costs stay where they are."""
    num_parameters = sum(reply.num_parameters for reply in replies)
    num_gone = num_parameters - sum(reply.num_kept for reply in replies)

    def counts(high: int | None) -> torch.Tensor:
        return torch.from_numpy(np.sum(cluster.run_all("cost_histogram", options, high), axis=0))

    upper = counts(None)
    num_units = units_to_remove(target_sparsity, num_parameters, num_gone, options.units.num_removed, int(upper.sum()))
    if num_units == 0:
        return Threshold(-1.0, num_gone, num_parameters)
    high, rest = bucket_of(upper, num_units)
    lower = counts(high)
    low, _ = bucket_of(lower, rest)
    removed = int(upper[:high].sum() + lower[: low + 1].sum()) * options.units.num_removed
    return Threshold(cost_of_bits(high, low), num_gone + removed, num_parameters)
