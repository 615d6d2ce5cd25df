from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ray_surgeon.maths.masks import ElementMask, StructuredMask
from ray_surgeon.models.low_rank import CLIP, RATE_OF_A, LowRank, LowRankCorrections
from ray_surgeon.models.shard import ModelShard
from tests.models.test_shard import shards


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def corrected(shard: ModelShard, owned: Any = None, **masks: Any) -> LowRankCorrections:
    shapes = shard.layout.shapes.items()
    full = {
        name: StructuredMask.full(s.num_rows, s.num_columns) for name, s in shapes
    } | masks
    parts = {n: LowRank(m, full[n], 2, 0, shard.device) for n, m in shard.linears.items()}
    return LowRankCorrections(shard, parts, owned or set(parts))


@pytest.fixture
def shard() -> ModelShard:
    return shards("llama", [0, 4])[0]


def test_step_length_is_the_rate_and_removed_rows_and_columns_stay_zero(
    shard: ModelShard,
) -> None:
    name = next(iter(shard.linears))
    before = shard.weight(name)
    mask = StructuredMask.full(*before.shape)
    mask.rows[0] = mask.columns[1] = False
    corrections = corrected(shard, **{name: mask})
    part = corrections.parts[name]
    start = part.A.detach().clone()
    moved = []
    for _ in range(4):
        for parameter in (part.A, part.B):
            parameter.grad = torch.ones_like(parameter)
        last = part.B.detach().clone()
        corrections.step(0.01)
        moved.append(float((last - part.B.detach()).mean()))
    # under a gradient that does not change, every step of Adam is as long as its rate, here
    # relative to the weights
    of_A = part.size
    of_W = float(before[:, : start.shape[1]].square().mean().sqrt())
    assert moved == pytest.approx([0.01 * of_W / (of_A * 2**0.5)] * 4, rel=1e-4)
    of_all = torch.full_like(start, 4 * 0.01 * RATE_OF_A * of_A)
    torch.testing.assert_close(start - part.A.detach(), of_all, rtol=1e-4, atol=1e-7)
    product = part.B.detach() @ part.A.detach()
    product[0] = 0
    product[:, 1] = 0
    found = corrections.absorb()
    torch.testing.assert_close(shard.weight(name), before + product)
    assert found[name] == pytest.approx([float(product.square().sum())] * 2, rel=1e-4)


