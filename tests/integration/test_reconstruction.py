"""Reconstruction of feed-forward layers in whole jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ray_surgeon.factors.collector import drawn
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.reconstruction import outputs_of, reconstruct
from ray_surgeon.memory.stores import Stores
from ray_surgeon.models.layout import FEED_FORWARD_OF_ALL
from ray_surgeon.pruning.calibration import calibrate
from ray_surgeon.pruning.coupled_groups import Groups
from ray_surgeon.recovery.reconstruction import RATES, Reconstruction, _layer
from tests.conftest import CONFIGS, LAYOUTS, SPARSE_CONFIGS, tiny_model
from tests.integration import runs
from tests.integration.runs import Jobs, difference, loaded, windows

FFN = runs.GROUPS | {"pruning__width_multiple": 1, "pruning__groups": ["ffn"]}
FIT: dict[str, Any] = FFN | {
    "pruning__reconstruction": {
        "tokens_per_step": 16,
        "num_epochs": 4,
        "learning_rate": 0.02,
    },
    "calibration__held_aside": 0,
}


@pytest.mark.parametrize("family", CONFIGS | SPARSE_CONFIGS)
def test_layer_matches_the_family(family: str, model_folders: dict[str, Path]) -> None:
    """From the inputs of its producers, a layer computes the outputs of its consumer, in every
    family with such layers.
    """
    cluster = loaded(model_folders[family])
    model = tiny_model(family)
    (worker,) = cluster.workers.values()
    layers = [
        groups for groups in worker.group_sets if groups.kind in FEED_FORWARD_OF_ALL
    ]
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def noting(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = inputs[0].detach().flatten(0, -2), output.detach().flatten(0, -2)

        return hook

    names = {
        name for groups in layers for name in (groups.producers[0][0], groups.consumer)
    }
    for name in names:
        model.get_submodule(name).register_forward_hook(noting(name))
    with torch.no_grad():
        model(torch.arange(24)[None])
    for groups in layers:
        kept = torch.ones(len(groups.columns), dtype=torch.bool)
        whole = _layer(worker, groups, worker.shard.weight(groups.consumer), kept)
        found = outputs_of(whole, seen[groups.producers[0][0]][0])
        torch.testing.assert_close(found, seen[groups.consumer][1], rtol=1e-4, atol=1e-5)
    assert layers or family in SPARSE_CONFIGS


@pytest.mark.parametrize("stores", [Stores(), Stores("disk", "device", "recompute", 2)])
def test_owners_receive_the_inputs_of_every_token_once(stores: Stores, job: Jobs) -> None:
    options = (
        FIT | runs.ONE | {"curvature__num_backward": 3, "calibration__held_aside": 0.3}
    )
    inputs = job.inputs(options)
    cluster = loaded(job.models["llama"], 2, 2, stores)
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
    assert len(inputs.text.held) == 2
    order = [*drawn(4, 3), *sorted(set(range(4)) - set(drawn(4, 3)))]
    owned = 0
    for worker in cluster.workers.values():
        assert worker.shard.layer_inputs is None
        for part, numbers in zip(worker.state.layer_inputs, (order, [4, 5]), strict=True):
            for name in filter(worker.owns, list(part.kept)):
                expected = torch.cat(
                    [seen[name][number] for number in numbers]
                ).bfloat16()
                found = part.kept.pop(name)
                torch.testing.assert_close(
                    found.float(), expected.float(), rtol=1e-2, atol=1e-3
                )
                owned += 1
    assert owned == 2 * len(seen)


def assert_all_better(shot: dict[str, Any]) -> None:
    """Check that the report has exactly the layers that lost channels, each with a lower error."""
    lost = {name for name, count in shot["groups_removed"].items() if count}
    assert set(shot["reconstruction"]) == lost
    assert all(after < before for before, after in shot["reconstruction"].values())


def test_reconstruction_fits_only_the_remaining_weights(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removed channels are the same, and the divergence is lower. Each layer has its own order
    of tokens.
    """
    asked: list[dict[str, Any]] = []

    def noting(
        layer: Any, *given: Any, generator: torch.Generator, **options: Any
    ) -> Any:
        asked.append(options | {"seed": generator.initial_seed()})
        return reconstruct(layer, *given, generator=generator, **options)

    monkeypatch.setattr("ray_surgeon.recovery.reconstruction.reconstruct", noting)
    seen = windows(
        job.folder / "plain/text.txt", 6, stride=64, name="seen", split="train"
    )
    options = runs.ONE | {"evaluation": [seen]}
    section = FIT["pruning__reconstruction"]
    changes = {"pruning__reconstruction": section | {"seed": 1000}}
    one = job(FFN | options, folder="plain")
    two = job(FIT | options | changes, folder="fit")
    (plain,) = one.shots
    (fit,) = two.shots
    assert fit["groups_removed"] == plain["groups_removed"]
    assert fit["divergence"]["seen"] < 0.9 * plain["divergence"]["seen"]
    assert_all_better(fit)
    assert fit["reconstruction_rate"] == 0.02
    before = one.tensors(1)
    after = two.tensors(1)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"model.layers.{block}.mlp.{linear}.weight"
        for block in {name.split(".")[2] for name in fit["reconstruction"]}
        for linear in ("gate_proj", "up_proj", "down_proj")
    }
    for name in after:
        if name.endswith("weight"):
            assert torch.equal(before[name] == 0, after[name] == 0), (
                "pruned weights stay zero"
            )
    numbers = LAYOUTS["llama"].linear_numbers
    assert {given.pop("seed") for given in asked} == {
        1000 + numbers[name] for name in fit["reconstruction"]
    }
    assert all(
        given[option] == value for given in asked for option, value in section.items()
    )


