"""Stores of the weights of a shard's blocks."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ray_surgeon.memory.stores import Place, Scratch, TensorStore
from ray_surgeon.memory.transfers import Arrival, Fetcher, transfers

TENSORS_AHEAD = 8
"""Tensors that are on their way or wait to be taken, at most."""
ENTRIES_AHEAD = 2**27
"""Of tensors that are read ahead: with as many, no further one is begun."""
Read = Callable[[str], Tensor]
"""Global name of a tensor -> the tensor, of any float dtype, on the CPU."""


class ReadAhead:
    """Reads tensors from afar, several at a time, in the order in which they will be asked for."""

    def __init__(
        self, read: Read, names: list[str], shapes: Mapping[str, Sequence[int]]
    ) -> None:
        """Start to read.

        Args:
            read: may be called from several threads.
            names: every tensor that will be asked for, in order.
            shapes: of those that are large.
        """
        self._read = read
        self._left = deque(names)
        self._num_entries = {name: math.prod(shapes.get(name, ())) for name in names}
        self._pool = ThreadPoolExecutor(TENSORS_AHEAD)
        self._coming: dict[str, Future[Tensor]] = {}
        self._start_more()

    def _start_more(self) -> None:
        while self._left and len(self._coming) < TENSORS_AHEAD:
            if sum(map(self._num_entries.__getitem__, self._coming)) >= ENTRIES_AHEAD:
                return
            name = self._left.popleft()
            self._coming[name] = self._pool.submit(self._read, name)

    def __call__(self, name: str) -> Tensor:
        """Return a tensor, the next one in order."""
        coming = self._coming.pop(name)
        self._start_more()
        return coming.result()


@dataclass(frozen=True)
class Slot:
    """Where a parameter or a saved buffer of a block belongs."""

    module: nn.Module  # that has it
    leaf: str  # its name there
    dtype: torch.dtype  # that it has there

    @property
    def content(self) -> Tensor:
        """The tensors, on meta where the weights are elsewhere."""
        content: Tensor = getattr(self.module, self.leaf)
        return content

    def fill(self, tensor: Tensor) -> None:
        """Put a tensor there."""
        is_parameter = self.leaf in self.module._parameters
        content = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        setattr(self.module, self.leaf, content)


Slots = Sequence[Mapping[str, Slot]]
"""For each block, global name -> where the tensor belongs."""


class WeightStore:
    """The weights of a shard's blocks by global name.

    A block has its weights on the device inside of ``with store.block(...)``. If they are kept
    there, all blocks have theirs always. If not, only the block that runs has, and on an
    accelerator the next block's are on their way. Between that they are in the memory of the host,
    pinned for a GPU; or on disk, where those that have not changed are read from their source if
    that is there, too.
    """

    def __init__(
        self, place: Place, slots: Slots, device: torch.device, scratch: Scratch
    ) -> None:
        """Start without weights.

        Args:
            place: where idle weights are.
            slots: for each block, global name -> where the tensor belongs.
            device: where blocks run; a GPU by its number.
            scratch: for what is on disk.
        """
        self._slots = slots
        self._device = device
        self.slot_of = {
            name: slot for of_block in slots for name, slot in of_block.items()
        }
        self.kept = TensorStore(place, device, scratch, ".weight")
        self._reads: dict[str, Read] = {}  # of the names that are read from elsewhere
        # the block that will be wanted after the present one; -1 if there is none
        self.then = -1
        self._fetcher = Fetcher(device, self._begin)

    @contextlib.contextmanager
    def block(self, place: int, then: int = -1) -> Iterator[None]:
        """Have the weights of a block on the device.

        Args:
            place: of the block in the shard.
            then: the block that will be wanted next, if there is one; its weights are fetched
                meanwhile.
        """
        self.then = then
        if self.kept.place == "device":
            yield
            return
        tensors = {name: self._fetcher.take(name) for name in self._slots[place]}
        self._fetcher.expect(self._slots[then] if 0 <= then < len(self._slots) else ())
        for name, slot in self._slots[place].items():
            slot.fill(tensors[name])
        del tensors
        try:
            yield
        finally:
            for slot in self._slots[place].values():
                slot.fill(slot.content.to("meta"))

    def _begin(self, name: str) -> Arrival:
        if name in self._reads:
            return transfers(self._device).to_device(self.get(name))
        return self.kept.begin(name)

    def fill(
        self, read: Read, checked: Callable[[str, Tensor], None], *, stays: bool
    ) -> None:
        """Look at every tensor once, and keep it if it would not stay.

        Args:
            read: a tensor by its name.
            checked: raises if a tensor is not usable.
            stays: whether `read` goes on to give the same tensors at little cost, from a local
                disk.
        """
        is_there = stays and self.kept.place == "disk"
        self._reads = dict.fromkeys(self.slot_of, read) if is_there else {}
        for name in self.slot_of:
            value = read(name)
            checked(name, value)
            if not is_there:
                self.set(name, value)

    def continue_from(self, read: Read, names: Container[str]) -> None:
        """Read the given names by another function, and free what is kept of them.

        Nothing stays open that no name needs.
        """
        self._fetcher.forget()
        for name in (name for name in self.slot_of if name in names):
            self._reads[name] = read
            if name in self.kept:
                self.kept.drop(name)

    def get(self, name: str) -> Tensor:
        """Return a tensor where it lies; it is not to be written to.

        On disk it is mapped from its file unless its dtype must be changed.
        """
        if name in self._reads:
            return self._reads[name](name).to(self.slot_of[name].dtype)
        return self.kept.get(name)

    def on_device(self, name: str) -> Tensor:
        """Return a tensor on the device; it is not to be written to."""
        return self._begin(name).on_device()

    def set(self, name: str, tensor: Tensor) -> None:
        """Replace the content of a tensor; not inside of its block."""
        self._fetcher.forget()
        slot = self.slot_of[name]
        if self.kept.place == "device" and name not in self.kept:
            tensor = tensor.to(self._device, slot.dtype, copy=True)
            slot.fill(tensor)
        self.kept.put(name, tensor.to(slot.dtype))
        self._reads.pop(name, None)
