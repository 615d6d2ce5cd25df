"""What every part of a worker works on: its shard, its masks, its replicas."""

from __future__ import annotations

import functools
import socket
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig

from ray_surgeon import storage
from ray_surgeon.cluster.messages import LinearSummary, ModelRecipe, WorkerIndex
from ray_surgeon.cluster.placement import Placement
from ray_surgeon.cluster.replicas import ProcessReplica, ReplicaGroup, SingleReplica
from ray_surgeon.models.couplings import GroupSet, group_sets
from ray_surgeon.models.dead import shrinkable, without_dead
from ray_surgeon.models.gguf import convert_gguf
from ray_surgeon.models.shard import ModelShard
from ray_surgeon.models.skeleton import checkpoint_key, linear_shapes, tied_names
from ray_surgeon.sources import open_model
from ray_surgeon.surgery.masks import ElementMask, Mask, StructuredMask

AnyMask = TypeVar("AnyMask", bound=Mask)


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
        self.busy_s = 0.0

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
        config = AutoConfig.from_pretrained(files.small_files_folder(), trust_remote_code=False)
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
            W = self.shard.weight(name)
            self.replicas.broadcast(W, self.owner(name))
            if self.owner(name) != self.replicas.rank:
                self.shard.set_weight(name, W)
            self.masks[name] = self.share_mask(name, self.masks[name])

    def share_mask(self, name: str, mask: AnyMask) -> AnyMask:
        """Return the owner's mask of a linear; every replica calls this."""
        parts = {part: tensor.to(self.device) for part, tensor in mask.tensors().items()}
        for tensor in parts.values():
            self.replicas.broadcast(tensor, self.owner(name))
        return type(mask)(**{part: tensor.cpu() for part, tensor in parts.items()})

    @functools.cached_property
    def group_sets(self) -> list[GroupSet]:
        """Coupled groups of this shard's blocks."""
        blocks = self.shard.blocks
        return [groups for groups in group_sets(self.shard.config, self.linear_shapes) if blocks.first <= groups.block < blocks.last]

    def structured(self, name: str) -> StructuredMask:
        """Return the mask of a linear in a structured mode."""
        mask = self.masks[name]
        assert isinstance(mask, StructuredMask)
        return mask

    def remove_dead(self) -> None:
        """Remove rows and columns that cannot influence the output any more; the same on every replica."""
        masks = {name: self.structured(name) for name in self.shard.linears}
        for name, mask in without_dead(self.shard.config, masks, self.group_sets).items():
            W = self.shard.weight(name)
            mask.apply_(W)
            self.shard.set_weight(name, W)
            self.masks[name] = mask

    def shrinkable(self) -> int:
        """Return the parameters of this shard in groups that are gone whole; see `dead.shrinkable`."""
        return shrinkable({name: self.structured(name) for name in self.shard.linears}, self.group_sets)

    def summary(self, name: str, predicted: float | None, residual: float) -> LinearSummary:
        """Return what is left of a linear."""
        mask, W = self.masks[name], self.shard.weight(name)
        rows, columns = (mask.rows, mask.columns) if isinstance(mask, StructuredMask) else (mask.kept.any(1), mask.kept.any(0))
        kept = int(rows.sum()), int(columns.sum()), mask.num_kept
        return LinearSummary(name, len(rows), len(columns), *kept, int(W.count_nonzero()), predicted, residual)
