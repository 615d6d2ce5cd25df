"""The search for how many coupled groups every block loses: what it measures, what it leaves
behind, and what it changes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.threshold import shrunk_ratios
from ray_surgeon.run.inputs import check
from ray_surgeon.runtime.cluster import LocalCluster
from ray_surgeon.runtime.passes import divergences_of, remember
from ray_surgeon.spec.parsing import parse_spec
from ray_surgeon.stages.curvature.stage import calibrate
from ray_surgeon.stages.prune.group_choice import ConsumerCosts, Paths, Reach, Unit
from ray_surgeon.stages.prune.method import Scores
from ray_surgeon.stages.search.search import SEARCHED, Search, SearchStage, prune_on_trial
from ray_surgeon.stages.stage import CalibrationText, Facts
from tests.integration import runs
from tests.integration.runs import Jobs, assert_same_shot, difference, loaded, weights_of

SEARCHING: dict[str, Any] = {
    **runs.GROUPS,
    "pruning__width_multiple": 1,
    "pruning__search": {"num_sequences": 3},
    "calibration__held_aside": 0,
}
NOTHING_HELD = CalibrationText(np.zeros((0, 40), dtype=np.int64))


Scored = tuple[Search, LocalCluster, Scores[ConsumerCosts], NDArray[np.int64]]


def scored(
    job: Jobs, family: str = "llama", num_replicas: int = 1, rounds: int = 1, **options: Any
) -> Scored:
    """Return a search and what it takes: a cluster after the costs of the first shot, these, and
    windows with dense states.
    """
    section = {"num_sequences": 3, "rounds": rounds}
    inputs = job.inputs(SEARCHING | runs.ONE | options, model=family, pruning__search=section)
    stage = inputs.stage(SearchStage)
    assert stage is not None
    cluster = loaded(job.models[family], 2, num_replicas)
    search = Search(stage.section, Paths(stage.method, cluster, 1), stage.windows, NOTHING_HELD)
    remember(cluster, SEARCHED, stage.windows)
    calibrate(inputs.method, cluster, inputs.text, 1, remembers=False)
    return search, cluster, stage.method.score(cluster, 1), stage.windows


def losing_units(search: Search, scores: Scores[ConsumerCosts]) -> list[Unit]:
    counts = search.paths.method.allocate(scores, 1).counts
    return [c.unit for c in scores.costs if counts[c.consumer]]


def dear(scores: Scores[ConsumerCosts], unit: Unit) -> dict[Unit, float]:
    """Return scales that make one unit dear."""
    return {c.unit: 1e3 if c.unit == unit else 1.0 for c in scores.costs}


def say_divergences(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    given = iter(values)
    monkeypatch.setattr("ray_surgeon.stages.search.search.divergences_of", lambda *_: [next(given)])


@pytest.mark.parametrize(("family", "num_replicas"), [("gpt2", 2), ("qwen3_moe", 1)])
def test_scales_are_what_removals_change_over_what_they_were_to_cost(
    family: str, num_replicas: int, job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block by brute force: the model with everything removed but in that block, put together
    from pruned and dense weights.
    """
    mixture: Any = {"pruning__groups": ["attention", "expert_channels"]}
    options = mixture if family == "qwen3_moe" else {}
    search, cluster, scores, windows = scored(job, family, num_replicas, **options)
    method = search.paths.method
    dense = weights_of(cluster)
    counts = method.allocate(scores, 1).counts
    pruned = dict(dense)
    for worker in cluster.workers.values():
        for groups in method.sets(worker):
            if worker.owns(groups.consumer):
                removal, *_ = method.removal(worker, groups, counts[groups.consumer])
                pruned[groups.consumer] = removal.W

    def set_weights(weights: Mapping[str, torch.Tensor]) -> None:
        for worker in cluster.workers.values():
            for name in worker.shard.linears:
                worker.shard.set_weight(name, weights[name])

    def divergence(undone: Unit | None) -> torch.Tensor:
        kept = {c.consumer for c in scores.costs if c.unit == undone}
        set_weights(pruned | {name: dense[name] for name in kept})
        return torch.tensor(divergences_of(cluster, SEARCHED, windows))

    units = sorted({c.unit for c in scores.costs if counts[c.consumer]})
    changes = torch.stack([divergence(None) - divergence(unit) for unit in units])
    costs = dict.fromkeys(units, 0.0)
    for c in scores.costs:
        if counts[c.consumer]:
            cheapest = c.costs.sort().values[: counts[c.consumer]]
            costs[c.unit] += float(cheapest.double().sum())
    divergence_before = float(divergence(None).mean())
    set_weights(dense)
    seen: list[tuple[torch.Tensor, ...]] = []

    def noting(*given: torch.Tensor) -> torch.Tensor:
        seen.append(given)
        return shrunk_ratios(*given)

    monkeypatch.setattr("ray_surgeon.stages.search.search.shrunk_ratios", noting)
    _, record = search.run(scores, {})
    ((found_changes, found_costs, found_kinds),) = seen
    assert record["divergences"][0] == pytest.approx(divergence_before, rel=1e-5)
    torch.testing.assert_close(found_changes, changes.double(), rtol=1e-3, atol=1e-6)
    assert found_costs.tolist() == pytest.approx(list(costs.values()))
    assert [[one == other for other in found_kinds] for one in found_kinds] == [
        [a == b for _, b in units] for _, a in units
    ]
    assert len(units) > 2


