"""Copies between a device and the host that run beside what the device computes.

Each way has a stream of its own, and host memory is pinned. On the CPU there is nothing to copy
beside anything: the same functions copy at once, or give back what they get.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

LANDING = 2
"""Tensors that may be on their way into memory that is not pinned."""


def backend(device: torch.device) -> Any:
    """Return torch's functions for devices of a type, as `torch.cuda` has them."""
    return torch.get_device_module(device)


def compute_on(device: torch.device) -> None:
    """Let this thread compute on a device; a new thread begins with the first GPU.

    Without it, CUDA would make a context there, and the thread would use that one's streams.
    """
    if device.index is not None:
        backend(device).set_device(device)


def thread_on(device: torch.device) -> ThreadPoolExecutor:
    """Return one thread that computes on a device, and starts with its first work."""
    return ThreadPoolExecutor(1, initializer=partial(compute_on, device))


@dataclass(frozen=True)
class Arrival:
    """A copy that may be on its way."""

    tensor: Tensor  # the copy
    event: Any = None  # which happens when it is there; None if it is there

    def on_host(self) -> Tensor:
        """Return the copy in the host's memory, once it is there."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensor

    def on_device(self) -> Tensor:
        """Return the copy on the device, for which the work that is queued from now on waits."""
        if self.event is not None:
            stream = backend(self.tensor.device).current_stream(self.tensor.device)
            stream.wait_event(self.event)
            self.tensor.record_stream(stream)  # its memory is of another stream
        return self.tensor


class Transfers:
    """The copies of a device; see `transfers`."""

    def __init__(self, device: torch.device) -> None:
        """Make the streams."""
        self._device = device
        self._is_cpu = device.type == "cpu"
        if not self._is_cpu:
            self._up = backend(device).Stream(device)
            self._down = backend(device).Stream(device)
        self._lock = threading.Lock()  # of what is landing
        self._thread = thread_on(device)
        self._landing = deque[Future[Tensor]]()

    @staticmethod
    def pinned(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """Return host memory that a device reads and writes itself.

        Once it is free, and no copy uses it any more, torch keeps it for later tensors.
        """
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def to_device(self, source: Tensor, after: Any = None) -> Arrival:
        """Begin to copy a tensor of the host to the device; what is there is returned itself.

        Args:
            source: if it is pinned, it must not change until the copy has arrived.
            after: an event for which the copy waits.
        """
        if source.device.type != "cpu" or self._is_cpu:
            return Arrival(source)
        with backend(self._device).stream(self._up):
            if after is not None:
                self._up.wait_event(after)
            copy = source.to(self._device, non_blocking=True, copy=True)
            return Arrival(copy, self._happened(self._up))

    def staged(self, source: Tensor) -> Tensor:
        """Return a copy on the device of what lies in memory of the host that is not pinned.

        The host waits for no work of the device. On the CPU it is the tensor itself.
        """
        if self._is_cpu:
            return source
        return self.to_device(
            self.pinned(source.shape, source.dtype).copy_(source)
        ).on_device()

    def to_host(self, source: Tensor, target: Tensor, after: Any = None) -> Arrival:
        """Begin to copy a tensor of the device into pinned memory.

        Args:
            source: may be dropped at once, but not written to until the copy has arrived.
            target: of the same shape; of any dtype.
            after: an event for which the copy waits.
        """
        if self._is_cpu:
            return Arrival(target.copy_(source))
        source = source.to(target.dtype)
        self._down.wait_stream(backend(self._device).current_stream(self._device))
        with backend(self._device).stream(self._down):
            if after is not None:
                self._down.wait_event(after)
            target.copy_(source, non_blocking=True)
            source.record_stream(self._down)
            return Arrival(target, self._happened(self._down))

    def land(self, source: Tensor, target: Tensor) -> None:
        """Begin to copy a tensor of the device into memory that is not pinned; see `settle`.

        The arguments are as those of `to_host`.
        """
        if self._is_cpu:
            target.copy_(source)
            return
        with self._lock:
            if len(self._landing) >= LANDING:
                self._landing.popleft().result()
            arrival = self.to_host(source, self.pinned(source.shape, target.dtype))
            self._landing.append(
                self._thread.submit(lambda: target.copy_(arrival.on_host()))
            )

    def settle(self) -> None:
        """Wait until everything has landed."""
        with self._lock:
            while self._landing:
                self._landing.popleft().result()

    def queued(self) -> Any:
        """Return an event that happens when all work that is queued now is done.

        So are copies to the host then.
        """
        self._down.wait_stream(backend(self._device).current_stream(self._device))
        return self._happened(self._down)

    def _happened(self, stream: Any) -> Any:
        event = backend(self._device).Event(blocking=True)
        event.record(stream)
        return event


transfers = functools.cache(Transfers)
"""Returns the copies of a device, for all who use it in this process."""


class Fetcher:
    """Brings tensors to the device by name, and those that will be wanted next in a thread.

    Tensors of one block are taken, those of the next one expected, and so on. Of no more than two
    blocks there are any on the device.
    """

    def __init__(self, device: torch.device, begin: Callable[[str], Arrival]) -> None:
        """Fetch nothing yet.

        Args:
            device: where tensors are wanted.
            begin: begins to copy a tensor there.
        """
        self._device = device
        self._begin = begin
        self._thread = thread_on(device)
        self._ahead: dict[str, Future[Arrival]] = {}

    def expect(self, names: Iterable[str]) -> None:
        """Fetch tensors ahead, in place of those that were not taken; nothing on the CPU.

        It begins when the work that is queued now is done, because until then there are the tensors
        of the block before.
        """
        self.forget()
        for name in () if self._device.type == "cpu" else names:
            if not self._ahead:
                self._thread.submit(transfers(self._device).queued().synchronize)
            self._ahead[name] = self._thread.submit(self._begin, name)

    def take(self, name: str) -> Tensor:
        """Return a tensor on the device, for which work that is queued from now on waits."""
        ahead = self._ahead.pop(name, None)
        return (self._begin(name) if ahead is None else ahead.result()).on_device()

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Let go of tensors that were fetched ahead, of all if no names are given."""
        for name in list(self._ahead) if names is None else names:
            if name in self._ahead:
                self._ahead.pop(name).result()
