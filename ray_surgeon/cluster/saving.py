"""Weights and masks as safetensors files of bounded size, so that a shard of any size is written a part at a time; replica 0 writes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ray_surgeon.cluster.needs import FILE_BYTES
from ray_surgeon.cluster.worker import Worker
from ray_surgeon.memory.weights import DiskWeights
from ray_surgeon.models.build import stored_name
from ray_surgeon.models.linears import cut, num_inputs
from ray_surgeon.storage import files, tensor_files
from ray_surgeon.surgery.masks import StructuredMask


@dataclass(frozen=True)
class SavedFile:
    """A file a worker wrote, e.g. ("shots/0001/shard-0001.safetensors", 123, ("model.layers.0...",))."""

    uri: str
    size_bytes: int
    keys: tuple[str, ...] = field(repr=False)


def save_shot(worker: Worker, folder: str) -> tuple[SavedFile, ...]:
    """Write what the method changes: the linears and the masks of a shard."""
    if worker.index.replica != 0:
        return ()
    saved, number = [], worker.index.shard + 1
    weights = _parts(worker, worker.shard.saved(linears_only=True))
    for kind, parts, get in (("shard", weights, worker.shard.tensor), ("masks", _mask_parts(worker), _mask_getter(worker))):
        for i, names in enumerate(parts, 1):
            suffix = f"-{i:04d}" if len(parts) > 1 else ""
            saved.append(_write(files.join(folder, f"{kind}-{number:04d}{suffix}.safetensors"), names, get))
    return tuple(saved)


def continue_from_shot(worker: Worker, saved: Sequence[SavedFile]) -> None:
    """Let weights that are streamed from disk come from the files of a committed shot, if these are on this machine."""
    weights = worker.shard.weights
    if isinstance(weights, DiskWeights) and all(files.is_local(file.uri) for file in saved):
        uri_of, reader = {key: file.uri for file in saved for key in file.keys}, tensor_files.Reader()
        weights.continue_from(lambda name: reader.read(uri_of[name], name))


def num_files(worker: Worker, masks: bool) -> tuple[int, int]:
    """Return how many files `save_weights` writes, of weights and of masks."""
    if worker.index.replica != 0:
        return 0, 0
    return len(_parts(worker, worker.shard.saved(linears_only=False))), len(_mask_parts(worker)) if masks else 0


def save_weights(
    worker: Worker, folder: str, names: Sequence[str], mask_names: Sequence[str], *, cut_out: bool, left_out: Collection[str], stored: bool
) -> tuple[SavedFile, ...]:
    """Write a shard's whole part of the model.

    Args:
        worker: of the shard.
        folder: URI.
        names: of the files of weights.
        mask_names: of the files of masks.
        cut_out: whether pruned rows and columns are left out, and with them tensors of which nothing is left.
        left_out: names of other tensors to leave out.
        stored: whether tensors are called as in the family's own checkpoints, or as they are here.
    """
    if worker.index.replica != 0:
        return ()

    def get(name: str) -> Tensor:
        tensor, (linear, _, part) = worker.shard.tensor(name), name.rpartition(".")
        if cut_out and linear in routers:
            return tensor[routers[linear].to(tensor.device)]
        if not cut_out or linear not in worker.shard.linears:
            return tensor
        mask, module = worker.mask(linear, StructuredMask), worker.shard.linears[linear]
        return cut(module, part, tensor, mask.rows, mask.columns[: num_inputs(module)])

    def called(name: str) -> str:
        for experts, places in numbers.items():
            if name.startswith(f"{experts}."):
                number, dot, rest = name.removeprefix(f"{experts}.").partition(".")
                name = f"{experts}.{places[int(number)]}{dot}{rest}"
        return stored_name(worker.layout.family, name) if stored else name

    kept, sparse = {e: ~worker.removed_experts(e) for e in worker.expert_sets} if cut_out else {}, worker.layout.family.sparse
    numbers = {experts.name: (left.cumsum(0) - 1).tolist() for experts, left in kept.items()}
    routers = {worker.layout.family.block_prefix(e.block) + sparse.router: left for e, left in kept.items()} if sparse is not None else {}
    parts = _parts(worker, worker.shard.saved(linears_only=False))
    wanted = [[name for name in part if name not in left_out] for part in parts]
    saved = [_write(files.join(folder, name), part, get, called) for name, part in zip(names, wanted, strict=True)]
    masks = zip(mask_names, _mask_parts(worker), strict=True) if mask_names else ()
    return tuple(saved + [_write(files.join(folder, name), part, _mask_getter(worker)) for name, part in masks])


def _parts(worker: Worker, names: Sequence[str]) -> list[list[str]]:
    """Cut names of tensors into those of one file each, by the sizes they have before anything is cut out."""
    width = worker.shard.dtype.itemsize
    return _by_size([(name, width * torch.Size(worker.layout.parameters[name]).numel()) for name in names])


def _mask_parts(worker: Worker) -> list[list[str]]:
    return _by_size([(f"{name}.{part}", tensor.numel()) for name, mask in worker.masks.items() for part, tensor in mask.tensors().items()])


def _mask_getter(worker: Worker) -> Callable[[str], Tensor]:
    def get(key: str) -> Tensor:
        name, _, part = key.rpartition(".")
        return worker.masks[name].tensors()[part]

    return get


def _by_size(sizes: Sequence[tuple[str, int]]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if parts[-1] and filled + size > FILE_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts


def _write(uri: str, names: Sequence[str], get: Callable[[str], Tensor], called: Callable[[str], str] = str) -> SavedFile:
    tensors = {called(name): tensor for name in names if (tensor := get(name)).numel()}
    return SavedFile(uri, tensor_files.write(uri, tensors), tuple(tensors))
