"""What workers keep of the linears that they own, written for a process that needs all of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ray_surgeon.models.checkpoint import Stored
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.storage import files, tensor_files


def write_kept(
    worker: Worker,
    kind: type[dict[str, Tensor]],
    folder: str,
    blocks: Sequence[int],
    *,
    stored: bool,
) -> None:
    """Write the tensors of linears that a worker keeps into a file, if it has some, and forget it.

    A tensor is called as the linear's weight in an export.

    Args:
        worker: that keeps them.
        kind: class as which it does, by the linears' names.
        folder: where the files of all workers go; see `tensor_files.read_folder`.
        blocks: numbers of those that are left, by which names are numbered anew.
        stored: whether names are those of the family's own checkpoints, or as they are here.
    """
    if worker.has(kind):
        file = f"{worker.index.shard}-{worker.index.replica}.safetensors"
        layout = worker.layout
        written = Stored(layout, worker.shard.blocks, worker.masks, stored=stored)
        tensors = {
            layout.renumbered(written.name(f"{linear}.weight"), blocks): tensor
            for linear, tensor in worker.drop(kind).items()
        }
        tensor_files.write(files.join(folder, file), tensors)
