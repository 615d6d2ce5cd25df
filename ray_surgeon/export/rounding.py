"""Rounds linears on the workers: a short pass sums G, then each block is rounded in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.microbatch import Tokens
from ray_surgeon.distributed.passes import BlockPass
from ray_surgeon.distributed.worker import Worker
from ray_surgeon.distributed.write_linear_tensors import write_linear_tensors
from ray_surgeon.factors.collector import WantedFactors, drawn, gather_curvature
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.products import PackedSymmetric
from ray_surgeon.maths.rounding import Grid, round_linear
from ray_surgeon.models.build import num_inputs

NUM_BACKWARD = 64
"""Number of sequences, drawn from the calibration, over which G is summed."""
DAMPING = (0.01, 1.0)
"""Damping of A (the published value), and of G."""


def write_scales(worker: Worker, folder: str, blocks: Sequence[int]) -> None:
    """Write the scales [R, groups] of the owned linears that were rounded, and free them."""
    scales = worker.state.rounded_scales
    write_linear_tensors(worker, scales, folder, blocks, stored=True)
    worker.state.rounded_scales = {}


@dataclass(frozen=True)
class Rounding(BlockPass):
    """Rounds the linears of all blocks, each on the outputs of the rounded blocks before it."""

    anew: ClassVar[bool] = False  # an earlier pass has summed G
    grid: Grid
    both_sides: bool  # whether an earlier pass has summed G

    def change(self, worker: Worker, name: str, A: Tensor) -> None:
        """Round the entries of a linear that are not pruned; its bias is not rounded."""
        mask = worker.mask(name, StructuredMask)
        W = worker.shard.weight(name)
        num_columns = num_inputs(worker.shard.linears[name])
        rows = mask.rows.to(W.device).nonzero()[:, 0]
        columns = mask.columns[:num_columns].to(W.device).nonzero()[:, 0]
        if not (len(rows) and len(columns)):
            return  # its layer is pruned whole
        G = None
        if self.both_sides:
            G = _G(worker, name)[rows][:, rows]
        rounded = round_linear(
            W[rows][:, columns],
            A[columns][:, columns],
            G,
            grid=self.grid,
            damping=DAMPING,
            name=name,
            ordered=self.both_sides,
        )
        W[rows[:, None], columns] = rounded.W
        worker.shard.set_weight(name, W)
        worker.state.rounded_scales[name] = rounded.scales.cpu()


def _G(worker: Worker, name: str) -> Tensor:
    """Return the sum G [R, R] of an owned linear."""
    (group,) = (group for group in worker.shard.gathering if name in group.names)
    key = group.keys_of_G[name]
    packed = worker.shard.factor_store.on_device(key)
    return PackedSymmetric(group.sizes[key], packed).dense()


def _keep_G_alone(worker: Worker) -> None:
    """Free A of the owned linears, because rounding changes it."""
    store = worker.shard.factor_store
    for group in worker.shard.gathering:
        if group.key_of_A in store:
            store.drop(group.key_of_A)


def _forget_G(worker: Worker) -> None:
    worker.shard.drop_curvature()


def round_linears(
    cluster: Cluster, tokens: Tokens, grid: Grid, *, both_sides: bool
) -> None:
    """Round all linears of the current model on the workers, permanently.

    Args:
        cluster: cluster with loaded workers.
        tokens: [num_sequences, sequence_length] of the calibration.
        grid: the numbers that can be stored.
        both_sides: whether G, too, weighs and compensates errors, and rounding proceeds in
            descending order. G is that of labels sampled from the current model, because rounding
            keeps the divergence from this model small.

    Raises:
        FloatingPointError: the loss or a factor is not finite.
    """
    if both_sides:
        sequences = tokens[drawn(len(tokens), NUM_BACKWARD)]
        gather_curvature(cluster, sequences, WantedFactors(label_seed=0))
        cluster.run_all(_keep_G_alone)
    else:
        cluster.run_all(_forget_G)
    Rounding(grid, both_sides).pass_all(cluster, tokens)
    cluster.run_all(_forget_G)
