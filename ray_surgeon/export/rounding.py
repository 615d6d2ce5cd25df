"""Weights of four bits, rounded on the workers by the calibration text; see `round_columns`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ray_surgeon.export.folder import write_weights
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.rounding import round_columns
from ray_surgeon.models.linears import num_inputs
from ray_surgeon.runtime.block_pass import BlockPass
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.storage import files, tensor_files

NUM_BITS = 4
_DAMPING = 0.01
"""Of A, relative to the mean of its diagonal; the published value."""
_MAX_DAMPING = 1.0


class _Scales(dict[str, Tensor]):
    """What an owner keeps of its linears: name -> [R, groups] of what is left of the linear."""


@dataclass(frozen=True)
class Rounding(BlockPass):
    """Rounds the linears of all blocks, each on the inputs that rounded blocks give."""

    group_size: int  # columns that share a scale

    def change(self, worker: Worker, name: str, A: Tensor) -> None:
        """Round what is left of a linear; its bias stays."""
        mask = worker.mask(name, StructuredMask)
        W = worker.shard.weight(name)
        num_columns = num_inputs(worker.shard.linears[name])
        rows = mask.rows.to(W.device).nonzero()[:, 0]
        columns = mask.columns[:num_columns].to(W.device).nonzero()[:, 0]
        W[rows[:, None], columns], scales = round_columns(
            W[rows][:, columns],
            A[columns][:, columns],
            self.group_size,
            NUM_BITS,
            damping=_DAMPING,
            max_damping=_MAX_DAMPING,
            name=name,
        )
        worker.shard.set_weight(name, W)
        worker.keeping(_Scales)[name] = scales.cpu()


def write_scales(worker: Worker, folder: str) -> str | None:
    """Write the scales of the linears that a worker owns, and return the file's URI.

    None if it owns none.
    """
    if not worker.has(_Scales):
        return None
    uri = files.join(folder, f"scales-{worker.index.shard}-{worker.index.replica}.safetensors")
    tensor_files.write(uri, worker.drop(_Scales))
    return uri


def round_weights(
    cluster: Cluster, sequences: NDArray[np.int64], group_size: int, folder: str
) -> list[str]:
    """Round the weights on the workers, for good, and write what is left of the model.

    Args:
        cluster: with the pruned weights.
        sequences: [num_sequences, sequence_length] tokens of the calibration.
        group_size: columns that share a scale.
        folder: where the weights go, and the scales.

    Returns:
        URIs of the files of scales.
    """
    Rounding(group_size).pass_all(cluster, sequences)
    write_weights(cluster, folder)
    uris = cluster.run_all(write_scales, files.join(folder, "scales"))
    return [uri for uri in uris if uri is not None]