def test_scales_of_another_round_go_on_from_those_before(job: Jobs) -> None:
    """What is measured is compared with costs before scaling; where nothing goes, scales stay."""
    search, cluster, scores, windows = scored(job)
    allocation = search.paths.method.allocate(scores, 1)
    cluster.run_all(prune_on_trial, search.paths.method, allocation.counts)
    divergences = divergences_of(cluster, SEARCHED, windows)
    first = search._scales(scores, allocation.counts, divergences, {})
    before = {unit: 0.5 + i for i, unit in enumerate(sorted({c.unit for c in scores.costs}))}
    before |= {(4, "ffn"): 3.0}
    scaled = replace(scores, costs=tuple(replace(c, scale=before[c.unit]) for c in scores.costs))
    found = search._scales(scaled, allocation.counts, divergences, before)
    expected = {
        unit: scale**0.3 * first[unit] if unit in first else scale for unit, scale in before.items()
    }
    assert found == pytest.approx(expected, rel=1e-4)
    assert 2 < len(first) < len(before)


def test_the_best_allocation_is_taken(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """And everything else is left as it was. Every round goes on from the scales before."""
    search, cluster, scores, _ = scored(job, num_replicas=2, rounds=3)
    dense = weights_of(cluster)
    losing = losing_units(search, scores)
    before = list[dict[Unit, float]]()
    scales = list[dict[Unit, float]]()

    def of_scores(*args: Any) -> dict[Unit, float]:
        before.append(dict(args[-1]))
        scales.append(dear(scores, losing[len(scales)]))
        return scales[-1]

    say_divergences(monkeypatch, 5.0, 3.0, 4.0, 6.0)
    monkeypatch.setattr(Search, "_scales", of_scores)
    rescaled = Paths.rescaled
    followed = list[bool]()

    def following(self: Paths, *others: Any) -> Scores[ConsumerCosts]:
        followed.append(all(torch.equal(W, dense[name]) for name, W in weights_of(cluster).items()))
        return rescaled(self, *others)

    monkeypatch.setattr(Paths, "rescaled", following)
    found, record = search.run(scores, {})
    assert before == [{}, *scales[:2]]
    assert followed == [True] * 3, "paths begin with the weights from before"
    assert record["divergences"] == [5.0, 3.0, 4.0, 6.0]
    assert {c.unit: c.scale for c in found.costs} == scales[0], "those of the second allocation"
    written = {(entry["block"], entry["kind"]): entry["scale"] for entry in record["scales"]}
    assert written == scales[0]
    for worker in cluster.workers.values():
        for name in worker.shard.linears:
            assert torch.equal(worker.shard.weight(name), dense[name])
        for name in worker.masks:
            assert worker.mask(name, StructuredMask).num_kept == worker.layout.shapes[name].size


@pytest.mark.parametrize(
    ("family", "kinds", "multiple"),
    [("llama", ["attention", "ffn"], 4), ("qwen3_moe", ["attention", "expert_channels"], 1)],
)
def test_paths_are_followed_as_far_as_scales_call_for(
    family: str, kinds: list[str], multiple: int, job: Jobs
) -> None:
    """With any scales and with none the allocation is that of paths followed to their ends."""
    options: Any = {"pruning__width_multiple": multiple}
    search, cluster, scores, _ = scored(job, family, pruning__groups=kinds, **options)
    method = search.paths.method
    units = sorted({c.unit for c in scores.costs})
    differ = False
    for seed, spread in enumerate((0, 2, 2)):
        factors = np.exp(np.random.default_rng(seed).normal(size=len(units)) * spread)
        scales = dict(zip(units, factors.tolist(), strict=True))
        found = Paths(method, cluster, 1).rescaled(scores, scales)
        assert all(c.scale == scales[c.unit] for c in found.costs)
        reach = {c.consumer: Reach(math.inf) for c in found.costs}
        whole = Scores.merged(cluster.run_all(method.costs, reach, 1))
        whole = replace(whole, costs=tuple(replace(c, scale=scales[c.unit]) for c in whole.costs))
        counts = method.allocate(found, 1).counts
        assert counts == method.allocate(whole, 1).counts
        differ |= counts != method.allocate(scores, 1).counts
    assert differ


def test_a_search_in_a_run(job: Jobs) -> None:
    """Shards and stores change nothing and replicas little; a run that goes on ends the same;
    without a search it ends otherwise.
    """
    options = SEARCHING | {"pruning__width_multiple": 8}
    one = job(options, folder="one")
    shards = job(options | runs.DISK, folder="shards", cluster__num_shards=3)
    replicas = job(options, folder="replicas", cluster__num_replicas=2)
    without = job(options | {"pruning__search": None}, folder="without")
    for shot in one.shots:
        # a second one is tried if scales say so
        assert len(shot["search"]["divergences"]) in (1, 2)
        assert shot["seconds"]["search"] > 0
        assert_same_shot(one.uri, shards.uri, shot["index"])
        assert difference(one.uri, replicas.uri, shot["index"]) < runs.MOST_BY_ORDER_OF_SUMS
    assert difference(one.uri, without.uri, 2) > 0
    shutil.rmtree(shards.uri / "shots/0002")
    job(options, "--resume", folder="shards", cluster__num_shards=3)
    assert_same_shot(one.uri, shards.uri, 2)


def test_windows_of_a_search_lie_beside_those_of_the_calibration(job: Jobs) -> None:
    """In every text but the model's own, and the calibration is the same as without a search."""
    other = job.folder / "other.txt"
    other.write_text("\n\n".join(list(topics.values())[8:16]))
    mix = [{"source": "self"}, {"source": str(other), "max_tokens": 4000}]
    options = SEARCHING | {"calibration__mix": mix, "calibration__stride": None}
    with_search, without = (
        check(parse_spec(job.spec(options | {"pruning__search": search}).read_text()), dry_run=True)
        for search in ({"num_sequences": 5}, None)
    )
    assert np.array_equal(with_search.calibration, without.calibration)
    stage = with_search.stage(SearchStage)
    assert stage is not None
    assert without.stage(SearchStage) is None
    assert stage.windows.shape == (5, 40)
    rows = {tuple(row) for row in (*with_search.calibration, *stage.windows)}
    assert len(rows) == 4 + 5 + 1, "all different, and two that are still to be written"


def test_a_divergence_that_is_no_number_ends_a_search(job: Jobs) -> None:
    search, cluster, scores, _ = scored(job)
    worker = list(cluster.workers.values())[-1]
    name = next(iter(worker.shard.linears))
    worker.shard.set_weight(name, torch.full_like(worker.shard.weight(name), torch.nan))
    with pytest.raises(FloatingPointError, match=r"divergence .* is not finite"):
        search.run(scores, {})


def test_an_allocation_is_measured_once(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    search, _, scores, _ = scored(job, rounds=3)
    monkeypatch.setattr(Search, "_scales", lambda *_: {c.unit: 2.0 for c in scores.costs})
    found, record = search.run(scores, {})
    assert len(record["divergences"]) == 1
    assert {c.scale for c in found.costs} == {1.0}


def test_windows_held_aside_decide(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which allocation is taken, whatever the windows say on which the scales were taken."""
    search, _, scores, windows = scored(job)
    scales = dear(scores, losing_units(search, scores)[0])
    monkeypatch.setattr(Search, "_scales", lambda *_: scales)
    text = CalibrationText(windows, held=windows)
    for held, taken in (([3.0, 4.0], 0), ([4.0, 3.0], 1)):
        say_divergences(monkeypatch, *([1.0, 9.0] if taken else [9.0, 1.0]))
        measures = iter(held)
        monkeypatch.setattr(
            "ray_surgeon.stages.search.search.held_measure", lambda *_, given=measures: next(given)
        )
        facts: Facts = {}
        found, record = replace(search, text=text).run(scores, facts)
        assert (record["held_aside"], record["taken"]) == (held, taken)
        expected = scales if taken else dict.fromkeys(scales, 1.0)
        assert {c.unit: c.scale for c in found.costs} == expected
        assert (facts["divergence before"], facts["divergence"]) == (held[0], min(held))
        assert "allocation" in str(facts["taken"])
