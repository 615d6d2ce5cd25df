"""The search for how many coupled groups every block loses: what it measures, what it leaves
behind, and what it changes.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.threshold import shrunk_ratios
from ray_surgeon.run.inputs import Inputs, check
from ray_surgeon.runtime.local import LocalCluster
from ray_surgeon.runtime.passes import divergences_of, remember
from ray_surgeon.spec.parsing import parse_spec
from ray_surgeon.stages.curvature.stage import calibrate
from ray_surgeon.stages.prune.group_choice import ConsumerCosts, Paths, Reach, Unit
from ray_surgeon.stages.prune.groups import Groups
from ray_surgeon.stages.prune.groups_section import GroupsSection, UniformGroupsSection
from ray_surgeon.stages.prune.method import Scores
from ray_surgeon.stages.search.search import SEARCHED, Search, SearchStage
from ray_surgeon.stages.search.section import SearchSection
from ray_surgeon.stages.stage import CalibrationText
from ray_surgeon.storage.texts import windows_of
from tests.integration.runs import (
    MOST_BY_ORDER_OF_SUMS,
    assert_same_shot,
    difference,
    loaded,
    report_of,
    run,
    tensors_of_shot,
    tiny_spec,
)

GROUPS: dict[str, Any] = {
    "pruning__structure": "groups",
    "pruning__width_multiple": 1,
    "pruning__search": {"num_sequences": 3},
    "calibration__held_aside": 0,
}
NOTHING_HELD = CalibrationText(np.zeros((0, 40), dtype=np.int64))


def scored(
    model: Path, folder: Path, num_replicas: int = 1, **options: Any
) -> tuple[Search, LocalCluster, Scores[ConsumerCosts], NDArray[np.int64]]:
    """Return a search and what it takes: a cluster after the costs of the first shot, these, and
    windows with dense states.
    """
    spec = parse_spec(
        tiny_spec(folder, model, **(GROUPS | options), pruning__num_shots=1).read_text()
    )
    inputs = check(spec)
    stage = inputs.stage(SearchStage)
    assert stage is not None
    search = Search(stage.section, stage.method)
    cluster = loaded(model, 2, num_replicas)
    assert search is not None
    remember(cluster, SEARCHED, stage.windows)
    calibrate(inputs.method, cluster, inputs.text, 1, remembers=False)
    return search, cluster, inputs.method.score(cluster, 1), stage.windows


def linears_of(cluster: LocalCluster) -> dict[str, torch.Tensor]:
    return {
        name: worker.shard.weight(name)
        for worker in cluster.workers.values()
        for name in worker.shard.linears
    }


@pytest.mark.parametrize(("family", "num_replicas"), [("llama", 1), ("gpt2", 2), ("qwen3_moe", 1)])
def test_scales_are_what_removals_change_over_what_they_were_to_cost(
    family: str,
    num_replicas: int,
    model_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each block by brute force: the model with everything removed but in that block, put together
    from pruned and dense weights.
    """
    options = {"pruning__groups": ["attention", "expert_channels"]} if family == "qwen3_moe" else {}
    search, cluster, scores, windows = scored(
        model_folders[family], tmp_path, num_replicas, **options
    )
    method = search.method
    dense = linears_of(cluster)
    counts = method.allocate(scores, 1).counts
    pruned = dict(dense)
    for worker in cluster.workers.values():
        for groups in method.sets(worker):
            if worker.owns(groups.consumer):
                pruned[groups.consumer] = method.removal(worker, groups, counts[groups.consumer])[
                    0
                ].W

    def divergence(undone: Unit | None) -> torch.Tensor:
        kept = {c.consumer for c in scores.costs if c.unit == undone}
        for worker in cluster.workers.values():
            for name in worker.shard.linears:
                worker.shard.set_weight(name, dense[name] if name in kept else pruned[name])
        return torch.tensor(divergences_of(cluster, SEARCHED, windows))

    units = sorted({c.unit for c in scores.costs if counts[c.consumer]})
    changes = torch.stack([divergence(None) - divergence(unit) for unit in units])
    costs = [
        sum(
            float(c.costs.sort().values[: counts[c.consumer]].double().sum())
            for c in scores.costs
            if c.unit == u
        )
        for u in units
    ]
    divergence_before = float(divergence(None).mean())
    for worker in cluster.workers.values():
        for name, W in dense.items():
            if name in worker.shard.linears:
                worker.shard.set_weight(name, W)
    seen: list[tuple[torch.Tensor, ...]] = []

    def noting(*given: torch.Tensor) -> torch.Tensor:
        seen.append(given)
        return shrunk_ratios(*given)

    monkeypatch.setattr("ray_surgeon.stages.search.search.shrunk_ratios", noting)
    _, record = search.run(cluster, scores, windows, NOTHING_HELD, 1)
    ((found_changes, found_costs, found_kinds),) = seen
    assert record["divergences"][0] == pytest.approx(divergence_before, rel=1e-5)
    torch.testing.assert_close(found_changes, changes.double(), rtol=1e-3, atol=1e-6)
    assert found_costs.tolist() == pytest.approx(costs)
    assert [[one == other for other in found_kinds] for one in found_kinds] == [
        [a == b for _, b in units] for _, a in units
    ]
    assert len(units) > 2


