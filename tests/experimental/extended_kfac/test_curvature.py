"""Costs and updates with two or more Kronecker terms, against the dense solution."""

from __future__ import annotations

import pytest
import torch

from ray_surgeon.experimental.extended_kfac.curvature import SummedProducts
from ray_surgeon.maths.conjugate import update_elements
from ray_surgeon.maths.element_pruning import ElementUnits
from tests.experimental.extended_kfac.dense import fisher, further_terms, linear
from tests.maths import test_elements, test_structured
from tests.maths.dense import dense_minimum, problem, silence
from tests.maths.test_elements import EXACT, kept_before, kept_of
from tests.maths.test_structured import EARLIER


@pytest.mark.parametrize("costs", ["obs", "obd"])
@pytest.mark.parametrize("structure", ["rows", "columns", "rows_columns"])
def test_rows_and_columns_match_the_dense_solution(structure: str, costs: str) -> None:
    W, A, G = problem()
    EARLIER.apply_(W)
    of = linear(W, A, G, further_terms(A, G, 1))
    test_structured.check_costs_and_updates(structure, costs, of, fisher)


@pytest.mark.parametrize("costs", ["obs", "obs_sum", "obd"])
@pytest.mark.parametrize(
    "units",
    [ElementUnits(), ElementUnits(2, 4), ElementUnits(1, 4)],
    ids=["single", "2:4", "1:4"],
)
def test_elements_match_the_dense_solution(units: ElementUnits, costs: str) -> None:
    W, A, G = problem(4, 9)
    further = further_terms(A, G, 1)
    silence(A, 3)
    silence(G, 2)
    W = W * kept_before(units).kept
    of = linear(W, A, G, further, has_bias=True)
    test_elements.check_costs_and_updates(units, costs, of, fisher)


def test_conjugate_gradients_converge_to_the_dense_solution() -> None:
    W, A, G = problem(6, 7)
    terms = [(G, A), *further_terms(A, G, 2)]
    kept = kept_of(6, 7, 0.5)
    F = torch.stack([torch.kron(*term) for term in terms]).sum(dim=0)
    expected, cost = dense_minimum(W, F, ~kept)
    found = update_elements(W, SummedProducts(terms, torch.float64), kept, EXACT)
    torch.testing.assert_close(found.W, expected, rtol=1e-7, atol=1e-9)
    assert found.residual < 1e-11
    assert found.predicted == pytest.approx(cost, rel=1e-9)
