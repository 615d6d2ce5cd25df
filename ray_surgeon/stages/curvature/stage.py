"""The curvature pass of a shot: A and G of every linear, from the calibration text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ray_surgeon.plan.needs import Beside, StepPlan, WorkerView
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.stages.calibration import CalibrationText
from ray_surgeon.stages.curvature import damping
from ray_surgeon.stages.curvature.extended import gather_terms
from ray_surgeon.stages.curvature.gather import gather_curvature
from ray_surgeon.stages.curvature.section import ExtendedKfacSection
from ray_surgeon.stages.prune.method import Method
from ray_surgeon.stages.prune.methods import Present
from ray_surgeon.stages.stage import Facts, RunState, Stage


def calibrate(
    method: Method, cluster: Cluster, text: CalibrationText, shot: int, *, remembers: bool
) -> tuple[Method, dict[str, Any]]:
    """Gather the curvature of the present weights.

    Args:
        method: of pruning.
        cluster: with loaded workers.
        text: the calibration text.
        shot: number of the shot.
        remembers: see `gather_curvature`.

    Returns:
        The method with the damping that was chosen, if it was; and what the report says.
        `calibration_loss` is the mean NLL in nats per predicted token.
    """
    curvature = method.used_curvature
    sequences = text.tokens
    seed = curvature.label_seed(shot, len(sequences))
    gather = partial(
        gather_curvature, cluster, kind=curvature.kind, label_seed=seed, only=method.gathers
    )
    has_held = curvature.chooses_damping and len(text.held) >= cluster.placement.num_replicas
    if has_held:
        gather(text.held, counts=text.held_counts)
        cluster.run_all(damping.keep_held_factors, method)
    method.before_pass(cluster, text)
    loss = gather(
        sequences,
        num_backward=curvature.sequences_backward,
        experts=method.ranks_experts,
        remembers=remembers,
        counts=text.counts,
    )
    record: dict[str, Any] = {}
    if has_held:
        method, record["damping_chosen"] = damping.choose(cluster, method, shot)
    if isinstance(curvature, ExtendedKfacSection):
        sizes = gather_terms(
            cluster, sequences, curvature.num_kronecker_terms, curvature.num_power_iterations, seed
        )
        record["median_size_of_terms"] = [float(np.median([*term.values()])) for term in sizes]
    method.after_pass(cluster, text)
    record["calibration_loss"] = loss
    return method, record


@dataclass(frozen=True)
class Curvature(Stage):
    """Workers gather the curvature of the present weights."""

    name = "curvature"
    method: Method
    # whether the first pass keeps the dense model's states of the calibration text
    remembers: bool

    def run(self, run: RunState, facts: Facts) -> None:
        """Gather, and choose the damping if the job leaves it open."""
        remembers = self.remembers and run.shot == 1
        method = run.kept(Present).method
        method, record = calibrate(method, run.cluster, run.text, run.shot, remembers=remembers)
        run.keep(Present(method), of_shot=True)
        run.record |= record
        facts["calibration_loss"] = record["calibration_loss"]
        facts["num_tokens"] = run.text.tokens.size
        if chosen := record.get("damping_chosen"):
            facts["damping"] = f"{chosen['a']:g}/{chosen['g']:g}"

    # For the plan

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the passes over the calibration text."""
        curvature = self.method.used_curvature
        stores = worker.stores
        waves = worker.num_waves
        of_all = curvature.sequences_backward or worker.num_sequences
        # of the replica that has most of them
        backward = 0 if curvature.gathers == "A" else -(-of_all // worker.num_replicas)
        ranks_experts = self.method.ranks_experts
        forward = (1 + ranks_experts) * 2 * worker.active + worker.all_factors / 2
        head = worker.head_flops * (backward or worker.sequences)
        runs_again = stores.activations == "recompute"
        further = (1 + runs_again) * 2 * worker.active + 2 * worker.head_flops
        of_pass = worker.sequences * forward + head + backward * further
        num_passes = 1
        if isinstance(curvature, ExtendedKfacSection):
            num_passes += (curvature.num_kronecker_terms - 1) * curvature.num_power_iterations
        loads = (waves + -(-backward // worker.wave)) * worker.all_blocks
        weights = worker.moved(stores.weights, loads)
        factors = worker.moved(stores.factors, 2 * waves * worker.all_factors)
        on_device = worker.all_factors if stores.factors == "device" else worker.largest_factors
        # the changes that removals of a token's experts would make
        changes = worker.shapes.layout.num_active_experts * worker.hidden_size * ranks_experts
        passing = worker.passing(more_kept=4 * changes, more_in_a_moment=12 * changes)
        host = worker.all_factors * (stores.factors == "host" and worker.device_is_host)
        yield StepPlan(
            self.name,
            worker.weights + on_device + passing,
            worker.host + host + worker.travelling(worker.sequence_length),
            num_passes * worker.sequence_length * of_pass,
            0.0,
            num_passes * (weights[0] + factors[0]),
            num_passes * (weights[1] + factors[1]),
            (waves + worker.num_shards - 1) / waves,
        )

    def beside(self, worker: WorkerView) -> Mapping[str, Beside]:
        """Return further Kronecker terms, which are not packed."""
        curvature = self.method.used_curvature
        if not isinstance(curvature, ExtendedKfacSection):
            return {}
        further = curvature.num_kronecker_terms - 1
        squares = sum(linear.num_rows**2 + linear.num_columns**2 for linear in worker.linears)
        terms = Beside(device=(further + 1.5) * 4.0 * squares)
        return dict.fromkeys((self.name, "costs", "update"), terms)
