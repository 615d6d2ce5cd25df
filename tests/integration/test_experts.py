"""Mixtures of experts in whole runs: channels of experts, whole experts, and all kinds together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import LAYOUTS, SPARSE_CONFIGS, of_families
from tests.integration import runs
from tests.integration.runs import Done, Jobs, assert_same_shot, changes_of, copied_model
from tests.models.test_checkpoint import as_mxfp4

GROUPS = runs.GROUPS | runs.ONE | {"pruning__target_sparsity": 0.15}
EXPERTS = GROUPS | {"pruning__groups": ["experts"], "pruning__allocation": "uniform"}
UNIFORM = GROUPS | {"pruning__allocation": "uniform", "output__exports": ["uniform"]}
PER_BLOCK = GROUPS | {"output__exports": ["per_block"]}
WHOLE = "pruning.groups=[experts]"
NO_SPARSITY = "pruning.target_sparsity=null"
WITHOUT_GROUPS = sorted(set(SPARSE_CONFIGS) - {"deepseek_v3"})
OFTEN = {"deepseek_v3", "glm4_moe", "gpt_oss", "qwen2_moe"}


def exported(done: Done) -> dict[str, Any]:
    """Return the record of the only export of a run."""
    (export,) = done.exports
    assert export["reload_max_logit_difference"] < 1e-4
    if export["kind"] != "masked":
        assert export["num_parameters"] == done.report["parameters"]["after"]
    return export


def older(model: Path, folder: Path) -> Path:
    """Return a copy whose config names the number of experts as older checkpoints do."""
    copied_model(model, folder)
    document = json.loads((folder / "config.json").read_text())
    document["num_experts"] = document.pop(
        "num_local_experts", document.get("num_experts")
    )
    (folder / "config.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("family", of_families(WITHOUT_GROUPS))
def test_uniform_export_has_fewer_and_narrower_experts(family: str, job: Jobs) -> None:
    """Experts keep their widths in a family whose shared experts have the same width."""
    kinds = ["experts"] if family == "glm4_moe" else ["experts", "expert_channels"]
    kinds += ["shared_experts"] if family == "qwen2_moe" else []
    options = UNIFORM | {"pruning__groups": kinds, "pruning__target_sparsity": 0.25}
    model = job.models[family]
    if family == "qwen3_moe":
        model = older(model, job.folder / "older")
    done = job(options, model=model, cluster__num_shards=2)
    widths = [numbers for numbers in exported(done)["experts"] if numbers]
    layout = LAYOUTS[family]
    num_left = len(widths[0])
    assert layout.num_active_experts <= num_left < layout.num_experts
    assert {len(numbers) for numbers in widths} == {num_left}
    (width,) = {width for numbers in widths for width in numbers}
    assert width % 8 == 0
    assert width <= max(layout.num_channels, 24)
    exported_model = AutoModelForCausalLM.from_pretrained(done.export("uniform"))
    assert type(exported_model.config) is type(SPARSE_CONFIGS[family])
    if family == "qwen2_moe":
        assert exported_model.config.shared_expert_intermediate_size == 24
    blocks = exported_model.model.layers
    layers = [block.mlp for block in blocks if hasattr(block.mlp, "experts")]
    routers = [layer.gate if hasattr(layer, "gate") else layer.router for layer in layers]
    assert {len(layer.experts.down_proj) for layer in layers} == {num_left}
    assert {len(router.weight) for router in routers} == {num_left}
    removed = done.shot["experts_removed"]
    assert len(removed) == len(layers) * (layout.num_experts - num_left)
    tensors = done.tensors(1)
    for name in removed:
        assert not tensors[f"{name}.rows"].any()
        assert not tensors[f"{name}.weight"].any()


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in OFTEN else pytest.mark.slow)
        for family in sorted(SPARSE_CONFIGS)
    ],
)
def test_all_kinds_of_groups_share_one_threshold(family: str, job: Jobs) -> None:
    """Routers that choose groups of experts, such as DeepSeek-V3's, keep all experts."""
    has_groups = family == "deepseek_v3"
    if has_groups:
        assert "2 groups of experts" in job.refused(WHOLE, **GROUPS, model=family)
    kinds = [
        kind for kind in LAYOUTS[family].kinds if kind != "experts" or not has_groups
    ]
    options = PER_BLOCK | {"pruning__groups": kinds, "pruning__target_sparsity": 0.3}
    done = job(options, model=family)
    export = exported(done)
    assert 0.3 <= done.shot["sparsity"] < 0.4
    assert done.shot["budget"]["need"] <= done.shot["budget"]["goal"]
    widths = {width for numbers in export["experts"] for width in numbers}
    assert len(widths) > 1
    assert all(width % 8 == 0 for width in widths)