def test_removed_layer_is_not_reconstructed(job: Jobs) -> None:
    layers = {
        "pruning__groups": ["ffn", "ffn_layers"],
        "pruning__depth": {"num_removed": 1},
    }
    options = FIT | runs.ONE | layers | {"calibration__held_aside": 0.3}
    (shot,) = job(options, pruning__target_sparsity=0.5).shots
    (gone,) = (step["layer"] for step in shot["layers_removed"])
    assert len(shot["reconstruction"]) == 3
    assert not [
        name for name in shot["reconstruction"] if f".{gone.split()[-1]}." in name
    ]


def test_mixture_keeps_inputs_only_of_kinds_that_are_pruned(job: Jobs) -> None:
    options = FIT | runs.ONE | {"model": "glm4_moe", "pruning__target_sparsity": 0.05}
    inputs = job.inputs(options | {"pruning__groups": ["ffn", "attention"]})
    cluster = loaded(job.models["glm4_moe"], 2)
    calibrate(inputs.method, cluster, inputs.text, 1, remembers=False)
    kept = [worker.state.layer_inputs[0] for worker in cluster.workers.values()]
    assert [tuple(inputs.kept) for inputs in kept] == [
        ("model.layers.0.mlp.down_proj",),
        (),
    ]
    for kind in ("ffn", "shared_experts"):
        changes = {"pruning__groups": [kind], "cluster__num_shards": 2}
        (shot,) = job(options | changes, folder=kind).shots
        assert_all_better(shot)


def test_models_in_bfloat16_are_reconstructed(job: Jobs) -> None:
    (shot,) = job(FIT | runs.ONE, model="gpt2", model__dtype="bfloat16").shots
    assert shot["reconstruction"]
    assert_all_better(shot)


def test_all_replicas_have_the_weights_trained_by_the_owner(job: Jobs) -> None:
    """The inputs are freed. With three replicas, different ones own the producers and the consumer.
    Results differ only by the order of sums.
    """
    inputs = job.inputs(FIT | runs.ONE, model="phi3")
    method = inputs.method
    assert isinstance(method, Groups)
    results = list[dict[str, Tensor]]()
    choice = None
    for num_replicas in (1, 3):
        cluster = loaded(job.models["phi3"], 1, num_replicas)
        calibrate(method, cluster, inputs.text, 1, remembers=False)
        found = method.choose(cluster, method.score(cluster, 1), 1)
        choice = choice or found
        method.apply(cluster, inputs.calibration, choice, 1)
        for worker in cluster.workers.values():
            assert worker.shard.layer_inputs is None
            masks = {
                f"{name}.rows": worker.mask(name, StructuredMask).rows
                for name in worker.masks
            }
            weights = {name: worker.shard.weight(name) for name in worker.shard.linears}
            results.append(weights | masks)
    (dense,) = loaded(job.models["phi3"]).workers.values()
    one, *others = results
    for name in one:
        assert all(torch.equal(other[name], others[0][name]) for other in others), name
    layers = [groups for groups in LAYOUTS["phi3"].group_sets if groups.kind == "ffn"]
    for name in {name for groups in layers for name, _ in groups.producers}:
        change = (one[name] - dense.shard.weight(name))[one[name] != 0]
        assert change.any()
        assert float((others[0][name] - one[name]).norm()) < 1e-3 * float(change.norm())


def test_best_learning_rate_is_chosen(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers try all rates, whichever workers own them. Trials change no weights."""
    seen = list[tuple[str, float, float]]()
    plain = Reconstruction.tried

    def noting(
        self: Reconstruction, worker: Any, groups: Any, W: Tensor, kept: Tensor
    ) -> list[tuple[float, float]]:
        weights = {name: worker.shard.weight(name) for name in worker.shard.linears}
        tried = plain(self, worker, groups, W, kept)
        assert all(
            torch.equal(worker.shard.weight(name), W) for name, W in weights.items()
        )
        seen.extend((groups.consumer, rate, error) for rate, error in tried)
        return tried

    computed = list[int]()

    def counting(layer: Any, inputs: Tensor) -> Tensor:
        computed.append(len(inputs))
        return outputs_of(layer, inputs)

    monkeypatch.setattr(Reconstruction, "tried", noting)
    monkeypatch.setattr("ray_surgeon.recovery.reconstruction.outputs_of", counting)
    section = {"tokens_per_step": 16, "num_epochs": 4}
    options = (
        FIT
        | runs.ONE
        | {"pruning__reconstruction": section, "calibration__held_aside": 0.3}
    )
    one = job(options, folder="one")
    trials_and_layers = 2 + len(one.shots[0]["reconstruction"])
    assert len(computed) == 2 * trials_and_layers, (
        "outputs of training and held-aside tokens are computed once each"
    )
    four = job(options | runs.FOUR, folder="four")
    assert {rate for _, rate, _ in seen} == set(RATES)
    assert len({layer for layer, _, _ in seen}) == 2
    first = seen[: len(seen) // 2]
    means = {rate: sum(error for _, one, error in first if one == rate) for rate in RATES}
    for (shot,) in (one.shots, four.shots):
        assert shot["reconstruction_rate"] == min(RATES, key=lambda rate: means[rate])
        assert shot["divergence_held_aside"] > 0
    assert difference(one.uri, four.uri, 1) < runs.MOST_BY_ORDER_OF_SUMS
    assert (
        Reconstruction.best_rate([(RATES[0], float("nan")), (RATES[1], 0.9)]) == RATES[1]
    )
