"""Sums and copies between the replicas of one shard."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class CollectiveError(RuntimeError):
    """A sum or a copy between replicas failed, or another replica did not join it in time."""


class ReplicaGroup(Protocol):
    """The replicas of one shard, as one of them sees them."""

    rank: int

    def reduce(self, tensor: Tensor, owner: int) -> None:
        """Make `tensor` the sum over the replicas, in place, at the owner.

        On the other replicas its content is undefined afterwards.
        """

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Make `tensor` a copy of the owner's, in place."""


class SingleReplica:
    """The group of a shard that has no other replica."""

    rank = 0

    def reduce(self, tensor: Tensor, owner: int) -> None:
        """Leave the tensor as it is."""

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Leave the tensor as it is."""


class ThreadMeeting:
    """Where the threads of one process that act as replicas of one shard meet."""

    def __init__(self, num_replicas: int) -> None:
        """Prepare places for threads, which wait until all are there or one leaves."""
        self.barrier = threading.Barrier(num_replicas)
        self.tensors: list[Tensor | None] = [None] * num_replicas


class ThreadReplica:
    """A replica that is a thread of this process."""

    def __init__(self, meeting: ThreadMeeting, rank: int) -> None:
        """Join a meeting."""
        self._meeting = meeting
        self.rank = rank

    def leave(self) -> None:
        """Let the others go on with an error, because this one will not come."""
        self._meeting.barrier.abort()

    def reduce(self, tensor: Tensor, owner: int) -> None:
        """Sum to the owner."""
        meeting = self._meeting
        meeting.tensors[self.rank] = tensor
        meeting.barrier.wait()
        if self.rank == owner:
            others = [t for i, t in enumerate(meeting.tensors) if i != owner and t is not None]
            for other in others:
                tensor.add_(other)
        meeting.barrier.wait()

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Copy from the owner."""
        meeting = self._meeting
        if self.rank == owner:
            meeting.tensors[owner] = tensor
        meeting.barrier.wait()
        source = meeting.tensors[owner]
        assert source is not None
        if self.rank != owner:
            tensor.copy_(source)
        meeting.barrier.wait()


def reduce_together(group: ReplicaGroup, tensors: Sequence[Tensor], owner: int) -> None:
    """Sum tensors of one dtype to their owner in place, in one message; see `reduce`."""
    _as_one(group, tensors, lambda flat: group.reduce(flat, owner))


def broadcast_together(group: ReplicaGroup, tensors: Sequence[Tensor], owner: int) -> None:
    """Copy tensors of one dtype from their owner in place, in one message.

    See `ReplicaGroup.broadcast`.
    """
    _as_one(group, tensors, lambda flat: group.broadcast(flat, owner))


def _as_one(
    group: ReplicaGroup, tensors: Sequence[Tensor], collective: Callable[[Tensor], None]
) -> None:
    if not tensors or isinstance(group, SingleReplica):
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    collective(flat)
    for tensor, part in zip(
        tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True
    ):
        tensor.copy_(part.view_as(tensor))


class ProcessReplica:
    """A replica in a process of its own, in a torch.distributed group.

    The backend is gloo on CPUs and NCCL on GPUs.
    """

    def __init__(
        self,
        address: str,
        world_rank: int,
        world_size: int,
        num_shards: int,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        """Join the world of all workers and make one group a shard.

        Args:
            address: ``tcp://host:port`` of worker 0.
            world_rank: this worker's rank, replica * num_shards + shard.
            world_size: number of workers.
            num_shards: shards of the model.
            device: where the tensors are.
            timeout_s: a collective that takes longer raises.

        Raises:
            CollectiveError: not all have come.
        """
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        try:
            dist.init_process_group(
                backend,
                init_method=address,
                rank=world_rank,
                world_size=world_size,
                timeout=timeout,
            )
            groups = [
                dist.new_group(list(range(shard, world_size, num_shards)), timeout=timeout)
                for shard in range(num_shards)
            ]
        # another is lost before all have met, or its port was taken meanwhile
        except RuntimeError as error:
            raise CollectiveError(
                f"the workers could not connect to each other: {error}"
            ) from error
        shard = world_rank % num_shards
        self.rank = world_rank // num_shards
        self._group = groups[shard]
        self._world_ranks = list(range(shard, world_size, num_shards))

    def reduce(self, tensor: Tensor, owner: int) -> None:
        """Sum to the owner."""
        self._together(dist.reduce, tensor, owner)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Copy from the owner."""
        self._together(dist.broadcast, tensor, owner)

    def _together(self, collective: Callable[..., object], tensor: Tensor, owner: int) -> None:
        try:
            collective(tensor, self._world_ranks[owner], group=self._group)
        except RuntimeError as error:  # of gloo and NCCL: a connection closed, or the timeout
            raise CollectiveError(f"a replica of this shard is lost: {error}") from error
