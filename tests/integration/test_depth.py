"""Removal of whole blocks, attention layers and feed-forward layers, and exports without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_surgeon.models.layers import layers_of
from ray_surgeon.pipeline import cli
from ray_surgeon.pruning import depth_passes as passes
from ray_surgeon.pruning import layer_removal as removal
from ray_surgeon.pruning.coupled_groups import Groups
from ray_surgeon.pruning.depth import Depth
from ray_surgeon.report.html_report import page
from ray_surgeon.run.result import PruneResult
from tests.conftest import (
    CONFIGS,
    HYBRIDS,
    LAYOUTS,
    SPARSE_CONFIGS,
    VOCABULARY,
    of_families,
)
from tests.integration.runs import (
    LORA,
    MOST_BY_ORDER_OF_SUMS,
    ONE,
    Jobs,
    assert_same_shot,
    difference,
    loaded,
    weights_of,
)

BLOCKS: dict[str, Any] = ONE | {
    "pruning__structure": "groups",
    "pruning__groups": ["blocks"],
    "pruning__allocation": "uniform",
    "pruning__target_sparsity": 0.25,
    "calibration__held_aside": 0.3,
}
PARTS = BLOCKS | {"pruning__groups": ["attention_layers", "ffn_layers"]}
PARTS |= {"pruning__allocation": "global", "pruning__target_sparsity": 0.3}
NORMED_AFTER = "opt-projections"
OFTEN = {"deepseek_v3", "gpt2", "gpt_oss", "llama-biases", "qwen3_moe"}
FAMILIES = sorted({*CONFIGS, *SPARSE_CONFIGS} - {NORMED_AFTER} - HYBRIDS)


@pytest.mark.parametrize("family", of_families(FAMILIES))
def test_blocks_of_every_family_are_removed(family: str, job: Jobs) -> None:
    done = job(BLOCKS, model=family, output__exports=["uniform"], cluster__num_shards=2)
    (shot,) = done.shots
    (step,) = shot["layers_removed"]
    assert step["layer"].startswith("block ")
    (export,) = done.exports
    assert len(export["blocks"]) == 3
    assert export["reload_max_logit_difference"] < 1e-4
    assert export["num_parameters"] == done.report["parameters"]["after"]
    config = json.loads((done.export("uniform") / "config.json").read_text())
    assert config.get("num_hidden_layers", config.get("n_layer")) == 3


def test_uniform_export_needs_no_uniform_allocation_if_only_blocks_are_removed(
    job: Jobs,
) -> None:
    """The remaining blocks keep their widths, so that plain classes and llama.cpp hold them."""
    options = BLOCKS | {"pruning__allocation": "global"}
    done = job(options, model="qwen2", output__exports=["uniform", "gguf"])
    uniform = done.exports[0]
    assert uniform["num_parameters"] == done.report["parameters"]["after"]
    model = AutoModelForCausalLM.from_pretrained(done.export("uniform"))
    assert type(model).__name__ == "Qwen2ForCausalLM"
    narrow = options | {"pruning__groups": ["blocks", "ffn"]}
    settings = "output.exports=[uniform]; pruning.depth.num_removed=1"
    assert "uniform needs pruning.allocation uniform" in job.refused(settings, **narrow)


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in OFTEN else pytest.mark.slow) for f in FAMILIES],
)
def test_attention_and_ffn_layers_of_every_family_are_removed(
    family: str, job: Jobs
) -> None:
    done = job(PARTS, model=family, output__exports=["per_block"], cluster__num_shards=2)
    (shot,) = done.shots
    assert len(shot["layers_removed"]) >= 2
    (export,) = done.exports
    assert export["reload_max_logit_difference"] < 1e-4
    assert export["num_parameters"] == done.report["parameters"]["after"]


def test_cost_equals_the_change_by_the_removal(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update of the preceding linear is kept only if it lowers the divergence."""
    monkeypatch.setattr(passes, "EVERY", 1)
    done = job(BLOCKS, pruning__target_sparsity=0.5, calibration__num_sequences=20)
    first, second = done.shot["layers_removed"]
    assert first["cost"] == pytest.approx(first["divergence_without_update"], rel=0.02)
    for step in (first, second):
        ratio = step["divergence_held_aside"] / step["divergence_without_update"]
        assert ratio == 1 if step["updated"] is None else ratio < 1
    assert "model.layers" in (first["updated"] or second["updated"])
    more = second["divergence_without_update"] - first["divergence_held_aside"]
    assert second["cost"] == pytest.approx(more, rel=0.02)


