"""Single elements and N:M groups of one linear, against the dense solution."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from ray_surgeon.maths.conjugate import ElementUpdate, update_elements
from ray_surgeon.maths.curvature import (
    FisherProducts,
    Linear,
    Removal,
    SplitMatrix,
    dominant_part,
)
from ray_surgeon.maths.element_pruning import ElementUnits, find_elements
from ray_surgeon.maths.kronecker import quadratic_cost
from ray_surgeon.maths.masks import ElementMask, StructuredMask
from tests.maths import dense
from tests.maths.dense import dense_minimum, draw, fisher, linear, problem, silence

EXACT = ElementUpdate("conjugate_gradients", 400, 1e-13, "float64")


def kept_of(R: int, C: int, fraction: float) -> Tensor:
    return torch.rand(R, C, generator=torch.Generator().manual_seed(3)) >= fraction


def updated(
    W: Tensor, A: Tensor, G: Tensor, kept: Tensor, update: ElementUpdate = EXACT
) -> Removal:
    products = FisherProducts(G, A, getattr(torch, update.precision))
    return update_elements(W, products, kept, update)


def kept_before(units: ElementUnits) -> ElementMask:
    """Return the mask of an earlier shot that removed one unit of a linear [4, 9]."""
    before = ElementMask.full(4, 9)
    before.kept[0, 4 : 4 + units.num_removed] = False
    return before


def check_costs_and_updates(
    units: ElementUnits,
    costs: str,
    of: Linear,
    fisher: Callable[[Linear, StructuredMask], Tensor],
) -> None:
    """Check a linear whose input 3 and gradient 2 are always zero, after the shot of `kept_before`.

    The last column is a bias, which is never removed. Elements that the earlier shot removed stay
    constraints and are no candidates.
    """
    W = of.W
    before = kept_before(units)
    found = find_elements(of, units, costs)
    assert found.basis.part.columns.tolist() == [c != 3 for c in range(9)]
    alive = found.basis.part.of(W)
    F = fisher(of, found.basis.part)

    def price(r: int, columns: tuple[int, ...]) -> float:
        removed = torch.zeros(4, 9, dtype=torch.bool)
        removed[r, columns] = True
        removed = found.basis.part.of(removed)
        if costs == "obd":
            return dense.cost_without_update(alive, F, removed)
        return dense_minimum(alive, F, removed)[1]

    def unit_price(r: int, columns: tuple[int, ...]) -> float:
        if costs == "obs":
            return price(r, columns)
        return sum(price(r, (c,)) for c in columns)

    by_unit = found.costs(of, before)
    starts = range(0, 8, units.m)
    patterns = [[*combinations(range(i, i + units.m), units.num_removed)] for i in starts]
    expected = torch.tensor(
        [[min(unit_price(r, one) for one in each) for each in patterns] for r in range(4)]
    )
    expected[0, 4 // units.m] = torch.inf
    torch.testing.assert_close(by_unit, expected, rtol=1e-5, atol=1e-9)
    threshold = float(by_unit.flatten().sort().values[2 * by_unit.numel() // 3])
    for update in (EXACT, ElementUpdate("single"), ElementUpdate("none")):
        removal, mask = found.prune(of, before, threshold, update)
        assert mask.kept[:, -1].all()
        assert not removal.W[~mask.kept].any()
        for r in range(4):
            for i, start in enumerate(starts):
                own = [c for c in range(start, start + units.m) if not mask.kept[r, c]]
                is_gone = by_unit[r, i] <= threshold or by_unit[r, i] == torch.inf
                assert len(own) == (units.num_removed if is_gone else 0)
                if by_unit[r, i] <= threshold:
                    assert unit_price(r, tuple(own)) == pytest.approx(
                        float(by_unit[r, i]), 1e-5
                    )
        removed = found.basis.part.of(~mask.kept)
        if update.solver == "single":
            alone = torch.eye(removed.numel(), dtype=torch.bool)[removed.flatten()]
            changes = [
                dense_minimum(alive, F, one.view_as(alive))[0] - alive for one in alone
            ]
            new = (alive + torch.stack(changes).sum(dim=0)) * ~removed
        elif update.solver == "none":
            new = alive * ~removed
        else:
            new = dense_minimum(alive, F, removed)[0]
        torch.testing.assert_close(
            found.basis.part.of(removal.W), new, rtol=1e-6, atol=1e-8
        )
        change = (new - alive).flatten()
        assert removal.predicted == pytest.approx(
            float(0.5 * change @ F @ change), rel=1e-7
        )
        assert removal.residual < 1e-11


@pytest.mark.parametrize("costs", ["obs", "obs_sum", "obd"])
@pytest.mark.parametrize(
    "units",
    [ElementUnits(), ElementUnits(2, 4), ElementUnits(1, 4)],
    ids=["single", "2:4", "1:4"],
)
def test_costs_and_updates_match_the_dense_solution(
    units: ElementUnits, costs: str
) -> None:
    W, A, G = problem(4, 9)
    silence(A, 3)
    silence(G, 2)
    W = W * kept_before(units).kept
    check_costs_and_updates(units, costs, linear(W, A, G, has_bias=True), fisher)


def test_update_uses_the_raised_damping_of_the_costs() -> None:
    W, A, G = problem()
    of = linear(W, dense.too_indefinite(A), G)
    full = ElementMask.full(6, 7)
    found = find_elements(of, ElementUnits(), "obs")
    assert found.basis.damping.a == pytest.approx(0.1)
    removal, mask = found.prune(of, full, 0.1, EXACT)
    assert 0 < mask.num_kept < W.numel()
    expected, _ = dense_minimum(W, fisher(of, of.live, found.basis.damping), ~mask.kept)
    torch.testing.assert_close(removal.W, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("C", "fraction"),
    [(7, 0.1), (7, 0.9), (1, 0.4), (7, 0.0)],
)
def test_conjugate_gradients_converge_to_the_dense_solution(
    C: int, fraction: float
) -> None:
    W, A, G = problem(6, C)
    kept = kept_of(6, C, fraction)
    expected, cost = dense_minimum(W, torch.kron(G, A), ~kept)
    found = updated(W, A, G, kept)
    torch.testing.assert_close(found.W, expected, rtol=1e-7, atol=1e-9)
    assert found.residual < 1e-11
    assert found.predicted == pytest.approx(cost, rel=1e-9)


def test_bfloat16_products_come_close_and_report_the_true_residual() -> None:
    W, A, G = problem(40, 50)
    G = dense.damped(G, 0.1)
    A = dense.damped(A, 0.01)
    kept = kept_of(40, 50, 0.5)
    exact = updated(W, A, G, kept)
    narrow = ElementUpdate("conjugate_gradients", 60, 0.0, "bfloat16")
    found = updated(W, A, G, kept, narrow)
    best, cost = (quadratic_cost(one.W - W, A, G) for one in (exact, found))
    assert best <= cost < 1.1 * best
    left, start = ((G @ change @ A)[kept].norm() for change in (found.W - W, -W * ~kept))
    assert found.residual == pytest.approx(float(left / start), rel=1e-6)


def test_iterations_beyond_float32_precision_stay_finite() -> None:
    W, A, G = (x.float() for x in problem(6, 8))
    update = ElementUpdate("conjugate_gradients", 1000, 0.0, "float32")
    found = updated(W, A, G, kept_of(6, 8, 0.4), update)
    assert torch.isfinite(found.W).all()
    assert found.residual < 1e-4


def test_preconditioner_inverts_the_dominant_part_on_kept_columns() -> None:
    _, A, G = problem(5, 24)
    U, s = dominant_part(A, 6)
    eigenvalues, vectors = torch.linalg.eigh(A)
    top = vectors[:, -6:] * eigenvalues[-6:].sqrt()
    assert float((U @ U.T - top @ top.T).norm() / (top @ top.T).norm()) < 0.01
    assert (s > 0).all()
    kept = kept_of(5, 24, 0.5)
    X = draw(5, 24, seed=9) * kept
    split = SplitMatrix(A, 6, torch.float64)
    found = split.preconditioner(G.diagonal(), kept.to(A.dtype))(X)
    for r, inside in enumerate(kept):
        restricted = (torch.diag(s) + U @ U.T)[inside][:, inside] * G[r, r]
        expected = torch.linalg.solve(restricted, X[r, inside])
        torch.testing.assert_close(found[r, inside], expected, rtol=1e-8, atol=1e-10)
        assert not found[r, ~inside].any()
