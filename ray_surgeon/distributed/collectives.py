"""Collectives between the replicas of a shard, and the encoding of tensors that travel."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ray_surgeon.distributed.placement import Placement, WorkerIndex
from ray_surgeon.memory.transfers import Transfers, transfers

_NO_LIMIT = timedelta(days=365)

MESSAGE_BYTES = 2**25
"""Size of a message of several tensors."""


class CollectiveError(RuntimeError):
    """A sum or a copy between replicas failed, or timed out after all replicas had joined it."""


class ReplicaGroup:
    """The replicas of one shard, as seen by one of them; here it is the only one."""

    rank = 0

    def reduce(self, tensor: Tensor, owner: int) -> None:
        """Make `tensor` the sum over the replicas, in place, at the owner.

        Afterwards the content of `tensor` is undefined on the other replicas.
        """

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Copy the owner's `tensor` into that of the other replicas, in place."""


class ThreadReplica(ReplicaGroup):
    """A replica that is a thread of this process."""

    def __init__(
        self, rank: int, barrier: threading.Barrier, brought: list[Tensor]
    ) -> None:
        """Join the replicas of a shard.

        Args:
            rank: rank of this replica.
            barrier: barrier of all replicas, which breaks when one of them leaves.
            brought: list shared by all replicas: the tensors of the present sum or copy, by rank.
        """
        self.rank = rank
        self._barrier = barrier
        self._brought = brought

    @contextlib.contextmanager
    def _all_of(self, tensor: Tensor) -> Iterator[list[Tensor]]:
        """Bring a tensor, and yield the tensors of all replicas; ends when all are done."""
        self._brought[self.rank] = tensor
        self._barrier.wait()
        yield self._brought
        self._barrier.wait()

    def leave(self) -> None:
        """Raise an error on the replicas that wait, because this one will not join them."""
        self._barrier.abort()

    def reduce(self, tensor: Tensor, owner: int) -> None:
        """Sum to the owner, in the order of replicas."""
        with self._all_of(tensor) as tensors:
            if self.rank == owner:
                for rank, part in enumerate(tensors):
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
        tensors: tensors with the same shapes on every replica.
        owner: replica that receives the sums, or whose tensors are copied.
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
    like: Tensor  # has the shape and dtype of the tensor, with or without memory
    get: Callable[[], Tensor]  # returns the tensor; called on the owner
    put: Callable[[Tensor], None]  # takes the tensor; called on the others


def send(
    group: ReplicaGroup,
    tensors: Iterable[Sent],
    device: torch.device,
    place: torch.device,
) -> None:
    """Send tensors from their owners to the other replicas, many in one message.

    Args:
        group: the replicas, all of which must call this.
        tensors: the same tensors in the same order on all replicas.
        device: device on which the group copies.
        place: device on which `Sent.put` takes tensors.
    """
    for message in _messages(tensors):
        first = message[0]
        sizes = [sent.like.numel() for sent in message]
        if group.rank == first.owner:
            flat = torch.cat([sent.get().to(device).flatten() for sent in message])
        else:
            flat = torch.empty(sum(sizes), dtype=first.like.dtype, device=device)
        group.broadcast(flat, first.owner)
        if group.rank != first.owner:
            parts = torch.split(flat.to(place), sizes)
            for sent, part in zip(message, parts, strict=True):
                sent.put(part.view(sent.like.shape))


def _messages(tensors: Iterable[Sent]) -> Iterator[list[Sent]]:
    """Yield lists of tensors of one owner and dtype, about `MESSAGE_BYTES` or one tensor each."""
    pending = defaultdict[tuple[int, torch.dtype], list[Sent]](list)
    pending_bytes = Counter[tuple[int, torch.dtype]]()
    for sent in tensors:
        key = (sent.owner, sent.like.dtype)
        pending[key].append(sent)
        pending_bytes[key] += sent.like.nbytes
        if pending_bytes[key] >= MESSAGE_BYTES:
            del pending_bytes[key]
            yield pending.pop(key)
    yield from pending.values()


