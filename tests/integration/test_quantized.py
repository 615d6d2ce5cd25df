"""Quantised copies: what is stored, how far it is from the export, and that transformers evaluates
it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_surgeon.export.quantized import PRESETS, quantised, restored, scheme_of
from ray_surgeon.maths.columns import round_columns, upper_inverse
from ray_surgeon.report.html_report import page
from ray_surgeon.run.inputs import check
from ray_surgeon.spec.parsing import parse_spec
from ray_surgeon.storage import tensor_files
from tests.conftest import LAYOUTS
from tests.integration.runs import report_of, run

UNIFORM: dict[str, Any] = {
    "pruning__structure": "groups",
    "pruning__allocation": "uniform",
    "pruning__width_multiple": 16,
    "pruning__num_shots": 1,
    "output__exports": ["uniform"],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_number_is_rounded_to_the_nearest(name: str, dtype: torch.dtype) -> None:
    weight = (0.02 * torch.randn(6, 32)).to(dtype)
    scheme = scheme_of(name, 16)
    stored = quantised(weight, scheme)
    found = restored(stored, scheme).float()
    weight = weight.float()
    groups = weight.view(6, -1, 16) if name == "w4a16" else weight[:, None]
    largest = groups.abs().amax(dim=2, keepdim=True)
    half_a_step = {
        "fp8": torch.maximum(groups.abs() / 16, largest / 448 / 512),
        "int8": largest / 255,
        "w4a16": largest / 15,
    }[name]
    assert ((found.view(groups.shape) - groups).abs() <= 1.001 * half_a_step).all()
    assert (
        float((found - weight).norm() / weight.norm())
        < {"fp8": 0.04, "int8": 0.01, "w4a16": 0.12}[name]
    )


@pytest.mark.parametrize(
    ("groups", "multiple", "size", "expected"),
    [
        (
            ["ffn"],
            16,
            32,
            "raise pruning.width_multiple, or set group_size to a divisor, such as 16",
        ),
        (["attention"], 16, 32, "self_attn.o_proj, whose columns will be a multiple of 16"),
        (
            ["ffn"],
            16,
            None,
            "group_size 128 do not fill the rows of model.layers.0.self_attn.q_proj",
        ),
    ],
)
def test_groups_that_do_not_fill_the_rows_are_refused(
    groups: list[str],
    multiple: int,
    size: int | None,
    expected: str,
    model_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pruning = UNIFORM | {"pruning__groups": groups, "pruning__width_multiple": multiple}
    assert (
        run(
            tmp_path,
            model_folders["llama"],
            **pruning,
            output__quantize={"scheme": "w4a16", "group_size": size},
        )
        == 2
    )
    assert expected in capsys.readouterr().err


def test_groups_must_fill_the_rows_of_every_device(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`o_proj` has 32 columns, and an engine gives each of two devices half of them."""
    pruning = UNIFORM | {
        "pruning__groups": ["ffn"],
        "pruning__width_multiple": 64,
        "pruning__tensor_parallel": 2,
    }
    asked = {"scheme": "w4a16", "group_size": 32}
    assert (
        run(tmp_path, model_folders["llama"], "--dry-run", **pruning, output__quantize=asked) == 2
    )
    assert "o_proj, whose columns will be a multiple of 16 on each of 2 devices" in " ".join(
        capsys.readouterr().err.split()
    )


def test_groups_must_fill_the_rows() -> None:
    with pytest.raises(ValueError, match="48 columns are no multiple of group_size 32"):
        quantised(torch.randn(4, 48), scheme_of("w4a16", 32))


