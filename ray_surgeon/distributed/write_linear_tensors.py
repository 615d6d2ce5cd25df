"""Writes tensors of the linears that a worker owns, for a process that reads those of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ray_surgeon.distributed.worker import Worker
from ray_surgeon.models.checkpoint import Stored
from ray_surgeon.storage import files, tensor_files


def write_linear_tensors(
    worker: Worker,
    of_linears: Mapping[str, Tensor],
    folder: str,
    blocks: Sequence[int],
    *,
    stored: bool,
) -> None:
    """Write one tensor for each of some linears into a file, if there are any.

    A tensor is called as the linear's weight in an export.

    Args:
        worker: that owns the linears.
        of_linears: linear -> tensor.
        folder: where the files of all workers go; see `tensor_files.read_folder`.
        blocks: numbers of those that are left, by which names are numbered anew.
        stored: whether names are those of the family's own checkpoints, or as they are here.
    """
    if of_linears:
        file = f"{worker.index.shard}-{worker.index.replica}.safetensors"
        layout = worker.layout
        written = Stored(layout, worker.shard.blocks, worker.masks, stored=stored)
        tensors = {
            layout.renumbered(written.name(f"{linear}.weight"), blocks): tensor
            for linear, tensor in of_linears.items()
        }
        tensor_files.write(files.join(folder, file), tensors)
