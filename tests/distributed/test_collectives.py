"""Synchronisation of replicas, and the messages between them."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import setitem
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayTaskError

from ray_surgeon.distributed import collectives, ray_cluster
from ray_surgeon.distributed.collectives import (
    CollectiveError,
    ProcessReplica,
    Sent,
    ThreadReplica,
    open_meeting,
    send,
)
from ray_surgeon.distributed.placement import WorkerIndex, place
from ray_surgeon.distributed.ray_cluster import RayCluster
from ray_surgeon.distributed.worker import Worker, collective
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.memory.stores import Place, Stores
from tests.conftest import LAYOUTS
from tests.integration.runs import loaded

CPU = torch.device("cpu")
TIMEOUT_S = 1.0


def replica(rank: int, address: str, device: str = "cpu") -> ProcessReplica:
    placement = place(LAYOUTS["llama"], 1, 2)
    index = WorkerIndex(0, rank)
    return ProcessReplica(placement, index, device, address=address, timeout_s=TIMEOUT_S)


def reduced(rank: int, address: str, what_happens: str, says: Any) -> None:
    """Sum tensors to the first of two replicas after something happens to the second."""
    own = replica(rank, address)
    tensor = torch.tensor([1.0, 2.0]) * (rank + 1)
    if rank and what_happens == "computes":
        time.sleep(2.5 * TIMEOUT_S)
    elif rank and what_happens == "dies":
        os._exit(1)
    elif rank and what_happens == "hangs":
        dist.reduce = lambda *_, **__: time.sleep(6 * TIMEOUT_S)
    start = time.monotonic()
    try:
        own.reduce(tensor, 0)
        says.send((tensor.tolist(), time.monotonic() - start))
    except CollectiveError as error:
        says.send((str(error), time.monotonic() - start))
    os._exit(0)  # who leaves in order waits for the other one


@pytest.mark.parametrize("what_happens", ["computes", "dies", "hangs"])
def test_waiting_for_a_slow_stopped_or_lost_replica(what_happens: str) -> None:
    """A replica that computes never times out."""
    processes = multiprocessing.get_context("fork")
    hears, says = processes.Pipe(duplex=False)
    meeting = open_meeting("127.0.0.1")
    address = f"127.0.0.1:{meeting.port}"
    both = [
        processes.Process(
            target=reduced,
            args=(rank, address, what_happens, says if not rank else Mock()),
        )
        for rank in range(2)
    ]
    for process in both:
        process.start()
    assert hears.poll(60), "the first one never said anything"
    result, seconds = hears.recv()
    for process in both:
        process.join()
    if what_happens == "computes":
        assert result == [3.0, 6.0]
        assert seconds > 1.5 * TIMEOUT_S
    else:
        assert result.startswith("a replica of this shard is lost")
        assert seconds < 5 * TIMEOUT_S


def test_gpu_replicas_synchronise_with_gloo_and_copy_with_nccl(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An NCCL error becomes the loss of a replica, with its reason."""
    groups: list[str] = []
    done: list[str] = []

    def new_group(ranks: list[int], timeout: Any, backend: str) -> str:
        groups.append(backend)
        return backend

    def broadcast(
        tensor: torch.Tensor, group: str, group_src: int, async_op: bool
    ) -> Mock:
        done.append(group)
        assert async_op, "NCCL tells only who waits for a collective of its own"
        error = dist.DistBackendError("NCCL error: remote process exited")
        return Mock(wait=Mock(side_effect=error))

    monkeypatch.setattr(dist, "init_process_group", Mock())
    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "barrier", done.append)
    monkeypatch.setattr(dist, "broadcast", broadcast)
    meeting = open_meeting("127.0.0.1")
    own = replica(1, f"127.0.0.1:{meeting.port}", "cuda:0")
    with pytest.raises(CollectiveError, match="NCCL error: remote process exited"):
        own.broadcast(torch.zeros(1), 0)
    assert groups == ["nccl", "gloo"]
    assert done == ["gloo", "nccl"], "they meet before they copy"


def test_failed_collective_is_reported_as_a_lost_worker() -> None:
    cluster: Any = RayCluster.__new__(RayCluster)
    cluster._ping_timeout_s = 1.0
    cluster._check_that_all_answer = Mock()
    failure = cluster.as_failure(
        RayTaskError("call", "...", CollectiveError("NCCL: timed out"))
    )
    assert failure.cause == "communication"
    assert "NCCL: timed out" in str(failure)