@pytest.mark.parametrize(("scheme", "size"), [("int8", None), ("fp8", None), ("w4a16", 16)])
def test_a_quantised_copy(
    scheme: str, size: int | None, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    quantize = {"scheme": scheme, "group_size": size}
    assert (
        run(
            tmp_path,
            model_folders["llama"],
            **UNIFORM,
            output__quantize=quantize,
            cluster__num_shards=2,
        )
        == 0
    )
    report = report_of(tmp_path / "run")
    folder = tmp_path / f"run/export/uniform-{scheme}"
    uniform, copy = report["exports"]
    assert (copy["kind"], copy["uri"]) == (f"uniform-{scheme}", str(folder))
    assert copy["size_bytes"] < uniform["size_bytes"]
    for text, value in report["shots"][-1]["perplexity"].items():
        assert copy["perplexity"][text] == pytest.approx(
            value, rel=0.2 if scheme == "w4a16" else 0.05
        )
        assert copy["perplexity"][text] != value
    document = json.loads((folder / "config.json").read_text())
    assert document["quantization_config"]["quant_method"] == "compressed-tensors"
    stored = {
        k: v
        for path in folder.glob("*.safetensors")
        for k, v in tensor_files.read(str(path)).items()
    }
    there = {
        k: v
        for path in (tmp_path / "run/export/uniform").glob("*.safetensors")
        for k, v in tensor_files.read(str(path)).items()
    }
    assert all(
        torch.equal(stored[key], there[key])
        for key in there
        if key.removesuffix(".weight") not in LAYOUTS["llama"].shapes
    )
    dtypes = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "w4a16": torch.int32}
    leaf = "weight_packed" if scheme == "w4a16" else "weight"
    assert all(stored[f"{name}.{leaf}"].dtype == dtypes[scheme] for name in LAYOUTS["llama"].shapes)
    assert f"quantised to {scheme}" in (folder / "README.md").read_text()
    assert f"uniform-{scheme}" in page([report])


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        (
            "llama",
            {"output__quantize": {"scheme": "int8", "group_size": 16}},
            "group_size: is not an option of int8",
        ),
        (
            "llama",
            {"output__quantize": {"scheme": "int8"}, "output__exports": ["masked"]},
            "is a copy of the export uniform",
        ),
        ("gpt2", {"output__quantize": {"scheme": "int8"}}, "the linears of gpt2 are Conv1D"),
    ],
)
def test_what_cannot_be_quantised_is_refused(
    family: str,
    changes: dict[str, Any],
    expected: str,
    model_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path, model_folders[family], **{**UNIFORM, **changes}) == 2
    assert expected in capsys.readouterr().err


def test_four_bits_are_rounded_by_the_calibration_text(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Against the linears of the first block that see the text unrounded; on one worker, and
    streamed on two shards, and on replicas.
    """
    options = {**UNIFORM, "output__quantize": {"scheme": "w4a16", "group_size": 16}}
    assert run(tmp_path / "one", model_folders["llama"], **options) == 0
    streamed = {"cluster__num_shards": 2, "memory__weights": "disk", "memory__factors": "disk"}
    assert run(tmp_path / "streamed", model_folders["llama"], **options, **streamed) == 0
    assert (
        run(tmp_path / "replicas", model_folders["llama"], **options, cluster__num_replicas=2) == 0
    )
    stored = [
        {
            k: v
            for path in (tmp_path / name / "run/export/uniform-w4a16").glob("*.safetensors")
            for k, v in tensor_files.read(str(path)).items()
        }
        for name in ("one", "streamed")
    ]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])
    found = [
        report_of(tmp_path / name / "run")["exports"][-1]["perplexity"]
        for name in ("one", "replicas")
    ]
    assert found[1] == pytest.approx(found[0], rel=0.05), (
        "replicas sum in another order, which tips single numbers"
    )
    assert not list((tmp_path / "one/run/export").glob("*-rounded"))

    uniform = tmp_path / "one/run/export/uniform"
    model = AutoModelForCausalLM.from_pretrained(uniform)
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    seen: list[torch.Tensor] = []
    model.get_submodule(names[0]).register_forward_pre_hook(
        lambda _, given: seen.append(given[0].flatten(0, 1))
    )
    inputs = check(parse_spec((tmp_path / "one/spec.yaml").read_text()), resume=True)
    with torch.no_grad():
        model(torch.from_numpy(inputs.calibration))
    A = seen[0].T @ seen[0] / len(seen[0])
    for name in names:
        W = model.get_submodule(name).weight.detach()
        expected, scales = round_columns(W, upper_inverse(A, 0.01, 1.0, name)[0], 16, 4)
        torch.testing.assert_close(
            stored[0][f"{name}.weight_scale"].float(), scales, rtol=1e-5, atol=0
        )
        parts = {
            part: stored[0][f"{name}.{part}"]
            for part in ("weight_packed", "weight_scale", "weight_shape")
        }
        torch.testing.assert_close(
            restored(parts, scheme_of("w4a16", 16)).float(), expected, rtol=1e-5, atol=1e-8
        )
        nearest = restored(quantised(W, scheme_of("w4a16", 16)), scheme_of("w4a16", 16)).float()
        lost = [float(((found - W) @ A * (found - W)).sum()) for found in (expected, nearest)]
        assert lost[0] < 0.9 * lost[1]
