"""The kinds of curvature that a job spec may ask for."""

from __future__ import annotations

import pytest

from ray_surgeon.config.curvature import (
    ActivationsSection,
    AnyCurvature,
    ExtendedKfacSection,
    IdentitySection,
    KfacSection,
)
from ray_surgeon.experimental.extended_kfac.kind import Kind
from ray_surgeon.factors.collector import CurvatureKind, kind_of


@pytest.mark.parametrize(
    "section",
    [
        KfacSection(),
        ActivationsSection(kind="activations"),
        IdentitySection(kind="identity"),
    ],
)
def test_core_kinds_need_one_pass_and_no_copies(section: AnyCurvature) -> None:
    kind = kind_of(section)
    assert type(kind) is CurvatureKind
    assert kind.num_passes == 1
    assert kind.num_copies == 0


def test_extended_kfac_is_loaded_with_its_passes_and_copies() -> None:
    section = ExtendedKfacSection(
        kind="extended_kfac", num_kronecker_terms=4, num_power_iterations=5
    )
    kind = kind_of(section)
    assert type(kind) is Kind
    assert kind.num_passes == 1 + 3 * 5
    assert kind.num_copies == 3 + 1.5
