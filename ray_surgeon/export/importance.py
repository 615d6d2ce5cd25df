"""What inputs of linears weigh: their mean squares, the diagonals of A, as llama.cpp wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.models.build import num_inputs
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.passes import BlockPass
from ray_surgeon.runtime.wave import Tokens
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.runtime.write_linear_tensors import write_linear_tensors


def _write(worker: Worker, folder: str, blocks: Sequence[int]) -> None:
    write_linear_tensors(worker, worker.state.mean_squares, folder, blocks, stored=False)
    worker.state.mean_squares = {}


@dataclass(frozen=True)
class _Measuring(BlockPass):
    """Keeps mean squares; the linears stay as they are."""

    changes: ClassVar[bool] = False

    def change(self, worker: Worker, name: str, A: Tensor) -> None:
        """Keep the diagonal of A, without the bias."""
        mask = worker.mask(name, StructuredMask)
        columns = mask.columns[: num_inputs(worker.shard.linears[name])]
        if columns.any() and mask.rows.any():
            squares = A.diagonal()[: len(columns)].cpu()
            worker.state.mean_squares[name] = squares[columns.cpu()]


def write_mean_squares(
    cluster: Cluster, tokens: Tokens, folder: str, blocks: Sequence[int]
) -> None:
    """Write the mean squares of the inputs of all linears, [C] by the names of their weights here.

    Args:
        cluster: with the pruned weights.
        tokens: [num_sequences, sequence_length] to take the mean over.
        folder: URI, for the files of all workers.
        blocks: numbers of those that are left, by which names are numbered anew.
    """
    _Measuring().pass_all(cluster, tokens)
    cluster.run_all(_write, folder, blocks)
