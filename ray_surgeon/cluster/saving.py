"""Weights and masks as safetensors files, one a shard; replica 0 writes for all."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor

from ray_surgeon.cluster.worker import Worker
from ray_surgeon.models.linears import cut, num_inputs
from ray_surgeon.storage import files
from ray_surgeon.surgery.masks import StructuredMask


@dataclass(frozen=True)
class SavedFile:
    """A file a worker wrote, e.g. ("shots/0001/shard-0001.safetensors", 123, ("model.layers.0...",))."""

    uri: str
    size_bytes: int
    keys: tuple[str, ...] = field(repr=False)


def save_shot(worker: Worker, folder: str) -> tuple[SavedFile, ...]:
    """Write what the method changes: the linears and the masks of a shard."""
    linears = worker.shard.tensors(linears_only=True)
    return _write(worker, folder, {"shard-{shard:04d}.safetensors": linears, "masks-{shard:04d}.safetensors": _masks(worker)})


def save_weights(
    worker: Worker, folder: str, name: str, *, masks: str | None, cut_out: bool, left_out: Collection[str]
) -> tuple[SavedFile, ...]:
    """Write a shard's whole part of the model.

    Args:
        worker: of the shard.
        folder: URI.
        name: file name with ``{shard}`` in it, which becomes the shard's number from 1.
        masks: file name of the masks, likewise; None writes none.
        cut_out: whether pruned rows and columns are left out, and with them tensors of which nothing is left.
        left_out: names of other tensors to leave out.
    """
    tensors = worker.shard.tensors(linears_only=False)
    if cut_out:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in left_out}
        for linear, module in worker.shard.linears.items():
            mask = worker.mask(linear, StructuredMask)
            parts = cut(module, mask.rows, mask.columns[: num_inputs(module)])
            tensors.update({f"{linear}.{part}": tensor for part, tensor in parts.items()})
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    return _write(worker, folder, {name: tensors} | ({} if masks is None else {masks: _masks(worker)}))


def _masks(worker: Worker) -> dict[str, Tensor]:
    return {f"{name}.{part}": value for name, mask in worker.masks.items() for part, value in mask.tensors().items()}


def _write(worker: Worker, folder: str, contents: dict[str, dict[str, Tensor]]) -> tuple[SavedFile, ...]:
    if worker.index.replica != 0:
        return ()
    saved = []
    for template, tensors in contents.items():
        uri = files.join(folder, template.format(shard=worker.index.shard + 1))
        saved.append(SavedFile(uri, files.write_tensors(uri, tensors), tuple(tensors)))
    return tuple(saved)