@pytest.mark.parametrize(
    ("users", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
        ({"PYTORCH_ALLOC_CONF": ""}, None),
    ],
    ids=str,
)
def test_environment_variables_of_workers(
    users: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "0")
    variables = ray_cluster.worker_environment(3)
    assert variables.get("PYTORCH_ALLOC_CONF") == expected
    assert "TORCH_NCCL_BLOCKING_WAIT" not in variables, "the user's own stays"
    assert variables["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(("device", "taken"), [("cpu", []), ("cuda", ["5"])])
def test_worker_uses_the_gpu_assigned_by_ray(
    device: str, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Mock()
    context.get_accelerator_ids.return_value = {"GPU": ["5"]}
    context.get_node_id.return_value = "node"
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    names: list[str] = []
    worker: Any = SimpleNamespace(device=torch.device(device), take_gpu=names.append)
    assert ray_cluster.settle(worker, torch.get_num_threads())[0] == "node"
    assert names == taken


@pytest.mark.parametrize(("limit", "num_messages"), [(2**20, 6), (100, 8)])
def test_tensors_are_sent_together(
    limit: int, num_messages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message for each owner and dtype, unless it would be too large; every tensor keeps its
    dtype.
    """
    monkeypatch.setattr(collectives, "MESSAGE_BYTES", limit)
    dtypes = [torch.bfloat16, torch.float32, torch.bool]
    shapes = [(2, 3), (4,), (5, 5), (1, 7)]
    kept = [
        (owner, torch.randn(shape).to(dtype))
        for shape in shapes
        for dtype in dtypes
        for owner in range(2)
    ]
    large = torch.randn(200)
    kept.append((1, large))
    barrier = Barrier(2)
    brought = [torch.empty(0)] * 2
    came: list[dict[int, torch.Tensor]] = [{}, {}]
    messages: list[tuple[torch.dtype, int]] = []

    class Noting(ThreadReplica):
        def broadcast(self, tensor: torch.Tensor, owner: int) -> None:
            if self.rank == 0:
                messages.append((tensor.dtype, tensor.numel()))
            super().broadcast(tensor, owner)

    def run(rank: int) -> None:
        tensors = [
            Sent(
                owner,
                tensor.to("meta"),
                partial(tensor.view_as, tensor),
                partial(setitem, came[rank], i),
            )
            for i, (owner, tensor) in enumerate(kept)
        ]
        send(Noting(rank, barrier, brought), tensors, CPU, CPU)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    for rank in range(2):
        assert set(came[rank]) == {
            i for i, (owner, _) in enumerate(kept) if owner != rank
        }
        for i, tensor in came[rank].items():
            assert torch.equal(tensor, kept[i][1]), i
            assert tensor.dtype == kept[i][1].dtype
    assert len(messages) == num_messages, messages
    assert sum(size for _, size in messages) == sum(x.numel() for _, x in kept)


@collective
def double_and_share(worker: Worker, names: list[str]) -> None:
    """Double the owned linears among some, remove their first row, and send them."""
    for name in filter(worker.owns, names):
        worker.shard.set_weight(name, 2 * worker.shard.weight(name))
        mask = worker.mask(name, StructuredMask)
        worker.masks[name] = mask.without(
            torch.arange(len(mask.rows)) == 0, ~mask.columns
        )
    worker.share_linears(names)


@pytest.mark.parametrize(
    ("family", "place"), [("llama-biases", "device"), ("gpt2", "disk")]
)
def test_linears_of_a_shard_are_sent_in_four_messages(
    family: str,
    place: Place,
    model_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights and masks with two owners."""
    cluster = loaded(model_folders[family], 1, 2, Stores(weights=place))
    workers = list(cluster.workers.values())
    names = list(workers[0].shard.linears)
    before = {name: workers[0].shard.weight(name) for name in names}
    broadcast = ThreadReplica.broadcast
    owners: list[int] = []

    def noting(self: ThreadReplica, tensor: torch.Tensor, owner: int) -> None:
        owners.append(owner)
        broadcast(self, tensor, owner)

    monkeypatch.setattr(ThreadReplica, "broadcast", noting)
    cluster.run_all(double_and_share, names)
    assert sorted(owners) == [0, 0, 0, 0, 1, 1, 1, 1], "every message is seen by both"
    for worker in workers:
        for name, W in before.items():
            assert torch.equal(worker.shard.weight(name), 2 * W)
            mask = worker.mask(name, StructuredMask)
            assert mask.rows.sum() == len(mask.rows) - 1
            assert mask.columns.all()
    cluster.close()
