from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from ray_surgeon.distributed.collectives import decode, encode
from ray_surgeon.distributed.passes import Operation, one_forward_one_backward
from ray_surgeon.distributed.placement import assign_owners, partition_blocks
from tests.conftest import LAYOUTS


@pytest.mark.parametrize(
    ("num_blocks", "num_shards", "head"),
    [(8, 2, 3.0), (12, 4, 100.0), (7, 3, 0.0), (5, 5, 4.7)],
)
def test_partition_minimises_the_slowest_shard(
    num_blocks: int, num_shards: int, head: float
) -> None:
    def slowest(sizes: list[int]) -> float:
        return max(size + head * (i == num_shards - 1) for i, size in enumerate(sizes))

    cuts = itertools.combinations(range(1, num_blocks), num_shards - 1)
    choices = [itertools.pairwise([0, *places, num_blocks]) for places in cuts]
    best = min(slowest([b - a for a, b in choice]) for choice in choices)
    ranges = partition_blocks(num_blocks, num_shards, head)
    assert [r.first for r in ranges] == [0, *(r.last for r in ranges[:-1])]
    assert ranges[-1].last == num_blocks
    assert slowest([r.last - r.first for r in ranges]) == best


def test_owners_share_the_work_of_their_shard() -> None:
    shapes = LAYOUTS["llama"].linears
    owners = assign_owners(shapes, 3, partition_blocks(4, 2, 1.0))
    load = [
        sum(
            s.num_rows**3 + s.num_columns**3
            for s in shapes
            if owners[s.shared_input] == r
        )
        for r in range(3)
    ]
    assert min(load) > 0
    assert max(load) < 1.5 * min(load)


def order_of_shard(shard: int, num_shards: int, n: int) -> Iterator[Operation]:
    warm_up = min(num_shards - 1 - shard, n)
    for micro_batch in range(n + warm_up):
        if micro_batch < n:
            yield shard, "forward", micro_batch
        if shard != num_shards - 1 and micro_batch >= warm_up:
            yield shard, "backward", micro_batch - warm_up


@pytest.mark.parametrize("num_shards", [1, 2, 5])
@pytest.mark.parametrize("n", [1, 8])
def test_schedule_keeps_the_order_of_each_shard_and_is_causal(
    num_shards: int, n: int
) -> None:
    order = one_forward_one_backward(num_shards, n)
    place_of: dict[object, int] = {operation: i for i, operation in enumerate(order)}
    last = num_shards - 1
    for shard in range(num_shards):
        own = [o for o in order if o[0] == shard]
        assert own == list(order_of_shard(shard, num_shards, n))
    for micro_batch in range(n):
        for shard in range(last):
            forward = place_of[(shard, "forward", micro_batch)]
            assert forward < place_of[(shard + 1, "forward", micro_batch)]
            after = (
                shard + 1,
                "forward" if shard + 1 == last else "backward",
                micro_batch,
            )
            assert place_of[after] < place_of[(shard, "backward", micro_batch)]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64]
)
def test_transport_is_exact_and_returns_an_independent_tensor(dtype: torch.dtype) -> None:
    tensor = (torch.randn(3, 4) * 100).to(dtype)
    payload = encode(tensor)
    payload.setflags(write=False)
    back = decode(payload, torch.device("cpu"))
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
    back.add_(1)
    assert torch.equal(decode(payload, torch.device("cpu")), tensor)
    payload = encode(torch.randn(1000, 10)[:2])
    assert payload.base is None or payload.base.nbytes <= 80, "not of the storage"