def open_meeting(host: str) -> TCPStore:
    """Return the store through which workers connect, served by this process on a free port."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


class ProcessReplica(ReplicaGroup):
    """A replica in a separate process, in a torch.distributed group.

    The backend is gloo on CPUs and NCCL on GPUs. Before a collective, replicas wait for each other
    without a timeout, because another replica may still compute. A dead peer closes its sockets; a
    silent one is found by the coordinator's pings.
    """

    def __init__(
        self,
        placement: Placement,
        index: WorkerIndex,
        device_type: str,
        *,
        address: str,
        timeout_s: float,
    ) -> None:
        """Join the world of all workers, and create one group per shard.

        Args:
            placement: of all workers.
            index: which of them this is.
            device_type: "cpu", or another one with NCCL.
            address: ``host:port`` of the store that worker 0 has opened; see `open_meeting`.
            timeout_s: limit of the time of a collective after all replicas have joined it.

        Raises:
            CollectiveError: not all workers have joined within `timeout_s`.
        """
        self.rank = index.replica
        size = len(placement.workers)
        num_shards = placement.num_shards
        # ranks of the replicas of each shard
        shards = [list(range(shard, size, num_shards)) for shard in range(num_shards)]
        timeout = timedelta(seconds=timeout_s)
        backend = "gloo" if device_type == "cpu" else "nccl"
        rank = placement.workers.index(index)
        host, _, port = address.rpartition(":")
        try:
            meeting = TCPStore(host, int(port), is_master=False, timeout=timeout)
            dist.init_process_group("gloo", None, timeout, size, rank, meeting)
            groups = [dist.new_group(ranks, timeout, backend) for ranks in shards]
            meetings = [dist.new_group(ranks, _NO_LIMIT, "gloo") for ranks in shards]
        # another worker is lost before all have joined
        except RuntimeError as error:
            raise CollectiveError(
                f"workers could not connect to each other: {error}"
            ) from error
        self._group = groups[index.shard]
        self._meeting = meetings[index.shard]

    def reduce(self, tensor: Tensor, owner: int) -> None:
        """Sum to the owner."""
        self._join(dist.reduce, tensor, group_dst=owner)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Copy from the owner."""
        self._join(dist.broadcast, tensor, group_src=owner)

    def _join(self, collective: Callable[..., Any], tensor: Tensor, **owner: int) -> None:
        try:
            dist.barrier(self._meeting)
            # NCCL reports errors and timeouts only to a caller that waits for the collective
            collective(tensor, group=self._group, async_op=True, **owner).wait()
        # from gloo, or NCCL (DistBackendError): a closed connection or the timeout
        except RuntimeError as error:
            raise CollectiveError(f"a replica of this shard is lost: {error}") from error


TensorPayload: TypeAlias = NDArray[Any]
"""A tensor that travels; int16 stands for bfloat16, as no tensor here has the dtype int16."""


def encode(tensor: Tensor) -> TensorPayload:
    """Return a tensor in the form in which it travels.

    A view is copied, as otherwise its whole storage would travel.
    """
    dense = tensor.detach().contiguous()
    if dense.device.type != "cpu":
        stage = Transfers.pinned(dense.shape, dense.dtype)
        dense = transfers(dense.device).to_host(dense, stage).on_host()
    elif dense.untyped_storage().nbytes() != dense.nbytes:
        dense = dense.clone()
    if dense.dtype == torch.bfloat16:
        dense = dense.view(torch.int16)
    return dense.numpy()


def decode(payload: TensorPayload, device: torch.device) -> Tensor:
    """Return a tensor that may be written to.

    It is a copy, because arrays in the object store are shared with other readers.
    """
    if device.type == "cpu":
        tensor = torch.tensor(payload)
    else:
        dtype = torch.from_numpy(np.empty(0, payload.dtype)).dtype
        tensor = Transfers.pinned(payload.shape, dtype)
        np.copyto(tensor.numpy(), payload)
        tensor = transfers(device).to_device(tensor).on_device()
    if tensor.dtype == torch.int16:
        return tensor.view(torch.bfloat16)
    return tensor
