"""Reconstruction of feed-forward layers in whole jobs: what is kept, what is trained, and what
replicas have after it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.reconstruction import outputs_of, reconstruct
from ray_surgeon.memory.stores import Stores
from ray_surgeon.models.layout import FEED_FORWARD_OF_ALL
from ray_surgeon.run.inputs import Inputs, check
from ray_surgeon.spec.parsing import parse_spec
from ray_surgeon.stages.curvature.gather import drawn
from ray_surgeon.stages.curvature.stage import calibrate
from ray_surgeon.stages.prune.groups import Groups
from ray_surgeon.stages.reconstruction.layers import (
    RATES,
    KeptInputs,
    Reconstruction,
    _layer,
    errors_of,
)
from tests.conftest import CONFIGS, LAYOUTS, SPARSE_CONFIGS, tiny_model
from tests.integration.runs import (
    MOST_BY_ORDER_OF_SUMS,
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
    "pruning__groups": ["ffn"],
}
FIT: dict[str, Any] = GROUPS | {
    "pruning__reconstruction": {"tokens_per_step": 16, "num_epochs": 4, "learning_rate": 0.02},
    "calibration__held_aside": 0,
}


def inputs_for(model: Path, folder: Path, **options: Any) -> Inputs:
    return check(
        parse_spec(
            tiny_spec(folder, model, **(FIT | {"pruning__num_shots": 1} | options)).read_text()
        )
    )


@pytest.mark.parametrize("family", CONFIGS | SPARSE_CONFIGS)
def test_a_layer_is_what_the_family_computes(family: str, model_folders: dict[str, Path]) -> None:
    """Inputs of the producers in, outputs of the consumer out, for every family that has such
    layers.
    """
    cluster = loaded(model_folders[family])
    model = tiny_model(family)
    (worker,) = cluster.workers.values()
    layers = [groups for groups in worker.group_sets if groups.kind in FEED_FORWARD_OF_ALL]
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def noting(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = inputs[0].detach().flatten(0, -2), output.detach().flatten(0, -2)

        return hook

    names = {name for groups in layers for name in (groups.producers[0][0], groups.consumer)}
    for name in names:
        model.get_submodule(name).register_forward_hook(noting(name))
    with torch.no_grad():
        model(torch.arange(24)[None])
    for groups in layers:
        whole = _layer(
            worker,
            groups,
            worker.shard.weight(groups.consumer),
            torch.ones(len(groups.columns), dtype=torch.bool),
        )
        torch.testing.assert_close(
            outputs_of(whole, seen[groups.producers[0][0]][0]),
            seen[groups.consumer][1],
            rtol=1e-4,
            atol=1e-5,
        )
    assert layers or family in SPARSE_CONFIGS


@pytest.mark.parametrize("stores", [Stores(), Stores("disk", "device", "recompute", 2)])
def test_owners_get_the_inputs_of_every_token_once(
    stores: Stores, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    inputs = inputs_for(
        model_folders["llama"], tmp_path, curvature__num_backward=3, calibration__held_aside=0.3
    )
    cluster = loaded(model_folders["llama"], 2, 2, stores)
    calibrate(inputs.method, cluster, inputs.text, 1, remembers=False)
    seen: dict[str, list[Tensor]] = {}
    model = tiny_model("llama")
    for number, block in enumerate(model.model.layers):
        parts = seen[f"model.layers.{number}.mlp.down_proj"] = []
        block.mlp.register_forward_pre_hook(
            lambda _, given, parts=parts: parts.append(given[0].detach()[0])
        )
    with torch.no_grad():
        for tokens in (*inputs.text.tokens, *inputs.text.held):
            model(torch.from_numpy(tokens)[None])
    owned = 0
    num_held = len(inputs.text.held)
    assert num_held == 2
    for worker in cluster.workers.values():
        assert worker.shard.layer_inputs is None
        kept = worker.kept(KeptInputs)
        assert kept.fitted is not None
        assert kept.held is not None
        fitted = 6 - num_held
        for name in filter(worker.owns, list(kept.fitted.kept)):
            order = [*drawn(fitted, 3), *sorted(set(range(fitted)) - set(drawn(fitted, 3)))]
            for found, numbers in (
                (kept.fitted.kept.pop(name), order),
                (kept.held.kept.pop(name), range(fitted, 6)),
            ):
                expected = torch.cat([seen[name][number] for number in numbers])
                torch.testing.assert_close(
                    found.float(), expected.bfloat16().float(), rtol=1e-2, atol=1e-3
                )
            owned += 1
    assert owned == len(seen)


def test_channels_are_the_same_and_the_divergence_is_lower(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    options = {
        "evaluation": [
            {
                "name": "seen",
                "source": str(tmp_path / "plain/text.txt"),
                "split": "train",
                "num_sequences": 6,
                "sequence_length": 40,
                "stride": 64,
                "max_tokens": 4000,
            }
        ],
        "pruning__num_shots": 1,
    }
    assert run(tmp_path / "plain", model_folders["llama"], **GROUPS, **options) == 0
    assert run(tmp_path / "fit", model_folders["llama"], **FIT, **options) == 0
    plain, fit = (report_of(tmp_path / name / "run")["shots"][0] for name in ("plain", "fit"))
    assert fit["groups_removed"] == plain["groups_removed"]
    assert fit["divergence"]["seen"] < 0.9 * plain["divergence"]["seen"]
    assert set(fit["reconstruction"]) == {
        name for name, count in fit["groups_removed"].items() if count
    }
    assert all(after < before for before, after in fit["reconstruction"].values())
    assert fit["reconstruction_rate"] == 0.02
    before, after = (tensors_of_shot(tmp_path / name / "run", 1) for name in ("plain", "fit"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"model.layers.{block}.mlp.{linear}.weight"
        for block in {name.split(".")[2] for name in fit["reconstruction"]}
        for linear in ("gate_proj", "up_proj", "down_proj")
    }
    for name in after:
        if name.endswith("weight"):
            assert torch.equal(before[name] == 0, after[name] == 0), "what is pruned stays zero"


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_two_replicas_and_shards_give_what_one_worker_gives(
    family: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    for name, workers in (
        ("one", {}),
        ("four", {"cluster__num_shards": 2, "cluster__num_replicas": 2}),
    ):
        assert run(tmp_path / name, model_folders[family], **FIT, **workers) == 0
    for shot in (1, 2):
        assert difference(tmp_path / "one/run", tmp_path / "four/run", shot) < MOST_BY_ORDER_OF_SUMS


def test_replicas_have_the_same_weights_and_no_inputs_after_it(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    inputs = inputs_for(model_folders["phi3"], tmp_path, cluster__num_replicas=2)
    method = inputs.method
    assert isinstance(method, Groups)
    cluster = loaded(model_folders["phi3"], 1, 2)
    calibrate(method, cluster, inputs.text, 1, remembers=False)
    choice = method.choose(cluster, method.score(cluster, 1), 1)
    method.apply(cluster, inputs.calibration, choice, 1)
    one, other = cluster.workers.values()
    assert one.shard.layer_inputs is other.shard.layer_inputs is None
    for name in one.shard.linears:
        assert torch.equal(one.shard.weight(name), other.shard.weight(name))
        assert torch.equal(
            one.mask(name, StructuredMask).rows, other.mask(name, StructuredMask).rows
        )


def test_a_layer_that_is_gone_is_not_trained(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    options = {
        "pruning__target_sparsity": 0.6,
        "pruning__remove_blocks": True,
        "pruning__num_shots": 1,
        "pruning__rank_by": "cost",
    }
    assert run(tmp_path, model_folders["llama"], **FIT, **options) == 0
    shot = report_of(tmp_path / "run")["shots"][0]
    gone = {name for name, count in shot["groups_removed"].items() if count == 48}
    assert gone
    assert set(shot["reconstruction"]) == {
        name for name, count in shot["groups_removed"].items() if 0 < count < 48
    }


def test_a_mixture_keeps_inputs_of_the_kinds_that_lose_groups(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    options = {
        "pruning__groups": ["ffn", "attention"],
        "pruning__num_shots": 1,
        "pruning__target_sparsity": 0.05,
    }
    inputs = inputs_for(model_folders["glm4_moe"], tmp_path, **options)
    cluster = loaded(model_folders["glm4_moe"], 2)
    calibrate(inputs.method, cluster, inputs.text, 1, remembers=False)
    kept = [worker.kept(KeptInputs).fitted for worker in cluster.workers.values()]
    assert [inputs is not None and tuple(inputs.kept) for inputs in kept] == [
        ("model.layers.0.mlp.down_proj",),
        (),
    ]
    for kind in ("ffn", "shared_experts"):
        changed = FIT | options | {"pruning__groups": [kind], "cluster__num_shards": 2}
        assert run(tmp_path / kind, model_folders["glm4_moe"], **changed) == 0
        shot = report_of(tmp_path / kind / "run")["shots"][0]
        assert shot["reconstruction"].keys() == {
            name for name, count in shot["groups_removed"].items() if count
        }
        assert all(after < before for before, after in shot["reconstruction"].values())


def test_layers_are_trained_as_the_section_says(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an order of tokens of its own each."""
    seen: list[dict[str, Any]] = []

    def noting(layer: Any, *given: Any, generator: torch.Generator, **options: Any) -> Any:
        seen.append(options | {"seed": generator.initial_seed()})
        return reconstruct(layer, *given, generator=generator, **options)

    monkeypatch.setattr("ray_surgeon.stages.reconstruction.layers.reconstruct", noting)
    section = {"tokens_per_step": 16, "num_epochs": 1, "learning_rate": 0.03}
    options = FIT | {"pruning__reconstruction": section | {"seed": 1000}, "pruning__num_shots": 1}
    assert run(tmp_path, model_folders["llama"], **options) == 0
    names = report_of(tmp_path / "run")["shots"][0]["reconstruction"]
    assert {one.pop("seed") for one in seen} == {
        1000 + LAYOUTS["llama"].linear_numbers[name] for name in names
    }
    assert all(one[option] == value for one in seen for option, value in section.items())


