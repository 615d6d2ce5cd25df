import pytest
import torch

from ray_surgeon.maths.factorised import damp_, factorise
from ray_surgeon.maths.kronecker import PackedSymmetric, balance_, with_ones
from tests.maths.dense import spd


@pytest.mark.parametrize("n", [1, 7, 256, 300, 600])
def test_packed_second_moment_equals_the_full_product(n: int) -> None:
    x = torch.randn(50, n, dtype=torch.float64)
    packed = PackedSymmetric.zeros(n, dtype=torch.float64)
    packed.add(x[:20])
    packed.add(x[20:])
    total = packed.dense()
    torch.testing.assert_close(total, x.T @ x, rtol=1e-12, atol=1e-12)
    assert torch.equal(total, total.T)
    assert torch.equal(packed.diagonal(), total.diagonal())
    assert torch.equal(PackedSymmetric.of(total).flat.sum(), packed.flat.sum())
    assert torch.equal(PackedSymmetric.of(total).dense(), total)
    assert n * (n + 1) / 2 <= len(packed.flat) <= n * (n + 256) / 2
    packed.fill_diagonal(3.0)
    assert torch.equal(packed.dense().diagonal(), torch.full((n,), 3.0, dtype=torch.float64))


def test_kronecker_product_is_exact_where_kfac_is() -> None:
    """With every pair of input and gradient equally often, E[gg^T x aa^T] factorises."""
    a = torch.randn(4, 3, dtype=torch.float64)
    g = torch.randn(5, 2, dtype=torch.float64)
    pairs = [(x, y) for x in a for y in g]
    F = sum(torch.outer(torch.kron(y, x), torch.kron(y, x)) for x, y in pairs) / len(pairs)
    A = torch.stack([torch.outer(x, x) for x, _ in pairs]).mean(dim=0)
    G = torch.stack([torch.outer(y, y) for _, y in pairs]).mean(dim=0)
    torch.testing.assert_close(torch.kron(G, A), F, rtol=1e-12, atol=1e-12)


def test_bias_is_one_more_input() -> None:
    x = torch.randn(9, 4)
    moment = with_ones(x).T @ with_ones(x)
    torch.testing.assert_close(moment[-1, :-1], x.sum(0))
    assert moment[-1, -1] == 9


def test_balancing_keeps_the_product() -> None:
    A = spd(5, 0) * 1e6
    G = spd(4, 1) * 1e-7
    balanced_A = A.clone()
    balanced_G = G.clone()
    balance_(balanced_A, balanced_G)
    torch.testing.assert_close(
        torch.kron(balanced_G, balanced_A), torch.kron(G, A), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        torch.linalg.norm(balanced_A), torch.linalg.norm(balanced_G), rtol=1e-12, atol=0
    )


def test_balancing_leaves_a_zero_factor() -> None:
    A = torch.zeros(3, 3)
    G = torch.eye(2)
    balance_(A, G)
    assert torch.equal(A, torch.zeros(3, 3))
    assert torch.equal(G, torch.eye(2))


def test_damping_is_relative_to_the_mean_of_the_diagonal() -> None:
    matrix = torch.diag(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(damp_(matrix, 0.5), torch.diag(torch.tensor([2.0, 4.0])))


@pytest.mark.parametrize("n", [1, 8, 513, 1100])
def test_inverse_and_its_parts(n: int) -> None:
    """Sizes below, at and above the panels'."""
    matrix = spd(n, 3)
    expected = torch.linalg.inv(damp_(matrix.clone(), 0.1))
    found = factorise(matrix, 0.1, 1.0, "x")
    torch.testing.assert_close(found.inverse(), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.inverse_diagonal(), expected.diagonal(), rtol=1e-9, atol=0)
    some = torch.randperm(n)[: n // 2 + 1]
    torch.testing.assert_close(
        found.inverse_columns(some), expected[:, some], rtol=1e-9, atol=1e-10
    )
    if n > 8:
        sets = torch.randperm(n)[: n // 3 * 3].view(-1, 3)
        blocks = expected[sets[:, :, None], sets[:, None, :]]
        torch.testing.assert_close(found.inverse_blocks(sets), blocks, rtol=1e-9, atol=1e-10)


def test_failed_cholesky_is_retried_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a float32 factorisation of a hard matrix fails depends on the LAPACK, so here every
    one does.
    """
    original = torch.linalg.cholesky_ex

    def fails_in_float32(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        factor, failed = original(matrix)
        return factor, failed if matrix.dtype == torch.float64 else torch.ones_like(failed)

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


def test_hopeless_matrix_is_an_error_that_names_it() -> None:
    with pytest.raises(FloatingPointError, match=r"blocks\.3 G.*\(2, 2\).*damping"):
        factorise(torch.tensor([[1.0, 0.0], [0.0, -5.0]]), 0.01, 1.0, "blocks.3 G")
    with pytest.raises(FloatingPointError, match="NaN"):
        factorise(torch.full((2, 2), float("nan")), 0.01, 1.0, "x")


def test_a_factor_that_is_zero_is_named_at_once() -> None:
    with pytest.raises(FloatingPointError, match="up A: the curvature factor is zero"):
        factorise(torch.zeros(3, 3), 0.01, 1.0, "up A")