@pytest.mark.parametrize(("size", "least", "most"), [(1e-6, 0.0, 0.1), (1e-2, 0.9, 1.1)])
def test_share_absorbed_in_bfloat16_is_reported(
    size: float, least: float, most: float
) -> None:
    (shard,) = shards("llama", [0, 4], dtype=torch.bfloat16)
    corrections = corrected(shard)
    before = {name: shard.weight(name) for name in shard.linears}
    added = {}
    for name, part in corrections.parts.items():
        part.B.data += size * drawn(*part.B.shape)
        added[name] = part.product().detach()
    for name, (arrived, wanted) in corrections.absorb().items():
        change = (shard.weight(name) - before[name])[:, : added[name].shape[1]]
        assert arrived == pytest.approx(
            float((change * added[name]).sum()), rel=1e-4, abs=1e-12
        )
        assert least <= arrived / wanted <= most


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_element_masks_have_product_gradients_and_keep_no_copy(
    dtype: torch.dtype,
) -> None:
    R = 24
    C = 16
    mask = ElementMask(torch.rand(R, C) < 0.6)
    part = LowRank(torch.nn.Linear(C, R, bias=False), mask, 2, 0, torch.device("cpu"))
    if dtype == torch.float64:
        part.A = part.A.detach().double().requires_grad_()
    part.B = torch.randn(R, 2, dtype=part.A.dtype).requires_grad_()
    x = torch.randn(6, C, dtype=dtype, requires_grad=True)
    W = torch.zeros(R, C, dtype=dtype)
    direction = torch.randn(6, R, dtype=dtype)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.extend([t] * (t.data_ptr() != W.data_ptr()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        added = part.outputs(x, W)
    leaves = x, part.A, part.B
    found = torch.autograd.grad(added, leaves, direction)
    plain = x @ torch.mul(part.B @ part.A, mask.kept).T.to(dtype)
    assert torch.equal(added, plain)
    rtol = 2e-2 if dtype == torch.bfloat16 else 1e-12
    for one, other in zip(
        found, torch.autograd.grad(plain, leaves, direction), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-12)
    assert max(t.numel() for t in kept if t.is_floating_point()) <= x.numel() < R * C


@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_outputs_and_gradients_match_the_dense_sum(num_tokens: int) -> None:
    """With removed rows and columns. The products with the most tokens are large enough for the
    faster library.
    """
    R = 96
    C = 80
    mask = StructuredMask(torch.rand(R) < 0.7, torch.rand(C) < 0.7)
    part = LowRank(torch.nn.Linear(C, R, bias=False), mask, 4, 0, torch.device("cpu"))
    part.B.data += torch.randn(R, 4) * mask.rows[:, None]
    x = torch.randn(num_tokens, C, requires_grad=True)
    W = torch.randn(R, C)
    direction = torch.randn(num_tokens, R)
    outputs = part.outputs(x, W)
    leaves = [x, part.A, part.B]
    gradients = torch.autograd.grad(outputs, leaves, direction)
    part.keep_removed_(*gradients[1:])
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    states, A, B = wide
    dense = W.double() + (B * mask.rows[:, None]) @ (A * mask.columns)
    expected = states @ dense.T
    oracle = torch.autograd.grad(expected, wide, direction.double())
    pairs = zip([outputs, *gradients], [expected, *oracle], strict=True)
    for own, exact in pairs:
        torch.testing.assert_close(own.double(), exact, rtol=1e-4, atol=1e-4)
    assert not gradients[1][:, ~mask.columns].any()
    assert not gradients[2][~mask.rows].any()


def test_corrections_start_at_zero_with_uniform_A() -> None:
    part = LowRank(
        torch.nn.Linear(400, 3), StructuredMask.full(3, 401), 20, 0, torch.device("cpu")
    )
    start = part.A.detach()
    assert not part.B.any()
    assert 0.049 < -float(start.min()) <= 0.05 >= float(start.max()) > 0.049


def test_gradients_are_of_the_mean_loss_and_cleared_by_a_step(shard: ModelShard) -> None:
    owned, other = list(shard.linears)[:2]
    corrections = corrected(shard, owned={owned})
    for name in (owned, other):
        part = corrections.parts[name]
        part.A.grad = torch.full_like(part.A, 6.0)
        assert [float(g.abs().max()) for g in corrections.gradients(name, 3)] == [
            2.0,
            0.0,
        ]
    corrections.step(0.1)
    for name in (owned, other):
        assert not corrections.gradients(name, 3)[0].any()


def test_restored_state_is_complete(shard: ModelShard) -> None:
    """Steps after a restored state equal those that were made after it was saved, moments and mean
    norms included. Later steps do not change a saved state.
    """
    corrections = corrected(shard)
    part = corrections.parts[next(iter(shard.linears))]

    def steps(count: int) -> Tensor:
        generator = torch.Generator().manual_seed(count)
        for _ in range(count):
            for each in corrections.parts.values():
                for parameter in (each.A, each.B):
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
            corrections.step(0.01)
        return torch.cat([part.A.detach().flatten(), part.B.detach().flatten()])

    steps(3)
    state = corrections.best()
    expected = steps(4)
    for _ in range(2):
        steps(5)
        corrections.back_to(state)
        assert part.A.grad is None
        assert torch.equal(steps(4), expected)


def test_gradient_far_above_the_earlier_mean_is_clipped(shard: ModelShard) -> None:
    corrections = corrected(shard)
    part = corrections.parts[next(iter(shard.linears))]
    norms = []
    for size in (1.0, 1.0, 100.0, 1.5):
        for each in corrections.parts.values():
            for parameter in (each.A, each.B):
                parameter.grad = torch.full_like(
                    parameter, size / parameter.numel() ** 0.5
                )
        gradient = part.A.grad
        assert gradient is not None
        corrections.step(0.01)
        norms.append(float(gradient.norm()))
    assert norms == pytest.approx([1.0, 1.0, CLIP, 1.5])


def test_outputs_with_absorbed_weights() -> None:
    (shard,) = shards("llama", [0, 4], dtype=torch.bfloat16)
    corrections = corrected(shard)
    name, module = next(iter(shard.linears.items()))
    part = corrections.parts[name]
    part.B.data += 0.003 * drawn(*part.B.shape)
    x = drawn(1, 5, part.A.shape[1], seed=2).bfloat16()
    plain = module(x).detach()
    corrections.rounds = True
    rounded = module(x).detach()
    corrections.absorb()
    absorbed = module(x).detach()
    torch.testing.assert_close(rounded, absorbed, rtol=2e-2, atol=2e-2)
    assert float((rounded - absorbed).abs().mean()) < float(
        (plain - absorbed).abs().mean()
    )
    corrections = corrected(shard)
    corrections.parts[name].B.data += 1
    corrections.remove()
    assert torch.equal(module(x), absorbed), "what is removed leaves no trace"
