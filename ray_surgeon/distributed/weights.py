"""Loads and saves the weights and masks of workers.

Weights come from a checkpoint or a shot. Replica 0 writes them as safetensors files of bounded
size, one file at a time, so that a shard of any size can be written.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TypeVar

import torch
from torch import Tensor

from ray_surgeon.config.sections import ModelSection
from ray_surgeon.distributed.worker import Worker
from ray_surgeon.maths.masks import ElementMask, StructuredMask
from ray_surgeon.memory.stores import (
    NO_SCRATCH,
    Read,
    ReadAhead,
    Scratch,
    ScratchNames,
    Stores,
)
from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.checkpoint import tensor_reader
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.runner import BlockRunner
from ray_surgeon.models.shard import ExportedTensors, ModelShard
from ray_surgeon.storage import files, tensor_files
from ray_surgeon.storage.sources import ModelFiles, open_model
from ray_surgeon.storage.wrapped import key_in_whole

T = TypeVar("T")
_Tensors = Iterable[tuple[str, Tensor]]
"""Tensors with their names in a file."""

FILE_BYTES = 2**30
"""Largest size of a file of weights, unless a single tensor is larger.

The content of a file is in memory while it is written.
"""


@dataclass(frozen=True)
class ModelRecipe:
    """How a worker gets its weights."""

    model: ModelSection  # the dense model, and the dtype of weights and activations
    # (key, URI of its file) of the commit to continue from
    shot_files: tuple[tuple[str, str], ...] = ()
    scratch: ScratchNames = NO_SCRATCH
    # layout of a teacher that is another model, and the blocks of each of its shards
    teacher: tuple[ModelLayout, tuple[BlockRange, ...]] | None = None

    def part(self, worker: Worker) -> tuple[ModelLayout, BlockRange]:
        """Return the layout of the model and the blocks of it that a worker holds."""
        if self.teacher is not None:
            layout, blocks = self.teacher
        else:
            layout, blocks = worker.layout, worker.placement.blocks
        return layout, blocks[worker.index.shard]


def load(worker: Worker, recipe: ModelRecipe, by_element: bool, stores: Stores) -> None:
    """Load a worker's weights and, when a run is resumed, its masks.

    Args:
        worker: has no weights, or those of a teacher, which are freed.
        recipe: where the weights and masks are; a teacher has no masks.
        by_element: whether masks are of elements, or of rows and columns.
        stores: where the weights and factors are kept.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    layout, blocks = recipe.part(worker)
    if worker.scratch is not None:
        worker.scratch.close()
    scratch = new_scratch(worker, recipe.scratch)
    scratch.remove_earlier()
    worker.scratch = scratch
    worker.shard = ModelShard(
        layout=layout,
        blocks=blocks,
        dtype=getattr(torch, recipe.model.dtype),
        device=worker.device,
        stores=stores,
        scratch=scratch,
    )
    worker.runner = BlockRunner(worker.shard)
    mask_type: type[StructuredMask] | type[ElementMask] = StructuredMask
    if by_element:
        mask_type = ElementMask
    mask_parts: list[str] = []
    if recipe.shot_files:
        mask_parts = [part.name for part in fields(mask_type)]
    read, stays = reader_of(worker, recipe)
    if not stays:
        names = list(worker.shard.wanted)
        for linear in worker.shard.linears:
            names.extend(f"{linear}.{part}" for part in mask_parts)
        read = ReadAhead(read, names, _shapes_of_files(layout))
    worker.shard.load(read, stays=stays)
    if recipe.teacher is not None:
        if blocks.is_last:
            worker.state.dense_states.head = worker.shard.head_weight
        return
    in_shot = dict(recipe.shot_files)
    for name in worker.shard.weights.slot_of:
        if name in in_shot:
            worker.shard.changed[name] = None
    _load_masks(worker, read, mask_type, mask_parts)


def _load_masks(
    worker: Worker,
    read: Read,
    mask_type: type[StructuredMask] | type[ElementMask],
    parts: Sequence[str],
) -> None:
    """Read the given parts of all masks; without parts, masks keep everything."""
    for name in worker.shard.linears:
        if parts:
            tensors = {
                part: read(f"{name}.{part}").to(torch.bool, copy=True) for part in parts
            }
            worker.masks[name] = mask_type(**tensors)
        else:
            shape = worker.layout.shapes[name]
            worker.masks[name] = mask_type.full(shape.num_rows, shape.num_columns)


