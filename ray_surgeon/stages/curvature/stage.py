"""The curvature pass of a shot: A and G of every linear, from the calibration text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from ray_surgeon.plan.needs import Beside, StepPlan, WorkerView
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.stages.calibration import CalibrationText
from ray_surgeon.stages.curvature.damping import DampingChoice
from ray_surgeon.stages.curvature.extended import gather_terms
from ray_surgeon.stages.curvature.gather import gather_curvature
from ray_surgeon.stages.curvature.section import ExtendedKfacSection
from ray_surgeon.stages.prune.method import Method
from ray_surgeon.stages.prune.stages import OfShot, Present
from ray_surgeon.stages.stage import Facts, RunState, Stage


@dataclass(frozen=True)
class Calibrated:
    """What a pass over the calibration text leaves on the coordinator."""

    method: Method  # with the damping that was chosen, if it was
    loss: float  # mean NLL in nats per predicted token
    record: dict[str, Any]  # more for the report


def calibrate(
    method: Method, cluster: Cluster, text: CalibrationText, shot: int, *, remembers: bool
) -> Calibrated:
    """Gather the curvature of the present weights.

    Args:
        method: of pruning.
        cluster: with loaded workers.
        text: the calibration text.
        shot: number of the shot.
        remembers: see `gather_curvature`.
    """
    curvature = method.used_curvature
    sequences = text.tokens
    seed = curvature.label_seed(shot, len(sequences))
    gather = partial(
        gather_curvature, cluster, kind=curvature.kind, label_seed=seed, only=method.gathers
    )
    has_held = curvature.chooses_damping and len(text.held) >= cluster.placement.num_replicas
    damping = DampingChoice(method)
    if has_held:
        gather(text.held, counts=text.held_counts)
        cluster.run_all(damping.keep_held_factors)
    method.before_pass(cluster, text)
    num_backward = curvature.sequences_backward
    loss = gather(
        sequences,
        num_backward=None if num_backward is None else min(num_backward, len(sequences)),
        experts=method.ranks_experts,
        remembers=remembers,
        counts=text.counts,
    )
    record: dict[str, Any] = {}
    if has_held:
        method, record["damping_chosen"] = damping.chosen(cluster, shot)
    if isinstance(curvature, ExtendedKfacSection):
        num_terms = curvature.num_kronecker_terms
        sizes = gather_terms(cluster, sequences, num_terms, curvature.num_power_iterations, seed)
        medians = [float(np.median(list(of_linear.values()))) for of_linear in sizes]
        record["median_size_of_terms"] = medians
    method.after_pass(cluster, text)
    return Calibrated(method, loss, record)


@dataclass(frozen=True)
class Curvature(Stage):
    """Workers gather the curvature of the present weights."""

    name: ClassVar[str] = "curvature"
    method: Method
    # whether the first pass keeps the dense model's states of the calibration text
    remembers: bool

    def run(self, run: RunState, facts: Facts) -> None:
        """Gather, and choose the damping if the job leaves it open."""
        remembers = self.remembers and run.shot == 1
        method = run.kept(Present).method
        calibrated = calibrate(method, run.cluster, run.text, run.shot, remembers=remembers)
        run.keep(OfShot(calibrated.method), of_shot=True)
        run.record |= calibrated.record
        run.record["calibration_loss"] = calibrated.loss
        facts |= {"calibration_loss": calibrated.loss, "num_tokens": run.text.tokens.size}
        chosen = calibrated.record.get("damping_chosen")
        if chosen is not None:
            facts["damping"] = f"{chosen['a']:g}/{chosen['g']:g}"

    # For the plan

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the passes over the calibration text."""
        curvature = self.method.used_curvature
        stores = worker.stores
        ranks_experts = self.method.ranks_experts
        backward = self._num_backward(worker)
        waves_backward = -(-backward // worker.wave)
        forward = (1 + ranks_experts) * 2 * worker.active + worker.all_factors / 2
        head = worker.head_flops * (backward or worker.sequences)
        runs_again = stores.activations == "recompute"
        further = (1 + runs_again) * 2 * worker.active + 2 * worker.head_flops
        of_pass = worker.sequences * forward + head + backward * further
        num_passes = 1
        if isinstance(curvature, ExtendedKfacSection):
            num_passes += (curvature.num_kronecker_terms - 1) * curvature.num_power_iterations
        waves = worker.num_waves
        weights = worker.moved(stores.weights, (waves + waves_backward) * worker.all_blocks)
        factors = worker.moved(stores.factors, 2 * waves * worker.all_factors)
        yield StepPlan(
            self.name,
            worker.weights + self._factors_on_device(worker) + self._passing(worker),
            worker.host
            + worker.all_factors * (stores.factors == "host" and worker.device_is_host)
            + worker.travelling(worker.sequence_length),
            num_passes * worker.sequence_length * of_pass,
            0.0,
            num_passes * (weights[0] + factors[0]),
            num_passes * (weights[1] + factors[1]),
            (waves + worker.num_shards - 1) / waves,
        )

    def _num_backward(self, worker: WorkerView) -> int:
        """Return how many sequences of a replica pass backward, of the one that has most."""
        curvature = self.method.used_curvature
        if curvature.gathers == "A":
            return 0
        of_all = curvature.sequences_backward or worker.num_sequences
        return -(-of_all // worker.num_replicas)

    def _factors_on_device(self, worker: WorkerView) -> float:
        if worker.stores.factors == "device":
            return worker.all_factors
        return worker.largest_factors

    def _passing(self, worker: WorkerView) -> float:
        """Return what passes, with the changes that removals of a token's experts would make."""
        of_experts = 0
        if self.method.ranks_experts:
            of_experts = worker.shapes.layout.num_active_experts * worker.hidden_size
        return worker.passing(more_kept=4 * of_experts, more_in_a_moment=12 * of_experts)

    def beside(self, worker: WorkerView) -> Mapping[str, Beside]:
        """Return further Kronecker terms, which are not packed."""
        curvature = self.method.used_curvature
        if not isinstance(curvature, ExtendedKfacSection):
            return {}
        further = curvature.num_kronecker_terms - 1
        squares = sum(linear.num_rows**2 + linear.num_columns**2 for linear in worker.linears)
        terms = Beside(device=(further + 1.5) * 4.0 * squares)
        return dict.fromkeys((self.name, "costs", "update"), terms)
