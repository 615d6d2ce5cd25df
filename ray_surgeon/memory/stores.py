"""A worker's stores of weights and factors, and its scratch folder."""

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
"""Where weights or factors are stored."""

Activations = Literal["keep", "recompute"]
"""What happens to a block's activations between its forward and its backward pass."""

TOGETHER = 8
"""Largest number of sequences in one call of a block on a GPU.

With sequences of 2,048 tokens, products then take longer than launches, even with 128 experts.
"""


@dataclass(frozen=True)
class Stores:
    """Where idle weights and factors are kept, and how many sequences pass together."""

    weights: Place = "device"  # of blocks
    factors: Place = "device"  # A and G of all linears
    activations: Activations = "keep"
    wave: int = 1  # sequences that pass a block before the next block runs
    together: int = 1  # sequences of a wave in one call of a block
    # blocks of the dense model or teacher, if it is loaded beside the pruned model
    teacher: Place = "device"

    @property
    def of_teacher(self) -> Stores:
        """Stores of the dense model or teacher; its weights are moved at most once per pass."""
        wave = self.wave if self.teacher == "device" else sys.maxsize
        return replace(self, weights=self.teacher, factors="device", wave=wave)

    def wave_of(self, num_sequences: int, num_shards: int) -> int:
        """Return the number of sequences in a wave on one replica.

        There are at least as many waves as shards, so that all shards are busy. If weights or
        factors have to be moved for every wave, more waves would cost more than idle shards.
        """
        if not self.weights == self.factors == "device":
            return self.wave
        return min(self.wave, max(1, num_sequences // num_shards))

    def in_a_call(self, num_sequences: float, num_shards: int) -> int:
        """Return the number of sequences in one call of a block; see `wave_of`."""
        return min(self.together, self.wave_of(math.ceil(num_sequences), num_shards))


class ScratchNames(NamedTuple):
    """Names of the scratch folders of a run."""

    root: str | None  # parent folder; None for the system's temporary folder
    run: str  # name of the run, the same for every attempt
    attempt: str  # unique name of the attempt


NO_SCRATCH = ScratchNames(None, "none", "none")
"""Names for workers outside of a run."""


def scratch_root(root: str | None) -> Path:
    """Return the parent folder of all scratch folders; `root`, or the system's temporary folder."""
    return Path(tempfile.gettempdir() if root is None else root)


class Scratch:
    """A folder on the local disk for one worker of one attempt of a run.

    The attempts of a run share a parent folder, so that an attempt can remove the files of an
    earlier one that was killed.
    """

    def __init__(self, root: str | None, run: str, attempt: str, worker: str) -> None:
        """Set the path of the folder, which is created by the first write.

        Args:
            root: parent folder; see `scratch_root`.
            run: name of the run, the same for every attempt.
            attempt: name of the attempt.
            worker: name of the worker.
        """
        self._run = scratch_root(root) / f"ray_surgeon-{run}"
        self._attempt = attempt
        self.folder = self._run / attempt / worker

    def path(self, name: str) -> Path:
        """Return the path of a file in the folder; create the folder if it does not exist."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the entries of a tensor to a file, replacing an earlier file of this name.

        Tensors that are mapped from the earlier file stay valid.

        Raises:
            OSError: the file cannot be written; the message gives the file and a remedy.
        """
        path = self.path(name)
        written = path.with_suffix(".writing")
        try:
            tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tofile(written)
            written.replace(path)
        except OSError as error:
            raise OSError(
                f"{path}: cannot write: {error}; free space on that disk, or name another one in "
                "memory.scratch"
            ) from error

    def _earlier(self) -> list[Path]:
        """Return the folders of earlier attempts of this run."""
        return [folder for folder in self._run.glob("*") if folder.name != self._attempt]

    def earlier_bytes(self) -> int:
        """Return the size of the files left by earlier attempts of this run."""
        sizes = 0
        for path in (path for left in self._earlier() for path in left.rglob("*")):
            with contextlib.suppress(
                OSError
            ):  # that attempt may still run and remove files
                sizes += path.lstat().st_size
        return sizes

    def remove_earlier(self) -> None:
        """Remove the files left by earlier attempts of this run."""
        for left in self._earlier():
            shutil.rmtree(left, ignore_errors=True)

    def close(self) -> None:
        """Remove the folder, and its parent folders if they are empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        # fails if other workers still have folders, or another worker removed it
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()
            self._run.rmdir()


_LARGEST_PIECE = 2**33
"""Largest size of a piece in bytes, unless a single tensor is larger.

A new piece has about an eighth of the bytes reserved so far, so that little memory is unused.
"""
_ALIGNMENT = 64


class Pieces:
    """Offsets of tensors in pieces of memory whose sizes are powers of two.

    Each tensor lies in the first piece with room for it.
    """

    def __init__(self) -> None:
        """Start without any pieces."""
        self.sizes: list[int] = []
        self._used: list[int] = []

    def place(self, size: int) -> tuple[int, int]:
        """Return the piece and the offset in it for a tensor of `size` bytes.

        If no piece has enough room, a new one is added.
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
    """Return the number of bytes reserved for tensors of these sizes."""
    pieces = Pieces()
    for size in sizes:
        pieces.place(size)
    return sum(pieces.sizes)


class HostMemory:
    """Allocates tensors in host memory, pinned if the device is an accelerator."""

    def __init__(self, device: torch.device) -> None:
        """Start without reserved memory."""
        self._pins = device.type != "cpu"
        self.clear()

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor."""
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
        """Start with new pieces; the earlier ones are freed with the last tensor in them."""
        self._pieces = Pieces()
        self._memory = list[Tensor]()


class TensorStore:
    """Tensors by name, on the device, in host memory, or in scratch files."""

    def __init__(
        self, place: Place, device: torch.device, scratch: Scratch, ending: str
    ) -> None:
        """Start empty; `ending` is the suffix of file names."""
        self.place = place
        self._device = device
        self._scratch = scratch
        self._ending = ending
        self._memory = HostMemory(device)
        self._kept: dict[str, Tensor] = {}  # meta tensors for those in files
        # for tensors in host memory, the event at the end of the last copy from or to the device
        self._moved: dict[str, Any] = {}
        self._fetcher = Fetcher(device, self.begin)

    def __contains__(self, name: str) -> bool:
        """Return whether the store has a tensor of this name."""
        return name in self._kept

    def get(self, name: str) -> Tensor:
        """Return a tensor where it is stored; one mapped from a file must not be written to."""
        kept = self._kept[name]
        if self.place != "disk":
            return Arrival(kept, self._moved.get(name)).on_host()
        file = str(self._scratch.path(name + self._ending))
        flat = torch.from_file(file, shared=False, size=kept.numel(), dtype=kept.dtype)
        return flat.view(kept.shape)

    def begin(self, name: str) -> Arrival:
        """Start to copy a tensor to the device; on the CPU, return it where it is stored."""
        if self.place != "host" or self._device.type == "cpu":
            return transfers(self._device).to_device(self.get(name))
        arrival = transfers(self._device).to_device(
            self._kept[name], self._moved.get(name)
        )
        self._moved[name] = arrival.event
        return arrival

    def expect(self, names: Iterable[str]) -> None:
        """Prefetch the tensors that are needed next; names that are not stored are ignored."""
        if self.place != "device":
            self._fetcher.expect([name for name in names if name in self._kept])

    def on_device(self, name: str) -> Tensor:
        """Return a tensor on the device that may be written to; `put` stores the changes."""
        if self.place == "device":
            return self._kept[name]
        tensor = self._fetcher.take(name)
        return tensor.clone() if self._device.type == "cpu" else tensor

    def put(self, name: str, tensor: Tensor) -> None:
        """Store a tensor, replacing an earlier one; it must not be written to afterwards."""
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
        """Remove a tensor."""
        self._fetcher.forget([name])
        self._moved.pop(name, None)
        del self._kept[name]
        if not self._kept:
            self._memory.clear()
        if self.place == "disk":
            self._scratch.path(name + self._ending).unlink()

    def clear(self) -> None:
        """Remove all tensors."""
        for name in list(self._kept):
            self.drop(name)


TENSORS_AHEAD = 8
"""Largest number of tensors that are read ahead."""
ENTRIES_AHEAD = 2**27
"""Number of entries in the tensors read ahead at which no further read is started."""
Read = Callable[[str], Tensor]
"""Returns a tensor of any float dtype on the CPU, given its global name."""


class ReadAhead:
    """Prefetches tensors, several at a time, in the order in which they will be requested."""

    def __init__(
        self, read: Read, names: list[str], shapes: Mapping[str, Sequence[int]]
    ) -> None:
        """Start reading.

        Args:
            read: reads one tensor; called from several threads.
            names: names of all tensors in the order of the requests.
            shapes: shapes of the large tensors; the others count as small.
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
        """Return the next tensor in order."""
        coming = self._coming.pop(name)
        self._start_more()
        return coming.result()


@dataclass(frozen=True)
class Slot:
    """The module attribute that holds a parameter or a saved buffer of a block."""

    module: nn.Module
    leaf: str  # name of the attribute
    dtype: torch.dtype  # dtype of the tensor in the module

    @property
    def content(self) -> Tensor:
        """The tensor, on the meta device if the weights are not in the module."""
        content: Tensor = getattr(self.module, self.leaf)
        return content

    def fill(self, tensor: Tensor) -> None:
        """Set the attribute to a tensor."""
        is_parameter = self.leaf in self.module._parameters
        content = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        setattr(self.module, self.leaf, content)


Slots = Sequence[Mapping[str, Slot]]
"""The slot of every tensor by its global name, for each block."""


class WeightStore:
    """The weights of a shard's blocks by global name.

    Inside ``with store.block(...)`` the weights of a block are on the device. If weights are stored
    there, this holds for all blocks at any time. Otherwise only the running block has its weights
    on the device, and on an accelerator those of the next block are being copied. The other weights
    are in host memory (pinned for a GPU) or on disk; unchanged weights on disk are read from the
    checkpoint if it is local.
    """

    def __init__(
        self, place: Place, slots: Slots, device: torch.device, scratch: Scratch
    ) -> None:
        """Start without weights.

        Args:
            place: where idle weights are stored.
            slots: slots of each block's tensors by global name.
            device: device on which blocks run; a GPU has an index.
            scratch: folder for weights on disk.
        """
        self._slots = slots
        self._device = device
        self.slot_of = {
            name: slot for of_block in slots for name, slot in of_block.items()
        }
        self.kept = TensorStore(place, device, scratch, ".weight")
        self._reads: dict[str, Read] = {}  # for tensors that are read from elsewhere
        # the block that runs after the current one; -1 if there is none
        self.then = -1
        self._fetcher = Fetcher(device, self._begin)

    @contextlib.contextmanager
    def block(self, place: int, then: int = -1) -> Iterator[None]:
        """Context in which the weights of a block are on the device.

        Args:
            place: index of the block in the shard.
            then: index of the next block, whose weights are prefetched; -1 if there is none.
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
        """Read and check every tensor, and store it unless it can be read again.

        Args:
            read: reads a tensor by its name.
            checked: raises an error if a tensor is not usable.
            stays: whether `read` can be called again later at little cost, because the checkpoint
                is on a local disk.
        """
        is_there = stays and self.kept.place == "disk"
        self._reads = dict.fromkeys(self.slot_of, read) if is_there else {}
        for name in self.slot_of:
            value = read(name)
            checked(name, value)
            if not is_there:
                self.set(name, value)

    def continue_from(self, read: Read, names: Container[str]) -> None:
        """Read the given tensors by another function from now on, and free the stored ones.

        References to earlier functions are dropped, so that their files can be closed.
        """
        self._fetcher.forget()
        for name in (name for name in self.slot_of if name in names):
            self._reads[name] = read
            if name in self.kept:
                self.kept.drop(name)

    def get(self, name: str) -> Tensor:
        """Return a tensor where it is stored; it must not be written to.

        On disk it is mapped from its file unless its dtype has to be converted.
        """
        if name in self._reads:
            return self._reads[name](name).to(self.slot_of[name].dtype)
        return self.kept.get(name)

    def on_device(self, name: str) -> Tensor:
        """Return a tensor on the device; it must not be written to."""
        return self._begin(name).on_device()

    def set(self, name: str, tensor: Tensor) -> None:
        """Replace a tensor; must not be called inside ``block`` for its block."""
        self._fetcher.forget()
        slot = self.slot_of[name]
        if self.kept.place == "device" and name not in self.kept:
            tensor = tensor.to(self._device, slot.dtype, copy=True)
            slot.fill(tensor)
        self.kept.put(name, tensor.to(slot.dtype))
        self._reads.pop(name, None)
