"""Sums of Kronecker products: their terms, and clipping that keeps them positive definite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.fisher_error import terms_of_samples
from ray_surgeon.experimental.extended_kfac import terms as extended
from ray_surgeon.experimental.extended_kfac.terms import Term, clip_term, minimise_kept
from tests.experimental.extended_kfac import dense
from tests.maths.dense import crossing, dense_minimum, draw, flags, problem

R = 5
C = 6


def test_power_iteration_finds_the_best_further_terms() -> None:
    """Against the SVD of R(F) minus the known terms, formed densely; also without a known term."""
    a = draw(50, C)
    g = draw(50, R, seed=1) * (1 + a[:, :1].abs())
    rearranged = torch.einsum("ni,nj,nk,nl->ijkl", g, g, a, a).reshape(R * R, C * C) / 50

    def flat(term: Term) -> Tensor:
        return torch.outer(*(factor.flatten() for factor in term))

    def check(known: list[Term]) -> Term:
        found: Term = terms_of_samples(a, g, known, len(known) + 1, 600)[-1]
        U, S, V = torch.linalg.svd(rearranged - sum(map(flat, known)))
        best = S[0] * torch.outer(U[:, 0], V[0])
        torch.testing.assert_close(flat(found), best, rtol=1e-6, atol=1e-9)
        return found

    check([])
    first = g.T @ g / 50, a.T @ a / 50
    check([first, check([first])])


def test_clipping_changes_only_terms_that_make_the_sum_indefinite() -> None:
    _, A, G = problem(R, C)
    factors = torch.linalg.cholesky(G), torch.linalg.cholesky(A)
    mild = 1e-3 * dense.indefinite(R, 1), 1e-3 * dense.indefinite(C, 2)
    assert clip_term(mild, *factors, 1.0)[1] == 0.0
    wild = 50 * dense.indefinite(R, 1), 50 * dense.indefinite(C, 2)
    assert float(torch.linalg.eigvalsh(torch.kron(G, A) + torch.kron(*wild)).min()) < 0
    clipped, change = clip_term(wild, *factors, 1.0)
    assert 0 < change < 1
    rest = torch.kron(G, A) * 0.9 + torch.kron(*clipped)
    assert float(torch.linalg.eigvalsh(rest).min()) > -1e-9
    negated, _ = clip_term((-wild[0], -wild[1]), *factors, 1.0)
    torch.testing.assert_close(torch.kron(*negated), torch.kron(*clipped))


@pytest.mark.parametrize("num_terms", [2, 4])
def test_joint_update_matches_the_dense_solution(
    num_terms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extended, "TOLERANCE", 1e-13)
    monkeypatch.setattr(extended, "ITERATIONS", 200)
    W, A, G = problem(R, C)
    terms = [(G, A), *dense.further_terms(A, G, num_terms - 1)]
    F = torch.stack([torch.kron(*term) for term in terms]).sum(dim=0)
    found, residual = minimise_kept(W, terms, flags(R, [1, 4]), flags(C, [0, 3]))
    expected, _ = dense_minimum(W, F, crossing(R, C, [1, 4], [0, 3]))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    assert residual < 1e-12
