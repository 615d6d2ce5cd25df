"""Low-rank first-order corrections: after every shot, B A is trained beside every linear of the blocks and absorbed into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ray_surgeon.cluster.cluster import Cluster
from ray_surgeon.cluster.collectives import broadcast_together, reduce_together
from ray_surgeon.cluster.passes import Labels, forward_and_backward
from ray_surgeon.cluster.worker import Worker, collective
from ray_surgeon.models.low_rank import LowRankCorrections
from ray_surgeon.sections.base import Positive, Section


class CorrectionSection(Section):
    """Low-rank first-order corrections: after every shot, B A is trained beside every linear of the blocks and absorbed into it."""

    loss: Literal["kl", "cross_entropy"] = Field(
        "kl",
        description="What corrections lower on the calibration text: the divergence from the dense model (kl), which recovers what "
        "pruning took, or the loss (cross_entropy), which also teaches the text",
    )
    lora_rank: int = Field(8, ge=1, le=1024, description="Rank of B A")
    learning_rate: float = Field(
        1e-4,
        gt=0,
        le=1,
        description="Learning rate of Adam. In a narrow model.dtype, changes by few small steps are rounded away: correction_absorbed in "
        "the report is the share that arrived in the weights",
    )
    steps_per_shot: int = Field(3, ge=0, description="Steps of Adam after every shot")
    sequences_per_step: Positive = Field(1, description="Calibration sequences of one step, at most all")
    final_epochs: int = Field(0, ge=0, description="Passes over the calibration sequences after the last shot")
    seed: int = Field(0, ge=0, description="Seed of A at the start, and of the order of the sequences")

    @model_validator(mode="after")
    def _trains(self) -> CorrectionSection:
        if not self.steps_per_shot and not self.final_epochs:
            raise ValueError("steps_per_shot and final_epochs are 0, so nothing is trained; set one of them, or correction: null")
        return self


@dataclass(frozen=True)
class Corrections:
    """The corrections of one run."""

    section: CorrectionSection

    # On a worker

    def start(self, worker: Worker, shot: int) -> None:
        """Put B A beside every linear; see `LowRankCorrections`."""
        section, numbers = self.section, worker.layout.linear_numbers
        first = section.seed + 1_000_003 * shot
        seeds = {name: first + numbers[name] for name in worker.shard.linears}
        owned = {name for name in worker.shard.linears if worker.owns(name)}
        rank, rate = section.lora_rank, section.learning_rate
        worker.keep(LowRankCorrections(worker.shard, worker.masks, owned, rank=rank, learning_rate=rate, seed_of=seeds))

    @collective
    def step(self, worker: Worker, num_tokens: int) -> None:
        """Sum the gradients to the owners, make a step of the optimizer there, and send the result to the replicas."""
        corrections = worker.kept(LowRankCorrections)
        owned = [[name for name in worker.shard.linears if worker.owner(name) == rank] for rank in range(worker.placement.num_replicas)]
        for owner, names in enumerate(owned):
            gradients = [gradient for name in names for gradient in corrections.gradients(name, num_tokens)]
            reduce_together(worker.replicas, gradients, owner)
        corrections.step()
        for owner, names in enumerate(owned):
            parts = [corrections.parts[name] for name in names]
            broadcast_together(worker.replicas, [x.detach() for part in parts for x in (part.A, part.B)], owner)

    def absorb(self, worker: Worker) -> tuple[float, float]:
        """Add every B A to its weight, and return how much of it arrived in the owned ones; see `LowRankCorrections.absorb`."""
        found = [about for name, about in worker.drop(LowRankCorrections).absorb().items() if worker.owns(name)]
        return sum(arrived for arrived, _ in found), sum(wanted for _, wanted in found)

    # On the coordinator

    def batches(self, shot: int, num_shots: int, num_sequences: int) -> list[list[int]]:
        """Return the calibration sequences of every step after a shot; the final epochs come after the last one.

        The order is drawn anew in every pass over the sequences.
        """
        section = self.section
        order = np.random.default_rng((section.seed, shot))

        def epoch() -> list[list[int]]:
            shuffled = order.permutation(num_sequences).tolist()
            return [shuffled[i : i + section.sequences_per_step] for i in range(0, num_sequences, section.sequences_per_step)]

        batches: list[list[int]] = []
        while len(batches) < section.steps_per_shot:
            batches += epoch()
        batches = batches[: section.steps_per_shot]
        if shot == num_shots:
            batches += [batch for _ in range(section.final_epochs) for batch in epoch()]
        return batches

    def train(self, cluster: Cluster, sequences: NDArray[np.int64], shot: int, num_shots: int) -> tuple[list[float], float]:
        """Train the corrections of all linears, one step of the optimizer a batch, and absorb them.

        Args:
            cluster: with the pruned weights and masks.
            sequences: [num_sequences, sequence_length] tokens.
            shot: number of the shot.
            num_shots: in all.

        Returns:
            The mean loss in nats per predicted token of each step's batch, before the step, and which share of the corrections arrived
            in the weights, as `LowRankCorrections.absorb` has it.
        """
        batches, losses = self.batches(shot, num_shots, len(sequences)), list[float]()
        labels = Labels(of_dense_model=self.section.loss == "kl")
        if not batches:
            return [], 1.0
        cluster.run_all(self.start, shot)
        cluster.progress.begin(len(batches), "steps", self.section.sequences_per_step * sequences.shape[1])
        for number, batch in enumerate(batches):
            num_tokens = len(batch) * (sequences.shape[1] - 1)
            losses.append(sum(forward_and_backward(cluster, sequences, labels, only=batch, counted=False)) / num_tokens)
            cluster.run_all(self.step, num_tokens)
            cluster.progress.reach(number + 1)
        arrived, wanted = (sum(parts) for parts in zip(*cluster.run_all(self.absorb), strict=True))
        return losses, arrived / wanted if wanted else 1.0
