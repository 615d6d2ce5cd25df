"""Places of tensors in pieces of pinned memory. Nothing is pinned here."""

from __future__ import annotations

import pytest
import torch

from ray_surgeon.memory.stores import HostMemory, Pieces, reserved_bytes


def test_places_do_not_overlap_and_pieces_are_full() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [
        *torch.randint(1, 5_000_000, (300,), generator=generator).tolist(),
        3 * 2**30,
        *[70_000_000] * 20,
        0,
        1,
    ]
    pieces = Pieces()
    places = list[tuple[int, int, int]]()
    for size in sizes:
        number, first = pieces.place(size)
        assert first % 64 == 0
        assert first + size <= pieces.sizes[number]
        places.append((number, first, first + size))
    for (piece, _, end), (same, start, _) in zip(sorted(places), sorted(places)[1:], strict=False):
        assert piece != same or end <= start
    assert all(size.bit_count() == 1 for size in pieces.sizes)
    assert reserved_bytes(sizes) == sum(pieces.sizes)


@pytest.mark.parametrize(
    ("size", "number"),
    [(134_234_112, 200), (8_392_704, 3000), (469_762_048, 80), (1_744_830_464, 40), (2**30, 50)],
)
def test_little_is_reserved_for_nothing(size: int, number: int) -> None:
    """Two of these are a little above a power of two, of which torch would reserve the next one for
    each.
    """
    assert reserved_bytes([size] * number) <= 1.25 * size * number
    assert reserved_bytes([100]) == 128, "a small model takes little"


def test_tensors_lie_where_they_were_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        HostMemory, "_reserve", staticmethod(lambda size: torch.zeros(size, dtype=torch.uint8))
    )
    memory = HostMemory(torch.device("cuda"))
    tensors = [
        memory.empty(torch.Size(shape), dtype).fill_(number)
        for number, (shape, dtype) in enumerate(
            [
                ((3, 5), torch.bfloat16),
                ((7,), torch.float32),
                ((), torch.float64),
                ((0, 4), torch.float32),
            ]
        )
    ]
    for number, (tensor, shape) in enumerate(zip(tensors, [(3, 5), (7,), (), (0, 4)], strict=True)):
        assert tensor.shape == shape
        assert (tensor == number).all()
    first = tensors[0].untyped_storage().data_ptr()
    memory.clear()
    assert memory.empty(torch.Size((3, 5)), torch.bfloat16).untyped_storage().data_ptr() != first
    assert (tensors[0] == 0).all(), "who has a tensor keeps it"


def test_a_cpu_pins_nothing() -> None:
    tensor = HostMemory(torch.device("cpu")).empty(torch.Size((3,)), torch.float32)
    assert not tensor.is_pinned()
    assert tensor.untyped_storage().nbytes() == 12