def test_expert_pruning_does_not_depend_on_shards_replicas_and_stores(job: Jobs) -> None:
    """A run that resumes after the removal of experts gives the same bits too."""
    host = {"memory__weights": "host", "memory__factors": "host"}
    ways: dict[str, dict[str, Any]] = {
        "one": {},
        "shards": host | {"memory__activations": "recompute", "cluster__num_shards": 3},
        "replicas": {"cluster__num_replicas": 2},
        "disk": runs.DISK
        | {"memory__wave": 4, "memory__scratch": str(job.folder / "scratch")},
    }
    kinds = ["attention", "ffn", "shared_experts", "expert_channels", "experts"]
    options = GROUPS | {"pruning__groups": kinds, "pruning__target_sparsity": 0.25}
    options |= {"pruning__num_shots": 2, "model": "qwen2_moe"}
    uris = {name: job(options | way, folder=name).uri for name, way in ways.items()}
    assert runs.report_of(uris["one"])["shots"][0]["experts_removed"]
    shutil.rmtree(uris["shards"] / "shots/0002")
    job(options | ways["shards"], "--resume", folder="shards")
    for name in ("shards", "disk"):
        for shot in (1, 2):
            assert_same_shot(uris["one"], uris[name], shot)
    assert runs.difference(uris["one"], uris["replicas"], 2) < runs.MOST_BY_ORDER_OF_SUMS


ELEMENT = "pruning.structure=element; pruning.method"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("olmoe", "pruning.costs=obs"),
        (
            "glm4_moe",
            "pruning.structure=element; recovery.rank=2; recovery.num_tokens=120",
        ),
        ("gpt_oss", "curvature.kind=extended_kfac"),
    ],
)
def test_other_methods_prune_experts_as_linears(
    family: str, settings: str, job: Jobs
) -> None:
    done = job(runs.MASKED | runs.ONE | changes_of(settings), model=family)
    assert done.shot["sparsity"] == pytest.approx(0.3, abs=0.03)
    exported(done)


def test_attention_sinks_are_removed_with_their_heads(job: Jobs) -> None:
    """Half of the heads and their sinks are removed; the export is a transformers class."""
    options = UNIFORM | {
        "pruning__groups": ["attention"],
        "pruning__target_sparsity": 0.03,
    }
    export = exported(job(options, model="gpt_oss", cluster__num_shards=2))
    assert {num_kv_heads for _, num_kv_heads in export["widths"]} == {1}


@pytest.mark.parametrize("method", ["sparsegpt", "wanda; curvature=null"])
def test_expert_without_tokens_keeps_its_largest_weights(method: str, job: Jobs) -> None:
    """Other text may route tokens to it."""
    folder = copied_model(job.models["glm4_moe"], job.folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    last = model.model.layers[-1].mlp
    last.gate.e_score_correction_bias[1] = -100
    model.save_pretrained(folder)
    settings = f"{ELEMENT}={method}; pruning.target_sparsity=0.5"
    done = job(changes_of(settings) | runs.ONE, model=folder)
    dense = last.experts.down_proj[1].detach()
    name = f"model.layers.{len(model.model.layers) - 1}.mlp.experts.1.down_proj.weight"
    pruned = done.tensors(1)[name]
    assert pruned.count_nonzero() == pruned.numel() / 2
    assert torch.equal(pruned[pruned != 0], dense[pruned != 0])
    assert float(dense[pruned != 0].abs().mean()) > float(dense[pruned == 0].abs().mean())


def test_layer_at_its_minimum_of_experts_passes_later_shots(job: Jobs) -> None:
    """Its router sums the best two experts of a group, so a group cannot have fewer than two."""
    options = EXPERTS | {"pruning__num_shots": 4, "pruning__target_sparsity": 0.24}
    done = job(options, model="glm4_moe", output__exports=["uniform"])
    shots = done.shots
    assert [len(shot["experts_removed"]) for shot in shots] == [3, 0, 3, 0]
    assert shots[0]["expert_costs"]
    assert not shots[-1]["expert_costs"]
    assert all(len(numbers) in (0, 2) for numbers in exported(done)["experts"])


@pytest.mark.parametrize("score", ["reap", "frequency", "random"])
def test_experts_with_the_lowest_baseline_scores_are_removed(
    score: str, job: Jobs
) -> None:
    """Every block loses the same number of experts, and no gradients are needed."""
    options = EXPERTS | {"pruning__expert_costs": score, "model": "olmoe"}
    shot = job(options, folder="forward", curvature__kind="activations").shot
    if score == "reap":
        both = job(options).shot["expert_costs"]
        assert shot["expert_costs"] == pytest.approx(both, rel=1e-4)
    if score == "random":
        assert len(set(shot["expert_costs"].values())) == len(shot["expert_costs"]), (
            "every expert has its own score"
        )
    for experts in LAYOUTS["olmoe"].expert_sets:
        costs = {
            linears[-1]: shot["expert_costs"][linears[-1]] for linears in experts.linears
        }
        gone = [costs.pop(name) for name in shot["experts_removed"] if name in costs]
        assert gone
        assert max(gone) <= min(costs.values())


def test_first_order_term_needs_labels_of_the_text(job: Jobs) -> None:
    empirical, sampled = (
        job(EXPERTS, folder=fisher, model="olmoe", curvature__fisher=fisher).shot[
            "expert_costs"
        ]
        for fisher in ("empirical", "sampled")
    )
    assert min(empirical.values()) < 0 < max(empirical.values())
    assert min(sampled.values()) >= 0


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            "pruning.groups=[ffn]",
            "has attention, expert_channels, experts that can be pruned here",
        ),
        (f"{NO_SPARSITY}; {WHOLE}; pruning.target={{flops: 1}}", "save no flops"),
        (
            f"{NO_SPARSITY}; {WHOLE}; pruning.target={{latency_s: 1, table: t}}",
            "a latency",
        ),
        (f"{WHOLE}; output.exports=[masked]", "masked keeps all shapes"),
        (f"{WHOLE}; curvature.kind=identity", "looks at no text"),
        (f"{WHOLE}; curvature.kind=activations", "has no gradients"),
        (
            "pruning.groups=[experts, attention]; pruning.expert_costs=reap",
            "another unit",
        ),
        ("pruning.expert_costs=reap", "is of whole experts"),
        ("curvature.num_backward=3", "the experts of a mixture see too few tokens"),
        (f"{WHOLE}; pruning.target_sparsity=0.9", "ask for less"),
    ],
)
def test_invalid_expert_settings_are_refused(
    settings: str, complaint: str, job: Jobs
) -> None:
    assert complaint in job.refused(settings, "--dry-run", model="mixtral", **GROUPS)


