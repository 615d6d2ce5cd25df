"""Asynchronous copies between a device and the host.

Each direction has its own stream, and host memory is pinned. On the CPU the same functions copy
synchronously, or return their argument.
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
"""Largest number of pending copies into memory that is not pinned."""


def backend(device: torch.device) -> Any:
    """Return torch's module for a type of device, such as `torch.cuda`."""
    return torch.get_device_module(device)


def compute_on(device: torch.device) -> None:
    """Set the current device of this thread; it is the first GPU in a new thread.

    Otherwise CUDA would create a context on the first GPU, and the thread would use its streams.
    """
    if device.index is not None:
        backend(device).set_device(device)


def thread_on(device: torch.device) -> ThreadPoolExecutor:
    """Return an executor with one thread that computes on a device."""
    return ThreadPoolExecutor(1, initializer=partial(compute_on, device))


@dataclass(frozen=True)
class Arrival:
    """A copy that may still be pending."""

    tensor: Tensor  # the copy
    event: Any = None  # recorded at the end of the copy; None if the copy is complete

    def on_host(self) -> Tensor:
        """Wait for a copy in host memory, and return it."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensor

    def on_device(self) -> Tensor:
        """Return a copy on the device; the current stream waits for it, but not the host."""
        if self.event is not None:
            stream = backend(self.tensor.device).current_stream(self.tensor.device)
            stream.wait_event(self.event)
            self.tensor.record_stream(stream)  # it was allocated on another stream
        return self.tensor


class Transfers:
    """Copies between a device and the host; see `transfers`."""

    def __init__(self, device: torch.device) -> None:
        """Create the streams."""
        self._device = device
        self._is_cpu = device.type == "cpu"
        if not self._is_cpu:
            self._up = backend(device).Stream(device)
            self._down = backend(device).Stream(device)
        self._lock = threading.Lock()  # guards `_landing`
        self._thread = thread_on(device)
        self._landing = deque[Future[Tensor]]()

    @staticmethod
    def pinned(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """Return uninitialised pinned host memory.

        When it is freed and no copy uses it, torch caches it for later tensors.
        """
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def to_device(self, source: Tensor, after: Any = None) -> Arrival:
        """Start to copy a host tensor to the device; a tensor on the device is returned itself.

        Args:
            source: a pinned tensor must not change until the copy is complete.
            after: event for which the copy waits.
        """
        if source.device.type != "cpu" or self._is_cpu:
            return Arrival(source)
        with backend(self._device).stream(self._up):
            if after is not None:
                self._up.wait_event(after)
            copy = source.to(self._device, non_blocking=True, copy=True)
            return Arrival(copy, self._happened(self._up))

    def staged(self, source: Tensor) -> Tensor:
        """Return a copy on the device of a host tensor that is not pinned.

        The host does not wait for the device. On the CPU the tensor itself is returned.
        """
        if self._is_cpu:
            return source
        return self.to_device(
            self.pinned(source.shape, source.dtype).copy_(source)
        ).on_device()

    def to_host(self, source: Tensor, target: Tensor, after: Any = None) -> Arrival:
        """Start to copy a device tensor to pinned memory.

        Args:
            source: may be released at once, but must not change until the copy is complete.
            target: pinned tensor of the same shape and any dtype.
            after: event for which the copy waits.
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
        """Start to copy a device tensor to memory that is not pinned; see `settle`.

        Args:
            source: see `to_host`.
            target: tensor of the same shape and any dtype.
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
        """Wait for all copies that `land` started."""
        with self._lock:
            while self._landing:
                self._landing.popleft().result()

    def queued(self) -> Any:
        """Return an event recorded after all work queued so far, including copies to the host."""
        self._down.wait_stream(backend(self._device).current_stream(self._device))
        return self._happened(self._down)

    def _happened(self, stream: Any) -> Any:
        event = backend(self._device).Event(blocking=True)
        event.record(stream)
        return event


transfers = functools.cache(Transfers)
"""Returns the `Transfers` of a device, one object per process."""


class Fetcher:
    """Copies tensors to the device by name, and prefetches those that are needed next in a thread.

    Callers alternate: they take the tensors of one block, then expect those of the next one. At
    most two blocks have tensors on the device.
    """

    def __init__(self, device: torch.device, begin: Callable[[str], Arrival]) -> None:
        """Start with nothing prefetched.

        Args:
            device: device to copy to.
            begin: starts the copy of a tensor to the device.
        """
        self._device = device
        self._begin = begin
        self._thread = thread_on(device)
        self._ahead: dict[str, Future[Arrival]] = {}

    def expect(self, names: Iterable[str]) -> None:
        """Prefetch tensors, and drop prefetched ones that were not taken; has no effect on the CPU.

        Copies start after the work queued so far, which still uses the tensors of the block before.
        """
        self.forget()
        for name in () if self._device.type == "cpu" else names:
            if not self._ahead:
                self._thread.submit(transfers(self._device).queued().synchronize)
            self._ahead[name] = self._thread.submit(self._begin, name)

    def take(self, name: str) -> Tensor:
        """Return a tensor on the device; the current stream waits for its copy."""
        ahead = self._ahead.pop(name, None)
        return (self._begin(name) if ahead is None else ahead.result()).on_device()

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Drop prefetched tensors; all of them if no names are given."""
        for name in list(self._ahead) if names is None else names:
            if name in self._ahead:
                self._ahead.pop(name).result()
