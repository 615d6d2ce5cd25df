"""Stores of tensors of a worker, and the folder on its disk."""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ray_surgeon.memory.transfers import Arrival, Fetcher, Transfers, transfers

Place = Literal["device", "host", "disk"]
"""Of weights or factors."""

Activations = Literal["keep", "recompute"]
"""Of a block, between its forward and its backward pass."""

TOGETHER = 8
"""Sequences that pass a block in one call on a GPU, where memory allows.

With 2,048 tokens each, products take longer than launches, be it in a mixture of 128.
"""


@dataclass(frozen=True)
class Stores:
    """Where idle weights and factors are kept, and how many sequences pass together."""

    weights: Place = "device"  # of blocks
    factors: Place = "device"  # A and G of all linears
    activations: Activations = "keep"
    wave: int = 1  # sequences that pass a block before the next block runs
    together: int = 1  # those of them that pass it in one call
    # blocks of the dense model, where it is beside the pruned one
    teacher: Place = "device"

    @property
    def of_teacher(self) -> Stores:
        """Return those of the dense model; if its weights move, they do so once in a pass."""
        wave = self.wave if self.teacher == "device" else sys.maxsize
        return replace(self, weights=self.teacher, factors="device", wave=wave)

    def wave_of(self, num_sequences: int, num_shards: int) -> int:
        """Return the size of a wave of the sequences that pass on a replica.

        There are at least as many waves as shards, so that all are busy; to move weights or factors
        for more of them would cost more than shards that wait.
        """
        if not self.weights == self.factors == "device":
            return self.wave
        return min(self.wave, max(1, num_sequences // num_shards))

    def in_a_call(self, num_sequences: float, num_shards: int) -> int:
        """Return how many sequences of a wave pass a block in one call; see `wave_of`."""
        return min(self.together, self.wave_of(math.ceil(num_sequences), num_shards))


class ScratchNames(NamedTuple):
    """Names of the scratch folders of a run."""

    root: str | None  # folder for all runs; None for the machine's own
    run: str  # the same for every try
    attempt: str  # another one for every try


NO_SCRATCH = ScratchNames(None, "none", "none")
"""Of workers outside of runs."""


def scratch_root(root: str | None) -> Path:
    """Return the folder for all runs, on this machine; None for the one of its temporary files."""
    return Path(tempfile.gettempdir() if root is None else root)


class Scratch:
    """A folder on the local disk for one worker of one try of a run.

    The tries of a run share a parent folder, so that a try removes what a killed one before it
    left.
    """

    def __init__(self, root: str | None, run: str, attempt: str, worker: str) -> None:
        """Name the folder; it is made when something is written.

        Args:
            root: folder for all runs; see `scratch_root`.
            run: the same for every try of a run.
            attempt: one try of it.
            worker: one of its workers.
        """
        self._run = scratch_root(root) / f"ray_surgeon-{run}"
        self._attempt = attempt
        self.folder = self._run / attempt / worker

    def path(self, name: str) -> Path:
        """Return the path of a file in the folder, which is made if need be."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the entries of a tensor into a file, which replaces the one of this name.

        Who still reads the old one keeps it.

        Raises:
            OSError: it cannot be written; names the file and the remedy.
        """
        path = self.path(name)
        written = path.with_suffix(".writing")
        try:
            tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tofile(written)
            written.replace(path)
        except OSError as error:
            remedy = "free space on that disk, or name another one in memory.scratch"
            raise OSError(f"{path}: cannot write: {error}; {remedy}") from error

    def _earlier(self) -> list[Path]:
        """Return the folders of earlier tries of this run."""
        return [folder for folder in self._run.glob("*") if folder.name != self._attempt]

    def earlier_bytes(self) -> int:
        """Return the bytes of what earlier tries of this run left."""
        sizes = 0
        for path in (path for left in self._earlier() for path in left.rglob("*")):
            with contextlib.suppress(OSError):  # that try may live, and remove its files
                sizes += path.lstat().st_size
        return sizes

    def remove_earlier(self) -> None:
        """Remove what earlier tries of this run left."""
        for left in self._earlier():
            shutil.rmtree(left, ignore_errors=True)

    def close(self) -> None:
        """Remove the folder, and those above it that are empty then."""
        shutil.rmtree(self.folder, ignore_errors=True)
        # other workers' folders are there, or it is gone
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()
            self._run.rmdir()


_LARGEST_PIECE = 2**33
"""Bytes of a piece, unless one tensor has more.

Earlier ones have an eighth of all before them, so that no more is reserved for nothing.
"""
_ALIGNMENT = 64


class Pieces:
    """The places of tensors in pieces whose sizes are powers of two.

    Each tensor lies in the first piece with room for it.
    """

    def __init__(self) -> None:
        """Start without pieces."""
        self.sizes: list[int] = []
        self._used: list[int] = []

    def place(self, size: int) -> tuple[int, int]:
        """Return the piece and the first byte in it for a tensor of `size` bytes.

        The piece may be a new one.
        """
        room = -(-size // _ALIGNMENT) * _ALIGNMENT
        fitting = (i for i, used in enumerate(self._used) if used + room <= self.sizes[i])
        number = next(fitting, len(self.sizes))
        if number == len(self.sizes):
            least = min(_LARGEST_PIECE, sum(self.sizes) // 8)
            self.sizes.append(
                1 << max(6, (room - 1).bit_length(), least.bit_length() - 1)
            )
            self._used.append(0)
        first = self._used[number]
        self._used[number] += room
        return number, first


def reserved_bytes(sizes: Iterable[int]) -> int:
    """Return how many bytes are reserved for tensors of these sizes."""
    pieces = Pieces()
    for size in sizes:
        pieces.place(size)
    return sum(pieces.sizes)


class HostMemory:
    """Gives tensors in the memory of the host, pinned if they go to a GPU."""

    def __init__(self, device: torch.device) -> None:
        """Reserve nothing yet."""
        self._pins = device.type != "cpu"
        self.clear()

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a tensor with whatever is there."""
        if not self._pins:
            return torch.empty(shape, dtype=dtype)
        size = math.prod(shape) * dtype.itemsize
        number, first = self._pieces.place(size)
        if number == len(self._memory):
            self._memory.append(
                Transfers.pinned([self._pieces.sizes[number]], dtype=torch.uint8)
            )
        return self._memory[number][first : first + size].view(dtype).view(shape)

    def clear(self) -> None:
        """Begin with new pieces; earlier ones are free once nobody has a tensor in them."""
        self._pieces = Pieces()
        self._memory = list[Tensor]()


class TensorStore:
    """Tensors by name: on the device, in the host's memory, or in files of scratch."""

    def __init__(
        self, place: Place, device: torch.device, scratch: Scratch, ending: str
    ) -> None:
        """Start empty; names of files have an ending."""
        self.place = place
        self._device = device
        self._scratch = scratch
        self._ending = ending
        self._memory = HostMemory(device)
        self._kept: dict[str, Tensor] = {}  # on meta what is in a file
        # of what is in the host's memory, when the last copy from or to a device is done
        self._moved: dict[str, Any] = {}
        self._fetcher = Fetcher(device, self.begin)

    def __contains__(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._kept

    def get(self, name: str) -> Tensor:
        """Return a tensor where it lies; what is mapped from a file is not to be written to."""
        kept = self._kept[name]
        if self.place != "disk":
            return Arrival(kept, self._moved.get(name)).on_host()
        file = str(self._scratch.path(name + self._ending))
        flat = torch.from_file(file, shared=False, size=kept.numel(), dtype=kept.dtype)
        return flat.view(kept.shape)

    def begin(self, name: str) -> Arrival:
        """Begin to copy a tensor to the device; on the CPU, return it where it lies."""
        if self.place != "host" or self._device.type == "cpu":
            return transfers(self._device).to_device(self.get(name))
        arrival = transfers(self._device).to_device(
            self._kept[name], self._moved.get(name)
        )
        self._moved[name] = arrival.event
        return arrival

    def expect(self, names: Iterable[str]) -> None:
        """Bring tensors to the device that will be wanted next, those of them that are kept."""
        if self.place != "device":
            self._fetcher.expect([name for name in names if name in self._kept])

    def on_device(self, name: str) -> Tensor:
        """Return a tensor that may be written to; `put` keeps what was written."""
        if self.place == "device":
            return self._kept[name]
        tensor = self._fetcher.take(name)
        return tensor.clone() if self._device.type == "cpu" else tensor

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor in place of the one there was; it is not to be written to afterwards."""
        self._fetcher.forget([name])
        if self.place == "disk":
            self._scratch.write(name + self._ending, tensor)
            self._kept[name] = tensor.to("meta")
            return
        if name not in self._kept:
            if self.place == "device":
                self._kept[name] = tensor
                return
            self._kept[name] = self._memory.empty(tensor.shape, tensor.dtype)
        kept = self._kept[name]
        moved = self._moved.pop(name, None)
        if self.place == "device" or tensor.device.type == "cpu":
            Arrival(kept, moved).on_host().copy_(tensor)
        else:
            self._moved[name] = transfers(self._device).to_host(tensor, kept, moved).event

    def drop(self, name: str) -> None:
        """Forget a tensor."""
        self._fetcher.forget([name])
        self._moved.pop(name, None)
        del self._kept[name]
        if not self._kept:
            self._memory.clear()
        if self.place == "disk":
            self._scratch.path(name + self._ending).unlink()

    def clear(self) -> None:
        """Forget everything."""
        for name in list(self._kept):
            self.drop(name)


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
