"""Copies that overlap with computation: their synchronisation, on the pretend accelerator.

The functions before the tests run in processes that have it; see tests/pretend_accelerator.py.
"""

from __future__ import annotations

import random
import tempfile
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ray_surgeon.distributed.collectives import decode, encode
from ray_surgeon.distributed.memory_plan.device_resources import resources_here
from ray_surgeon.distributed.processes import process_usage
from ray_surgeon.distributed.worker import Worker
from ray_surgeon.export import speed
from ray_surgeon.memory.stores import Place, Scratch, Slot, TensorStore, WeightStore
from ray_surgeon.memory.transfers import Fetcher, Transfers, transfers
from ray_surgeon.models.hooks import LayerInputs
from tests.conftest import Zygote

SIM = torch.device("sim", 0) if hasattr(torch, "sim") else torch.device("cpu")
"""The device, in a process where it is registered."""


# In a process that has the device


def copies() -> list[str]:
    """Return the names of wrong copies."""
    from tests import pretend_streams

    own = transfers(SIM)
    x = torch.arange(6.0, device=SIM).view(2, 3)
    wrong = []
    early = own.to_device(Transfers.pinned([4], torch.float32).fill_(2.0))
    if not early.tensor.cpu().isnan().all():
        wrong.append("what has not been waited for is there")
    if early.on_device().tolist() != [2.0] * 4:
        wrong.append("to the device")
    rounded = own.to_host(x / 3, Transfers.pinned([2, 3], torch.bfloat16)).on_host()
    if not torch.equal(rounded, (x.cpu() / 3).bfloat16()):
        wrong.append("to the host, of another dtype")
    before = pretend_streams.num_blocking
    landed = torch.zeros(5, 2, 3)
    for number, row in enumerate(landed):
        own.land(x + number, row)
        own.staged(torch.ones(3)).add_(1.0)
    if pretend_streams.num_blocking != before:
        wrong.append("the host has waited")
    own.settle()
    if not torch.equal(landed, x.cpu() + torch.arange(5.0).view(5, 1, 1)):
        wrong.append("landed")
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        payload = encode(x.to(dtype)[:, 1:])
        payload.flags.writeable = False
        came = decode(payload, SIM)
        if (came.dtype, came.cpu().tolist()) != (dtype, x.to(dtype)[:, 1:].tolist()):
            wrong.append(f"on its way, {dtype}")
    return wrong


def forgotten() -> dict[str, str]:
    """Return the error of each mistake that a GPU would not report."""
    from tests import pretend_streams

    own = transfers(SIM)
    x = torch.ones(3, device=SIM)

    def in_another_thread(work: Callable[[], object]) -> None:
        errors: list[BaseException] = []

        def run() -> None:
            try:
                work()
            except AssertionError as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        raise errors[0]

    def no_wait() -> None:
        pretend_streams.Stream.wait_stream = lambda *_: None  # type: ignore[method-assign]
        own.to_host(x + 1, Transfers.pinned([3], torch.float32))

    def no_record() -> None:
        torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]
        own.to_host(x, Transfers.pinned([3], torch.float32)).on_host()

    attempts: dict[str, Callable[[], object]] = {
        "pinned": lambda: own.to_host(x, torch.zeros(3)),
        "device": lambda: in_another_thread(lambda: own.staged(torch.zeros(3))),
        "record": no_record,
        "wait": no_wait,
        "arrived": lambda: own.staged(torch.zeros(3)) + 1,
    }
    told = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except AssertionError as error:
            told[name] = str(error)
    return told


def stored(device: str, place: Place, seed: int) -> list[list[float]]:
    """Return the results of random puts, changes, reads and prefetches."""
    chance = random.Random(seed)
    where = torch.device(device)
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        store = TensorStore(place, where, Scratch(folder, "run", "try", "worker"), ".x")
        for step in range(60):
            name = chance.choice("abc")
            do = chance.choice(
                ["put", "put from host", "change", "get", "expect", "drop"]
            )
            if do == "expect":
                store.expect(chance.sample("abc", 2))
            elif do.startswith("put") or name not in store:
                own = where if do == "put" else torch.device("cpu")
                if place == "device":
                    own = where
                store.put(name, torch.full([3], float(step), device=own))
            elif do == "change":
                store.put(name, store.on_device(name).mul_(2.0))
            elif do == "get":
                seen.append(store.get(name).tolist())
            else:
                store.drop(name)
        seen += [store.get(name).tolist() for name in "abc" if name in store]
        store.clear()
    return seen