def test_scales_of_another_round_go_on_from_those_before(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """What is measured is compared with costs before scaling; where nothing goes, scales stay."""
    search, cluster, scores, windows = scored(model_folders["llama"], tmp_path)
    allocation = search.method.allocate(scores, 1)
    cluster.run_all(search.prune, allocation.counts)
    divergences = divergences_of(cluster, SEARCHED, windows)
    first = search._scales(cluster, scores, allocation, windows, divergences, {})
    before = {unit: 0.5 + i for i, unit in enumerate(sorted({c.unit for c in scores.costs}))} | {
        (4, "ffn"): 3.0
    }
    scaled = replace(scores, costs=tuple(replace(c, scale=before[c.unit]) for c in scores.costs))
    found = search._scales(cluster, scaled, allocation, windows, divergences, before)
    assert found == pytest.approx(
        {
            unit: scale**0.3 * first[unit] if unit in first else scale
            for unit, scale in before.items()
        },
        rel=1e-4,
    )
    assert 2 < len(first) < len(before)


def test_the_best_allocation_is_taken_and_everything_else_is_left_as_it_was(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, cluster, scores, windows = scored(model_folders["llama"], tmp_path, 2)
    search = Search(SearchSection(rounds=3, num_sequences=3), search.method)
    dense = linears_of(cluster)
    given = iter([5.0, 3.0, 4.0, 6.0])
    counts = search.method.allocate(scores, 1).counts
    scales = list[dict[Unit, float]]()
    losing = [c.unit for c in scores.costs if counts[c.consumer]]

    def of_scores(*args: Any) -> dict[Unit, float]:
        scales.append({c.unit: 1e3 if c.unit == losing[len(scales)] else 1.0 for c in scores.costs})
        return scales[-1]

    monkeypatch.setattr("ray_surgeon.stages.search.search.divergences_of", lambda *_: [next(given)])
    monkeypatch.setattr(Search, "_scales", of_scores)
    rescaled = Paths.rescaled
    followed = list[bool]()

    def following(self: Paths, *others: Any) -> Scores[ConsumerCosts]:
        followed.append(all(torch.equal(W, dense[name]) for name, W in linears_of(cluster).items()))
        return rescaled(self, *others)

    monkeypatch.setattr(Paths, "rescaled", following)
    found, record = search.run(cluster, scores, windows, NOTHING_HELD, 1)
    assert followed == [True] * 3, "paths begin with the weights from before"
    assert record["divergences"] == [5.0, 3.0, 4.0, 6.0]
    assert {c.unit: c.scale for c in found.costs} == scales[0], "those of the second allocation"
    assert {
        (entry["block"], entry["kind"]): entry["scale"] for entry in record["scales"]
    } == scales[0]
    for worker in cluster.workers.values():
        assert all(
            torch.equal(worker.shard.weight(name), dense[name]) for name in worker.shard.linears
        )
        assert all(
            worker.mask(name, StructuredMask).num_kept
            == worker.mask(name, StructuredMask).num_parameters
            for name in worker.masks
        )


@pytest.mark.parametrize(
    ("family", "kinds", "multiple", "rank_by"),
    [
        ("llama", ["attention", "ffn"], 1, "cost_per_parameter"),
        ("llama", ["attention", "ffn"], 4, "cost"),
        ("llama", ["attention", "ffn"], 16, "cost_per_parameter"),
        ("qwen3_moe", ["attention", "expert_channels"], 1, "cost"),
        ("qwen3_moe", ["attention", "expert_channels"], 8, "cost_per_parameter"),
    ],
)
def test_paths_are_followed_as_far_as_scales_call_for(
    family: str,
    kinds: list[str],
    multiple: int,
    rank_by: str,
    model_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    """With any scales the allocation is that of paths which were followed to their ends."""
    options: dict[str, Any] = {
        "pruning__width_multiple": multiple,
        "pruning__rank_by": rank_by,
        "pruning__groups": kinds,
    }
    search, cluster, scores, _ = scored(model_folders[family], tmp_path, **options)
    method = search.method
    differ = False
    for seed in range(12):
        generator = np.random.default_rng(seed)
        scales = {
            unit: float(np.exp(generator.normal() * 2))
            for unit in sorted({c.unit for c in scores.costs})
        }
        found = Paths(method, cluster, 1).rescaled(scores, scales)
        whole = Scores.merged(cluster.run_all(method.costs, Reach(math.inf, scales=scales), 1))
        assert {c.consumer: c.scale for c in found.costs} == {
            c.consumer: scales[c.unit] for c in whole.costs
        }
        assert method.allocate(found, 1).counts == method.allocate(whole, 1).counts
        differ |= method.allocate(found, 1).counts != method.allocate(scores, 1).counts
    assert differ


@pytest.mark.parametrize("shots", [1, 2])
def test_a_search_in_a_run(shots: int, model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Shards and stores change nothing and replicas little; a run that goes on ends the same;
    without a search it ends otherwise.
    """
    options = {**GROUPS, "pruning__num_shots": shots, "pruning__width_multiple": 8}
    ways: dict[str, dict[str, Any]] = {
        "one": {},
        "shards": {"cluster__num_shards": 3},
        "replicas": {"cluster__num_replicas": 2},
        "disk": {"memory__weights": "disk", "memory__factors": "disk", "memory__wave": 2},
    }
    for name, others in ways.items():
        assert run(tmp_path / name, model_folders["llama"], **options, **others) == 0
    assert_same_shot(tmp_path / "one/run", tmp_path / "shards/run", shots)
    assert_same_shot(tmp_path / "one/run", tmp_path / "disk/run", shots)
    assert (
        difference(tmp_path / "one/run", tmp_path / "replicas/run", shots) < MOST_BY_ORDER_OF_SUMS
    )
    report = report_of(tmp_path / "one/run")
    for shot in report["shots"]:
        assert len(shot["search"]["divergences"]) in (1, 2), (
            "a second one is tried if scales say so"
        )
        assert shot["seconds"]["search"] > 0
    assert (
        run(tmp_path / "without", model_folders["llama"], **{**options, "pruning__search": None})
        == 0
    )
    assert difference(tmp_path / "one/run", tmp_path / "without/run", shots) > 0
    if shots == 2:
        shutil.rmtree(tmp_path / "shards/run/shots/0002")
        assert (
            run(
                tmp_path / "shards",
                model_folders["llama"],
                "--resume",
                **options,
                cluster__num_shards=3,
            )
            == 0
        )
        assert_same_shot(tmp_path / "one/run", tmp_path / "shards/run", 2)


def test_a_search_that_finds_something_changes_the_masks(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales that make one layer dear keep its channels."""

    def dear(
        self: Search, cluster: Any, scores: Scores[ConsumerCosts], *_: Any
    ) -> dict[Unit, float]:
        return {c.unit: 1e6 if c.unit == (1, "ffn") else 1.0 for c in scores.costs}

    monkeypatch.setattr(Search, "_scales", dear)
    given = iter([2.0, 1.0])
    monkeypatch.setattr("ray_surgeon.stages.search.search.divergences_of", lambda *_: [next(given)])
    assert run(tmp_path, model_folders["llama"], **GROUPS, pruning__num_shots=1) == 0
    tensors = tensors_of_shot(tmp_path / "run", 1)
    assert tensors["model.layers.1.mlp.down_proj.columns"].all()
    assert not tensors["model.layers.0.mlp.down_proj.columns"].all()


def test_windows_of_a_search_lie_beside_those_of_the_calibration(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """In every text but the model's own, and the calibration is the same as without a search."""
    mix = [{"source": "self"}, {"source": "python-docstrings", "max_tokens": 4000}]
    inputs = []
    for search in ({"num_sequences": 5}, None):
        options = {
            **GROUPS,
            "pruning__search": search,
            "calibration__mix": mix,
            "calibration__stride": None,
        }
        inputs.append(
            check(
                parse_spec(tiny_spec(tmp_path, model_folders["llama"], **options).read_text()),
                dry_run=True,
            )
        )
    with_search, without = inputs
    assert np.array_equal(with_search.calibration, without.calibration)
    stage = with_search.stage(SearchStage)
    assert stage is not None
    assert without.stage(SearchStage) is None
    assert stage.windows.shape == (5, 40)
    rows = {tuple(row) for row in (*with_search.calibration, *stage.windows)}
    assert len(rows) == 4 + 5 + 1, "all different, and two that are still to be written"


@pytest.mark.parametrize(("stride", "first"), [(16, 8 * 16), (64, 6 * 64), (40, 6 * 40)])
def test_placed_windows_of_a_search_begin_where_the_last_one_of_the_calibration_ends(
    stride: int, first: int, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Six windows of 40 tokens are the calibration's."""

    def windows(stride: int, num_sequences: int, search: dict[str, int] | None) -> Inputs:
        options = {
            **GROUPS,
            "pruning__search": search,
            "calibration__stride": stride,
            "calibration__num_sequences": num_sequences,
        }
        return check(
            parse_spec(tiny_spec(tmp_path, model_folders["llama"], **options).read_text()),
            dry_run=True,
        )

    text = windows(1, first + 1, None).calibration[:, 0]
    found = windows(stride, 6, {"num_sequences": 3})
    stage = found.stage(SearchStage)
    assert stage is not None
    assert stage.windows[0, 0] == text[first]
    assert np.array_equal(stage.windows[0], windows(1, first + 1, None).calibration[first])
    assert first >= 5 * stride + 40


def test_a_divergence_that_is_no_number_ends_a_search(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    search, cluster, scores, windows = scored(model_folders["llama"], tmp_path)
    worker = list(cluster.workers.values())[-1]
    name = next(iter(worker.shard.linears))
    worker.shard.set_weight(name, torch.full_like(worker.shard.weight(name), torch.nan))
    with pytest.raises(FloatingPointError, match=r"divergence .* is not finite"):
        search.run(cluster, scores, windows, NOTHING_HELD, 1)


def test_a_method_has_a_search_if_its_section_says_so() -> None:
    plain = {"structure": "groups", "target_sparsity": 0.2}
    for section, searches in (
        (GroupsSection(**plain, search=SearchSection()), True),
        (GroupsSection(**plain), False),
        (UniformGroupsSection(**plain, allocation="uniform"), False),
    ):
        method = Groups(section, None, None, {}, frozenset())
        found = SearchStage.of(method, windows_of(np.zeros((0, 1), dtype=np.int64)))
        assert (found is not None) == searches


def test_every_round_goes_on_from_the_scales_before(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, cluster, scores, windows = scored(model_folders["llama"], tmp_path)
    search = Search(SearchSection(rounds=2, num_sequences=3), search.method)
    counts = search.method.allocate(scores, 1).counts
    seen = list[dict[Unit, float]]()
    made = list[dict[Unit, float]]()
    losing = [c.unit for c in scores.costs if counts[c.consumer]]

    def scales(
        self: Search, cluster: Any, scores: Scores[ConsumerCosts], *given: Any
    ) -> dict[Unit, float]:
        seen.append(dict(given[-1]))
        made.append({c.unit: 1e3 if c.unit == losing[len(made)] else 1.0 for c in scores.costs})
        return made[-1]

    monkeypatch.setattr(Search, "_scales", scales)
    search.run(cluster, scores, windows, NOTHING_HELD, 1)
    assert seen == [{}, made[0]]


def test_an_allocation_is_measured_once(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, cluster, scores, windows = scored(model_folders["llama"], tmp_path)
    search = Search(SearchSection(rounds=3, num_sequences=3), search.method)
    monkeypatch.setattr(
        Search, "_scales", lambda self, cluster, scores, *_: {c.unit: 2.0 for c in scores.costs}
    )
    found, record = search.run(cluster, scores, windows, NOTHING_HELD, 1)
    assert len(record["divergences"]) == 1
    assert {c.scale for c in found.costs} == {1.0}


@pytest.mark.parametrize(("held", "taken"), [([3.0, 4.0], 0), ([4.0, 3.0], 1)])
def test_windows_held_aside_decide_which_allocation_is_taken(
    held: list[float],
    taken: int,
    model_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the windows say on which the scales were taken."""
    search, cluster, scores, windows = scored(model_folders["llama"], tmp_path)
    counts = search.method.allocate(scores, 1).counts
    losing = next(c.unit for c in scores.costs if counts[c.consumer])
    given = iter([9.0, 1.0] if not taken else [1.0, 9.0])
    measures = iter(held)
    monkeypatch.setattr("ray_surgeon.stages.search.search.divergences_of", lambda *_: [next(given)])
    monkeypatch.setattr("ray_surgeon.stages.search.search.held_measure", lambda *_: next(measures))
    scales = {c.unit: 1e3 if c.unit == losing else 1.0 for c in scores.costs}
    monkeypatch.setattr(Search, "_scales", lambda *_: scales)
    found, record = search.run(cluster, scores, windows, CalibrationText(windows, held=windows), 1)
    assert (record["held_aside"], record["taken"]) == (held, taken)
    assert {c.unit: c.scale for c in found.costs} == (
        scales if taken else dict.fromkeys(scales, 1.0)
    )
    facts = Search.facts(record)
    assert (facts["divergence before"], facts["divergence"]) == (held[0], min(held))
    assert "allocation" in str(facts["taken"])
