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
from ray_surgeon.stages.prune.experts import whole_expert_costs
from tests.conftest import LAYOUTS, SPARSE_CONFIGS
from tests.integration.runs import (
    MOST_BY_ORDER_OF_SUMS,
    assert_same_shot,
    difference,
    loaded,
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
}
UNIFORM = GROUPS | {"pruning__allocation": "uniform", "output__exports": ["uniform"]}
WITHOUT_GROUPS = sorted(set(SPARSE_CONFIGS) - {"deepseek_v3"})


def export_of(folder: Path, kind: str) -> dict[str, Any]:
    (export,) = report_of(folder / "run")["exports"]
    assert export["kind"] == kind
    assert export["reload_max_logit_difference"] < 1e-4
    return dict(export)


@pytest.mark.parametrize("family", WITHOUT_GROUPS)
def test_whole_experts_leave_a_plain_model_with_fewer(
    family: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert (
        run(
            tmp_path,
            model_folders[family],
            **UNIFORM,
            pruning__groups=["experts"],
            pruning__num_shots=1,
            cluster__num_shards=2,
        )
        == 0
    )
    experts = export_of(tmp_path, "uniform")["experts"]
    sparse = [numbers for numbers in experts if numbers]
    assert len({len(numbers) for numbers in sparse}) == 1
    num_left = len(sparse[0])
    layout = LAYOUTS[family]
    assert layout.num_active_experts <= num_left < layout.num_experts
    config = AutoConfig.from_pretrained(tmp_path / "run/export/uniform")
    assert type(config) is type(SPARSE_CONFIGS[family])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/uniform")
    layers = [block.mlp for block in model.model.layers if hasattr(block.mlp, "experts")]
    assert (
        {len(layer.experts.down_proj) for layer in layers}
        == {num_left}
        == {
            len((layer.gate if hasattr(layer, "gate") else layer.router).weight) for layer in layers
        }
    )
    removed = report_of(tmp_path / "run")["shots"][-1]["experts_removed"]
    assert len(removed) == len(layers) * (layout.num_experts - num_left)
    tensors = tensors_of_shot(tmp_path / "run", 1)
    for name in removed:
        assert not tensors[f"{name}.rows"].any()
        assert not tensors[f"{name}.weight"].any()


@pytest.mark.parametrize("family", sorted(SPARSE_CONFIGS))
def test_channels_of_experts(family: str, model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Where shared experts are as wide as others by definition, no plain class holds the result."""
    plain = family not in ("glm4_moe", "deepseek_v3")
    options = UNIFORM if plain else GROUPS | {"output__exports": ["per_block"]}
    assert (
        run(
            tmp_path,
            model_folders[family],
            **options,
            pruning__groups=["expert_channels"],
            cluster__num_shards=2,
        )
        == 0
    )
    widths = [
        width
        for numbers in export_of(tmp_path, "uniform" if plain else "per_block")["experts"]
        for width in numbers
    ]
    assert all(width % 8 == 0 for width in widths)
    assert min(widths) < max(LAYOUTS[family].num_channels, 24)
    assert len(set(widths)) == 1 or not plain


@pytest.mark.parametrize("family", WITHOUT_GROUPS)
def test_everything_under_one_threshold(
    family: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    kinds = list(LAYOUTS[family].kinds)
    options = GROUPS | {
        "pruning__groups": kinds,
        "pruning__target_sparsity": 0.3,
        "output__exports": ["per_block"],
    }
    assert run(tmp_path, model_folders[family], **options) == 0
    export_of(tmp_path, "per_block")
    report = report_of(tmp_path / "run")
    assert 0.3 <= report["shots"][-1]["sparsity"] < 0.4
    assert report["shots"][-1]["budget"]["need"] <= report["shots"][-1]["budget"]["goal"]


def test_groups_of_experts_of_which_a_router_chooses_some(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ["ffn", "shared_experts", "expert_channels"]
    options = GROUPS | {"output__exports": ["per_block"]}
    assert (
        run(tmp_path / "channels", model_folders["deepseek_v3"], **options, pruning__groups=kinds)
        == 0
    )
    export_of(tmp_path / "channels", "per_block")
    assert (
        run(
            tmp_path / "experts",
            model_folders["deepseek_v3"],
            **options,
            pruning__groups=["experts"],
        )
        == 2
    )
    assert "2 groups of experts" in capsys.readouterr().err


ALL = GROUPS | {
    "pruning__groups": ["attention", "ffn", "shared_experts", "expert_channels", "experts"],
    "pruning__target_sparsity": 0.25,
}


def test_shards_and_replicas_and_stores(model_folders: dict[str, Path], tmp_path: Path) -> None:
    ways: dict[str, dict[str, Any]] = {
        "one": {},
        "shards": {"cluster__num_shards": 3},
        "replicas": {"cluster__num_replicas": 2},
        "disk": {
            "memory__weights": "disk",
            "memory__factors": "disk",
            "memory__wave": 4,
            "memory__scratch": str(tmp_path / "scratch"),
        },
        "host": {
            "memory__weights": "host",
            "memory__factors": "host",
            "memory__activations": "recompute",
        },
    }
    for name, way in ways.items():
        assert run(tmp_path / name, model_folders["qwen2_moe"], **ALL, **way) == 0
    for name in ("shards", "disk", "host"):
        for shot in (1, 2):
            assert_same_shot(tmp_path / "one/run", tmp_path / name / "run", shot)
    assert difference(tmp_path / "one/run", tmp_path / "replicas/run", 2) < MOST_BY_ORDER_OF_SUMS


def test_a_resumed_run_goes_around_the_experts_that_are_gone(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = GROUPS | {
        "pruning__groups": ["experts"],
        "pruning__target_sparsity": 0.3,
        "pruning__num_shots": 3,
    }
    assert run(tmp_path / "whole", model_folders["qwen3_moe"], **options) == 0
    add_event = RunDirectory.add_event

    def stop(self: Any, event: dict[str, Any]) -> None:
        add_event(self, event)
        if event["shot"] == 2 and event["step"] == "costs":
            raise FloatingPointError("enough")

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "add_event", stop)
        assert run(tmp_path / "cut", model_folders["qwen3_moe"], **options) == 1
    assert len(report_of(tmp_path / "cut/run")["shots"]) == 1
    assert run(tmp_path / "cut", model_folders["qwen3_moe"], "--resume", **options) == 0
    for shot in (1, 2, 3):
        assert_same_shot(tmp_path / "whole/run", tmp_path / "cut/run", shot)
    one, other = (
        report_of(tmp_path / name / "run")["shots"][-1]["perplexity"] for name in ("whole", "cut")
    )
    assert one == other


ELEMENT = {"pruning__structure": "element"}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("olmoe", {}),
        ("glm4_moe", {}),
        ("gpt_oss", {}),
        ("glm4_moe", ELEMENT | {"correction__lora_rank": 2}),
        ("gpt_oss", ELEMENT | {"pruning__method": "sparsegpt"}),
        ("olmoe", ELEMENT | {"pruning__method": "wanda", "curvature": None}),
        ("gpt_oss", {"curvature__kind": "extended_kfac"}),
    ],
)
def test_other_methods_take_experts_as_linears(
    family: str, options: dict[str, Any], model_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert run(tmp_path, model_folders[family], **options, output__exports=["masked"]) == 0
    (*_, last) = report_of(tmp_path / "run")["shots"]
    assert last["sparsity"] == pytest.approx(0.3, abs=0.03)
    export_of(tmp_path, "masked")


def test_shared_experts_become_narrower_in_a_plain_class(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    options = UNIFORM | {"pruning__groups": ["shared_experts"], "pruning__target_sparsity": 0.05}
    assert run(tmp_path, model_folders["qwen2_moe"], **options) == 0
    export_of(tmp_path, "uniform")
    config = AutoConfig.from_pretrained(tmp_path / "run/export/uniform")
    assert config.shared_expert_intermediate_size in (8, 16, 24, 32)
    assert config.moe_intermediate_size == 24


def test_whole_layers_of_a_mixture_may_go(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Experts and shared experts without channels, dense layers and attention without any, in the
    classes that go along.
    """
    kinds = ["attention", "ffn", "shared_experts", "expert_channels"]
    options = GROUPS | {
        "pruning__groups": kinds,
        "pruning__remove_blocks": True,
        "pruning__target_sparsity": 0.8,
    }
    assert run(tmp_path, model_folders["qwen2_moe"], **options, output__exports=["per_block"]) == 0
    export = export_of(tmp_path, "per_block")
    widths = [width for experts in export["experts"] for width in experts]
    assert 0 in widths
    assert (
        min(kv_heads for _, kv_heads in export["widths"]) == 0
        or min(channels for channels, _ in export["widths"]) == 0
    )
    assert export["loaders"]["vLLM"] == "not run"


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_an_expert_that_was_not_called_keeps_its_largest_weights(
    method: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """It may be called yet."""
    model = AutoModelForCausalLM.from_pretrained(model_folders["glm4_moe"])
    block = len(model.model.layers) - 1
    model.model.layers[block].mlp.gate.e_score_correction_bias[1] = -100
    model.save_pretrained(tmp_path / "model")
    for path in model_folders["glm4_moe"].glob("tokenizer*"):
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    options = {
        "pruning__method": method,
        "pruning__structure": "element",
        "pruning__target_sparsity": 0.5,
        "pruning__num_shots": 1,
    }
    options |= {"curvature": None} if method == "wanda" else {}
    assert run(tmp_path, tmp_path / "model", **options) == 0
    dense = model.model.layers[block].mlp.experts.down_proj[1].detach()
    pruned = tensors_of_shot(tmp_path / "run", 1)[
        f"model.layers.{block}.mlp.experts.1.down_proj.weight"
    ]
    assert pruned.count_nonzero() == pruned.numel() / 2
    assert torch.equal(pruned[pruned != 0], dense[pruned != 0])
    assert float(dense[pruned != 0].abs().mean()) > float(dense[pruned == 0].abs().mean())


def test_a_layer_without_an_expert_to_spare_passes_another_shot(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Its router, which takes the best two of a group, cannot be asked without one of its two."""
    options = UNIFORM | {
        "pruning__groups": ["experts"],
        "pruning__num_shots": 4,
        "pruning__target_sparsity": 0.24,
    }
    assert run(tmp_path, model_folders["glm4_moe"], **options) == 0
    shots = report_of(tmp_path / "run")["shots"]
    assert [len(shot["experts_removed"]) for shot in shots] == [3, 0, 3, 0]
    assert shots[0]["expert_costs"]
    assert not shots[-1]["expert_costs"]
    assert all(len(numbers) in (0, 2) for numbers in export_of(tmp_path, "uniform")["experts"])


@pytest.mark.parametrize("score", ["reap", "frequency", "random"])
def test_scores_of_baselines(score: str, model_folders: dict[str, Path], tmp_path: Path) -> None:
    """The experts of the lowest scores go, equally many a block; no gradients are needed."""
    options = UNIFORM | {
        "pruning__groups": ["experts"],
        "pruning__num_shots": 1,
        "pruning__expert_costs": score,
    }
    assert run(tmp_path, model_folders["olmoe"], **options) == 0
    shot = report_of(tmp_path / "run")["shots"][-1]
    assert (
        run(tmp_path / "forward", model_folders["olmoe"], **options, curvature__kind="activations")
        == 0
    )
    assert report_of(tmp_path / "forward/run")["shots"][-1]["expert_costs"] == pytest.approx(
        shot["expert_costs"], rel=1e-4
    )
    for experts in LAYOUTS["olmoe"].expert_sets:
        costs = {linears[-1]: shot["expert_costs"][linears[-1]] for linears in experts.linears}
        gone = [name for name in costs if name in shot["experts_removed"]]
        assert gone
        assert max(costs[name] for name in gone) <= min(
            cost for name, cost in costs.items() if name not in gone
        )


def test_random_costs_are_others_in_every_layer_and_shot(model_folders: dict[str, Path]) -> None:
    cluster = loaded(model_folders["olmoe"])
    (worker,) = cluster.workers.values()
    gather_curvature(cluster, np.arange(40)[None], "activations", experts=True)
    found = [whole_expert_costs(worker, "random", shot, first_order=False) for shot in (1, 2)]
    of_layers = [
        tuple(costs[linears[-1]] for linears in experts.linears)
        for costs in found
        for experts in worker.expert_sets
    ]
    assert len(set(of_layers)) == len(of_layers) == 2 * 4


def test_the_first_order_counts_with_labels_of_the_text_only(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    options = UNIFORM | {"pruning__groups": ["experts"], "pruning__num_shots": 1}
    costs = {}
    for fisher in ("empirical", "sampled"):
        assert (
            run(tmp_path / fisher, model_folders["olmoe"], **options, curvature__fisher=fisher) == 0
        )
        costs[fisher] = report_of(tmp_path / fisher / "run")["shots"][-1]["expert_costs"].values()
    assert min(costs["empirical"]) < 0 < max(costs["empirical"])
    assert min(costs["sampled"]) >= 0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"pruning__groups": ["ffn"]},
            "has attention, expert_channels, experts that can be pruned here",
        ),
        (
            {
                "pruning__groups": ["experts"],
                "pruning__target": {"flops": 1e4},
                "pruning__target_sparsity": None,
            },
            "save no flops",
        ),
        (
            {
                "pruning__groups": ["expert_channels"],
                "pruning__target": {"latency_s": 1.0},
                "pruning__target_sparsity": None,
            },
            "a latency",
        ),
        (
            {"pruning__groups": ["experts"], "output__exports": ["masked"]},
            "masked keeps all shapes",
        ),
        ({"pruning__groups": ["experts"], "curvature__kind": "identity"}, "looks at no text"),
        ({"pruning__groups": ["experts"], "curvature__kind": "activations"}, "has no gradients"),
        (
            {"pruning__groups": ["experts", "attention"], "pruning__expert_costs": "reap"},
            "another unit",
        ),
        ({"pruning__expert_costs": "reap"}, "is of whole experts"),
        ({"curvature__num_backward": 3}, "the experts of a mixture see too few tokens"),
        ({"pruning__groups": ["experts"], "pruning__target_sparsity": 0.9}, "lower it"),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, Any],
    complaint: str,
    model_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path, model_folders["mixtral"], "--dry-run", **GROUPS | changes) == 2
    assert complaint in capsys.readouterr().err


def test_targets_of_a_mixture(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Bytes count all experts; flops only those a token goes to."""
    options = {
        **GROUPS,
        "pruning__target_sparsity": None,
        "pruning__num_shots": 1,
        "pruning__groups": ["expert_channels"],
    }
    layout = LAYOUTS["qwen3_moe"]
    active = sum(shape.size * (1 if shape.expert is None else 2 / 6) for shape in layout.linears)
    scores = (
        4 * 4 * 8 * 4 * 17 / 2
        # blocks, a multiply-add for q.k and one for the sum, dimensions of a head, heads, tokens
        # before
    )
    dense = 2 * (active + layout.config.vocab_size * layout.config.hidden_size) + scores
    targets = {
        "bytes": {"bytes": int(0.9 * 4 * layout.num_parameters)},
        "flops": {"flops": int(0.9 * dense), "prompt_length": 16},
    }
    for unit, target in targets.items():
        assert (
            run(tmp_path / unit, model_folders["qwen3_moe"], **options, pruning__target=target) == 0
        )
        budget = report_of(tmp_path / unit / "run")["shots"][-1]["budget"]
        assert budget["need"] <= target[unit] < budget["dense"]
    assert budget["dense"] == pytest.approx(dense)


def test_heads_with_sinks(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Half of the heads go, in a plain class, with their sinks."""
    options = UNIFORM | {
        "pruning__groups": ["attention"],
        "pruning__target_sparsity": 0.03,
        "cluster__num_shards": 2,
    }
    assert run(tmp_path, model_folders["gpt_oss"], **options) == 0
    widths = export_of(tmp_path, "uniform")["widths"]
    assert {num_kv_heads for _, num_kv_heads in widths} == {1}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/uniform")
    dense = AutoModelForCausalLM.from_pretrained(model_folders["gpt_oss"])
    for one, other in zip(model.model.layers, dense.model.layers, strict=True):
        sinks = one.self_attn.sinks
        whole = other.self_attn.sinks
        assert any(torch.equal(sinks, whole[start : start + 2]) for start in (0, 2))
        assert len(sinks) == 2


def test_a_packed_checkpoint_is_pruned_as_the_unpacked_one(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """As gpt-oss is published: MXFP4, and an export in the job's dtype that says nothing of it;
    also with weights on disk.
    """
    state = load_file(model_folders["gpt_oss"] / "model.safetensors")
    document = json.loads((model_folders["gpt_oss"] / "config.json").read_text()) | {
        "intermediate_size": 64
    }
    stacked = {name: tensor for name, tensor in state.items() if "experts" in name}
    for name, tensor in stacked.items():  # a width that blocks of 32 fill
        if name.endswith("down_proj"):
            state[name] = torch.cat([tensor, tensor[:, :16]], dim=1)
        elif "gate_up" in name:
            state[name] = torch.cat([tensor, tensor[..., :32]], dim=-1)
    packed = as_mxfp4(state)
    unpacked = {name: t for name, t in packed.items() if not name.endswith(("_blocks", "_scales"))}
    for name in packed:
        if name.endswith("_blocks"):
            whole = name.removesuffix("_blocks")
            unpacked[whole] = convert_moe_packed_tensors(
                packed[name], packed[f"{whole}_scales"]
            ).float()
    quantised = {
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    }
    for name, tensors, extra in (("packed", packed, quantised), ("unpacked", unpacked, {})):
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(document | extra))
        for path in model_folders["gpt_oss"].glob("tokenizer*"):
            (folder / path.name).write_bytes(path.read_bytes())
    options = UNIFORM | {
        "pruning__groups": ["experts", "expert_channels"],
        "pruning__target_sparsity": 0.25,
    }
    disk = {"memory__weights": "disk", "memory__scratch": str(tmp_path / "scratch")}
    for name, way in {"packed": {}, "unpacked": {}, "streamed": disk}.items():
        assert (
            run(tmp_path / "runs" / name, tmp_path / ("packed" if way else name), **options, **way)
            == 0
        )
        export_of(tmp_path / "runs" / name, "uniform")
    for name in ("unpacked", "streamed"):
        assert_same_shot(tmp_path / "runs/packed/run", tmp_path / "runs" / name / "run", 2)
    written = json.loads((tmp_path / "runs/packed/run/export/uniform/config.json").read_text())
    assert "quantization_config" not in written


def test_config_of_a_checkpoint_without_some_fields(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Older checkpoints call the number of experts by one name only."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in model_folders["qwen3_moe"].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    document = json.loads((copy / "config.json").read_text())
    document["num_experts"] = document.pop("num_local_experts", document.get("num_experts"))
    (copy / "config.json").write_text(json.dumps(document))
    assert run(tmp_path, copy, **UNIFORM, pruning__groups=["experts"], pruning__num_shots=1) == 0
    written = json.loads((tmp_path / "run/export/uniform/config.json").read_text())
    assert written["num_experts"] == len(export_of(tmp_path, "uniform")["experts"][0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/uniform")
    assert torch.isfinite(model(torch.arange(5)[None]).logits).all()


def test_magnitudes_of_experts_and_attention_are_compared_as_they_are(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """The identity is no sum over tokens, of which an expert would have few: one threshold on |w|
    over the whole model.
    """
    magnitude = {
        "curvature__kind": "identity",
        "pruning__structure": "element",
        "pruning__costs": "obd",
        "pruning__update": {"solver": "none"},
    }
    assert (
        run(
            tmp_path,
            model_folders["mixtral"],
            **magnitude,
            pruning__target_sparsity=0.5,
            pruning__num_shots=1,
        )
        == 0
    )
    weights = {
        name: W
        for name, W in tensors_of_shot(tmp_path / "run", 1).items()
        if name.endswith("_proj.weight")
    }
    of_experts, others = (
        min(
            float(W[W != 0].abs().min())
            for name, W in weights.items()
            if ("experts" in name) == has
        )
        for has in (True, False)
    )
    assert of_experts == pytest.approx(others, rel=0.02)
