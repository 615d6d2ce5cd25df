"""Mixtures of experts through the whole pipeline: channels of experts, whole experts, all kinds
together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ray_surgeon.report.directory import RunDirectory
from ray_surgeon.stages.curvature.gather import gather_curvature
from ray_surgeon.stages.prune.experts import ExpertSumsBeside, whole_expert_costs
from tests.conftest import LAYOUTS, SPARSE_CONFIGS
from tests.integration.runs import (
    MOST_BY_ORDER_OF_SUMS,
    Refused,
    assert_same_shot,
    completed,
    copied_model,
    difference,
    loaded,
    overrides,
    report_of,
    run,
    tensors_of_shot,
)
from tests.models.test_checkpoint import as_mxfp4

pytestmark = pytest.mark.usefixtures("forked")

GROUPS: dict[str, Any] = {
    "pruning__structure": "groups",
    "pruning__width_multiple": 8,
    "pruning__target_sparsity": 0.15,
    "pruning__num_shots": 1,
}
EXPERTS = GROUPS | {"pruning__groups": ["experts"], "pruning__allocation": "uniform"}
UNIFORM = GROUPS | {"pruning__allocation": "uniform", "output__exports": ["uniform"]}
PER_BLOCK = GROUPS | {"output__exports": ["per_block"]}
WHOLE = "pruning.groups=[experts]"
NO_SPARSITY = "pruning.target_sparsity=null"
LATENCY = "pruning.target={latency_s: 1}"
WITHOUT_GROUPS = sorted(set(SPARSE_CONFIGS) - {"deepseek_v3"})


def exported(folder: Path, model: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run, and return the report and what it says of the export."""
    report = completed(folder, model, **options)
    (export,) = report["exports"]
    assert export["kind"] == options["output__exports"][0]
    assert export["reload_max_logit_difference"] < 1e-4
    return report, export


