from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.fisher_error import terms_of_samples
from ray_surgeon.maths.conjugate import ElementUpdate
from ray_surgeon.maths.curvature import LinearCurvature
from ray_surgeon.maths.element_pruning import (
    ElementUnits,
    find_elements,
    prune_elements,
    unit_costs,
)
from ray_surgeon.maths.extended.terms import TwoTermInverse, clip_term, minimise_kept
from ray_surgeon.maths.kronecker import Damping, KroneckerFactors, PackedSymmetric, Term
from ray_surgeon.maths.linear import Linear
from ray_surgeon.maths.masks import ElementMask, StructuredMask
from ray_surgeon.maths.structured import find_candidates, prune_structures
from tests.maths.dense import (
    by_conjugate_gradients,
    crossing,
    dense_minimum,
    flags,
    indefinite,
    problem,
)

R = 5
C = 6


def sum_of(num_terms: int) -> tuple[Tensor, list[Term], Tensor]:
    """Return W, the terms, the first positive definite and the others clipped to leave a positive
    definite sum, and dense F.
    """
    W, A, G = problem(R, C)
    terms = [(G, A)]
    for r in range(1, num_terms):
        wild = indefinite(R, 10 + r), indefinite(C, 20 + r)
        terms.append(
            clip_term(
                wild, torch.linalg.cholesky(G), torch.linalg.cholesky(A), 1 / (num_terms - 1)
            ).term
        )
    return W, terms, torch.stack([torch.kron(G, A) for G, A in terms]).sum(dim=0)


def two_term_inverse(terms: list[Term]) -> TwoTermInverse:
    return TwoTermInverse(
        torch.linalg.cholesky(terms[0][0]), torch.linalg.cholesky(terms[0][1]), terms[1]
    )


def test_weighted_moment_is_the_direct_sum() -> None:
    x = torch.randn(7, 300, dtype=torch.float64)
    weights = torch.randn(7, dtype=torch.float64)
    total = PackedSymmetric.zeros(300, dtype=torch.float64)
    total.add(x, weights)
    torch.testing.assert_close(
        total.dense(), torch.einsum("n,ni,nj->ij", weights, x, x), rtol=1e-12, atol=1e-12
    )


def test_power_iteration_finds_the_best_further_terms_of_the_rearranged_fisher() -> None:
    """Against the SVD of R(F) - sum of known terms, formed densely."""
    num_tokens = 50
    a = torch.randn(num_tokens, C, dtype=torch.float64)
    g = torch.randn(num_tokens, R, dtype=torch.float64)
    g = g * (1 + a[:, :1].abs())
    rearranged = torch.einsum("ni,nj,nk,nl->ijkl", g, g, a, a).reshape(R * R, C * C) / num_tokens
    G_terms = [g.T @ g / num_tokens]
    A_terms = [a.T @ a / num_tokens]
    for num_terms in (2, 3):
        rest = rearranged - sum(
            torch.outer(G.flatten(), A.flatten()) for G, A in zip(G_terms, A_terms, strict=True)
        )
        G, A = terms_of_samples(a, g, list(zip(G_terms, A_terms, strict=True)), num_terms, 600)[-1]
        U, S, V = torch.linalg.svd(rest)
        assert float(G.norm() * A.norm()) == pytest.approx(float(S[0]), rel=1e-10)
        torch.testing.assert_close(
            torch.outer(G.flatten(), A.flatten()),
            S[0] * torch.outer(U[:, 0], V[0]),
            rtol=1e-6,
            atol=1e-9,
        )
        G_terms.append(G)
        A_terms.append(A)
    G, A = terms_of_samples(a, g, [], 1, 600)[0]
    U, S, V = torch.linalg.svd(rearranged)
    torch.testing.assert_close(
        torch.outer(G.flatten(), A.flatten()),
        S[0] * torch.outer(U[:, 0], V[0]),
        rtol=1e-6,
        atol=1e-9,
    )


def test_clipping_leaves_a_harmless_term_alone_and_makes_a_wild_one_harmless() -> None:
    _, A, G = problem(R, C)
    factors = torch.linalg.cholesky(G), torch.linalg.cholesky(A)
    mild = 1e-3 * indefinite(R, 1), 1e-3 * indefinite(C, 2)
    assert clip_term(mild, *factors, 1.0).change == 0.0
    wild = 50 * indefinite(R, 1), 50 * indefinite(C, 2)
    assert float(torch.linalg.eigvalsh(torch.kron(G, A) + torch.kron(*wild)).min()) < 0
    clipped = clip_term(wild, *factors, 1.0)
    assert 0 < clipped.change < 1
    rest = torch.kron(G, A) * 0.9 + torch.kron(*clipped.term)
    assert float(torch.linalg.eigvalsh(rest).min()) > -1e-9
    negated = clip_term((-wild[0], -wild[1]), *factors, 1.0)
    torch.testing.assert_close(torch.kron(*negated.term), torch.kron(*clipped.term))


