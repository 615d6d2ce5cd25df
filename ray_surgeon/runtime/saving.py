"""Weights and masks as safetensors files of bounded size; replica 0 writes them.

A shard of any size is written a part at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.memory.weights import DiskWeights
from ray_surgeon.models.build import stored_name
from ray_surgeon.models.checkpoint import Stack, part_of_stack
from ray_surgeon.models.linears import cut, num_inputs
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.storage import files, tensor_files

T = TypeVar("T")

FILE_BYTES = 2**30
"""Largest size of a file of weights, unless one tensor alone is larger.

What it holds is in memory while it is written.
"""


@dataclass(frozen=True)
class SavedFile:
    """A file that a worker wrote.

    For example ("shots/0001/shard-0001.safetensors", 123, ("model.layers.0...",)).
    """

    uri: str
    size_bytes: int
    keys: tuple[str, ...] = field(repr=False)


def save_shot(worker: Worker, folder: str) -> tuple[SavedFile, ...]:
    """Write what the method changes: the linears and the masks of a shard."""
    if worker.index.replica != 0:
        return ()
    saved = []
    number = worker.index.shard + 1
    weights = _parts(worker, worker.shard.saved(linears_only=True))
    for kind, parts, get in (
        ("shard", weights, worker.shard.tensor),
        ("masks", _mask_parts(worker), _mask_getter(worker)),
    ):
        for i, names in enumerate(parts, 1):
            suffix = f"-{i:04d}" if len(parts) > 1 else ""
            saved.append(
                _write(files.join(folder, f"{kind}-{number:04d}{suffix}.safetensors"), names, get)
            )
    return tuple(saved)


def continue_from_shot(worker: Worker, saved: Sequence[SavedFile]) -> None:
    """Let weights that are streamed from disk come from a committed shot's files.

    The files must be on this machine.
    """
    weights = worker.shard.weights
    if isinstance(weights, DiskWeights) and all(files.is_local(file.uri) for file in saved):
        uri_of = {key: file.uri for file in saved for key in file.keys}
        reader = tensor_files.Reader()
        weights.continue_from(lambda name: reader.read(uri_of[name], name), uri_of)
        worker.shot_reader.close()


def num_files(worker: Worker, masks: bool) -> tuple[int, int]:
    """Return how many files `save_weights` writes, of weights and of masks."""
    if worker.index.replica != 0:
        return 0, 0
    return len(_parts(worker, worker.shard.saved(linears_only=False), stacked=True)), len(
        _mask_parts(worker)
    ) if masks else 0


def save_weights(
    worker: Worker,
    folder: str,
    names: Sequence[str],
    mask_names: Sequence[str],
    *,
    cut_out: bool,
    left_out: Collection[str],
    stored: bool,
) -> tuple[SavedFile, ...]:
    """Write a shard's whole part of the model.

    Args:
        worker: of the shard.
        folder: URI.
        names: of the files of weights.
        mask_names: of the files of masks.
        cut_out: whether pruned rows and columns are left out, and with them tensors of which
            nothing is left.
        left_out: names of other tensors to leave out.
        stored: whether tensors are called as in the family's own checkpoints, or as they are here.
    """
    if worker.index.replica != 0:
        return ()

    family = worker.layout.family
    exported = _Exported(worker, cut_out=cut_out)
    is_stacked = stored and family.stacks_experts

    def called(name: str) -> str:
        part = part_of_stack(family, name) if is_stacked else None
        if part is not None:
            return part.whole
        return stored_name(family, exported.called(name)) if stored else exported.called(name)

    parts = _parts(worker, worker.shard.saved(linears_only=False), stacked=True)
    wanted = [[name for name in part if name not in left_out] for part in parts]
    get = exported.of_stack if is_stacked else exported.get
    saved = [
        _write(files.join(folder, name), part, get, called)
        for name, part in zip(names, wanted, strict=True)
    ]
    masks = zip(mask_names, _mask_parts(worker), strict=True) if mask_names else ()
    return tuple(
        saved
        + [_write(files.join(folder, name), part, _mask_getter(worker)) for name, part in masks]
    )


class _Exported:
    """The tensors of a shard as an export has them."""

    def __init__(self, worker: Worker, *, cut_out: bool) -> None:
        """Look up what is left of experts and heads, if pruned parts are cut out."""
        self._worker = worker
        self._cut_out = cut_out
        family = worker.layout.family
        sets = worker.expert_sets if cut_out else []
        sparse = family.sparse
        kept = {experts: ~worker.removed_experts(experts) for experts in sets}
        self._numbers = {
            experts.name: (left.cumsum(0) - 1).tolist() for experts, left in kept.items()
        }
        self._num_left = {experts.name: int(left.sum()) for experts, left in kept.items()}
        self._entries = (
            {family.block_prefix(e.block) + sparse.router: left for e, left in kept.items()}
            if sparse is not None
            else {}
        )
        for groups in worker.group_sets if cut_out and family.per_head else ():
            if groups.kind == "attention":
                columns = worker.mask(groups.consumer, StructuredMask).columns[
                    groups.columns.flatten()
                ]
                heads = columns.view(-1, worker.layout.heads.head_dim).any(dim=1)
                self._entries |= {
                    family.block_prefix(groups.block) + name: heads for name in family.per_head
                }
        self._stacks: dict[str, Stack] = {}

    def get(self, name: str) -> Tensor:
        """Return a tensor, without what is cut out."""
        tensor = self._worker.shard.tensor(name)
        (linear, _, part) = name.rpartition(".")
        for of in (name, linear):
            if of in self._entries:
                return tensor[self._entries[of].to(tensor.device)]
        if not self._cut_out or linear not in self._worker.shard.linears:
            return tensor
        mask = self._worker.mask(linear, StructuredMask)
        module = self._worker.shard.linears[linear]
        return cut(module, part, tensor, mask.rows, mask.columns[: num_inputs(module)])

    def called(self, name: str) -> str:
        """Return its name, experts being numbered without those that are gone."""
        sparse = self._worker.layout.family.sparse
        part = sparse.tensor_of(name) if sparse is not None else None
        if part is None or part.experts not in self._numbers:
            return name
        number = self._numbers[part.experts][part.number]
        return f"{part.experts}.{number}.{part.linear}.{part.kind}"

    def of_stack(self, name: str) -> Tensor:
        """Return the tensor that holds all experts, with this expert's part filled in.

        It also has the parts that were asked for before. Other tensors are returned as they are.
        """
        part = part_of_stack(self._worker.layout.family, name)
        tensor = self.get(name)
        if part is None or not tensor.numel():
            return tensor
        experts = part.whole.rpartition(".")[0]
        place = self._numbers[experts][part.expert] if experts in self._numbers else part.expert
        if part.whole not in self._stacks:
            assert self._worker.layout.family.sparse is not None
            num_left = self._num_left.get(experts, self._worker.layout.num_experts)
            self._stacks = {part.whole: Stack(self._worker.layout.family.sparse, num_left)}
        self._stacks[part.whole].put(part, place, tensor)
        return self._stacks[part.whole].tensor


def _parts(worker: Worker, names: Sequence[str], *, stacked: bool = False) -> list[list[str]]:
    """Cut names of tensors into those of one file each, by sizes before anything is cut.

    With `stacked`, those that checkpoints of the family keep in one tensor follow each other and
    stay together.
    """
    units: dict[str, list[str]] = {}
    for name in names:
        part = part_of_stack(worker.layout.family, name) if stacked else None
        units.setdefault(name if part is None else part.whole, []).append(name)
    width = worker.shard.dtype.itemsize
    sizes = [
        (unit, sum(width * torch.Size(worker.layout.parameters[name]).numel() for name in unit))
        for unit in units.values()
    ]
    return [[name for unit in part for name in unit] for part in _by_size(sizes)]


def _mask_parts(worker: Worker) -> list[list[str]]:
    return _by_size(
        [
            (f"{name}.{part}", tensor.numel())
            for name, mask in worker.masks.items()
            for part, tensor in mask.tensors().items()
        ]
    )


def _mask_getter(worker: Worker) -> Callable[[str], Tensor]:
    def get(key: str) -> Tensor:
        name, _, part = key.rpartition(".")
        return worker.masks[name].tensors()[part]

    return get


def _by_size(sizes: Sequence[tuple[T, int]]) -> list[list[T]]:
    parts: list[list[T]] = [[]]
    filled = 0
    for name, size in sizes:
        if parts[-1] and filled + size > FILE_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts


def _write(
    uri: str, names: Sequence[str], get: Callable[[str], Tensor], called: Callable[[str], str] = str
) -> SavedFile:
    tensors = {called(name): tensor for name in names if (tensor := get(name)).numel()}
    return SavedFile(uri, tensor_files.write(uri, tensors), tuple(tensors))