def streamed(device: str, place: Place) -> list[list[float]]:
    """Return the weights seen by blocks if they are prefetched and change between two passes."""
    where = torch.device(device)
    blocks = [nn.Linear(4, 2, device="meta") for _ in range(5)]
    slots = [
        {f"{i}.{leaf}": Slot(block, leaf, torch.float32) for leaf in ("weight", "bias")}
        for i, block in enumerate(blocks)
    ]
    ones = torch.ones(1, 4, device=where)
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Scratch(folder, "run", "try", "worker")
        store = WeightStore(place, slots, where, scratch)
        leaves = {"weight": torch.ones(2, 4), "bias": torch.zeros(2)}
        store.fill(
            lambda name: leaves[name[2:]] * (1 + int(name[0])),
            lambda *_: None,
            stays=True,
        )
        for way in (range(5), reversed(range(5)), (2, 0, 4)):
            numbers = list(way)
            for at, then in zip(numbers, [*numbers[1:], -1], strict=True):
                with store.block(at, then):
                    seen.append(blocks[at](ones).flatten().tolist())
                store.set(f"{at}.bias", torch.full([2], 0.5 + at, device=where))
    return seen


def layer_inputs(num_tokens: int) -> dict[str, Any]:
    """Return the number of host waits while inputs are kept, and whether they are correct."""
    from tests import pretend_streams

    linear = nn.Linear(8, 4, device=SIM)
    kept = LayerInputs({"last": (0, linear), "other": (1, linear)}, 4 * num_tokens, SIM)
    x = torch.randn(4, 1, num_tokens, 8, device=SIM)
    (hook,) = kept.watch(0)
    before = pretend_streams.num_blocking
    for sequence in x:
        linear(sequence)
    blocking = pretend_streams.num_blocking - before
    hook.remove()
    expected = x.cpu().flatten(0, 2).bfloat16()
    return {"blocking": blocking, "equal": torch.equal(kept.kept["last"], expected)}


def statistics() -> dict[str, Any]:
    """Return the reported memory and speed of the device."""
    worker: Any = Worker.__new__(Worker)
    worker.device = torch.device("sim")
    Worker.take_gpu(worker)
    peaks = [process_usage(worker.device).peak_gpu_bytes for _ in range(2)]
    found = resources_here(worker.device, None)
    return {
        "device": str(worker.device),
        "gpu": worker.gpu,
        "peaks": peaks,
        "room": [
            found.room.device,
            found.room.device_is_host,
            found.device,
            found.device_name,
        ],
        "name": speed._device_name(SIM, 1),
        "now": speed._now(SIM) > 0,
    }


# Here


def on_sim(zygote: Zygote, function: Callable[..., object], **arguments: object) -> Any:
    """Call a function in a process that has the device."""
    where = f"{function.__module__}:{function.__name__}"
    asked = {"function": where, "arguments": arguments}
    return zygote.run_module("tests.pretend_accelerator", asked)["returned"]


def test_copies_are_correct(zygote: Zygote) -> None:
    assert on_sim(zygote, copies) == []


def test_missing_synchronisation_is_an_error(zygote: Zygote) -> None:
    told = on_sim(zygote, forgotten)
    assert set(told) == {"pinned", "device", "record", "wait", "arrived"}, told
    assert "not pinned" in told["pinned"]
    assert "set its device" in told["device"]
    assert "reused" in told["record"]
    assert "does not wait" in told["wait"]
    assert "while it is read" in told["arrived"]


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_store_returns_the_stored_tensors(place: Place, zygote: Zygote) -> None:
    for seed in range(4):
        expected = stored("cpu", place, seed)
        assert len(expected) > 5
        assert on_sim(zygote, stored, device="sim:0", place=place, seed=seed) == expected


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_prefetched_weights_are_correct(place: Place, zygote: Zygote) -> None:
    expected = streamed("cpu", "device")
    assert expected[0] == [4.0, 4.0]
    assert expected[-1] == [24.5, 24.5]
    assert streamed("cpu", place) == expected
    assert on_sim(zygote, streamed, device="sim:0", place=place) == expected


def test_layer_inputs_are_copied_in_the_background(zygote: Zygote) -> None:
    assert on_sim(zygote, layer_inputs, num_tokens=6) == {"blocking": 0, "equal": True}


def test_reported_device_statistics(zygote: Zygote) -> None:
    told = on_sim(zygote, statistics)
    assert told == {
        "device": "sim:0",
        "gpu": "0",
        "peaks": [12345, 0],
        "room": [2.0**34, False, "GPU-0", "pretend H100"],
        "name": "pretend H100",
        "now": True,
    }


def expected_and_not_taken(device: str) -> list[list[str]]:
    """Return the reads that were started after each of several calls."""
    begun = list[str]()

    def begin(name: str) -> Any:
        begun.append(name)
        return SimpleNamespace(on_device=lambda: name.upper())

    fetcher = Fetcher(torch.device(device), begin)
    fetcher.expect(["a", "b"])
    taken: Any = fetcher.take("b")
    seen = [taken, *sorted(begun)]
    fetcher.forget(["a"])
    assert str(fetcher.take("a")) == "A"
    return [seen, sorted(begun)]


def test_unused_prefetches_are_dropped(zygote: Zygote) -> None:
    assert expected_and_not_taken("cpu") == [["B", "b"], ["a", "b"]], (
        "nothing comes ahead"
    )
    told = on_sim(zygote, expected_and_not_taken, device="sim:0")
    assert told == [["B", "a", "b"], ["a", "a", "b"]]
