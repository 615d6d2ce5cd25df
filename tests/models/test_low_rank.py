from __future__ import annotations

import pytest
import torch

from ray_surgeon.models.low_rank import LowRank, LowRankCorrections, adding
from ray_surgeon.surgery.masks import ElementMask, StructuredMask
from tests.models.test_shard import shards


def test_steps_are_as_long_as_the_rate_and_removed_rows_and_columns_stay() -> None:
    (shard,) = shards("llama", [0, 4])
    shapes = shard.layout.shapes
    masks = {name: StructuredMask.full(shape.num_rows, shape.num_columns) for name, shape in shapes.items()}
    name = next(iter(shard.linears))
    masks[name].rows[0] = masks[name].columns[1] = False
    before, num_steps, rate = shard.weight(name), 4, 0.01
    corrections = LowRankCorrections(shard, masks, set(shard.linears), rank=2, learning_rate=rate, seed_of=dict.fromkeys(shard.linears, 0))
    part = corrections.parts[name]
    start, moved = part.A.detach().clone(), []
    for _ in range(num_steps):
        for parameter in (part.A, part.B):
            parameter.grad = torch.ones_like(parameter)
        last = part.B.detach().clone()
        corrections.step()
        moved.append(float((last - part.B.detach()).mean()))
    # under a gradient that does not change, every step of Adam is as long as its rate
    assert moved == pytest.approx([rate] * num_steps, rel=1e-4)
    torch.testing.assert_close(start - part.A.detach(), torch.full_like(start, num_steps * rate), rtol=1e-4, atol=1e-7)
    product = part.B.detach() @ part.A.detach()
    found = corrections.absorb()
    product[0] = 0
    product[:, 1] = 0
    torch.testing.assert_close(shard.weight(name), before + product)
    assert found[name] == pytest.approx([float(product.square().sum())] * 2, rel=1e-4)


@pytest.mark.parametrize(("size", "least", "most"), [(1e-6, 0.0, 0.1), (1e-2, 0.9, 1.1)])
def test_what_is_absorbed_in_bfloat16_is_said(size: float, least: float, most: float) -> None:
    (shard,) = shards("llama", [0, 4], dtype=torch.bfloat16)
    shapes = shard.layout.shapes
    masks = {name: StructuredMask.full(shape.num_rows, shape.num_columns) for name, shape in shapes.items()}
    seeds = dict.fromkeys(shard.linears, 0)
    corrections = LowRankCorrections(shard, masks, set(shard.linears), rank=2, learning_rate=0.1, seed_of=seeds)
    before, added = {name: shard.weight(name) for name in shard.linears}, {}
    for name, part in corrections.parts.items():
        part.B.data += size * torch.randn(part.B.shape, generator=torch.Generator().manual_seed(1))
        added[name] = part.product().detach()
    for name, (arrived, wanted) in corrections.absorb().items():
        change = (shard.weight(name) - before[name])[:, : added[name].shape[1]]
        assert arrived == pytest.approx(float((change * added[name]).sum()), rel=1e-4, abs=1e-12)
        assert least <= arrived / wanted <= most


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_elements_have_the_gradients_of_the_whole_product_and_keep_none_of_its_size(dtype: torch.dtype) -> None:
    R, C, T = 24, 16, 3
    part = LowRank(torch.nn.Linear(C, R, bias=False), ElementMask(torch.rand(R, C) < 0.6), 2, 0, torch.device("cpu"))
    if dtype == torch.float64:
        part.A = part.A.detach().double().requires_grad_()
    part.B = torch.randn(R, 2, dtype=part.A.dtype).requires_grad_()
    x, direction = torch.randn(2, T, C, dtype=dtype, requires_grad=True), torch.randn(2, T, R, dtype=dtype)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape) if t.is_floating_point() else None, t)[1], lambda t: t):
        added = part.added(x)
    leaves = x, part.A, part.B
    found = torch.autograd.grad(added, leaves, direction)
    plain = x @ torch.mul(part.B @ part.A, part.kept).T.to(dtype)
    assert torch.equal(added, plain)
    for one, other in zip(found, torch.autograd.grad(plain, leaves, direction), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2 if dtype == torch.bfloat16 else 1e-12, atol=1e-12)
    assert max(map(torch.Size.numel, kept)) <= max(x.numel(), part.A.numel(), part.B.numel()) < R * C


@pytest.mark.parametrize("by_element", [False, True])
def test_what_is_added_to_outputs_is_what_is_absorbed(by_element: bool) -> None:
    module, x = torch.nn.Linear(5, 4), torch.randn(2, 3, 5)
    kept = torch.rand(4, 6) < 0.6
    mask = ElementMask(kept) if by_element else StructuredMask(kept[:, 0], kept[0])  # the last column is the bias's
    part, before = LowRank(module, mask, 2, 0, torch.device("cpu")), module(x)
    part.B.data = torch.randn(4, 2)
    module.register_forward_hook(adding(part))
    added = part.B @ part.A * (kept[:, :5] if by_element else torch.outer(kept[:, 0], kept[0, :5]))
    torch.testing.assert_close(part.product(), added)
    torch.testing.assert_close(module(x), before + x @ added.T)


def test_corrections_start_uniform_and_add_nothing() -> None:
    part = LowRank(torch.nn.Linear(400, 3), StructuredMask.full(3, 401), 20, 0, torch.device("cpu"))
    start = part.A.detach()
    assert not part.B.any()
    assert 0.049 < -float(start.min()) <= 0.05 >= float(start.max()) > 0.049
    assert float(start.mean()) == pytest.approx(0, abs=1e-3)


def test_gradients_are_of_the_mean_loss_and_forgotten_after_a_step() -> None:
    (shard,) = shards("llama", [0, 4])
    masks = {name: StructuredMask.full(shape.num_rows, shape.num_columns) for name, shape in shard.layout.shapes.items()}
    name, other = list(shard.linears)[:2]
    corrections = LowRankCorrections(shard, masks, {name}, rank=2, learning_rate=0.1, seed_of=dict.fromkeys(shard.linears, 0))
    for each in (name, other):
        part = corrections.parts[each]
        part.A.grad = torch.full_like(part.A, 6.0)
        assert [float(gradient.abs().max()) for gradient in corrections.gradients(each, 3)] == [2.0, 0.0]
    corrections.step()
    assert not corrections.gradients(name, 3)[0].any()
    assert not corrections.gradients(other, 3)[0].any()
