"""Workers load their shards: weights, and the masks of the shot that a run goes on from."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ray_surgeon.maths.masks import ElementMask, StructuredMask
from ray_surgeon.memory.stores import NO_SCRATCH, Scratch, ScratchNames, Stores
from ray_surgeon.memory.weights import ReadAhead
from ray_surgeon.models.checkpoint import tensor_reader
from ray_surgeon.models.runner import BlockRunner
from ray_surgeon.models.shard import ModelShard
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.spec.sections import ModelSection
from ray_surgeon.storage import files
from ray_surgeon.storage.sources import open_model


@dataclass(frozen=True)
class ModelRecipe:
    """How a worker gets its weights."""

    model: ModelSection  # the dense model, and the dtype of weights and activations
    # (key, URI of its file) of the committed shot to continue from
    shot_files: tuple[tuple[str, str], ...] = ()
    scratch: ScratchNames = NO_SCRATCH


def load(worker: Worker, recipe: ModelRecipe, by_element: bool, stores: Stores) -> None:
    """Load a worker's weights and, when a run is resumed, its masks.

    Args:
        worker: without weights.
        recipe: where everything is.
        by_element: whether masks are of elements, or of rows and columns.
        stores: where the weights and factors are kept.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    source = open_model(recipe.model)
    layout = worker.layout
    index = worker.index
    scratch = Scratch(*recipe.scratch, f"{index.shard}-{index.replica}")
    scratch.remove_earlier()
    blocks = worker.placement.blocks[index.shard]
    dtype = getattr(torch, recipe.model.dtype)
    worker.shard = ModelShard(layout, blocks, dtype, worker.device, stores, scratch)
    worker.scratch = scratch
    worker.runner = BlockRunner(worker.shard)
    pruned_in = dict(recipe.shot_files)
    read_dense = tensor_reader(layout, source.uri_of, source.read, source.origin)

    def read(name: str) -> Tensor:
        if name in pruned_in:
            return worker.shot_reader.read(pruned_in[name], name)
        return read_dense(name)

    kind: type[StructuredMask] | type[ElementMask] = ElementMask if by_element else StructuredMask
    parts = [part.name for part in fields(kind)] if pruned_in else []
    # stacked tensors are taken apart once, not whenever a block is read
    stays = source.is_local and not layout.family.sparse.stacked
    stays = stays and all(map(files.is_local, set(pruned_in.values())))
    get = read
    if not stays:
        names = [*worker.shard.wanted, *(f"{n}.{p}" for n in worker.shard.linears for p in parts)]
        of_masks = {f"{s.name}.kept": (s.num_rows, s.num_columns) for s in layout.linears}
        get = ReadAhead(read, names, {**layout.parameters, **of_masks})
    worker.shard.load(get, stays=stays)
    for name in worker.shard.linears:
        shape = layout.shapes[name]
        tensors = {part: get(f"{name}.{part}").to(torch.bool, copy=True) for part in parts}
        worker.masks[name] = (
            kind(**tensors) if parts else kind.full(shape.num_rows, shape.num_columns)
        )