def test_only_layers_that_lost_channels_in_a_shot_are_trained_and_in_its_report(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    inputs = inputs_for(model_folders["llama"], tmp_path, pruning__num_shots=2)
    cluster = loaded(model_folders["llama"], 2)
    method = inputs.method
    layers = [groups.consumer for groups in LAYOUTS["llama"].group_sets if groups.kind == "ffn"]
    for shot in (1, 2):
        calibrate(method, cluster, inputs.text, shot, remembers=False)
        scores = method.score(cluster, shot)
        choice = replace(
            method.choose(cluster, scores, shot),
            counts={name: 3 * (name == layers[shot]) for name in layers},
        )
        method.apply(cluster, inputs.calibration, choice, shot)
        trained = [name for errors in cluster.run_all(errors_of) for name in errors.of_layer]
        assert trained == [layers[shot]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_in_bfloat16_are_reconstructed(
    family: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert (
        run(tmp_path, model_folders[family], **FIT, pruning__num_shots=1, model__dtype="bfloat16")
        == 0
    )
    (shot,) = report_of(tmp_path / "run")["shots"]
    assert shot["reconstruction"]
    assert all(after < before for before, after in shot["reconstruction"].values())


def test_all_replicas_have_what_the_owner_of_the_consumer_trained(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Of three replicas, not the same one owns the producers and the consumer. What is trained
    differs by the order of sums alone.
    """
    inputs = inputs_for(model_folders["llama"], tmp_path)
    method = inputs.method
    results = list[dict[str, Tensor]]()
    choice = None
    for num_replicas in (1, 3):
        cluster = loaded(model_folders["llama"], 1, num_replicas)
        calibrate(method, cluster, inputs.text, 1, remembers=False)
        found = method.choose(cluster, method.score(cluster, 1), 1)
        choice = choice or found
        method.apply(cluster, inputs.calibration, choice, 1)
        results += [
            {name: worker.shard.weight(name) for name in worker.shard.linears}
            for worker in cluster.workers.values()
        ]
    (dense,) = loaded(model_folders["llama"]).workers.values()
    one, *others = results
    for name in {
        name
        for groups in LAYOUTS["llama"].group_sets
        if groups.kind == "ffn"
        for name, _ in groups.producers
    }:
        change = (one[name] - dense.shard.weight(name))[one[name] != 0]
        assert change.any()
        for other in others:
            assert float((other[name] - one[name]).norm()) < 1e-3 * float(change.norm())


def test_the_learning_rate_is_the_best_of_those_tried_on_two_layers(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same one whoever owns the layers, and trying changes nothing."""
    seen = list[tuple[str, float, float]]()
    plain = Reconstruction.tried

    def noting(
        self: Reconstruction, worker: Any, groups: Any, W: Tensor, kept: Tensor, rate: float
    ) -> float:
        weights = {name: worker.shard.weight(name) for name in worker.shard.linears}
        error = plain(self, worker, groups, W, kept, rate)
        assert all(torch.equal(worker.shard.weight(name), W) for name, W in weights.items())
        seen.append((groups.consumer, rate, error))
        return error

    monkeypatch.setattr(Reconstruction, "tried", noting)
    options: dict[str, Any] = {
        "pruning__reconstruction": {"tokens_per_step": 16, "num_epochs": 4},
        "pruning__num_shots": 1,
    }
    options["calibration__held_aside"] = 0.3
    for name, workers in (
        ("one", {}),
        ("four", {"cluster__num_shards": 2, "cluster__num_replicas": 2}),
    ):
        assert run(tmp_path / name, model_folders["llama"], **(FIT | options), **workers) == 0
    assert {rate for _, rate, _ in seen} == set(RATES)
    assert len({layer for layer, _, _ in seen}) == 2
    first = seen[: len(seen) // 2]
    means = {rate: sum(error for _, one, error in first if one == rate) for rate in RATES}
    for name in ("one", "four"):
        (shot,) = report_of(tmp_path / name / "run")["shots"]
        assert shot["reconstruction_rate"] == min(RATES, key=lambda rate: means[rate])
        assert shot["divergence_held_aside"] > 0
    assert difference(tmp_path / "one/run", tmp_path / "four/run", 1) < MOST_BY_ORDER_OF_SUMS
    assert Reconstruction.best_rate({0.1: [float("nan"), 0.1], 0.2: [0.9, 0.9]}) == 0.2
