"""Weights and masks on workers: loaded from a checkpoint or a shot, and saved.

Files are safetensors of bounded size, which replica 0 writes. A shard of any size is written a part
at a time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from ray_surgeon.maths.masks import ElementMask, StructuredMask
from ray_surgeon.memory.stores import NO_SCRATCH, Scratch, ScratchNames, Stores
from ray_surgeon.memory.weights import Read, ReadAhead
from ray_surgeon.models.build import BlockRange, cut, num_inputs
from ray_surgeon.models.checkpoint import Stored, tensor_reader
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.runner import BlockRunner
from ray_surgeon.models.shard import ModelShard
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.spec.sections import ModelSection
from ray_surgeon.storage import files, tensor_files
from ray_surgeon.storage.sources import open_model

T = TypeVar("T")
_Tensors = Iterable[tuple[str, Tensor]]
"""With their names in a file."""

FILE_BYTES = 2**30
"""Largest size of a file of weights, unless one tensor alone is larger.

What it holds is in memory while it is written.
"""


@dataclass(frozen=True)
class ModelRecipe:
    """How a worker gets its weights."""

    model: ModelSection  # the dense model, and the dtype of weights and activations
    # (key, URI of its file) of the commit to continue from
    shot_files: tuple[tuple[str, str], ...] = ()
    scratch: ScratchNames = NO_SCRATCH
    # of a teacher that is another model: its layout, and the blocks of every shard
    teacher: tuple[ModelLayout, tuple[BlockRange, ...]] | None = None

    def part(self, worker: Worker) -> tuple[ModelLayout, BlockRange]:
        """Return the layout of the model, and the blocks of it that a worker holds."""
        layout, blocks = self.teacher or (worker.layout, worker.placement.blocks)
        return layout, blocks[worker.index.shard]


def load(worker: Worker, recipe: ModelRecipe, by_element: bool, stores: Stores) -> None:
    """Load a worker's weights and, when a run is resumed, its masks.

    Args:
        worker: without weights, or with those of a teacher, which are freed.
        recipe: where everything is; of a teacher, there are no masks.
        by_element: whether masks are of elements, or of rows and columns.
        stores: where the weights and factors are kept.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    layout, blocks = recipe.part(worker)
    index = worker.index
    if worker.scratch is not None:
        worker.scratch.close()
    worker.scratch = scratch = Scratch(*recipe.scratch, f"{index.shard}-{index.replica}")
    scratch.remove_earlier()
    dtype = getattr(torch, recipe.model.dtype)
    worker.shard = ModelShard(layout, blocks, dtype, worker.device, stores, scratch)
    worker.runner = BlockRunner(worker.shard)
    kind: type[StructuredMask] | type[ElementMask] = ElementMask if by_element else StructuredMask
    parts = [part.name for part in fields(kind)] if recipe.shot_files else []
    read, stays = reader_of(worker, recipe)
    get = read
    if not stays:
        names = [*worker.shard.wanted, *(f"{n}.{p}" for n in worker.shard.linears for p in parts)]
        of_masks = {f"{s.name}.kept": (s.num_rows, s.num_columns) for s in layout.linears}
        get = ReadAhead(read, names, {**layout.parameters, **of_masks})
    worker.shard.load(get, stays=stays)
    if recipe.teacher is not None:
        if blocks.is_last:
            worker.state.dense_states.head = worker.shard.head_weight
        return
    of_shot = filter(dict(recipe.shot_files).__contains__, worker.shard.weights.slot_of)
    worker.shard.changed.update(dict.fromkeys(of_shot))
    for name in worker.shard.linears:
        sizes = layout.shapes[name].num_rows, layout.shapes[name].num_columns
        tensors = {part: get(f"{name}.{part}").to(torch.bool, copy=True) for part in parts}
        worker.masks[name] = kind(**tensors) if parts else kind.full(*sizes)


def reader_of(worker: Worker, recipe: ModelRecipe) -> tuple[Read, bool]:
    """Return what reads a tensor by its name, and whether it goes on to at little cost."""
    source = open_model(recipe.model)
    layout, _ = recipe.part(worker)
    pruned_in = dict(recipe.shot_files)
    read_dense = tensor_reader(layout, source.uri_of, source.read, source.origin)

    def read(name: str) -> Tensor:
        if name in pruned_in:
            return worker.shot_reader.read(pruned_in[name], name)
        return read_dense(name)

    # stacked tensors are taken apart once, not whenever a block is read
    stays = source.is_local and not layout.family.sparse.stacked
    return read, stays and all(map(files.is_local, set(pruned_in.values())))


@dataclass(frozen=True)
class SavedFile:
    """A file that a worker wrote.

    For example ("shots/0001/shard-0001.safetensors", 123, ("model.layers.0...",)).
    """

    uri: str
    size_bytes: int
    keys: tuple[str, ...] = field(repr=False)


def save_shot(worker: Worker, folder: str) -> tuple[SavedFile, ...]:
    """Write what the method changes: linears, or all that was trained, and the masks."""
    get = worker.shard.tensor
    weights = [((n, get(n)) for n in part) for part in _weight_parts(worker, changed_only=True)]
    files_of: dict[str, Sequence[_Tensors]] = {"shard": weights, "masks": _mask_parts(worker)}
    names = {f"{kind}-{worker.index.shard + 1:04d}": parts for kind, parts in files_of.items()}
    return tuple(chain.from_iterable(_write_all(folder, *named) for named in names.items()))


def save_tensors(folder: str, name: str, tensors: Mapping[str, Tensor]) -> tuple[SavedFile, ...]:
    """Write tensors by name into one or more files, whose names begin with the one given."""
    parts = _of_files([(item, item[1].nbytes) for item in tensors.items()])
    return tuple(_write_all(folder, name, parts))