def test_flops_target_counts_only_the_experts_of_a_token(
    job: Jobs,
) -> None:
    layout = LAYOUTS["qwen3_moe"]
    active = sum(
        shape.size * (1 if shape.sees_all_tokens else 2 / 6) for shape in layout.linears
    )
    # blocks, multiply-adds for q.k and the sum, head dimension, heads, mean number of past tokens
    scores = 4 * 4 * 8 * 4 * 17 / 2
    flops = 2 * (active + layout.config.vocab_size * layout.config.hidden_size) + scores
    target = {"flops": int(0.9 * flops), "prompt_length": 16}
    options = GROUPS | {"pruning__target_sparsity": None, "pruning__target": target}
    done = job(options, model="qwen3_moe", pruning__groups=["expert_channels"])
    budget = done.shot["budget"]
    assert budget["need"] <= target["flops"] < budget["dense"] == pytest.approx(flops)


def test_mxfp4_checkpoint_is_unpacked(job: Jobs) -> None:
    """gpt-oss is published in MXFP4. The export is in the job's dtype and its config does not
    mention MXFP4.
    """
    dense = job.models["gpt_oss"]
    state = load_file(dense / "model.safetensors")
    for name, tensor in state.items():  # widen to a multiple of the block size of 32
        if "experts" in name and name.endswith("down_proj"):
            state[name] = torch.cat([tensor, tensor[:, :16]], dim=1)
        elif "gate_up" in name:
            state[name] = torch.cat([tensor, tensor[..., :32]], dim=-1)
    mxfp4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    changes = {"intermediate_size": 64, "quantization_config": mxfp4}
    model = copied_model(dense, job.folder / "packed", **changes)
    save_file(as_mxfp4(state), model / "model.safetensors", metadata={"format": "pt"})
    options = UNIFORM | {"pruning__groups": ["experts", "expert_channels"]}
    options |= {"pruning__target_sparsity": 0.25, "memory__weights": "disk"}
    done = job(options, model=model, memory__scratch=str(job.folder / "scratch"))
    exported(done)
    written = json.loads((done.export("uniform") / "config.json").read_text())
    assert "quantization_config" not in written


def test_magnitude_pruning_uses_one_threshold_for_experts_and_attention(
    job: Jobs,
) -> None:
    """Identity curvature does not depend on the number of tokens of an expert: one threshold on |w|
    holds for the whole model.
    """
    magnitude = (
        "curvature.kind=identity; pruning.structure=element; pruning.costs=obd; "
        "pruning.update={solver: none}; pruning.target_sparsity=0.5"
    )
    done = job(changes_of(magnitude) | runs.ONE, model="mixtral")
    smallest = {True: list[float](), False: list[float]()}
    for name, W in done.tensors(1).items():
        if name.endswith("_proj.weight"):
            smallest["experts" in name].append(float(W[W != 0].abs().min()))
    assert min(smallest[True]) == pytest.approx(min(smallest[False]), rel=0.02)