def new_scratch(worker: Worker, names: ScratchNames, suffix: str = "") -> Scratch:
    """Return a scratch folder for a worker; `suffix` tells several of one worker apart."""
    index = worker.index
    return Scratch(
        root=names.root,
        run=names.run,
        attempt=names.attempt,
        worker=f"{index.shard}-{index.replica}{suffix}",
    )


def _shapes_of_files(layout: ModelLayout) -> dict[str, Sequence[int]]:
    """Return the shapes of all parameters and element masks by their names in files."""
    shapes: dict[str, Sequence[int]] = dict(layout.parameters)
    for linear in layout.linears:
        shapes[f"{linear.name}.kept"] = (linear.num_rows, linear.num_columns)
    return shapes


def reader_of(worker: Worker, recipe: ModelRecipe) -> tuple[Read, bool]:
    """Return a function that reads tensors by name, and whether later reads are cheap."""
    source = open_model(recipe.model)
    layout, _ = recipe.part(worker)
    uri_in_shot = dict(recipe.shot_files)
    read_dense = tensor_reader(layout, source.uri_of, source.read, source.origin)

    def read(name: str) -> Tensor:
        if name in uri_in_shot:
            return worker.shot_reader.read(uri_in_shot[name], name)
        return read_dense(name)

    # stacked tensors are taken apart once, not whenever a block is read
    stays = source.is_local and not layout.family.sparse.stacked
    return read, stays and all(map(files.is_local, set(uri_in_shot.values())))


@dataclass(frozen=True)
class SavedFile:
    """A file that a worker wrote.

    For example ("shots/0001/shard-0001.safetensors", 123, ("model.layers.0...",)).
    """

    uri: str
    size_bytes: int
    keys: tuple[str, ...] = field(repr=False)


def save_shot(worker: Worker, folder: str) -> tuple[SavedFile, ...]:
    """Write the masks and the weights that have changed: linears, or all that were trained."""
    number = f"{worker.index.shard + 1:04d}"
    parts = _weight_parts(worker, changed_only=True)
    weights = [_named_tensors(worker.shard, names) for names in parts]
    saved = [
        *_write_all(folder, f"shard-{number}", weights),
        *_write_all(folder, f"masks-{number}", _mask_parts(worker)),
    ]
    return tuple(saved)


def _named_tensors(shard: ModelShard, names: Iterable[str]) -> _Tensors:
    for name in names:
        yield name, shard.tensor(name)


def save_tensors(
    folder: str,
    name: str,
    tensors: Mapping[str, Tensor],
) -> tuple[SavedFile, ...]:
    """Write tensors by name into one or more files, whose names begin with `name`."""
    parts = _split_into_files([(item, item[1].nbytes) for item in tensors.items()])
    return tuple(_write_all(folder, name, parts))


def _write_all(folder: str, name: str, parts: Sequence[_Tensors]) -> Iterator[SavedFile]:
    for i, part in enumerate(parts, 1):
        suffix = f"-{i:04d}" if len(parts) > 1 else ""
        yield _write(files.join(folder, f"{name}{suffix}.safetensors"), part)


def continue_from_shot(worker: Worker, saved: Sequence[SavedFile]) -> None:
    """Stream weights that are kept on disk from the files of a committed shot from now on.

    This needs all files on this machine; otherwise nothing changes.
    """
    weights = worker.shard.weights
    if weights.kept.place != "disk":
        return
    if not all(files.is_local(file.uri) for file in saved):
        return
    uri_of: dict[str, str] = {}
    for file in saved:
        uri_of.update(dict.fromkeys(file.keys, file.uri))
    reader = tensor_files.Reader()
    weights.continue_from(lambda name: reader.read(uri_of[name], name), uri_of)
    worker.shot_reader.close()