@pytest.mark.parametrize("family", WITHOUT_GROUPS)
def test_a_plain_model_has_fewer_and_narrower_experts(
    family: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Where shared experts are as wide as others by definition, all keep their widths."""
    kinds = ["experts"] if family == "glm4_moe" else ["experts", "expert_channels"]
    options = UNIFORM | {"pruning__groups": kinds, "pruning__target_sparsity": 0.25}
    report, export = exported(tmp_path, model_folders[family], **options, cluster__num_shards=2)
    widths = [numbers for numbers in export["experts"] if numbers]
    layout = LAYOUTS[family]
    num_left = len(widths[0])
    assert layout.num_active_experts <= num_left < layout.num_experts
    assert {len(numbers) for numbers in widths} == {num_left}
    (width,) = {width for numbers in widths for width in numbers}
    assert width % 8 == 0
    assert width <= max(layout.num_channels, 24)
    folder = tmp_path / "run/export/uniform"
    assert type(AutoConfig.from_pretrained(folder)) is type(SPARSE_CONFIGS[family])
    blocks = AutoModelForCausalLM.from_pretrained(folder).model.layers
    layers = [block.mlp for block in blocks if hasattr(block.mlp, "experts")]
    routers = [layer.gate if hasattr(layer, "gate") else layer.router for layer in layers]
    assert {len(layer.experts.down_proj) for layer in layers} == {num_left}
    assert {len(router.weight) for router in routers} == {num_left}
    removed = report["shots"][-1]["experts_removed"]
    assert len(removed) == len(layers) * (layout.num_experts - num_left)
    tensors = tensors_of_shot(tmp_path / "run", 1)
    for name in removed:
        assert not tensors[f"{name}.rows"].any()
        assert not tensors[f"{name}.weight"].any()


@pytest.mark.parametrize("family", sorted(SPARSE_CONFIGS))
def test_everything_under_one_threshold(
    family: str, refused: Refused, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """But no groups of experts of which a router chooses some, as those of DeepSeek-V3."""
    has_groups = family == "deepseek_v3"
    if has_groups:
        message = refused(WHOLE, source=model_folders[family], **GROUPS)
        assert "2 groups of experts" in message
    kinds = [kind for kind in LAYOUTS[family].kinds if kind != "experts" or not has_groups]
    options = PER_BLOCK | {"pruning__groups": kinds, "pruning__target_sparsity": 0.3}
    report, export = exported(tmp_path, model_folders[family], **options)
    shot = report["shots"][-1]
    assert 0.3 <= shot["sparsity"] < 0.4
    assert shot["budget"]["need"] <= shot["budget"]["goal"]
    widths = {width for numbers in export["experts"] for width in numbers}
    assert len(widths) > 1
    assert all(width % 8 == 0 for width in widths)


def test_shards_and_replicas_and_stores(model_folders: dict[str, Path], tmp_path: Path) -> None:
    disk = "memory.weights=disk; memory.factors=disk; memory.wave=4; memory.scratch="
    ways = {
        "one": "",
        "shards": "cluster.num_shards=3",
        "replicas": "cluster.num_replicas=2",
        "disk": f"{disk}{tmp_path}/scratch",
        "host": "memory.weights=host; memory.factors=host; memory.activations=recompute",
    }
    kinds = ["attention", "ffn", "shared_experts", "expert_channels", "experts"]
    options = GROUPS | {"pruning__groups": kinds, "pruning__target_sparsity": 0.25}
    options["pruning__num_shots"] = 2
    for name, way in ways.items():
        completed(tmp_path / name, model_folders["qwen2_moe"], *overrides(way), **options)
    for name in ("shards", "disk", "host"):
        for shot in (1, 2):
            assert_same_shot(tmp_path / "one/run", tmp_path / name / "run", shot)
    assert difference(tmp_path / "one/run", tmp_path / "replicas/run", 2) < MOST_BY_ORDER_OF_SUMS


def test_a_resumed_run_goes_around_the_experts_that_are_gone(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_folders["qwen3_moe"]
    options = GROUPS | {"pruning__groups": ["experts"], "pruning__target_sparsity": 0.3}
    options["pruning__num_shots"] = 2
    whole = completed(tmp_path / "whole", model, **options)
    add_event = RunDirectory.add_event

    def stop(self: Any, event: dict[str, Any]) -> None:
        add_event(self, event)
        if event["shot"] == 2 and event["step"] == "costs":
            raise FloatingPointError("enough")

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "add_event", stop)
        assert run(tmp_path / "cut", model, **options) == 1
    assert len(report_of(tmp_path / "cut/run")["shots"]) == 1
    cut = completed(tmp_path / "cut", model, "--resume", **options)
    for shot in (1, 2):
        assert_same_shot(tmp_path / "whole/run", tmp_path / "cut/run", shot)
    assert whole["shots"][-1]["perplexity"] == cut["shots"][-1]["perplexity"]


ELEMENT = "pruning.structure=element; pruning.method"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("olmoe", "pruning.structure=rows_columns"),
        ("glm4_moe", "pruning.structure=element; correction.lora_rank=2"),
        ("gpt_oss", f"{ELEMENT}=sparsegpt"),
        ("olmoe", f"{ELEMENT}=wanda; curvature=null"),
        ("gpt_oss", "curvature.kind=extended_kfac"),
    ],
)
def test_other_methods_take_experts_as_linears(
    family: str, settings: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    arguments = overrides(f"output.exports=[masked]; pruning.num_shots=1; {settings}")
    report = completed(tmp_path, model_folders[family], *arguments)
    assert report["shots"][-1]["sparsity"] == pytest.approx(0.3, abs=0.03)
    assert report["exports"][0]["reload_max_logit_difference"] < 1e-4


def test_shared_experts_become_narrower(model_folders: dict[str, Path], tmp_path: Path) -> None:
    options = UNIFORM | {"pruning__groups": ["shared_experts"], "pruning__target_sparsity": 0.05}
    exported(tmp_path, model_folders["qwen2_moe"], **options)
    config = AutoConfig.from_pretrained(tmp_path / "run/export/uniform")
    assert config.shared_expert_intermediate_size in (8, 16, 24, 32)
    assert config.moe_intermediate_size == 24


def test_whole_layers_of_a_mixture_may_go(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Experts and shared experts without channels, dense layers and attention without any, in the
    classes that go along.
    """
    kinds = ["attention", "ffn", "shared_experts", "expert_channels"]
    options = PER_BLOCK | {"pruning__groups": kinds, "pruning__target_sparsity": 0.8}
    options["pruning__remove_blocks"] = True
    _, export = exported(tmp_path, model_folders["qwen2_moe"], **options)
    assert 0 in [width for experts in export["experts"] for width in experts]
    assert 0 in [number for widths in export["widths"] for number in widths]
    assert export["loaders"]["vLLM"] == "not run"


@pytest.mark.parametrize("method", ["sparsegpt", "wanda; curvature=null"])
def test_an_expert_that_was_not_called_keeps_its_largest_weights(
    method: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """It may be called yet."""
    folder = copied_model(model_folders["glm4_moe"], tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    last = model.model.layers[-1].mlp
    last.gate.e_score_correction_bias[1] = -100
    model.save_pretrained(folder)
    settings = f"{ELEMENT}={method}; pruning.target_sparsity=0.5; pruning.num_shots=1"
    completed(tmp_path, folder, *overrides(settings))
    dense = last.experts.down_proj[1].detach()
    name = f"model.layers.{len(model.model.layers) - 1}.mlp.experts.1.down_proj.weight"
    pruned = tensors_of_shot(tmp_path / "run", 1)[name]
    assert pruned.count_nonzero() == pruned.numel() / 2
    assert torch.equal(pruned[pruned != 0], dense[pruned != 0])
    assert float(dense[pruned != 0].abs().mean()) > float(dense[pruned == 0].abs().mean())


def test_a_layer_without_an_expert_to_spare_passes_another_shot(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Its router, which takes the best two of a group, cannot be asked without one of its two."""
    options = EXPERTS | {"pruning__num_shots": 4, "pruning__target_sparsity": 0.24}
    options["output__exports"] = ["uniform"]
    report, export = exported(tmp_path, model_folders["glm4_moe"], **options)
    shots = report["shots"]
    assert [len(shot["experts_removed"]) for shot in shots] == [3, 0, 3, 0]
    assert shots[0]["expert_costs"]
    assert not shots[-1]["expert_costs"]
    assert all(len(numbers) in (0, 2) for numbers in export["experts"])


@pytest.mark.parametrize("score", ["reap", "frequency", "random"])
def test_scores_of_baselines(score: str, model_folders: dict[str, Path], tmp_path: Path) -> None:
    """The experts of the lowest scores go, equally many a block; no gradients are needed."""
    options = EXPERTS | {"pruning__expert_costs": score}
    (shot,), (forward,) = (
        completed(tmp_path / kind, model_folders["olmoe"], **options, curvature__kind=kind)["shots"]
        for kind in ("kfac", "activations")
    )
    assert forward["expert_costs"] == pytest.approx(shot["expert_costs"], rel=1e-4)
    for experts in LAYOUTS["olmoe"].expert_sets:
        costs = {linears[-1]: shot["expert_costs"][linears[-1]] for linears in experts.linears}
        gone = [costs.pop(name) for name in shot["experts_removed"] if name in costs]
        assert gone
        assert max(gone) <= min(costs.values())


def test_random_costs_are_others_in_every_layer_and_shot(model_folders: dict[str, Path]) -> None:
    cluster = loaded(model_folders["olmoe"])
    (worker,) = cluster.workers.values()
    gather_curvature(cluster, np.arange(40)[None], "activations", beside=ExpertSumsBeside())
    found = [whole_expert_costs(worker, "random", shot, first_order=False) for shot in (1, 2)]
    of_layers = {
        tuple(costs[linears[-1]] for linears in experts.linears)
        for costs in found
        for experts in worker.shard.expert_sets
    }
    assert len(of_layers) == 2 * 4


def test_the_first_order_counts_with_labels_of_the_text_only(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    empirical, sampled = (
        completed(tmp_path / fisher, model_folders["olmoe"], **EXPERTS, curvature__fisher=fisher)[
            "shots"
        ][-1]["expert_costs"].values()
        for fisher in ("empirical", "sampled")
    )
    assert min(empirical) < 0 < max(empirical)
    assert min(sampled) >= 0


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ("pruning.groups=[ffn]", "has attention, expert_channels, experts that can be pruned here"),
        (f"{NO_SPARSITY}; {WHOLE}; pruning.target={{flops: 1}}", "save no flops"),
        (f"{NO_SPARSITY}; pruning.groups=[expert_channels]; {LATENCY}", "a latency"),
        (f"{WHOLE}; output.exports=[masked]", "masked keeps all shapes"),
        (f"{WHOLE}; curvature.kind=identity", "looks at no text"),
        (f"{WHOLE}; curvature.kind=activations", "has no gradients"),
        ("pruning.groups=[experts, attention]; pruning.expert_costs=reap", "another unit"),
        ("pruning.expert_costs=reap", "is of whole experts"),
        ("curvature.num_backward=3", "the experts of a mixture see too few tokens"),
        (f"{WHOLE}; pruning.target_sparsity=0.9", "ask for less"),
    ],
)
def test_what_cannot_be_is_refused(
    settings: str, complaint: str, refused: Refused, model_folders: dict[str, Path]
) -> None:
    mixtral = model_folders["mixtral"]
    assert complaint in refused(settings, "--dry-run", source=mixtral, **GROUPS)


@pytest.mark.parametrize("unit", ["bytes", "flops"])
def test_targets_of_a_mixture(unit: str, model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Bytes count all experts; flops only those a token goes to."""
    layout = LAYOUTS["qwen3_moe"]
    active = sum(shape.size * (1 if shape.sees_all_tokens else 2 / 6) for shape in layout.linears)
    # blocks, a multiply-add for q.k and one for the sum, dimensions of a head, heads, tokens before
    scores = 4 * 4 * 8 * 4 * 17 / 2
    flops = 2 * (active + layout.config.vocab_size * layout.config.hidden_size) + scores
    dense = {"bytes": 4 * layout.num_parameters, "flops": flops}[unit]
    target = {unit: int(0.9 * dense)} | ({"prompt_length": 16} if unit == "flops" else {})
    options = GROUPS | {"pruning__target_sparsity": None, "pruning__target": target}
    options["pruning__groups"] = ["expert_channels"]
    report = completed(tmp_path, model_folders["qwen3_moe"], **options)
    budget = report["shots"][-1]["budget"]
    assert budget["need"] <= target[unit] < budget["dense"]
    if unit == "flops":
        assert budget["dense"] == pytest.approx(dense)


def test_heads_with_sinks(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Half of the heads go, in a plain class, with their sinks."""
    options = UNIFORM | {"pruning__groups": ["attention"], "pruning__target_sparsity": 0.03}
    _, export = exported(tmp_path, model_folders["gpt_oss"], **options, cluster__num_shards=2)
    assert {num_kv_heads for _, num_kv_heads in export["widths"]} == {1}
    pruned, dense = (
        AutoModelForCausalLM.from_pretrained(folder).model.layers
        for folder in (tmp_path / "run/export/uniform", model_folders["gpt_oss"])
    )
    for block, whole in zip(pruned, dense, strict=True):
        halves = whole.self_attn.sinks.split(2)
        assert any(torch.equal(block.self_attn.sinks, half) for half in halves)


def test_a_packed_checkpoint_is_unpacked(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """As gpt-oss is published: MXFP4, and an export in the job's dtype that says nothing of it;
    also with weights on disk.
    """
    state = load_file(model_folders["gpt_oss"] / "model.safetensors")
    for name, tensor in state.items():  # a width that blocks of 32 fill
        if "experts" in name and name.endswith("down_proj"):
            state[name] = torch.cat([tensor, tensor[:, :16]], dim=1)
        elif "gate_up" in name:
            state[name] = torch.cat([tensor, tensor[..., :32]], dim=-1)
    packed = as_mxfp4(state)
    unpacked = {name: t for name, t in packed.items() if not name.endswith(("_blocks", "_scales"))}
    for whole in [name.removesuffix("_blocks") for name in packed if name.endswith("_blocks")]:
        parts = (packed[f"{whole}_{part}"] for part in ("blocks", "scales"))
        unpacked[whole] = convert_moe_packed_tensors(*parts).float()
    mxfp4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    for name, tensors, extra in (
        ("packed", packed, {"quantization_config": mxfp4}),
        ("unpacked", unpacked, {}),
    ):
        folder = tmp_path / name
        copied_model(model_folders["gpt_oss"], folder, intermediate_size=64, **extra)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    options = UNIFORM | {"pruning__groups": ["experts", "expert_channels"]}
    options["pruning__target_sparsity"] = 0.25
    disk = {"memory__weights": "disk", "memory__scratch": str(tmp_path / "scratch")}
    for name, model, way in (
        ("packed", "packed", {}),
        ("unpacked", "unpacked", {}),
        ("streamed", "packed", disk),
    ):
        exported(tmp_path / "runs" / name, tmp_path / model, **options, **way)
    for name in ("unpacked", "streamed"):
        assert_same_shot(tmp_path / "runs/packed/run", tmp_path / "runs" / name / "run", 1)
    written = json.loads((tmp_path / "runs/packed/run/export/uniform/config.json").read_text())
    assert "quantization_config" not in written


def test_config_of_an_older_checkpoint(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Older checkpoints call the number of experts by one name only."""
    model = copied_model(model_folders["qwen3_moe"], tmp_path / "model")
    document = json.loads((model / "config.json").read_text())
    document["num_experts"] = document.pop("num_local_experts", document.get("num_experts"))
    (model / "config.json").write_text(json.dumps(document))
    _, export = exported(tmp_path, model, **UNIFORM, pruning__groups=["experts"])
    written = json.loads((tmp_path / "run/export/uniform/config.json").read_text())
    assert written["num_experts"] == len(export["experts"][0])


def test_magnitudes_of_experts_and_attention_are_compared_as_they_are(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """The identity is no sum over tokens, of which an expert would have few: one threshold on |w|
    over the whole model.
    """
    magnitude = (
        "curvature.kind=identity; pruning.structure=element; pruning.costs=obd; "
        "pruning.update={solver: none}; pruning.target_sparsity=0.5; pruning.num_shots=1"
    )
    completed(tmp_path, model_folders["mixtral"], *overrides(magnitude))
    smallest = {True: list[float](), False: list[float]()}
    for name, W in tensors_of_shot(tmp_path / "run", 1).items():
        if name.endswith("_proj.weight"):
            smallest["experts" in name].append(float(W[W != 0].abs().min()))
    assert min(smallest[True]) == pytest.approx(min(smallest[False]), rel=0.02)
