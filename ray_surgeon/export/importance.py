"""Measures the mean squares of linears' inputs, the diagonals of A, for llama.cpp."""

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
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.models.build import num_inputs


def _write(worker: Worker, folder: str, blocks: Sequence[int]) -> None:
    mean_squares = worker.state.mean_squares
    write_linear_tensors(worker, mean_squares, folder, blocks, stored=False)
    worker.state.mean_squares = {}


@dataclass(frozen=True)
class _Measuring(BlockPass):
    """Keeps the mean squares of inputs; does not change the linears."""

    changes: ClassVar[bool] = False

    def change(self, worker: Worker, name: str, A: Tensor) -> None:
        """Keep the diagonal of A, without the bias."""
        mask = worker.mask(name, StructuredMask)
        columns = mask.columns[: num_inputs(worker.shard.linears[name])]
        if not (columns.any() and mask.rows.any()):
            return
        squares = A.diagonal()[: len(columns)].cpu()
        worker.state.mean_squares[name] = squares[columns.cpu()]


def write_mean_squares(
    cluster: Cluster, tokens: Tokens, folder: str, blocks: Sequence[int]
) -> None:
    """Write the mean squares of the inputs of all linears.

    Each is a tensor [C], for the columns that are not pruned, by the name that the linear's weight
    has in memory here.

    Args:
        cluster: cluster with the pruned weights.
        tokens: [num_sequences, sequence_length], over which the mean is taken.
        folder: URI, for the files of all workers.
        blocks: numbers of the remaining blocks; names number them from 0.
    """
    _Measuring().pass_all(cluster, tokens)
    cluster.run_all(_write, folder, blocks)
