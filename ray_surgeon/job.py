"""What a run works on and what it tells: the checked job, events, and the meter of steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ray_surgeon.cluster.messages import (
    CostOptions,
    CurvatureOptions,
    GroupOptions,
    LayerwiseOptions,
    LowRankOptions,
    PruneOptions,
    Usage,
)
from ray_surgeon.cluster.protocol import Cluster
from ray_surgeon.cluster.usage import process_usage
from ray_surgeon.export.kinds import Measures
from ray_surgeon.export.latency import LatencyOptions
from ray_surgeon.export.speed import SpeedOptions
from ray_surgeon.export.tasks import TaskOptions
from ray_surgeon.models.budgets import Budget
from ray_surgeon.report import Fact
from ray_surgeon.sections import PruningSection
from ray_surgeon.sources import ModelSource
from ray_surgeon.spec import JobSpec
from ray_surgeon.surgery.element_surgery import ElementUnits, ElementUpdate


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
        fewest_groups: kind of structure groups -> groups that must be left in every block.
        budget: what structure groups save from; None for other structures, and until latencies are measured.
    """

    spec: JobSpec
    spec_yaml: str
    model_source: ModelSource
    calibration: NDArray[np.int64] = field(repr=False)
    evaluation: Mapping[str, NDArray[np.int64]] = field(repr=False)
    fingerprints: Mapping[str, Any]
    environment: Mapping[str, str]
    num_parameters: int
    fewest_groups: Mapping[str, int] = field(default_factory=dict)
    budget: Budget | None = None

    @property
    def cost_options(self) -> CostOptions:
        """How costs are taken."""
        curvature, pruning = self.spec.curvature, self.spec.pruning
        options = CurvatureOptions(curvature.kind, curvature.damping.a, curvature.damping.g, curvature.max_damping)
        return CostOptions(pruning.structure, pruning.rank_by, pruning.costs, self._units, options)

    @property
    def _units(self) -> ElementUnits:
        pruning = self.spec.pruning
        return ElementUnits(*pruning.n_m, pruning.group_costs == "joint") if pruning.structure == "n_m" else ElementUnits()

    @property
    def prune_options(self) -> PruneOptions:
        """How the weights that stay are updated."""
        updates = self.spec.updates
        update = ElementUpdate(
            updates.correlations,
            updates.solver,
            updates.num_iterations,
            updates.tolerance,
            updates.max_correlate,
            updates.precision,
            updates.first_order_step,
        )
        return PruneOptions(updates.joint, update)

    def layerwise_options(self, sparsity: float) -> LayerwiseOptions:
        """Return how SparseGPT or Wanda prune to a sparsity."""
        curvature = self.spec.curvature
        return LayerwiseOptions(self.spec.pruning.method, sparsity, self._units, curvature.damping.a, curvature.max_damping)

    def group_options(self, *, last: bool) -> GroupOptions:
        """Return which coupled groups may go in a shot; widths are rounded in the last one."""
        pruning = self.spec.pruning
        multiples = {"ffn": pruning.width_multiple} if last else {}
        per_unit = pruning.rank_by == "cost_per_parameter"
        sizes: dict[str, float] = {kind: self.known_budget.size(kind) if per_unit else 1.0 for kind in pruning.groups}
        return GroupOptions(pruning.groups, pruning.fewest_groups, multiples, pruning.allocation == "uniform", sizes)

    def goal(self, shot: int) -> float:
        """Return what is left of the budget after a shot of structure groups."""
        pruning, dense = self.spec.pruning, self.known_budget.dense
        last = pruning.target_sparsity if pruning.allowed is None else 1 - pruning.allowed / dense
        assert last is not None
        return dense * (1 - pruning.fractions(last)[shot - 1])

    @property
    def known_budget(self) -> Budget:
        """The budget of structure groups."""
        assert self.budget is not None, "latencies are not measured yet"
        return self.budget

    @property
    def needs_latencies(self) -> bool:
        """Whether the budget must be measured."""
        target = self.spec.pruning.target
        return target is not None and target.unit == "latency_s" and self.budget is None

    @property
    def latency_options(self) -> LatencyOptions:
        """What is measured for the budget."""
        pruning, target = self.spec.pruning, self.spec.pruning.target
        assert target is not None
        request = SpeedOptions(**target.request.model_dump())
        uniform = pruning.allocation == "uniform"
        return LatencyOptions(target.device, request, self.spec.model.dtype, self.fewest_groups, pruning.width_multiple, uniform)

    def with_budget(self, budget: Budget) -> Job:
        """Return the job with a measured budget.

        Raises:
            ValueError: the target is out of reach.
        """
        check_budget(budget, self.spec.pruning, self.fewest_groups)
        return replace(self, budget=budget)

    @property
    def measures(self) -> Measures:
        """What is measured of the exports besides their logits."""
        speed = self.spec.output.speed
        return Measures(None if speed is None else SpeedOptions(**speed.model_dump()), task_options(self.spec))

    def low_rank_options(self, shot: int) -> LowRankOptions:
        """Return how the corrections of a shot start."""
        correction = self.spec.correction
        return LowRankOptions(correction.lora_rank, correction.learning_rate, correction.seed + 1_000_003 * shot)

    def correction_batches(self, shot: int) -> list[list[int]]:
        """Return the calibration sequences of every step of the corrections after a shot, the final epochs after the last one.

        The order is drawn anew in every pass over the sequences.
        """
        correction, num_sequences = self.spec.correction, len(self.calibration)
        if not correction.lora_rank:
            return []
        order = np.random.default_rng((correction.seed, shot))
        size = correction.sequences_per_step

        def epoch() -> list[list[int]]:
            shuffled = order.permutation(num_sequences).tolist()
            return [shuffled[i : i + size] for i in range(0, num_sequences, size)]

        batches: list[list[int]] = []
        while len(batches) < correction.steps_per_shot:
            batches += epoch()
        batches = batches[: correction.steps_per_shot]
        if shot == self.spec.pruning.shots:
            batches += [batch for _ in range(correction.final_epochs) for batch in epoch()]
        return batches

    @property
    def steps_of_a_shot(self) -> tuple[str, ...]:
        """Names of the steps of a shot, in order; each one is an event."""
        if self.spec.pruning.method == "llm_surgeon":
            steps = ["curvature", "costs", "threshold", "update"]
            if self.spec.curvature.takes_power_passes:
                steps.insert(1, "terms")
        else:
            steps = ["update"]
        return (*steps, *(["correction"] if self.spec.correction.lora_rank else []), "evaluation", "commit")


