from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from ray_surgeon.maths.conjugate import (
    ElementUpdate,
    SplitMatrix,
    dominant_part,
    masked_preconditioner,
)
from ray_surgeon.maths.element_pruning import (
    ElementUnits,
    element_costs,
    find_elements,
    group_costs,
    group_patterns,
    pattern_removals,
    prune_elements,
    summed_group_costs,
    unit_costs,
)
from ray_surgeon.maths.masks import ElementMask
from ray_surgeon.maths.rows_columns import quadratic_cost
from ray_surgeon.maths.threshold import bit_histogram, bucket_of, cost_of_bits
from tests.maths.dense import (
    assert_exact,
    by_conjugate_gradients,
    damped,
    dense_removal,
    linear,
    problem,
    too_indefinite,
)


def random_removal(R: int, C: int, fraction: float, seed: int = 3) -> Tensor:
    return torch.rand(R, C, generator=torch.Generator().manual_seed(seed)) < fraction


def obs_scales(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    return 1 / torch.linalg.inv(G).diagonal()[:, None], 1 / torch.linalg.inv(A).diagonal()[None]


def blocks_of(A_inverse: Tensor, m: int) -> Tensor:
    return torch.stack([A_inverse[i : i + m, i : i + m] for i in range(0, len(A_inverse), m)])[None]


def test_element_cost_is_the_dense_cost() -> None:
    W, A, G = problem()
    costs = element_costs(W, *obs_scales(A, G))
    for r in range(6):
        for c in range(7):
            removed = torch.zeros(6, 7, dtype=torch.bool)
            removed[r, c] = True
            assert float(costs[r, c]) == pytest.approx(dense_removal(W, A, G, removed)[1], rel=1e-9)


def test_diagonal_cost_is_that_of_the_diagonal_fisher() -> None:
    W, A, G = problem()
    expected = 0.5 * W.square() * torch.kron(G, A).diagonal().view_as(W)
    assert_exact(element_costs(W, G.diagonal()[:, None], A.diagonal()[None]), expected)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
def test_group_cost_is_that_of_the_best_of_all_patterns(n: int, m: int) -> None:
    W, A, G = problem(R=3, C=8)
    costs, choice = group_costs(
        W, blocks_of(torch.linalg.inv(A), m), torch.linalg.inv(G).diagonal(), n, m
    )
    patterns = list(combinations(range(m), m - n))
    assert group_patterns(n, m).tolist() == [list(p) for p in patterns]
    for r in range(3):
        for group in range(8 // m):
            dense = []
            for pattern in patterns:
                removed = torch.zeros(3, 8, dtype=torch.bool)
                removed[r, [group * m + place for place in pattern]] = True
                dense.append(dense_removal(W, A, G, removed)[1])
            assert float(costs[r, group]) == pytest.approx(min(dense), rel=1e-8)
            assert dense[int(choice[r, group])] == pytest.approx(min(dense), rel=1e-8)


def test_summed_group_cost_takes_the_smallest() -> None:
    single = torch.rand(5, 8)
    costs, choice = summed_group_costs(single, 2, 4)
    torch.testing.assert_close(costs, single.view(5, 2, 4).sort(dim=2).values[:, :, :2].sum(dim=2))
    removed = pattern_removals(torch.ones(5, 2, dtype=torch.bool), choice, 2, 4)
    assert torch.equal(removed.view(5, 2, 4).sum(dim=2), torch.full((5, 2), 2))
    torch.testing.assert_close((single * removed).view(5, 2, 4).sum(dim=2), costs)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_conjugate_gradients_reach_the_dense_solution(fraction: float) -> None:
    W, A, G = problem()
    removed = random_removal(6, 7, fraction)
    expected, cost = dense_removal(W, A, G, removed)
    found = by_conjugate_gradients(W, [(G, A)], ~removed, num_iterations=200, tolerance=1e-12)
    torch.testing.assert_close(found.W, expected, rtol=1e-8, atol=1e-9)
    assert found.residual < 1e-11
    assert found.predicted == pytest.approx(cost, rel=1e-9)
    assert quadratic_cost(found.W - W, A, G) == pytest.approx(cost, rel=1e-9)


def test_conjugate_gradients_lower_the_cost_with_every_iteration_and_tell_the_residual() -> None:
    W, A, G = problem()
    removed = random_removal(6, 7, 0.5)
    costs = []
    residuals = []
    for n in range(6):
        found = by_conjugate_gradients(W, [(G, A)], ~removed, num_iterations=n, tolerance=0.0)
        costs.append(quadratic_cost(found.W - W, A, G))
        residual = torch.linalg.norm((G @ (found.W - W) @ A)[~removed]) / torch.linalg.norm(
            (G @ (-W * removed) @ A)[~removed]
        )
        assert found.residual == pytest.approx(float(residual), rel=1e-6)
        residuals.append(found.residual)
    assert costs == sorted(costs, reverse=True)
    assert residuals[-1] < residuals[0] == 1.0


def test_dominant_part_is_that_of_the_eigendecomposition() -> None:
    A = damped(problem(R=4, C=40)[1], 0.01)
    U, D = dominant_part(A, 4)
    eigenvalues, vectors = torch.linalg.eigh(A)
    top = vectors[:, -4:] * eigenvalues[-4:].sqrt()
    assert float((U @ U.T - top @ top.T).norm() / (top @ top.T).norm()) < 0.01
    assert (D > 0).all()


def test_split_matrix_multiplies_like_the_matrix() -> None:
    A = problem(R=4, C=40)[1]
    X = torch.randn(5, 40, dtype=torch.float64)
    torch.testing.assert_close(
        SplitMatrix(A, 4, torch.float64).after(X), X @ A, rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(
        SplitMatrix(A, 4, torch.float64).before(X.T.contiguous()), A @ X.T, rtol=1e-10, atol=1e-10
    )
    narrow = (SplitMatrix(A, 4, torch.bfloat16).after(X) - X @ A).norm()
    assert narrow < 0.2 * (X.bfloat16() @ A.bfloat16() - X @ A).norm()


def test_preconditioner_inverts_diagonal_plus_low_rank_on_the_kept_columns_of_each_row() -> None:
    _, A, G = problem(R=5, C=24)
    U, D = dominant_part(A, 6)
    kept = ~random_removal(5, 24, 0.5)
    X = torch.randn(5, 24, dtype=torch.float64) * kept
    found = masked_preconditioner(SplitMatrix(A, 6, torch.float64), G.diagonal(), kept.to(A.dtype))(
        X
    )
    for r in range(5):
        inside = kept[r]
        restricted = (torch.diag(D) + U @ U.T)[inside][:, inside] * G[r, r]
        torch.testing.assert_close(
            found[r, inside], torch.linalg.solve(restricted, X[r, inside]), rtol=1e-8, atol=1e-10
        )
        assert not found[r, ~inside].any()


def test_narrow_products_come_close_and_tell_the_true_residual() -> None:
    W, A, G = problem(R=40, C=50)
    A = damped(A, 0.01)
    G = damped(G, 0.1)
    removed = random_removal(40, 50, 0.5)
    exact = by_conjugate_gradients(W, [(G, A)], ~removed, num_iterations=300, tolerance=1e-10)
    best = quadratic_cost(exact.W - W, A, G)
    found = by_conjugate_gradients(
        W, [(G, A)], ~removed, num_iterations=60, tolerance=0.0, product_dtype=torch.bfloat16
    )
    assert best <= quadratic_cost(found.W - W, A, G) < 1.1 * best
    residual = torch.linalg.norm((G @ (found.W - W) @ A)[~removed]) / torch.linalg.norm(
        (G @ (-W * removed) @ A)[~removed]
    )
    assert found.residual == pytest.approx(float(residual), rel=1e-6)


def test_nothing_to_remove() -> None:
    W, A, G = problem()
    kept = torch.ones(6, 7, dtype=torch.bool)
    found = by_conjugate_gradients(W, [(G, A)], kept, num_iterations=5, tolerance=0.0)
    assert torch.equal(found.W, W)


@pytest.mark.parametrize("precision", [None, torch.float32])
def test_more_iterations_than_the_dtype_has_digits_for(precision: torch.dtype | None) -> None:
    W, A, G = (x.float() for x in problem(6, 8))
    found = by_conjugate_gradients(
        W,
        [(G, A)],
        ~random_removal(6, 8, 0.4),
        num_iterations=1000,
        tolerance=0.0,
        product_dtype=precision,
    )
    assert torch.isfinite(found.W).all()
    assert found.residual < 1e-4


def test_a_linear_of_one_column() -> None:
    W, A, G = problem(8, 1)
    removed = random_removal(8, 1, 0.4)
    found = by_conjugate_gradients(W, [(G, A)], ~removed, num_iterations=50, tolerance=1e-9)
    torch.testing.assert_close(found.W, dense_removal(W, A, G, removed)[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("ties", [False, True])
def test_kth_value_by_counting_bits_is_that_of_sorting(ties: bool) -> None:
    parts = [torch.rand(1000, generator=torch.Generator().manual_seed(s)) ** 8 for s in range(3)]
    if ties:
        parts = [(p * 20).floor() / 20 for p in parts]
    infinite = [torch.cat([p, torch.full((7,), torch.inf)]) for p in parts]
    expected = torch.cat(parts).sort().values
    for k in (1, 2, 1500, 2999, 3000):
        high, rest = bucket_of(torch.stack([bit_histogram(p, None) for p in infinite]).sum(0), k)
        low, _ = bucket_of(torch.stack([bit_histogram(p, high) for p in infinite]).sum(0), rest)
        assert cost_of_bits(high, low) == float(expected[k - 1])


UPDATE = ElementUpdate("conjugate_gradients", 300, 1e-12, "float64")
SINGLE = ElementUnits()


def test_linear_of_elements_is_dense_with_what_earlier_shots_removed() -> None:
    """Bias in the last column; an earlier shot removed some elements: they stay zero and are
    constraints still.
    """
    W, A, G = problem()
    kept = ~random_removal(6, 7, 0.2)
    kept[:, -1] = True
    W = W * kept
    of = linear(W, A, G, has_bias=True)
    before = ElementMask(kept)
    found = find_elements(of, SINGLE, "obs")
    costs = unit_costs(of, before, SINGLE, found)
    assert costs.shape == (6, 6)
    assert torch.equal(torch.isinf(costs), ~kept[:, :6])
    expected_costs = element_costs(W, *obs_scales(damped(A, 0.01), damped(G, 0.1)))
    torch.testing.assert_close(costs[kept[:, :6]], expected_costs[:, :6][kept[:, :6]].float())
    threshold = float(costs.flatten().sort().values[9])
    removal, mask = prune_elements(of, before, SINGLE, found, threshold, UPDATE)
    assert int((~mask.kept).sum()) == int((~kept).sum()) + 10
    expected, cost = dense_removal(W, damped(A, 0.01), damped(G, 0.1), ~mask.kept)
    torch.testing.assert_close(removal.W, expected, rtol=1e-7, atol=1e-9)
    assert removal.predicted == pytest.approx(cost, rel=1e-8)
    assert removal.residual < 1e-11
    assert not removal.W[~mask.kept].any()
    assert mask.kept[:, -1].all()


def test_n_m_linear_keeps_the_pattern_and_the_bias() -> None:
    W, A, G = problem(R=5, C=9)
    of = linear(W, A, G, has_bias=True)
    full = ElementMask.full(5, 9)
    units = ElementUnits(2, 4)
    found = find_elements(of, units, "obs")
    damped_inverse = torch.linalg.inv(damped(A, 0.01))[:8, :8]
    G_inverse_diagonal = torch.linalg.inv(damped(G, 0.1)).diagonal()
    expected, _ = group_costs(
        W[:, :8].contiguous(), blocks_of(damped_inverse, 4), G_inverse_diagonal, 2, 4
    )
    torch.testing.assert_close(unit_costs(of, full, units, found), expected.float())
    removal, mask = prune_elements(of, full, units, found, float("inf"), UPDATE)
    assert torch.equal(mask.kept[:, :8].view(5, 2, 4).sum(dim=2), torch.full((5, 2), 2))
    assert mask.kept[:, -1].all()
    torch.testing.assert_close(
        removal.W,
        dense_removal(W, damped(A, 0.01), damped(G, 0.1), ~mask.kept)[0],
        rtol=1e-7,
        atol=1e-9,
    )
    again = linear(removal.W, A, G, has_bias=True)
    assert torch.isinf(unit_costs(again, mask, units, find_elements(again, units, "obs"))).all(), (
        "a pruned group is no candidate again"
    )


def test_always_zero_rows_and_columns_cost_nothing() -> None:
    W, A, G = problem()
    G[1] = 0
    G[:, 1] = 0
    A[3] = 0
    A[:, 3] = 0
    of = linear(W, A, G)
    full = ElementMask.full(6, 7)
    found = find_elements(of, SINGLE, "obs")
    costs = unit_costs(of, full, SINGLE, found)
    assert not costs[1].any()
    assert not costs[:, 3].any()
    removal, mask = prune_elements(of, full, SINGLE, found, 0.0, UPDATE)
    assert not removal.W[1].any()
    assert not removal.W[:, 3].any()
    assert int(mask.kept.sum()) == 5 * 6


def test_the_update_has_the_damping_that_the_costs_needed() -> None:
    W, A, G = problem()
    A = too_indefinite(A)
    of = linear(W, A, G)
    full = ElementMask.full(6, 7)
    found = find_elements(of, SINGLE, "obs")
    assert found.damping.a == pytest.approx(0.1)
    threshold = float(unit_costs(of, full, SINGLE, found).flatten().sort().values[9])
    removal, mask = prune_elements(of, full, SINGLE, found, threshold, UPDATE)
    expected, _ = dense_removal(W, damped(A, 0.1), damped(G, 0.1), ~mask.kept)
    torch.testing.assert_close(removal.W, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solver", ["single", "none"])
def test_simpler_updates(solver: str) -> None:
    W, A, G = problem()
    of = linear(W, A, G)
    full = ElementMask.full(6, 7)
    found = find_elements(of, SINGLE, "obs")
    threshold = float(unit_costs(of, full, SINGLE, found).min())
    removal, mask = prune_elements(of, full, SINGLE, found, threshold, ElementUpdate(solver))
    assert int((~mask.kept).sum()) == 1
    expected = (
        dense_removal(W, damped(A, 0.01), damped(G, 0.1), ~mask.kept)[0]
        if solver == "single"
        else W * mask.kept
    )
    assert_exact(removal.W, expected)