def num_files(worker: Worker, masks: bool) -> tuple[int, int]:
    """Return how many files of weights and of masks `save_weights` writes."""
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
    prefixes: Mapping[str, str],
) -> tuple[SavedFile, ...]:
    """Write a shard's whole part of the model.

    Args:
        worker: holds the shard.
        folder: URI.
        names: names of the files of weights.
        mask_names: names of the files of masks. If there are none, pruned rows and columns are cut
            out, and tensors that become empty are not written.
        left_out: names of other tensors that are not written.
        stored: whether tensors have the names of the family's checkpoints, or those used here.
        blocks: numbers of the blocks to write, which are renumbered in this order.
        prefixes: of a language model inside of a checkpoint; see `wrapped.prefixes_of`.
    """
    exported = ExportedTensors(
        worker.shard,
        {} if mask_names else worker.masks,
        worker.group_sets,
        blocks=blocks,
        left_out=left_out,
        stored=stored,
    )
    parts: list[_Tensors] = []
    for names_of_file in _weight_parts(worker, changed_only=False):
        parts.append(_in_whole(exported.tensors(names_of_file), prefixes))
    if mask_names:
        parts.extend(_mask_parts(worker))
    saved: list[SavedFile] = []
    for name, part in zip([*names, *mask_names], parts, strict=True):
        saved.append(_write(files.join(folder, name), part))
    return tuple(saved)


def _in_whole(tensors: _Tensors, prefixes: Mapping[str, str]) -> _Tensors:
    for name, tensor in tensors:
        yield key_in_whole(name, prefixes), tensor


def save_others(
    source: ModelFiles, folder: str, names: Sequence[str]
) -> tuple[SavedFile, ...]:
    """Write the tensors of a whole checkpoint that are not of its language model, unchanged.

    Args:
        source: the language model inside of the checkpoint.
        folder: URI.
        names: names of the files, as many as `parts_of_others` has parts.
    """
    assert source.whole is not None
    saved = []
    for name, keys in zip(names, parts_of_others(source), strict=True):
        tensors = [(key, source.whole.read(key)) for key in keys]
        saved.append(_write(files.join(folder, name), tensors))
    return tuple(saved)


def parts_of_others(source: ModelFiles) -> list[list[str]]:
    """Return the keys of the tensors that `save_others` writes, grouped by file."""
    return _split_into_files(source.other_sizes.items())


def _weight_parts(worker: Worker, *, changed_only: bool) -> list[list[str]]:
    """Return the names of the tensors in each file, by sizes before anything is cut out.

    In whole models, tensors that the family's checkpoints store as one stay together. Only
    replica 0 writes weights.
    """
    if worker.index.replica:
        return []
    units: dict[str, list[str]] = {}
    for name in worker.shard.saved(changed_only=changed_only):
        stored = name if changed_only else worker.layout.family.stored_in(name)
        units.setdefault(stored, []).append(name)
    element_bytes = worker.shard.dtype.itemsize
    sizes: list[tuple[list[str], int]] = []
    for unit in units.values():
        num_entries = sum(math.prod(worker.layout.parameters[name]) for name in unit)
        sizes.append((unit, element_bytes * num_entries))
    parts: list[list[str]] = []
    for units_of_file in _split_into_files(sizes):
        parts.append(list(itertools.chain.from_iterable(units_of_file)))
    return parts


def _mask_parts(worker: Worker) -> list[list[tuple[str, Tensor]]]:
    """Return the named tensors of all masks, grouped by file; only replica 0 writes masks."""
    if worker.index.replica:
        return []
    sizes: list[tuple[tuple[str, Tensor], int]] = []
    for name, mask in worker.masks.items():
        for part, tensor in vars(mask).items():
            sizes.append(((f"{name}.{part}", tensor), tensor.numel()))
    return _split_into_files(sizes)


def _split_into_files(sizes: Iterable[tuple[T, int]]) -> list[list[T]]:
    """Group items with sizes in bytes, in order, into files of at most `FILE_BYTES`."""
    parts: list[list[T]] = []
    filled_bytes = 0
    for item, size_bytes in sizes:
        if not parts or filled_bytes + size_bytes > FILE_BYTES:
            parts.append([])
            filled_bytes = 0
        parts[-1].append(item)
        filled_bytes += size_bytes
    return parts


def _write(uri: str, tensors: _Tensors) -> SavedFile:
    """Write named tensors, except empty ones."""
    kept = {name: tensor for name, tensor in tensors if tensor.numel()}
    return SavedFile(uri, tensor_files.write(uri, kept), tuple(kept))
