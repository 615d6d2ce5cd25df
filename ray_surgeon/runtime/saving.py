"""Weights and masks as safetensors files of bounded size; replica 0 writes them.

A shard of any size is written a part at a time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

from torch import Tensor

from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.memory.weights import StreamedWeights
from ray_surgeon.models.build import cut, num_inputs
from ray_surgeon.models.checkpoint import Stack
from ray_surgeon.models.experts import ExpertTensor
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
    masks = _mask_tensors(worker)
    for kind, parts, get in (
        ("shard", _weight_parts(worker, linears_only=True), worker.shard.tensor),
        ("masks", _mask_parts(masks), masks.__getitem__),
    ):
        for i, part in enumerate(parts, 1):
            suffix = f"-{i:04d}" if len(parts) > 1 else ""
            name = f"{kind}-{worker.index.shard + 1:04d}{suffix}.safetensors"
            saved.append(_write(files.join(folder, name), ((n, get(n)) for n in part)))
    return tuple(saved)


def continue_from_shot(worker: Worker, saved: Sequence[SavedFile]) -> None:
    """Let weights that are streamed from disk come from a committed shot's files.

    The files must be on this machine.
    """
    weights = worker.shard.weights
    are_here = all(files.is_local(file.uri) for file in saved)
    if isinstance(weights, StreamedWeights) and weights.kept.place == "disk" and are_here:
        uri_of = {key: file.uri for file in saved for key in file.keys}
        reader = tensor_files.Reader()
        weights.continue_from(lambda name: reader.read(uri_of[name], name), uri_of)
        worker.shot_reader.close()


def num_files(worker: Worker, masks: bool) -> tuple[int, int]:
    """Return how many files `save_weights` writes, of weights and of masks."""
    if worker.index.replica != 0:
        return 0, 0
    num_of_masks = len(_mask_parts(_mask_tensors(worker))) if masks else 0
    return len(_weight_parts(worker, linears_only=False)), num_of_masks


def save_weights(
    worker: Worker,
    folder: str,
    names: Sequence[str],
    mask_names: Sequence[str],
    left_out: Collection[str],
    stored: bool,
) -> tuple[SavedFile, ...]:
    """Write a shard's whole part of the model.

    Args:
        worker: of the shard.
        folder: URI.
        names: of the files of weights.
        mask_names: of the files of masks; if there are none, pruned rows and columns are left out,
            and with them tensors of which nothing is left.
        left_out: names of other tensors to leave out.
        stored: whether tensors are called as in the family's own checkpoints, or as they are here.
    """
    if worker.index.replica != 0:
        return ()
    saved = []
    exported = _Exported(worker, cut_out=not mask_names, stored=stored)
    for name, part in zip(names, _weight_parts(worker, linears_only=False), strict=True):
        tensors = ((exported.name(n), exported.get(n)) for n in part if n not in left_out)
        saved.append(_write(files.join(folder, name), tensors))
    masks = _mask_tensors(worker)
    for name, part in zip(mask_names, _mask_parts(masks) if mask_names else (), strict=True):
        saved.append(_write(files.join(folder, name), ((n, masks[n]) for n in part)))
    return tuple(saved)


class _Exported:
    """The tensors of a shard as an export has them."""

    def __init__(self, worker: Worker, *, cut_out: bool, stored: bool) -> None:
        """Look up what is left of experts and heads, if pruned parts are cut out."""
        self._worker = worker
        self._cut_out = cut_out
        self._stored = stored
        self._family = worker.layout.family
        self._left: dict[str, Tensor] = {}  # global name of a block's experts -> which are left
        # name of a tensor, or of a module, with an entry for each expert or head -> which are left
        self._entries: dict[str, Tensor] = {}
        self._stack: tuple[str, Stack] | None = None  # the one that is being put together
        if not cut_out:
            return
        for experts in worker.expert_sets:
            assert self._family.sparse is not None
            left = ~worker.removed_experts(experts)
            self._left[experts.name] = left
            router = self._family.block_prefix(experts.block) + self._family.sparse.router
            self._entries[router] = left
        for groups in worker.group_sets if self._family.per_head else ():
            if groups.kind == "attention":
                columns = worker.mask(groups.consumer, StructuredMask).columns
                of_heads = columns[groups.columns.flatten()].view(-1, worker.layout.heads.head_dim)
                for name in self._family.per_head:
                    full_name = self._family.block_prefix(groups.block) + name
                    self._entries[full_name] = of_heads.any(dim=1)

    def _part_of_stack(self, name: str) -> ExpertTensor | None:
        return self._family.part_of_stack(name) if self._stored else None

    def _place(self, experts: str, number: int) -> int:
        """Return the number of an expert among those that are left."""
        return int(self._left[experts][:number].sum()) if experts in self._left else number

    def name(self, name: str) -> str:
        """Return what a tensor is called, experts being numbered without those that are gone."""
        stack = self._part_of_stack(name)
        if stack is not None:
            return stack.whole
        part = self._family.sparse.tensor_of(name) if self._family.sparse is not None else None
        if part is not None:
            number = self._place(part.experts, part.expert)
            name = f"{part.experts}.{number}.{part.linear}.{part.kind}"
        return self._family.stored_name(name) if self._stored else name

    def get(self, name: str) -> Tensor:
        """Return a tensor, without what is cut out.

        In place of an expert's, if these are stored together, it is the one with all experts, in
        which the parts that were wanted before are filled in.
        """
        tensor = self._cut(name)
        part = self._part_of_stack(name)
        if part is None or not tensor.numel():
            return tensor
        experts = part.whole.rpartition(".")[0]
        if self._stack is None or self._stack[0] != part.whole:
            assert self._family.sparse is not None
            num_left = self._place(experts, self._worker.layout.num_experts)
            self._stack = part.whole, Stack(num_left)
        stack = self._stack[1]
        stack.put(part, self._place(experts, part.expert), tensor)
        return stack.tensor

    def _cut(self, name: str) -> Tensor:
        tensor = self._worker.shard.tensor(name)
        linear, _, part = name.rpartition(".")
        entries = self._entries.get(name, self._entries.get(linear))
        if entries is not None:
            return tensor[entries.to(tensor.device)]
        if not self._cut_out or linear not in self._worker.shard.linears:
            return tensor
        mask = self._worker.mask(linear, StructuredMask)
        module = self._worker.shard.linears[linear]
        return cut(module, part, tensor, mask.rows, mask.columns[: num_inputs(module)])


def _weight_parts(worker: Worker, *, linears_only: bool) -> list[list[str]]:
    """Cut names of tensors into those of one file each, by sizes before anything is cut out.

    In whole models, those that checkpoints of the family keep in one tensor follow each other and
    stay together.
    """
    units: dict[str, list[str]] = {}
    for name in worker.shard.saved(linears_only=linears_only):
        stored = name if linears_only else worker.layout.family.stored_in(name)
        units.setdefault(stored, []).append(name)
    num_entries = {name: math.prod(shape) for name, shape in worker.layout.parameters.items()}
    width = worker.shard.dtype.itemsize
    sizes = [(unit, width * sum(num_entries[name] for name in unit)) for unit in units.values()]
    return [list(chain.from_iterable(part)) for part in _by_size(sizes)]


def _mask_tensors(worker: Worker) -> dict[str, Tensor]:
    """Return the tensors of all masks by their names in files."""
    return {
        f"{name}.{part}": tensor
        for name, mask in worker.masks.items()
        for part, tensor in vars(mask).items()
    }


def _mask_parts(masks: dict[str, Tensor]) -> list[list[str]]:
    return _by_size([(name, tensor.numel()) for name, tensor in masks.items()])


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


def _write(uri: str, tensors: Iterable[tuple[str, Tensor]]) -> SavedFile:
    """Write tensors by name, but those of which nothing is left."""
    kept = {name: tensor for name, tensor in tensors if tensor.numel()}
    return SavedFile(uri, tensor_files.write(uri, kept), tuple(kept))