def test_two_term_inverse_is_the_dense_one() -> None:
    _, terms, F = sum_of(2)
    inverse = two_term_inverse(terms)
    B = torch.randn(R, C, dtype=torch.float64)
    torch.testing.assert_close(
        inverse.solve(B), torch.linalg.solve(F, B.flatten()).view(R, C), rtol=1e-9, atol=1e-11
    )
    dense = torch.linalg.inv(F)
    torch.testing.assert_close(
        inverse.diagonal(), dense.diagonal().view(R, C), rtol=1e-9, atol=1e-11
    )
    left = torch.tensor([0, 0, 4])
    right = torch.tensor([1, 0, 2])
    blocks = dense.view(R, C, R, C)
    expected = torch.stack([blocks[r, left, r, right] for r in range(R)])
    torch.testing.assert_close(inverse.row_blocks(left, right), expected, rtol=1e-9, atol=1e-11)


def test_the_published_inverse_is_another_matrix() -> None:
    """L^-1 E in place of L^-T E, as the published code has it, does not invert the sum."""
    _, terms, F = sum_of(2)
    inverse = two_term_inverse(terms)
    L = torch.linalg.cholesky(terms[0][0])
    E = torch.linalg.eigh(torch.linalg.solve(L, torch.linalg.solve(L, terms[1][0]).T)).eigenvectors
    inverse.K1 = torch.linalg.solve(L, E)
    B = torch.randn(R, C, dtype=torch.float64)
    assert (F @ inverse.solve(B).flatten() - B.flatten()).norm() > 0.1 * B.norm()


def test_row_column_and_element_costs_are_the_dense_ones() -> None:
    W, terms, F = sum_of(2)
    inverse = two_term_inverse(terms)
    for r in range(R):
        assert float(inverse.row_costs(W)[r]) == pytest.approx(
            dense_minimum(W, F, crossing(R, C, [r], []))[1], rel=1e-8
        )
    for c in range(C):
        assert float(inverse.column_costs(W)[c]) == pytest.approx(
            dense_minimum(W, F, crossing(R, C, [], [c]))[1], rel=1e-8
        )


