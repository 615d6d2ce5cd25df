"""Streams, events and pinned memory of the pretend accelerator, in the worst order that a GPU may
have.

A copy on its own stream is done at the last moment: when an event after it is waited for. So memory
that is read too early holds NaN, and memory that is written to too early is noticed. The stream
that computes does everything at once.

Mistakes that a GPU would not report are errors: a copy from memory that may be reused meanwhile, a
copy that does not wait for its input, a copy to memory that is not pinned, and a thread that
computes without setting its device.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.backend_registration import _DummyBackendModule

_here = threading.local()
"""Of each thread: current stream, device, number, and count of computing operators."""
_numbers = itertools.count()
_lock = threading.RLock()
_pinned: dict[int, StorageWeakRef] = {}
"""Address of pinned memory -> a weak reference to its owner."""
num_blocking = 0
"""Number of copies between host and device for which the host waited."""


class Stream:
    """A queue of copies."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.work = deque[Callable[[], object]]()
        self.num_issued = 0
        self.num_done = 0
        self.seen = dict[int, int]()  # thread -> its operators that were waited for
        self.arriving = dict[
            int, int
        ]()  # thread -> address of what it last copied to the device
        self.recorded = set[
            int
        ]()  # addresses of memory that is not given away before it is done

    def add(self, work: Callable[[], object]) -> None:
        """Append an action; the stream that computes does it at once."""
        with _lock:
            self.num_issued += 1
            self.work.append(work)
            if self is COMPUTES:
                self.run(self.num_issued)

    def run(self, count: int) -> None:
        """Do all actions up to a number."""
        with _lock:
            while self.num_done < count:
                self.num_done += 1
                self.work.popleft()()

    def wait_event(self, event: Event) -> None:
        for thread, number in event.seen.items():
            self.seen[thread] = max(number, self.seen.get(thread, 0))
        self.add(event.synchronize)
        if self is COMPUTES and event.arriving is not None:
            _not_recorded().add(event.arriving)

    def wait_stream(self, stream: Stream) -> None:
        event = Event()
        event.record(stream)
        self.wait_event(event)


COMPUTES = Stream()


class Event:
    """A position in a stream."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or current_stream()
        self.place = self.stream.num_issued
        self.arriving = self.stream.arriving.pop(_number(), None)
        computed = {_number(): num_computed()}
        self.seen = computed if self.stream is COMPUTES else dict(self.stream.seen)
        self.time_s = time.perf_counter()

    def synchronize(self) -> None:
        assert self.stream is not None, "waits for an event that was never recorded"
        self.stream.run(self.place)

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.time_s - self.time_s)


def current_stream(device: torch.device | None = None) -> Stream:
    if threading.current_thread() is not threading.main_thread():
        assert hasattr(_here, "device"), "this thread has not set its device"
    return getattr(_here, "stream", COMPUTES)


@contextlib.contextmanager
def stream(within: Stream) -> Iterator[None]:
    before = current_stream()
    _here.stream = within
    try:
        yield
    finally:
        _here.stream = before


def set_device(device: torch.device) -> None:
    assert device.index == 0, f"{device}: there is one, and it has a number"
    _here.device = device.index


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(tuple(shape), dtype=dtype)
    _pinned[address(tensor)] = StorageWeakRef(tensor.untyped_storage())
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    reference = _pinned.get(address(tensor))
    return reference is not None and not reference.expired()


def record_stream(tensor: Tensor, stream: Stream) -> None:
    stream.recorded.add(address(tensor))
    if stream is COMPUTES:
        _not_recorded().discard(address(tensor))


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def copy(
    source: Tensor,
    target: Tensor,
    device: Tensor,
    do: Callable[[Tensor], object],
    waits: bool,
) -> None:
    """Copy in the current stream.

    Args:
        source: tensor to read.
        target: tensor to write.
        device: the one of the two that is on the device.
        do: copies from a tensor.
        waits: whether the host waits for the copy.
    """
    global num_blocking
    own = getattr(_here, "stream", COMPUTES)
    host = target if device is source else source
    if own is COMPUTES or host is device or not source.numel():
        num_blocking += waits and host.device != device.device and host.dim() > 0
        do(source)
    elif device is source:
        assert is_pinned(host), "an asynchronous copy to memory that is not pinned"
        seen = own.seen.get(_number())
        assert seen == num_computed(), (
            "a copy does not wait for the computation of its input"
        )

        def leave() -> None:
            assert address(source) in own.recorded, (
                "memory may be reused while it is copied"
            )
            do(source)

        own.add(leave)
    else:
        if target.is_floating_point():
            do(torch.full_like(host, torch.nan))
        # memory that is not pinned is read at once
        read = host if is_pinned(host) else host.clone()
        own.add(lambda: do(read))
        own.arriving[_number()] = address(target)


class Backend(_DummyBackendModule):
    """The functions of `torch.cuda` for the pretend accelerator."""

    Stream = Stream
    Event = Event
    current_stream = staticmethod(current_stream)
    stream = staticmethod(stream)
    set_device = staticmethod(set_device)
    peak_bytes = 12345

    def synchronize(self, device: torch.device | None = None) -> None:
        return

    def empty_cache(self) -> None:
        return

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peak_bytes

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak_bytes = 0

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 2**34, 2**35

    def get_device_name(self, device: torch.device) -> str:
        return "pretend H100"

    def get_device_properties(self, device: torch.device) -> Any:
        return type(
            "Properties", (), {"uuid": "GPU-0", "name": self.get_device_name(device)}
        )


def _number() -> int:
    """Return the number of this thread; numbers are not reused."""
    if not hasattr(_here, "number"):
        _here.number = next(_numbers)
    return int(_here.number)


def _not_recorded() -> set[int]:
    """Return the addresses of memory that was copied to the device in this thread and belongs to
    another stream.
    """
    addresses: set[int] = _here.__dict__.setdefault("not_recorded", set())
    return addresses


def num_computed() -> int:
    return getattr(_here, "num_computed", 0)


def count() -> None:
    """Count a computing operator."""
    assert not _not_recorded(), "copied memory may be reused while it is read"
    _here.num_computed = num_computed() + 1
