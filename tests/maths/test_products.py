from __future__ import annotations

import pytest
import torch

from ray_surgeon.maths import products
from ray_surgeon.maths.products import product, times

M = 160
K = 200
N = 144
"""A size above the threshold for oneDNN."""


def laid_out(m: int, n: int, way: str) -> torch.Tensor:
    whole = torch.randn(2 * m, 2 * n)
    return {
        "rows": torch.randn(m, n),
        "columns": torch.randn(n, m).T,
        "gaps": whole[:m, :n],
        "part": whole[m:, n:].T.contiguous().T,
    }[way]


@pytest.mark.parametrize("way", ["rows", "columns", "gaps", "part"])
@pytest.mark.parametrize("other", ["rows", "columns", "gaps"])
def test_product_matches_float64_for_all_strides(way: str, other: str) -> None:
    x = laid_out(M, K, way)
    y = laid_out(K, N, other)
    expected = x.double() @ y.double()
    assert M * K * N >= products.WORTH_IT, "sizes are those of the fast way"
    assert (
        float((product(x, y).double() - expected).abs().max() / expected.abs().max())
        < 3e-6
    )


@pytest.mark.parametrize("num_tokens", [3, M])
def test_gradient_matches_autograd(num_tokens: int) -> None:
    one, other = (torch.randn(2, num_tokens, K).requires_grad_() for _ in range(2))
    other.data.copy_(one.data)
    y = torch.randn(K, N)
    found = times(one, y)
    expected = other @ y
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(found)
    (gradient,) = torch.autograd.grad(found, one, direction)
    (wanted,) = torch.autograd.grad(expected, other, direction)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)
    assert not product(one[0], y).requires_grad


@pytest.mark.parametrize("way", ["rows", "columns"])
@pytest.mark.parametrize("num_tokens", [1, 3, M])
def test_gradients_of_both_operands_match_float64(num_tokens: int, way: str) -> None:
    x = torch.randn(2, num_tokens, K).requires_grad_()
    y = laid_out(K, N, way).requires_grad_()
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, y)]
    direction = torch.randn(2, num_tokens, N)
    found = torch.autograd.grad(times(x, y), (x, y), direction)
    expected = torch.autograd.grad(wide[0] @ wide[1], wide, direction.double())
    for own, exact in zip(found, expected, strict=True):
        assert float((own.double() - exact).norm() / exact.norm()) < 1e-6
    kept: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        times(x, y.detach())
    assert all(t.numel() == y.numel() for t in kept), "nothing waits for a gradient of y"
    (alone,) = torch.autograd.grad(times(x.detach(), y), y, direction)
    assert torch.equal(alone, found[1])


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_products_do_not_depend_on_memory_alignment(num_rows: int) -> None:
    """A matrix mapped from a file may start anywhere; allocated ones start at multiples of 64
    bytes.
    """
    x = torch.randn(num_rows, 32)
    y = torch.randn(48, 32).T
    wanted = times(x, y)
    for offset in range(1, 16):
        elsewhere = (
            torch.empty(y.numel() + 16)[offset : offset + y.numel()]
            .view(48, 32)
            .T.copy_(y)
        )
        assert torch.equal(times(x, elsewhere), wanted)
    torch.testing.assert_close(wanted, x @ y)