@pytest.mark.parametrize("num_terms", [2, 4])
def test_joint_update_is_the_dense_solution(
    num_terms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_surgeon.maths.extended.terms.TOLERANCE", 1e-13)
    monkeypatch.setattr("ray_surgeon.maths.extended.terms.ITERATIONS", 200)
    W, terms, F = sum_of(num_terms)
    found, residual = minimise_kept(W, terms, flags(R, [1, 4]), flags(C, [0, 3]))
    expected, _ = dense_minimum(W, F, crossing(R, C, [1, 4], [0, 3]))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    assert residual < 1e-12


@pytest.mark.parametrize("num_terms", [1, 2, 3])
def test_elements_of_a_sum_are_the_dense_solution(num_terms: int) -> None:
    W, terms, F = sum_of(num_terms)
    kept = torch.rand(R, C, generator=torch.Generator().manual_seed(3)) > 0.5
    solution = by_conjugate_gradients(W, terms, kept, num_iterations=400, tolerance=1e-13)
    expected, _ = dense_minimum(W, F, ~kept)
    torch.testing.assert_close(solution.W, expected, rtol=1e-7, atol=1e-9)


def test_single_corrections_are_dense_for_one_structure() -> None:
    W, terms, F = sum_of(2)
    inverse = two_term_inverse(terms)
    nothing = flags(R, []), flags(C, [])
    row = W + inverse.single_corrections(W, flags(R, [2]), nothing[1])
    column = W + inverse.single_corrections(W, nothing[0], flags(C, [4]))
    torch.testing.assert_close(
        row, dense_minimum(W, F, crossing(R, C, [2], []))[0], rtol=1e-8, atol=1e-10
    )
    torch.testing.assert_close(
        column, dense_minimum(W, F, crossing(R, C, [], [4]))[0], rtol=1e-8, atol=1e-10
    )


DAMPING = Damping(0.02, 0.1, 1.0)


def extended_linear(num_terms: int = 2) -> Linear:
    W, terms, _ = sum_of(num_terms)
    n = 9
    return Linear(
        "x",
        W,
        KroneckerFactors(terms[0][1] * n, terms[0][0] * n, n, tuple(terms[1:])).packed(),
        False,
        DAMPING,
    )


def dense_of(curvature: LinearCurvature) -> Tensor:
    return torch.stack([torch.kron(G, A) for G, A in curvature.terms]).sum(dim=0)


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("costs", ["obs", "obd"])
def test_a_linear_with_two_terms(costs: str, side: str) -> None:
    """One row and one column were pruned before: costs, update and predicted loss are dense on the
    rest.
    """
    linear = extended_linear()
    mask = StructuredMask(flags(R, [1, 2, 3, 4]), flags(C, [0, 2, 3, 4, 5]))
    mask.apply_(linear.W)
    found = find_candidates(linear, mask, side, costs, per_parameter=False)
    curvature = linear.curvature(found.live)
    alive = found.live.of(linear.W)
    F = dense_of(curvature)
    assert found.clipping == curvature.clipping
    by_cost = found.row_costs if side == "rows" else found.column_costs

    def crossed(places: list[int]) -> Tensor:
        return crossing(4, 5, places, []) if side == "rows" else crossing(4, 5, [], places)

    for place in range(len(by_cost)):
        change = torch.where(crossed([place]), -alive, 0).flatten()
        expected = (
            dense_minimum(alive, F, crossed([place]))[1]
            if costs == "obs"
            else float(0.5 * change @ F @ change)
        )
        assert float(by_cost[place]) == pytest.approx(expected, rel=1e-8)
    threshold = float(by_cost.sort().values[1])
    removal, _ = prune_structures(linear, mask, found, threshold, "full")
    pruned = [place for place in range(len(by_cost)) if by_cost[place] <= threshold]
    new = found.live.of(removal.W)
    change = (new - alive).flatten()
    assert removal.predicted == pytest.approx(float(0.5 * change @ F @ change), rel=1e-8)
    assert removal.residual == 0.0
    torch.testing.assert_close(
        new, dense_minimum(alive, F, crossed(pruned))[0], rtol=1e-8, atol=1e-10
    )


def test_rows_and_columns_of_two_terms_are_updated_independently() -> None:
    linear = extended_linear()
    curvature = linear.curvature(linear.live)
    rows = flags(R, [0])
    columns = flags(C, [2, 3])
    new, _ = curvature.prune(linear.W, rows, columns, "full")
    F = dense_of(curvature)
    by_rows, _ = dense_minimum(linear.W, F, crossing(R, C, [0], []))
    by_columns, _ = dense_minimum(linear.W, F, crossing(R, C, [], [2, 3]))
    expected = (by_rows + by_columns - linear.W) * torch.outer(~rows, ~columns)
    torch.testing.assert_close(new, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "units", [ElementUnits(), ElementUnits(2, 3), ElementUnits(2, 3, joint=False)]
)
@pytest.mark.parametrize("costs", ["obs", "obd"])
def test_elements_and_groups_with_two_terms(units: ElementUnits, costs: str) -> None:
    """One input is always zero: costs and update are dense on the rest."""
    linear = extended_linear()
    mask = ElementMask.full(R, C)
    factors = linear.factors.dense()
    factors.A[4] = 0
    factors.A[:, 4] = 0
    linear = replace(linear, factors=factors.packed())
    found = find_elements(linear, units, costs)
    assert found.live.columns.tolist() == [True, True, True, True, False, True]
    F = dense_of(linear.curvature(found.live))
    alive = found.live.of(linear.W)
    by_unit = unit_costs(linear, mask, units, found)
    single = torch.zeros(R, C, dtype=torch.float64)
    for r in range(R):
        for place, c in enumerate(found.live.columns.nonzero()[:, 0].tolist()):
            removed = torch.zeros(R, 5, dtype=torch.bool)
            removed[r, place] = True
            change = torch.where(removed, -alive, 0).flatten()
            single[r, c] = (
                dense_minimum(alive, F, removed)[1] if costs == "obs" else 0.5 * change @ F @ change
            )
    expected = single if units.m == 1 else single.view(R, 2, 3).min(dim=2).values
    torch.testing.assert_close(by_unit.double(), expected, rtol=1e-5, atol=1e-9)
    threshold = float(by_unit.flatten().sort().values[len(by_unit.flatten()) // 2])
    full = ElementUpdate("conjugate_gradients", 400, 1e-13, "float64")
    removal, new_mask = prune_elements(linear, mask, units, found, threshold, full)
    pruned = ~found.live.of(new_mask.kept)
    torch.testing.assert_close(
        found.live.of(removal.W), dense_minimum(alive, F, pruned)[0], rtol=1e-6, atol=1e-8
    )
    smallest = float(by_unit[by_unit > 0].min())
    once, new_mask = prune_elements(linear, mask, units, found, smallest, ElementUpdate("single"))
    if units.m == 1:
        pruned = ~found.live.of(new_mask.kept) & (alive != 0)
        assert int(pruned.sum()) == 1
        torch.testing.assert_close(
            found.live.of(once.W), dense_minimum(alive, F, pruned)[0], rtol=1e-6, atol=1e-8
        )
