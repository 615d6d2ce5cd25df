"""How tensors travel: sums and copies between replicas of a shard, and messages."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ray_surgeon.runtime.placement import Placement, WorkerIndex


class CollectiveError(RuntimeError):
    """A sum or a copy between replicas failed, or another replica did not join it in time."""


class ReplicaGroup:
    """The replicas of one shard, as one of them sees them; here it is the only one."""

    rank = 0

    def reduce(self, tensor: Tensor, owner: int) -> None:
        """Make `tensor` the sum over the replicas, in place, at the owner.

        On the other replicas its content is undefined afterwards.
        """

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Make `tensor` a copy of the owner's, in place."""


class ThreadMeeting:
    """Where the threads of one process that act as replicas of one shard meet."""

    def __init__(self, num_replicas: int) -> None:
        """Prepare places for threads, which wait until all are there or one leaves."""
        self.barrier = threading.Barrier(num_replicas)
        self.tensors = [torch.empty(0)] * num_replicas  # what each has brought

    @contextlib.contextmanager
    def brought(self, rank: int, tensor: Tensor) -> Iterator[list[Tensor]]:
        """Bring a tensor, and have all of them until every replica has done its part."""
        self.tensors[rank] = tensor
        self.barrier.wait()
        yield self.tensors
        self.barrier.wait()


class ThreadReplica(ReplicaGroup):
    """A replica that is a thread of this process."""

    def __init__(self, meeting: ThreadMeeting, rank: int) -> None:
        """Join a meeting."""
        self._meeting = meeting
        self.rank = rank

    def leave(self) -> None:
        """Let the others go on with an error, because this one will not come."""
        self._meeting.barrier.abort()

    def reduce(self, tensor: Tensor, owner: int) -> None:
        """Sum to the owner, in the order of replicas."""
        with self._meeting.brought(self.rank, tensor) as tensors:
            for rank, part in enumerate(tensors) if self.rank == owner else ():
                if rank != owner:
                    tensor.add_(part)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Copy from the owner."""
        with self._meeting.brought(self.rank, tensor) as tensors:
            if self.rank != owner:
                tensor.copy_(tensors[owner])


def together(
    collective: Callable[[Tensor, int], None], tensors: Sequence[Tensor], owner: int
) -> None:
    """Sum or copy tensors of one dtype in place, in one message.

    Args:
        collective: `reduce` or `broadcast` of a `ReplicaGroup`.
        tensors: on every replica the same number, of the same shapes.
        owner: to which they are summed, or from which they are copied.
    """
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    collective(flat, owner)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


class ProcessReplica(ReplicaGroup):
    """A replica in a process of its own, in a torch.distributed group.

    The backend is gloo on CPUs and NCCL on GPUs.
    """

    def __init__(
        self,
        address: str,
        placement: Placement,
        index: WorkerIndex,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        """Join the world of all workers and make one group a shard.

        Args:
            address: ``tcp://host:port`` of worker 0.
            placement: of all workers.
            index: which of them this is.
            device: where the tensors are.
            timeout_s: a collective that takes longer raises.

        Raises:
            CollectiveError: not all have come.
        """
        timeout = timedelta(seconds=timeout_s)
        size = len(placement.workers)
        ranks = [
            list(range(shard, size, placement.num_shards)) for shard in range(placement.num_shards)
        ]
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                init_method=address,
                rank=placement.rank(index),
                world_size=size,
                timeout=timeout,
            )
            groups = [dist.new_group(of_shard, timeout=timeout) for of_shard in ranks]
        # another is lost before all have met, or its port was taken meanwhile
        except RuntimeError as error:
            raise CollectiveError(
                f"the workers could not connect to each other: {error}"
            ) from error
        self.rank = index.replica
        self._group = groups[index.shard]
        self._world_ranks = ranks[index.shard]

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


@dataclass(frozen=True)
class TensorPayload:
    """A tensor on its way: a numpy array, int16 where it stands for bfloat16."""

    array: NDArray[np.generic]
    is_bfloat16: bool


def encode(tensor: Tensor) -> TensorPayload:
    """Return a tensor as it travels.

    A view becomes a copy of its own, or its whole storage would travel.
    """
    dense = tensor.detach().cpu().contiguous()
    if dense.untyped_storage().nbytes() != dense.nbytes:
        dense = dense.clone()
    is_bfloat16 = dense.dtype == torch.bfloat16
    return TensorPayload((dense.view(torch.int16) if is_bfloat16 else dense).numpy(), is_bfloat16)


def decode(payload: TensorPayload, device: torch.device) -> Tensor:
    """Return a tensor that may be written to.

    What lies in the object store is shared with other readers.
    """
    tensor = torch.tensor(payload.array)
    if payload.is_bfloat16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.to(device)