def task_options(spec: JobSpec) -> TaskOptions | None:
    """Return which downstream tasks are wanted, if any."""
    tasks = spec.evaluation.tasks
    return None if tasks is None else TaskOptions(**tasks.model_dump())


def check_budget(budget: Budget, pruning: PruningSection, fewest: Mapping[str, int]) -> None:
    """Refuse a target that cannot be reached, or that the dense model is within already.

    Args:
        budget: of the model.
        pruning: what is asked for.
        fewest: kind of groups -> groups that must be left in every block.

    Raises:
        ValueError: says what is possible.
    """
    least, dense, allowed = budget.least(fewest), budget.dense, pruning.allowed
    if allowed is None:
        assert pruning.target_sparsity is not None
        if dense * (1 - pruning.target_sparsity) < least:
            raise ValueError(
                f"pruning.target_sparsity: {pruning.target_sparsity:g}, but with these groups, allocation and widths at most "
                f"{1 - least / dense:.4f} of the parameters of this model's linears can go; lower it, or change those"
            )
    elif allowed < least:
        raise ValueError(
            f"pruning.target: {budget.unit} {allowed:.6g}, but with these groups, allocation and widths the model needs at least "
            f"{least:.6g}; raise it, or change those"
        )
    elif allowed >= dense:
        raise ValueError(f"pruning.target: {budget.unit} {allowed:.6g}, but the dense model needs no more than {dense:.6g}; lower it")


@dataclass(frozen=True)
class Event:
    """The end of one step.

    Attributes:
        step: e.g. "curvature".
        shot: 0 for what is done before the first shot.
        num_shots: in all.
        seconds: wall clock of the step.
        facts: what there is to say about it.
        worker_seconds: how long each worker was busy in it, in the order of `placement.workers`.
    """

    step: str
    shot: int
    num_shots: int
    seconds: float
    facts: dict[str, Fact]
    worker_seconds: Sequence[float] = ()


class StepMeter:
    """Wall clock and CPU time of steps, over all the workers' processes, and how long each worker was busy in them.

    Attributes:
        seconds: step -> wall clock.
        cpu_seconds: step -> CPU time of all processes.
        worker_seconds: step -> how long each worker was busy, in the order of `placement.workers`.
    """

    def __init__(self, cluster: Cluster) -> None:
        """Start with no steps."""
        self._cluster = cluster
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.worker_seconds: dict[str, list[float]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure one step."""
        wall, before = time.perf_counter(), self._usages()
        yield
        after = self._usages()
        self.seconds[name] = time.perf_counter() - wall
        self.cpu_seconds[name] = _cpu_s(after) - _cpu_s(before)
        self.worker_seconds[name] = [round(b.busy_s - a.busy_s, 3) for a, b in zip(before[1:], after[1:], strict=True)]

    def _usages(self) -> list[Usage]:
        return [process_usage(torch.device("cpu")), *self._cluster.run_all("usage")]

    def peak_bytes(self, field_name: str) -> int:
        """Return the sum over the workers' processes of a peak of `Usage`."""
        return sum({usage.process: getattr(usage, field_name) for usage in self._cluster.run_all("usage")}.values())


def _cpu_s(usages: list[Usage]) -> float:
    return sum({usage.process: usage.cpu_s for usage in usages}.values())
