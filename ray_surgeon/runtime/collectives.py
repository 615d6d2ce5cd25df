"""How tensors travel: sums and copies between replicas of a shard, and messages."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ray_surgeon.memory.transfers import Transfers, transfers

if TYPE_CHECKING:
    from ray_surgeon.runtime.worker import Worker


_NO_LIMIT = timedelta(days=365)

MESSAGE_BYTES = 2**25
"""Of tensors that are sent together."""


class CollectiveError(RuntimeError):
    """A sum or a copy between replicas failed, or took too long once all had come to it."""


class ReplicaGroup:
    """The replicas of one shard, as one of them sees them; here it is the only one."""

    rank = 0

    def reduce(self, tensor: Tensor, owner: int) -> None:
        """Make `tensor` the sum over the replicas, in place, at the owner.

        On the other replicas its content is undefined afterwards.
        """

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Make `tensor` a copy of the owner's, in place."""


class ThreadReplica(ReplicaGroup):
    """A replica that is a thread of this process."""

    def __init__(self, rank: int, barrier: threading.Barrier, brought: list[Tensor]) -> None:
        """Join the replicas of a shard.

        Args:
            rank: of this one.
            barrier: of all of them, where they wait until all are there or one leaves.
            brought: what each of them has brought to the present sum or copy.
        """
        self.rank = rank
        self._barrier = barrier
        self._brought = brought

    @contextlib.contextmanager
    def _all_of(self, tensor: Tensor) -> Iterator[list[Tensor]]:
        """Bring a tensor, and have all of them until every replica has done its part."""
        self._brought[self.rank] = tensor
        self._barrier.wait()
        yield self._brought
        self._barrier.wait()

    def leave(self) -> None:
        """Let the others go on with an error, because this one will not come."""
        self._barrier.abort()

    def reduce(self, tensor: Tensor, owner: int) -> None:
        """Sum to the owner, in the order of replicas."""
        with self._all_of(tensor) as tensors:
            for rank, part in enumerate(tensors) if self.rank == owner else ():
                if rank != owner:
                    tensor.add_(part)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Copy from the owner."""
        with self._all_of(tensor) as tensors:
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


class Sent(NamedTuple):
    """A tensor that its owner sends to the other replicas."""

    owner: int
    like: Tensor  # of its shape and dtype, with or without memory
    get: Callable[[], Tensor]  # returns it, asked at the owner
    put: Callable[[Tensor], None]  # takes it, at the others


def send(
    group: ReplicaGroup, tensors: Iterable[Sent], device: torch.device, place: torch.device
) -> None:
    """Send tensors from their owners to the other replicas, many in one message.

    Args:
        group: of the replicas; all of them call this.
        tensors: the same ones in the same order on all of them.
        device: where the group copies.
        place: where those that come are wanted.
    """
    for message in _messages(tensors):
        first, *_ = message
        sizes = [sent.like.numel() for sent in message]
        if group.rank == first.owner:
            flat = torch.cat([sent.get().to(device).flatten() for sent in message])
        else:
            flat = torch.empty(sum(sizes), dtype=first.like.dtype, device=device)
        group.broadcast(flat, first.owner)
        if group.rank != first.owner:
            for sent, part in zip(message, torch.split(flat.to(place), sizes), strict=True):
                sent.put(part.view(sent.like.shape))


def _messages(tensors: Iterable[Sent]) -> Iterator[list[Sent]]:
    """Yield tensors of one owner and dtype, about `MESSAGE_BYTES` or one tensor at a time."""
    left = defaultdict[tuple[int, torch.dtype], list[Sent]](list)
    sizes = Counter[tuple[int, torch.dtype]]()
    for sent in tensors:
        key = (sent.owner, sent.like.dtype)
        left[key].append(sent)
        sizes[key] += sent.like.nbytes
        if sizes[key] >= MESSAGE_BYTES:
            del sizes[key]
            yield left.pop(key)
    yield from left.values()


def open_meeting(host: str) -> TCPStore:
    """Return where workers meet, opened in this process on a port that nobody else has."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


class ProcessReplica(ReplicaGroup):
    """A replica in a process of its own, in a torch.distributed group.

    The backend is gloo on CPUs and NCCL on GPUs. Replicas meet before they begin, for which there
    is no limit of time: one that waits because another one still computes has lost nothing, and
    who has died has broken its connections. Of one that is silent, the coordinator hears.
    """

    def __init__(self, worker: Worker, address: str, timeout_s: float) -> None:
        """Join the world of all workers and make one group a shard.

        Args:
            worker: which of them this is.
            address: ``host:port`` of the meeting; worker 0 has opened it, see `open_meeting`.
            timeout_s: a collective that takes longer, once all have come to it, raises.

        Raises:
            CollectiveError: not all have come.
        """
        self.rank = worker.index.replica
        placement = worker.placement
        size = len(placement.workers)
        shards = [[*range(i, size, placement.num_shards)] for i in range(placement.num_shards)]
        timeout = timedelta(seconds=timeout_s)
        backend = "gloo" if worker.device.type == "cpu" else "nccl"
        rank = placement.workers.index(worker.index)
        host, _, port = address.rpartition(":")
        try:
            meeting = TCPStore(host, int(port), is_master=False, timeout=timeout)
            dist.init_process_group("gloo", None, timeout, size, rank, meeting)
            groups = [dist.new_group(ranks, timeout, backend) for ranks in shards]
            meetings = [dist.new_group(ranks, _NO_LIMIT, "gloo") for ranks in shards]
        # another is lost before all have met
        except RuntimeError as error:
            raise CollectiveError(f"workers could not connect to each other: {error}") from error
        self._group = groups[worker.index.shard]
        self._meeting = meetings[worker.index.shard]

    def reduce(self, tensor: Tensor, owner: int) -> None:
        """Sum to the owner."""
        self._join(dist.reduce, tensor, group_dst=owner)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Copy from the owner."""
        self._join(dist.broadcast, tensor, group_src=owner)

    def _join(self, collective: Callable[..., Any], tensor: Tensor, **owner: int) -> None:
        try:
            dist.barrier(self._meeting)
            # NCCL has an error or a timeout for who waits, and only for a collective of its own
            collective(tensor, group=self._group, async_op=True, **owner).wait()
        # of gloo and NCCL (DistBackendError): a connection closed, or the timeout
        except RuntimeError as error:
            raise CollectiveError(f"a replica of this shard is lost: {error}") from error


TensorPayload: TypeAlias = NDArray[Any]
"""A tensor on its way; int16 stands for bfloat16, and no tensor here is of int16."""


def encode(tensor: Tensor) -> TensorPayload:
    """Return a tensor as it travels.

    A view becomes a copy of its own, or its whole storage would travel.
    """
    dense = tensor.detach().contiguous()
    if dense.device.type != "cpu":
        stage = Transfers.pinned(dense.shape, dense.dtype)
        dense = transfers(dense.device).to_host(dense, stage).on_host()
    elif dense.untyped_storage().nbytes() != dense.nbytes:
        dense = dense.clone()
    return (dense.view(torch.int16) if dense.dtype == torch.bfloat16 else dense).numpy()


def decode(payload: TensorPayload, device: torch.device) -> Tensor:
    """Return a tensor that may be written to.

    What lies in the object store is shared with other readers.
    """
    if device.type == "cpu":
        tensor = torch.tensor(payload)
    else:
        tensor = Transfers.pinned(payload.shape, torch.from_numpy(np.empty(0, payload.dtype)).dtype)
        np.copyto(tensor.numpy(), payload)
        tensor = transfers(device).to_device(tensor).on_device()
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
