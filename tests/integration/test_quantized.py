"""Quantised exports: stored tensors, differences from the unquantised export, and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor
from transformers import AutoModelForCausalLM

from ray_surgeon.config.job import parse_spec
from ray_surgeon.export.card import front_matter
from ray_surgeon.export.quantized import PRESETS, quantised, scheme_of
from ray_surgeon.maths.rounding import Grid, round_linear
from ray_surgeon.preparation.inputs import check
from ray_surgeon.report.html_report import page
from tests.conftest import LAYOUTS
from tests.integration.runs import DISK, GROUPS, ONE, Jobs, tensors_in

UNIFORM: dict[str, Any] = {
    **GROUPS,
    **ONE,
    "pruning__allocation": "uniform",
    "pruning__width_multiple": 16,
    "output__exports": ["uniform"],
}
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
DTYPES |= {"w4a16": torch.int32, "w8a16": torch.int32}
SIZE = {"w4a16": 16, "w8a16": 16}
"""Number of columns that share a scale."""


def restored(stored: dict[str, Tensor], scheme: QuantizationScheme) -> Tensor:
    """Return the decompressed weight."""
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    weight: Tensor = compressor.decompress(dict(stored), scheme)["weight"]
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_weights_are_rounded_to_the_nearest_value(name: str, dtype: torch.dtype) -> None:
    weight = (0.02 * torch.randn(6, 32)).to(dtype)
    scheme = scheme_of(name, SIZE.get(name))
    stored = quantised(weight, scheme)
    found = restored(stored, scheme).float()
    weight = weight.float()
    groups = weight.view(6, -1, 16) if name in SIZE else weight[:, None]
    largest = groups.abs().amax(dim=2, keepdim=True)
    half_a_step = {
        "fp8": torch.maximum(groups.abs() / 16, largest / 448 / 512),
        "int8": largest / 255,
        "w4a16": largest / 15,
        "w8a16": largest / 255,
    }[name]
    assert ((found.view(groups.shape) - groups).abs() <= 1.001 * half_a_step).all()
    assert (
        float((found - weight).norm() / weight.norm())
        < {"fp8": 0.04, "int8": 0.01, "w4a16": 0.12, "w8a16": 0.01}[name]
    )


def four_bits(kind: str, size: int | None, **more: Any) -> dict[str, Any]:
    quantize = {"scheme": "w4a16", "group_size": size}
    return {"pruning__groups": [kind], "output__quantize": quantize, **more}


INT8 = {"output__quantize": {"scheme": "int8"}}
ON_TWO_DEVICES = {"pruning__width_multiple": 64, "pruning__tensor_parallel": 2}
REFUSED: dict[str, dict[str, Any]] = {
    "or give a divisor such as 16": four_bits("ffn", 32),
    "group_size 128 does not divide the columns of model.layers.0": four_bits(
        "ffn", None
    ),
    # o_proj has 32 columns, and each of two devices gets half of them
    "o_proj, of which a multiple of 16 on each of 2 devices will stay": four_bits(
        "ffn", 32, **ON_TWO_DEVICES
    ),
    "needs one of the exports uniform": INT8 | {"output__exports": ["masked"]},
    "the linears of gpt2 are Conv1D": INT8 | {"model": "gpt2"},
    "gpt_oss's checkpoints keep experts together": INT8 | {"model": "gpt_oss"},
    "give scheme w4a16 or w8a16": INT8 | {"model": "mixtral"},
    "columns of model.layers.0.mlp.experts.0.down_proj": four_bits(
        "expert_channels", 16, model="qwen3_moe", pruning__width_multiple=8
    ),
    "rounding: is not an option of int8": {
        "output__quantize": {"scheme": "int8", "rounding": "gptq"}
    },
}


@pytest.mark.parametrize(("said", "changes"), REFUSED.items(), ids=REFUSED)
def test_models_that_cannot_be_quantised_are_refused(
    said: str, changes: dict[str, Any], job: Jobs
) -> None:
    assert said in job(UNIFORM | changes, "--dry-run", code=2).error


@pytest.mark.parametrize("scheme", sorted(DTYPES))
def test_quantised_export(scheme: str, job: Jobs) -> None:
    quantize = {"scheme": scheme, "group_size": SIZE.get(scheme)}
    done = job(UNIFORM, output__quantize=quantize, cluster__num_shards=2)
    folder = done.uri / f"export/uniform-{scheme}"
    uniform, copy = done.report["exports"]
    assert (copy["kind"], copy["uri"]) == (f"uniform-{scheme}", str(folder))
    assert copy["size_bytes"] < uniform["size_bytes"]
    most = 0.2 if scheme == "w4a16" else 0.05
    for text, value in done.shots[-1]["perplexity"].items():
        assert copy["perplexity"][text] == pytest.approx(value, rel=most)
        assert copy["perplexity"][text] != value
    document = json.loads((folder / "config.json").read_text())
    assert document["quantization_config"]["quant_method"] == "compressed-tensors"
    shapes = LAYOUTS["llama"].shapes
    stored = tensors_in(folder)
    for name, tensor in tensors_in(done.uri / "export/uniform").items():
        assert name.removesuffix(".weight") in shapes or torch.equal(stored[name], tensor)
    leaf = "weight_packed" if scheme in SIZE else "weight"
    assert {stored[f"{name}.{leaf}"].dtype for name in shapes} == {DTYPES[scheme]}
    assert f"quantised to {scheme}" in (folder / "README.md").read_text()
    assert f"uniform-{scheme}" in page([done.report])


def w4a16(**more: Any) -> dict[str, Any]:
    return UNIFORM | {"output__quantize": {"scheme": "w4a16", "group_size": 16, **more}}


@pytest.mark.parametrize("rounding", ["both_sides", "gptq"])
def test_rounding_does_not_depend_on_shards_and_streaming(
    rounding: str, job: Jobs
) -> None:
    options = w4a16(rounding=rounding)
    one = job.baseline(options)
    replicas = job(options, folder="replicas", cluster__num_replicas=2)
    streamed = job(options | DISK, folder="streamed", cluster__num_shards=2)
    stored, other = (
        tensors_in(done.uri / "export/uniform-w4a16") for done in (one, streamed)
    )
    assert stored.keys() == other.keys()
    assert all(torch.equal(stored[key], other[key]) for key in stored)
    # replicas sum in another order, which changes the rounding of single weights
    found = [done.report["exports"][-1]["perplexity"] for done in (one, replicas)]
    assert found[1] == pytest.approx(found[0], rel=0.05)
    assert not list((one.uri / "export").glob("*-rounded"))


def test_gptq_rounding_uses_the_second_moment_of_the_inputs(job: Jobs) -> None:
    """The linears of the first block are compared, whose inputs are not affected by rounding."""
    options = w4a16(rounding="gptq")
    one = job.baseline(options)
    stored = tensors_in(one.uri / "export/uniform-w4a16")
    model = AutoModelForCausalLM.from_pretrained(one.uri / "export/uniform")
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    seen: list[Tensor] = []
    model.get_submodule(names[0]).register_forward_pre_hook(
        lambda _, given: seen.append(given[0].flatten(0, 1))
    )
    with torch.no_grad():
        model(torch.from_numpy(job.inputs(options, "again").calibration))
    A = seen[0].T @ seen[0] / len(seen[0])
    scheme = scheme_of("w4a16", 16)
    for name in names:
        W = model.get_submodule(name).weight.detach()
        expected = round_linear(W, A, None, Grid(4, 16), (0.01, 1.0), name, ordered=False)
        leaves = ("weight_packed", "weight_scale", "weight_shape")
        parts = {leaf: stored[f"{name}.{leaf}"] for leaf in leaves}
        scales = parts["weight_scale"].float()
        torch.testing.assert_close(scales, expected.scales, rtol=1e-5, atol=0)
        found = restored(parts, scheme).float()
        torch.testing.assert_close(found, expected.W, rtol=1e-5, atol=1e-8)
        nearest = restored(quantised(W, scheme), scheme).float()
        lost = [float(((x - W) @ A * (x - W)).sum()) for x in (found, nearest)]
        assert lost[0] < 0.9 * lost[1]


def test_nearest_rounding_is_independent_of_the_text(job: Jobs) -> None:
    options = w4a16(rounding="nearest")
    done = job(options)
    stored = tensors_in(done.uri / "export/uniform-w4a16")
    scheme = scheme_of("w4a16", 16)
    for name, weight in tensors_in(done.uri / "export/uniform").items():
        if (linear := name.removesuffix(".weight")) in LAYOUTS["llama"].shapes:
            for leaf, value in quantised(weight, scheme).items():
                assert torch.equal(stored[f"{linear}.{leaf}"], value)


def test_dense_model_is_quantised_without_pruning(job: Jobs) -> None:
    """The uniform export equals the source."""
    alone = {"pruning": None, "output__exports": ["uniform"]}
    done = job(w4a16() | alone, "--dry-run")
    assert "write another format, 240 calibration tokens" in done.error + done.out
    done = job(alone | {"output__quantize": {"scheme": "w4a16", "group_size": 16}})
    for key, tensor in tensors_in(done.uri / "export/uniform").items():
        assert torch.equal(tensor, tensors_in(job.models["llama"])[key])
    for text, value in done.report["dense"]["perplexity"].items():
        assert done.shot["perplexity"][text] == pytest.approx(value, rel=1e-6)
        assert done.exports[-1]["perplexity"][text] == pytest.approx(value, rel=0.2)
    card = (done.uri / "export/uniform-w4a16/README.md").read_text()
    assert front_matter(card)["tags"] == ["quantization"]
    assert "not pruned; linears are quantised to w4a16" in card


def test_quantising_alone_is_given_no_recovery(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    document = {
        "version": 3,
        "model": {"source": str(model_folders["llama"])},
        "calibration": {
            "source": "python-docs",
            "num_sequences": 2,
            "sequence_length": 16,
        },
        "pruning": None,
        "output": {
            "uri": str(tmp_path / "run"),
            "quantize": {"scheme": "w4a16", "group_size": 16},
        },
        "time": "30min",
    }
    inputs = check(parse_spec(json.dumps(document)))
    assert inputs.spec.pruning is None
    assert inputs.spec.recovery is None
    assert any("and no recovery" in note for note in inputs.choices)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_quantised_mixture_of_experts_is_evaluated(family: str, job: Jobs) -> None:
    """Experts have the names of the export, and each has its own scales."""
    kinds = ["experts", "expert_channels"]
    size = {"scheme": "w4a16", "group_size": 8}
    options = UNIFORM | {"pruning__groups": kinds, "output__quantize": size}
    done = job(
        options | {"pruning__width_multiple": 8}, model=family, cluster__num_shards=2
    )
    uniform, copy = done.exports
    folder = done.uri / "export/uniform-w4a16"
    stored = tensors_in(folder)
    scheme = scheme_of("w4a16", 8)
    leaves = ("weight_packed", "weight_scale", "weight_shape")
    changed = 0
    for name, weight in tensors_in(done.uri / "export/uniform").items():
        linear = name.removesuffix(".weight")
        if f"{linear}.weight_packed" in stored:
            found = restored(
                {leaf: stored[f"{linear}.{leaf}"] for leaf in leaves}, scheme
            ).float()
            assert float((found - weight).norm() / weight.norm()) < 0.3
            nearest = quantised(weight, scheme)["weight_packed"]
            assert not torch.equal(stored[f"{linear}.weight_packed"], nearest)
            changed += ".experts." in linear
    assert changed == 3 * sum(map(len, uniform["experts"]))
    assert not any("gate.weight_packed" in name for name in stored)
    for text, value in done.shot["perplexity"].items():
        assert copy["perplexity"][text] == pytest.approx(value, rel=0.2)
        assert copy["perplexity"][text] != value
    assert "    vllm serve .\n" in (folder / "README.md").read_text()
