from __future__ import annotations

import math

import pytest
import torch

from ray_surgeon.maths.kronecker import balance_, damp_, factorise
from ray_surgeon.maths.products import PackedSymmetric
from tests.maths.dense import damped, draw, packed, spd


@pytest.mark.parametrize("n", [1, 256, 600])
def test_packed_second_moment_equals_the_full_product(n: int) -> None:
    x = draw(50, n)
    half = PackedSymmetric.zeros(n, dtype=torch.float64)
    half.add(x[:20])
    half.add(x[20:])
    total = half.dense()
    torch.testing.assert_close(total, x.T @ x, rtol=1e-12, atol=1e-12)
    assert torch.equal(total, total.T)
    assert torch.equal(half.diagonal(), total.diagonal())
    assert torch.equal(packed(total).dense(), total)
    assert n * (n + 1) / 2 <= len(half.flat) <= n * (n + 256) / 2
    half.fill_diagonal(3.0)
    assert torch.equal(half.dense(), total.fill_diagonal_(3.0))


def test_weighted_second_moment_matches_the_direct_sum() -> None:
    x = draw(7, 300)
    weights = draw(7, seed=1)
    total = PackedSymmetric.zeros(300, dtype=torch.float64)
    total.add(x, weights)
    expected = torch.einsum("n,ni,nj->ij", weights, x, x)
    torch.testing.assert_close(total.dense(), expected, rtol=1e-12, atol=1e-12)


def test_balancing_a_batch_equals_balancing_each_pair() -> None:
    As = torch.stack([spd(5, 0) * 1e6, spd(5, 2), torch.zeros(5, 5, dtype=torch.float64)])
    Gs = torch.stack([spd(4, 1), spd(4, 3), spd(4, 4)])
    pairs = [(A.clone(), G.clone()) for A, G in zip(As, Gs, strict=True)]
    balance_(As, Gs)
    for A, G, pair in zip(As, Gs, pairs, strict=True):
        balance_(*pair)
        torch.testing.assert_close((A, G), pair, rtol=1e-14, atol=0)


def test_balancing_preserves_the_product_and_zero_factors() -> None:
    A = spd(5, 0) * 1e6
    G = spd(4, 1) * 1e-7
    product = torch.kron(G, A)
    balance_(A, G)
    torch.testing.assert_close(torch.kron(G, A), product, rtol=1e-12, atol=0)
    torch.testing.assert_close(A.norm(), G.norm(), rtol=1e-12, atol=0)
    A.zero_()
    before = G.clone()
    balance_(A, G)
    assert not A.any()
    assert torch.equal(G, before)


@pytest.mark.parametrize("n", [1, 9, 600])
def test_inverse_and_its_parts(n: int) -> None:
    """For sizes below and above the height of a panel."""
    matrix = spd(n, 3)
    expected = torch.linalg.inv(damped(matrix, 0.1))
    found = factorise(matrix, 0.1, 1.0, "x")
    torch.testing.assert_close(found.inverse(), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        found.inverse_diagonal(), expected.diagonal(), rtol=1e-9, atol=0
    )
    some = torch.randperm(n)[: n // 2 + 1]
    columns = found.inverse_columns(some)
    torch.testing.assert_close(columns, expected[:, some], rtol=1e-9, atol=1e-10)
    sets = torch.randperm(n)[: n // 3 * 3].view(-1, 3)
    blocks = expected[sets[:, :, None], sets[:, None, :]]
    torch.testing.assert_close(found.inverse_blocks(sets), blocks, rtol=1e-9, atol=1e-10)


def test_failed_cholesky_is_retried_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a float32 factorisation of a hard matrix fails depends on the LAPACK, so every
    float32 factorisation fails in this test.
    """
    original = torch.linalg.cholesky_ex

    def fails_in_float32(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        factor, failed = original(matrix)
        return factor, failed if matrix.dtype == torch.float64 else torch.ones_like(
            failed
        )

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails_in_float32)
    matrix = spd(8, 3).float()
    found = factorise(matrix.clone(), 0.01, 1.0, "x")
    assert found.float64_retry
    assert found.damping == 0.01
    assert found.cholesky.dtype == torch.float32
    torch.testing.assert_close(found.cholesky @ found.cholesky.T, damp_(matrix, 0.01))
    torch.testing.assert_close(found.matrix, matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damping_is_raised_tenfold_and_reported(dtype: torch.dtype) -> None:
    diagonal = torch.tensor([1.0, 1.0, 1.0, -0.05], dtype=dtype)
    factor = factorise(torch.diag(diagonal), 0.01, 1.0, "x")
    assert factor.damping == pytest.approx(0.1)
    torch.testing.assert_close(factor.matrix.diagonal(), diagonal + 0.1 * diagonal.mean())
    torch.testing.assert_close(factor.cholesky @ factor.cholesky.T, factor.matrix)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ([[1.0, 0.0], [0.0, -5.0]], r"blocks\.3 G.*\(2, 2\).*damping"),
        ([[math.nan] * 2] * 2, r"blocks\.3 G.*NaN"),
        ([[0.0] * 2] * 2, r"blocks\.3 G: the curvature factor is zero"),
    ],
)
def test_error_names_a_matrix_that_cannot_be_factorised(
    matrix: list[list[float]], expected: str
) -> None:
    with pytest.raises(FloatingPointError, match=expected):
        factorise(torch.tensor(matrix), 0.01, 1.0, "blocks.3 G")
