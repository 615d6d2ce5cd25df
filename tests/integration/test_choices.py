"""What the coordinator chooses, from costs that are given; no model is loaded but in the last
tests.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.threshold import StructureCosts
from ray_surgeon.models.budgets import Budget, parameters_budget
from ray_surgeon.stages.curvature.section import KfacSection
from ray_surgeon.stages.curvature.stage import calibrate
from ray_surgeon.stages.prune.group_choice import ConsumerCosts, Reach
from ray_surgeon.stages.prune.groups import Groups
from ray_surgeon.stages.prune.groups_section import GroupsSection
from ray_surgeon.stages.prune.method import Scores
from ray_surgeon.stages.prune.rows_columns import RowsColumns, RowsColumnsSection
from tests.conftest import LAYOUTS
from tests.integration.runs import GROUPS, ONE, Jobs, loaded

NO_CLUSTER: Any = None
ANY = frozenset(range(9))
INF = math.inf
COSTS = (
    StructureCosts("a", 40, 8, 5, torch.arange(1.0, 9.0), torch.tensor([3.5, 4.5, 5.5, 6.5])),
    StructureCosts("b", 12, 4, 3, torch.arange(2.0, 6.0), torch.tensor([1.5, 2.5, 3.5])),
)


class Propagating:
    """Workers whose propagation takes `extra` entries more of each linear, at any threshold."""

    def __init__(self, extra: int) -> None:
        self.extra = extra

    def run_all(self, step: Any, value: float) -> list[int]:
        def kept(c: StructureCosts) -> int:
            rows = int((c.rows > value).sum() + c.num_rows - len(c.rows))
            return rows * int((c.columns > value).sum() + c.num_columns - len(c.columns))

        return [max(0, kept(c) - self.extra) for c in COSTS]


@pytest.mark.parametrize(("extra", "target"), [(0, 0.05), (3, 0.31), (40, 25.5 / 52)])
def test_rows_and_columns_go_up_to_the_lowest_threshold_of_all(extra: int, target: float) -> None:
    method = RowsColumns(RowsColumnsSection(target_sparsity=target, num_shots=1), KfacSection())
    cluster: Any = Propagating(extra)

    def removed(value: float) -> int:
        return 52 - sum(cluster.run_all(None, value))

    values = sorted({0.0, *(float(x) for c in COSTS for side in (c.rows, c.columns) for x in side)})
    expected = next(value for value in values if removed(value) >= target * 52 - 1e-6)
    choice = method.choose(cluster, Scores(COSTS, 52, 52), 1)
    assert choice.threshold == expected == choice.facts["threshold"]
    assert choice.facts["sparsity"] == pytest.approx(removed(expected) / 52)


def small_budget(num_groups: int, num_consumers: int = 1) -> Budget:
    """Ten parameters a group, and nothing else."""
    of_any = parameters_budget(LAYOUTS["llama"])
    by_left = {"ffn": tuple(10.0 * n for n in range(num_groups + 1))}
    return replace(of_any, fixed=0.0, by_left=by_left, num_consumers={"ffn": num_consumers})


def small_groups(budget: Budget | None = None, **options: Any) -> Groups:
    defaults = {"target_sparsity": 0.5, "width_multiple": 1, "num_shots": 1}
    section = GroupsSection(structure="groups", **defaults | options)
    return Groups(section, None, budget or small_budget(24), {"ffn": 0}, frozenset())


def path(name: str, *costs: float, **options: Any) -> ConsumerCosts:
    """Return the costs of a consumer's groups, of ten parameters each."""
    sizes: Any = {"num_parameters": 10} | options
    return ConsumerCosts(name, "ffn", torch.tensor(costs), len(costs), ANY, **sizes)


def test_the_curve_is_of_scaled_costs_a_unit_as_the_threshold_is() -> None:
    method = small_groups(small_budget(2, 2), target_sparsity=0.25)
    costs = tuple(
        path(f"{block}", 1.0, 2.0, layer=block, scale=scale)
        for block, scale in enumerate((1.0, 7.0))
    )
    choice = method.choose(NO_CLUSTER, Scores(costs, 40, 40), 1)
    assert choice.threshold == pytest.approx(0.1)
    assert choice.facts["sparsity"] == 0.25


def test_what_earlier_shots_removed_counts() -> None:
    left = replace(path("x", 1.0, 2.0, 3.0, INF), num_left=3)
    scores = Scores((left,), 40, 30)
    facts = small_groups(small_budget(4), num_shots=2).choose(NO_CLUSTER, scores, 2).facts
    assert (facts["groups"], facts["sparsity"], facts["need"]) == (1, 0.5, 20.0)


def test_widths_that_may_be_left_are_multiples_in_the_last_shot_and_the_whole_one() -> None:
    groups: Any = SimpleNamespace(kind="ffn", columns=torch.zeros(24, 1))
    method = small_groups(width_multiple=16, num_shots=2)
    for shot, expected in ((1, list(range(25))), (2, [0, 16, 24])):
        allowed = method._allowed(NO_CLUSTER, groups, shot)
        assert [count for count in range(-1, 50) if count in allowed] == expected


def test_a_path_is_followed_to_the_next_width_that_may_be_left_whatever_it_costs(job: Jobs) -> None:
    inputs = job.inputs(GROUPS | ONE)
    method = inputs.method
    assert isinstance(method, Groups)
    cluster = loaded(job.models["llama"])
    calibrate(method, cluster, inputs.text, 1, remembers=False)
    for worker in cluster.workers.values():
        for groups in method.sets(worker):
            if groups.kind == "ffn":
                mask = worker.mask(groups.consumer, StructuredMask)
                gone = torch.zeros_like(mask.columns)
                gone[:3] = True
                worker.masks[groups.consumer] = mask.without(torch.zeros_like(mask.rows), gone)
    found = Scores.merged(cluster.run_all(method.costs, Reach(1e-12), 1))
    # 45 are left, 40 may stay
    assert {c.num_reached for c in found.costs if c.kind == "ffn"} == {5}
