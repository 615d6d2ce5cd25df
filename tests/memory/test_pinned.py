"""Places of tensors in pieces of pinned memory; nothing is pinned in these tests."""

from __future__ import annotations

import itertools

import pytest
import torch

from ray_surgeon.memory.stores import HostMemory, Pieces, reserved_bytes
from ray_surgeon.memory.transfers import Transfers


def test_places_do_not_overlap_and_pieces_are_full() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 5_000_000, (300,), generator=generator).tolist()
    sizes += [3 * 2**30, *[70_000_000] * 20, 0, 1]
    pieces = Pieces()
    places = list[tuple[int, int, int]]()
    for size in sizes:
        number, first = pieces.place(size)
        assert first % 64 == 0
        assert first + size <= pieces.sizes[number]
        places.append((number, first, first + size))
    for (piece, _, end), (same, start, _) in itertools.pairwise(sorted(places)):
        assert piece != same or end <= start
    assert all(size.bit_count() == 1 for size in pieces.sizes)
    assert reserved_bytes(sizes) == sum(pieces.sizes)


@pytest.mark.parametrize(("size", "number"), [(134_234_112, 200), (8_392_704, 3000)])
def test_little_reserved_memory_is_wasted(size: int, number: int) -> None:
    """Both sizes are slightly above powers of two, where torch would reserve the next power."""
    assert reserved_bytes([size] * number) <= 1.25 * size * number
    assert reserved_bytes([100]) == 128, "a small model takes little"


def test_tensors_are_stored_at_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transfers, "pinned", torch.zeros)
    memory = HostMemory(torch.device("cuda"))
    shapes = [(3, 5), (7,), (), (0, 4)]
    dtypes = [torch.bfloat16, torch.float32, torch.float64, torch.float32]
    tensors = [
        memory.empty(torch.Size(shape), dtype).fill_(number)
        for number, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    assert [tensor.shape for tensor in tensors] == shapes
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
    first = tensors[0].untyped_storage().data_ptr()
    memory.clear()
    assert (
        memory.empty(torch.Size((3, 5)), torch.bfloat16).untyped_storage().data_ptr()
        != first
    )
    assert (tensors[0] == 0).all(), "who has a tensor keeps it"