def _write_all(folder: str, name: str, parts: Sequence[_Tensors]) -> Iterator[SavedFile]:
    for i, part in enumerate(parts, 1):
        suffix = f"-{i:04d}" if len(parts) > 1 else ""
        yield _write(files.join(folder, f"{name}{suffix}.safetensors"), part)


def continue_from_shot(worker: Worker, saved: Sequence[SavedFile]) -> None:
    """Let weights that are streamed from disk come from a committed shot's files.

    The files must be on this machine.
    """
    weights = worker.shard.weights
    are_here = all(files.is_local(file.uri) for file in saved)
    if weights.kept.place == "disk" and are_here:
        uri_of = {key: file.uri for file in saved for key in file.keys}
        reader = tensor_files.Reader()
        weights.continue_from(lambda name: reader.read(uri_of[name], name), uri_of)
        worker.shot_reader.close()


def num_files(worker: Worker, masks: bool) -> tuple[int, int]:
    """Return how many files `save_weights` writes, of weights and of masks."""
    num_masks = len(_mask_parts(worker)) if masks else 0
    return len(_weight_parts(worker, changed_only=False)), num_masks


def save_weights(
    worker: Worker,
    folder: str,
    names: Sequence[str],
    mask_names: Sequence[str],
    left_out: Collection[str],
    stored: bool,
    blocks: Sequence[int],
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
        blocks: numbers of those that are written, in whose order they are numbered anew.
    """
    exported = _Exported(worker, blocks, cut_out=not mask_names, stored=stored)
    names_of_parts = _weight_parts(worker, changed_only=False)
    parts = [exported.tensors(n for n in part if n not in left_out) for part in names_of_parts]
    parts += _mask_parts(worker) if mask_names else []
    uris = (files.join(folder, name) for name in (*names, *mask_names))
    return tuple(_write(uri, part) for uri, part in zip(uris, parts, strict=True))


class _Exported:
    """The tensors of a shard as an export has them."""

    def __init__(
        self, worker: Worker, blocks: Sequence[int], *, cut_out: bool, stored: bool
    ) -> None:
        """Look up what is left of heads and of other parts, if pruned ones are cut out."""
        self._blocks = blocks
        self._shard = worker.shard
        self._masks = worker.masks if cut_out else {}
        layout = worker.layout
        self._stored = Stored(layout, worker.shard.blocks, self._masks, stored=stored)
        # name of a tensor, or of a module, with an entry for each part -> which are left
        self._entries = dict(self._stored.entries)
        per_head = layout.family.per_head if cut_out else ()
        for groups in worker.group_sets if per_head else ():
            if groups.kind == "attention":
                columns = worker.mask(groups.consumer, StructuredMask).columns
                of_heads = columns[groups.columns.flatten()].view(-1, layout.heads.head_dim)
                prefix = layout.family.block_prefix(groups.block)
                self._entries |= {prefix + name: of_heads.any(dim=1) for name in per_head}

    def tensors(self, names: Iterable[str]) -> _Tensors:
        """Yield tensors, without what is cut out; see `Stored.whole`."""
        layout = self._shard.layout
        written = {None, *self._blocks}
        for name in names:
            if layout.block_of(name) in written:
                stored = layout.renumbered(self._stored.name(name), self._blocks)
                yield stored, self._stored.whole(name, self._cut(name))

    def _cut(self, name: str) -> Tensor:
        tensor = self._shard.tensor(name)
        linear, _, part = name.rpartition(".")
        entries = self._entries.get(name, self._entries.get(linear))
        if entries is not None:
            return tensor[entries.to(tensor.device)]
        mask = self._masks.get(linear)
        if mask is None:
            return tensor
        assert isinstance(mask, StructuredMask)
        module = self._shard.linears[linear]
        return cut(module, part, tensor, mask.rows, mask.columns[: num_inputs(module)])


def _weight_parts(worker: Worker, *, changed_only: bool) -> list[list[str]]:
    """Cut names of tensors into those of one file each, by sizes before anything is cut out.

    In whole models, those that checkpoints of the family keep in one tensor follow each other and
    stay together. Replica 0 writes all of them.
    """
    if worker.index.replica:
        return []
    units: dict[str, list[str]] = {}
    for name in worker.shard.saved(changed_only=changed_only):
        stored = name if changed_only else worker.layout.family.stored_in(name)
        units.setdefault(stored, []).append(name)
    num_entries = {name: math.prod(shape) for name, shape in worker.layout.parameters.items()}
    width = worker.shard.dtype.itemsize
    sizes = [(unit, width * sum(num_entries[name] for name in unit)) for unit in units.values()]
    return [list(chain.from_iterable(part)) for part in _of_files(sizes)]


def _mask_parts(worker: Worker) -> list[list[tuple[str, Tensor]]]:
    """Return the tensors of all masks by their names in files, those of one file each.

    Replica 0 writes all of them.
    """
    if worker.index.replica:
        return []
    tensors = [
        (f"{name}.{part}", tensor)
        for name, mask in worker.masks.items()
        for part, tensor in vars(mask).items()
    ]
    return _of_files([((name, tensor), tensor.numel()) for name, tensor in tensors])


def _of_files(sizes: Iterable[tuple[T, int]]) -> list[list[T]]:
    """Put things of these sizes together as files hold them."""
    parts: list[list[T]] = []
    filled = 0
    for thing, size in sizes:
        if not parts or filled + size > FILE_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(thing)
        filled += size
    return parts


def _write(uri: str, tensors: _Tensors) -> SavedFile:
    """Write tensors by name, but those of which nothing is left."""
    kept = {name: tensor for name, tensor in tensors if tensor.numel()}
    return SavedFile(uri, tensor_files.write(uri, kept), tuple(kept))