def test_layer_removal_on_shards_and_replicas_matches_one_worker(job: Jobs) -> None:
    options = BLOCKS | {
        "pruning__groups": ["blocks", "ffn"],
        "pruning__width_multiple": 8,
    }
    options |= {"pruning__depth": {"num_removed": 2}, "pruning__num_shots": 2}
    options |= {"pruning__target_sparsity": 0.6, "model": "llama-biases"}
    one = job(options, folder="one", output__exports=["uniform"])
    assert [len(shot["layers_removed"]) for shot in one.shots] == [1, 1]
    assert 0.6 <= one.shot["sparsity"] < 0.7
    assert one.exports[0]["reload_max_logit_difference"] < 1e-4
    assert len(one.exports[0]["widths"]) == 2
    shards = job(options, folder="shards", cluster__num_shards=3)
    replicas = job(options, folder="replicas", cluster__num_replicas=2)
    assert_same_shot(one.uri, shards.uri, 2)
    assert difference(one.uri, replicas.uri, 2) < MOST_BY_ORDER_OF_SUMS


def test_resumed_run_keeps_layers_removed(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BLOCKS | {"pruning__num_shots": 2, "pruning__target_sparsity": 0.5} | LORA
    whole = job(options, folder="whole")
    ended = Depth.remove_layers

    def stop(self: Depth, run: Any, method: Groups, facts: Any) -> Groups:
        if run.shot == 2:
            raise FloatingPointError("stopped")
        return ended(self, run, method, facts)

    monkeypatch.setattr(Depth, "remove_layers", stop)
    job(options, folder="stopped", code=1)
    monkeypatch.setattr(Depth, "remove_layers", ended)
    again = job(options, "--resume", folder="stopped")
    assert_same_shot(whole.uri, again.uri, 2)


@pytest.mark.parametrize("costs", ["loss", "influence", "last", "random"])
def test_baseline_costs_choose_layers_without_updates(costs: str, job: Jobs) -> None:
    depth = {"costs": costs, "update": False}
    done = job(BLOCKS, pruning__depth=depth, pruning__target_sparsity=0.5)
    steps = done.shot["layers_removed"]
    assert all(step["updated"] is None for step in steps)
    if costs == "last":
        assert [step["layer"] for step in steps] == ["block 3", "block 2"]


def test_influence_is_one_minus_the_cosine(llama: Path) -> None:
    tokens = torch.arange(40).reshape(2, 20)
    model = AutoModelForCausalLM.from_pretrained(llama)
    # the last hidden state is after the final norm
    states = list(model(tokens, output_hidden_states=True).hidden_states)
    cluster = loaded(llama, 2, 2)
    of_blocks = passes.influences_of(cluster, tokens.numpy())
    assert list(of_blocks) == [0, 1, 2, 3]
    for block in range(3):
        cosines = torch.cosine_similarity(states[block], states[block + 1], dim=-1)
        assert of_blocks[block] == pytest.approx(float((1 - cosines).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("family", "linear"),
    [
        ("llama", "mlp.down_proj"),
        ("gpt2", "mlp.c_proj"),
        ("granite", "mlp.down_proj"),
    ],
)
def test_removed_layer_is_folded_into_the_preceding_linear(
    family: str, linear: str, model_folders: dict[str, Path]
) -> None:
    """The fold is the exact least squares solution, bias included, and can be undone."""
    model = AutoModelForCausalLM.from_pretrained(model_folders[family])
    tokens = torch.randint(
        VOCABULARY, (6, 30), generator=torch.Generator().manual_seed(1)
    )
    layout = LAYOUTS[family]
    name = f"{layout.family.block_prefix(1)}{linear}"
    read = list[torch.Tensor]()
    model.get_submodule(name).register_forward_pre_hook(lambda _, x: read.append(x[0]))
    states = model(tokens, output_hidden_states=True).hidden_states
    x = read[0].detach().double().flatten(0, 1)
    if layout.shapes[name].has_bias:
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    d = (states[3] - states[2]).detach().double().flatten(0, 1)
    d = d / layout.residual_multiplier
    cluster = loaded(model_folders[family], 2)
    layer = layers_of(layout, ["blocks"])[2]
    before = weights_of(cluster)[name].double()
    passes.sum_additions(cluster, layout, tokens.numpy(), layer, name)
    cluster.run_all(removal.fold, name)
    A = x.T @ x
    damped = A + removal.DAMPING[0] * A.diagonal().mean() * torch.eye(len(A))
    wanted = before + torch.linalg.solve(damped, x.T @ d).T
    torch.testing.assert_close(
        weights_of(cluster)[name].double(), wanted, rtol=1e-3, atol=1e-3
    )
    cluster.run_all(removal.unfold, name)
    assert torch.equal(weights_of(cluster)[name].double(), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("pruning.target_sparsity=0.8", "at most 0.75"),
        (
            "pruning.depth={num_removed: 1}",
            "the target says how many blocks go; remove it",
        ),
        ("pruning.groups=[blocks, ffn]", "groups names ffn beside layers; say how many"),
        (
            "pruning.groups=[ffn]; pruning.depth={}",
            "is of whole layers; remove it, or name one",
        ),
        ("model=lfm2", "some blocks of lfm2 have conv in place of an attention"),
        (
            "pruning.groups=[ffn_layers]",
            "leave blocks that differ; set allocation to global",
        ),
        ("model=opt-projections", "norms come after what layers add"),
        ("model=gemma3; output.exports=[gguf]", "so no block can go; export uniform"),
        ("curvature={kind: kfac}", "gathers its own; remove it"),
        (
            "pruning.sizes=[0.2, 0.1]; pruning.target_sparsity=null",
            "give sparsities that rise",
        ),
        (
            "pruning.sizes=[0.1, 0.2]",
            "got target_sparsity and sizes",
        ),
        ("calibration.held_aside=0", "leaves no windows on which layers are chosen"),
        ("output.sizes=[0.1]", "[0.1] are none of pruning.sizes, []; name these"),
    ],
)
def test_invalid_depth_settings_are_refused(
    settings: str, message: str, job: Jobs
) -> None:
    assert message in job.refused(settings, **BLOCKS)


def test_model_with_fewer_blocks_is_exported_to_gguf_and_quantised(job: Jobs) -> None:
    options = BLOCKS | {"output__exports": ["uniform", "gguf"], "output__gguf": ["f32"]}
    options |= {"output__quantize": {"scheme": "w4a16", "group_size": 16}}
    done = job(options, cluster__num_shards=2)
    assert [export["kind"] for export in done.exports] == [
        "uniform",
        "gguf",
        "uniform-w4a16",
    ]
    (path,) = done.export("gguf").glob("*-F32.gguf")
    reader = gguf.GGUFReader(path)
    assert reader.fields["llama.block_count"].contents() == 3
    assert all(value < 1e4 for value in done.exports[2]["perplexity"].values())


SIZES = BLOCKS | {"pruning__target_sparsity": None, "pruning__sizes": [0.25, 0.5]}


def test_each_of_several_sizes_matches_a_run_to_that_size(job: Jobs) -> None:
    """Shots, recovery and exports are bit-identical to those of a run with one size."""
    options = SIZES | LORA | {"output__exports": ["uniform"], "output__keep_shots": 1}
    speed = {"prompt_length": 8, "num_new_tokens": 2, "num_repeats": 1}
    options |= {"recovery__num_tokens_between_shots": 0}
    done = job(options, output__speed=speed)
    shown = page([done.report])
    assert '-sizes"' in shown
    assert "Round 2: block" in shown
    assert "speed of generation, dense model = 1" in shown
    perplexity = done.shots[0]["perplexity"]["docs"]
    assert f"-> {perplexity:.3f}, again" in done.out.partition("(uniform at 25 %)")[2]
    assert [shot["sparsity"] for shot in done.shots] == pytest.approx(
        [0.25, 0.5], abs=1e-3
    )
    assert all(len(shot["recovery_losses"]) == 3 for shot in done.shots)
    large, small = done.exports
    assert (large["size"], small["size"]) == (0.5, 0.25)
    assert [Path(e["uri"]).name for e in done.exports] == ["uniform", "uniform-0.25"]
    own = job(options | BLOCKS | {"pruning__sizes": None}, folder="own")
    assert_same_shot(done.uri, own.uri, 1)
    (exported,) = own.exports
    assert small["size_bytes"] == exported["size_bytes"]
    weights = (Path(e["uri"]) / "model.safetensors" for e in (small, exported))
    first, second = (path.read_bytes() for path in weights)
    assert first == second


def test_exports_can_be_added_to_a_finished_run(
    job: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    done = job(SIZES, output__exports=["masked"])
    before = done.report
    more = ["--exports", "uniform", "--size", "0.25"]
    assert cli(["export", str(done.uri), *more]) == 0
    kinds = [(export["kind"], export["size"]) for export in done.exports]
    assert kinds == [("masked", 0.5), ("masked", 0.25), ("uniform", 0.25)]
    assert done.report["spec"] == before["spec"]
    assert (
        "nothing is done again" in job(SIZES, "--resume", output__exports=["masked"]).out
    )
    result = PruneResult(str(done.uri), done.report)
    assert list(result.sizes) == [0.25, 0.5]
    assert [export["kind"] for export in result.sizes[0.25]["exports"]] == [
        "masked",
        "uniform",
    ]
    assert result.load("uniform", size=0.25).config.num_hidden_layers == 3
    with pytest.raises(ValueError, match=r"has no export uniform of size 0\.5"):
        result.load("uniform", size=0.5)
    assert cli(["export", str(done.uri), "--exports", "uniform", "--size", "0.3"]) == 2
    assert "are none of pruning.sizes, [0.25, 0.5]" in " ".join(
        capsys.readouterr().err.split()
    )
    assert cli(["export", str(done.uri / "no"), "--exports", "uniform"]) == 2
    assert "holds no finished run" in " ".join(capsys.readouterr().err.split())
    assert len(done.exports) == 3
