"""Linears rounded on the workers: a short pass for G, then block after block while texts pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ray_surgeon.factors.collector import WantedFactors, drawn, gather_curvature
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.packed import PackedSymmetric
from ray_surgeon.maths.rounding import Grid, round_linear
from ray_surgeon.models.build import num_inputs
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.passes import BlockPass
from ray_surgeon.runtime.wave import Tokens
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.runtime.write_linear_tensors import write_linear_tensors

NUM_BACKWARD = 64
"""Sequences that give G, drawn from the calibration."""
DAMPING = (0.01, 1.0)
"""Of A, the published value, and of G."""


def write_scales(worker: Worker, folder: str, blocks: Sequence[int]) -> None:
    """Write the scales of the owned linears that were rounded, [R, groups], and forget them."""
    write_linear_tensors(worker, worker.state.rounded_scales, folder, blocks, stored=True)
    worker.state.rounded_scales = {}


@dataclass(frozen=True)
class Rounding(BlockPass):
    """Rounds the linears of all blocks, each on the inputs that rounded blocks give."""

    anew: ClassVar[bool] = False  # G is there
    grid: Grid
    both_sides: bool  # whether G is there

    def change(self, worker: Worker, name: str, A: Tensor) -> None:
        """Round what is left of a linear; its bias stays."""
        mask = worker.mask(name, StructuredMask)
        W = worker.shard.weight(name)
        num_columns = num_inputs(worker.shard.linears[name])
        rows = mask.rows.to(W.device).nonzero()[:, 0]
        columns = mask.columns[:num_columns].to(W.device).nonzero()[:, 0]
        if not (len(rows) and len(columns)):
            return  # in a layer that is gone
        G = _G(worker, name)[rows][:, rows] if self.both_sides else None
        A = A[columns][:, columns]
        kept = W[rows][:, columns]
        both = self.both_sides
        found = round_linear(kept, A, G, self.grid, DAMPING, name, ordered=both)
        W[rows[:, None], columns] = found.W
        worker.shard.set_weight(name, W)
        worker.state.rounded_scales[name] = found.scales.cpu()


def _G(worker: Worker, name: str) -> Tensor:
    """Return the sum G [R, R] of an owned linear."""
    (group,) = (group for group in worker.shard.gathering if name in group.names)
    key = group.keys_of_G[name]
    return PackedSymmetric(group.sizes[key], worker.shard.factor_store.on_device(key)).dense()


def _keep_G_alone(worker: Worker) -> None:
    """Free A of the owned linears, which rounding changes."""
    store = worker.shard.factor_store
    for key in (group.key_of_A for group in worker.shard.gathering):
        if key in store:
            store.drop(key)


def _forget_G(worker: Worker) -> None:
    worker.shard.drop_curvature()


def round_linears(cluster: Cluster, tokens: Tokens, grid: Grid, *, both_sides: bool) -> None:
    """Round all linears of the present model on the workers, for good.

    Args:
        cluster: with loaded workers.
        tokens: [num_sequences, sequence_length] of the calibration.
        grid: numbers that can be stored.
        both_sides: whether errors are weighed and answered by G, too, in descending order: G of
            labels that the present model draws, as its divergence is what is to stay small.

    Raises:
        FloatingPointError: the loss or a factor is not finite.
    """
    if both_sides:
        some = tokens[drawn(len(tokens), NUM_BACKWARD)]
        gather_curvature(cluster, some, WantedFactors(label_seed=0))
        cluster.run_all(_keep_G_alone)
    else:
        cluster.run_all(_forget_G)
    Rounding(grid, both_sides).pass_all(cluster, tokens)
    cluster.run_all(_forget_G)
