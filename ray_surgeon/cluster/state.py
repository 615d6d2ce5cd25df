"""What every part of a worker works on: its shard, its masks, its replicas."""

from __future__ import annotations

import functools
import socket
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import AutoConfig

from ray_surgeon import storage
from ray_surgeon.cluster.messages import LinearSummary, ModelRecipe, WorkerIndex
from ray_surgeon.cluster.placement import Placement
from ray_surgeon.cluster.replicas import ProcessReplica, ReplicaGroup, SingleReplica
from ray_surgeon.models.gguf import convert_gguf
from ray_surgeon.models.shard import ModelShard
from ray_surgeon.models.skeleton import checkpoint_key, linear_shapes, tied_names
from ray_surgeon.sources import open_model
from ray_surgeon.surgery.masks import ElementMask, Mask, StructuredMask


class ShardState:
    """A shard of one replica, loaded, with its masks. Each linear has one owner among the replicas."""

    def __init__(self, placement: Placement, index: WorkerIndex, num_threads: int, device: str) -> None:
        """Prepare an empty worker.

        Args:
            placement: where every block is.
            index: which worker this is.
            num_threads: torch threads on the CPU.
            device: "cpu" or "cuda".
        """
        torch.set_num_threads(num_threads)
        self.placement, self.index, self.device = placement, index, torch.device(device)
        self.replicas: ReplicaGroup = SingleReplica()
        self.masks: dict[str, Mask] = {}

    # Setting up

    def meeting_address(self, host: str) -> str:
        """Return an address on this machine with a free port, for `join_replicas`; `host` is its name to the others."""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind(("", 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def join_replicas(self, address: str, timeout_s: float) -> None:
        """Join the process group of all workers; see `ProcessReplica`."""
        world_size = len(self.placement.workers)
        rank = self.placement.rank(self.index)
        self.replicas = ProcessReplica(address, rank, world_size, self.placement.num_shards, self.device, timeout_s)

    def load(self, recipe: ModelRecipe, by_element: bool) -> None:
        """Load this shard's weights and, when a run is resumed, its masks.

        Args:
            recipe: where everything is.
            by_element: whether masks are of elements, or of rows and columns.

        Raises:
            ValueError: the checkpoint cannot be read.
        """
        files = open_model(recipe.source, convert_gguf)
        config = AutoConfig.from_pretrained(files.small_files_folder())
        self.shard = ModelShard(config, self.placement.blocks[self.index.shard], getattr(torch, recipe.dtype), self.device)
        reader, tied = files.reader(), tied_names(config, self.shard.adapter)
        local_copy = functools.cache(storage.local_copy)  # asking an object store once a file, not once a tensor
        pruned_in = {key: file.uri for file in recipe.shot_files for key in file.keys}

        def read(name: str) -> Tensor:
            if name in pruned_in:
                return storage.read_tensors(str(local_copy(pruned_in[name])), (name,))[name]
            key = checkpoint_key(name, reader.file_of, tied)
            if key is None:
                raise ValueError(f"model.source: {files.origin} has no tensor {name}")
            return reader.read(key)

        self.shard.load(read)
        self.linear_shapes = linear_shapes(config)  # here, because building a model on the meta device is not thread-safe
        shapes = {s.name: s for s in self.linear_shapes}
        self.number_of = {name: number for number, name in enumerate(shapes)}
        self.site_of = {name: shapes[name].site for name in self.shard.linears}
        kind: type[StructuredMask] | type[ElementMask] = ElementMask if by_element else StructuredMask
        for name in self.shard.linears:
            mask: Mask = kind.full(shapes[name].num_rows, shapes[name].num_columns)
            if recipe.shot_files:
                mask = type(mask)(**{part: read(f"{name}.{part}").bool() for part in mask.tensors()})
            self.masks[name] = mask

    def owner(self, name: str) -> int:
        """Return the replica that inverts, costs and updates a linear."""
        return self.placement.owners[self.site_of[name]]

    def owned(self) -> Iterator[str]:
        """Return the names of the linears that are this replica's."""
        return (name for name in self.shard.linears if self.owner(name) == self.replicas.rank)

    def share_linears(self, names: Iterable[str]) -> None:
        """Send linears and their masks from their owners to the other replicas, after all of them have done their own."""
        for name in names:
            owner = self.owner(name)
            W, mask = self.shard.weight(name), self.masks[name]
            parts = {part: tensor.to(self.device) for part, tensor in mask.tensors().items()}
            for tensor in (W, *parts.values()):
                self.replicas.broadcast(tensor, owner)
            if owner != self.replicas.rank:
                self.shard.set_weight(name, W)
                self.masks[name] = type(mask)(**{part: tensor.cpu() for part, tensor in parts.items()})

    def summary(self, name: str, predicted: float | None, residual: float) -> LinearSummary:
        """Return what is left of a linear."""
        mask, W = self.masks[name], self.shard.weight(name)
        rows, columns = (mask.rows, mask.columns) if isinstance(mask, StructuredMask) else (mask.kept.any(1), mask.kept.any(0))
        kept = int(rows.sum()), int(columns.sum()), mask.num_kept
        return LinearSummary(name, len(rows), len(columns), *kept, int(W.count_nonzero()), predicted, residual)
