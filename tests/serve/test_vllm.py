"""Exports computed by vLLM, against transformers: greedy continuations and log-probabilities.

All in float32. Three prompts of different lengths run as one batch with a cache; the longest one is
prefilled in chunks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from ray_surgeon.export.quantized import scheme_of
from ray_surgeon.storage import tensor_files
from tests.integration.runs import tensors_in
from tests.integration.test_quantized import restored
from tests.serve import environments
from tests.serve.compare import NUM_NEW_TOKENS, compare, mean_difference
from tests.serve.models import BLOCKS, FAMILIES, MIXTURES, PROMPTS, exported

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(
        not environments.is_there("vllm"),
        reason="python -m tests.serve.environments vllm",
    ),
]
REQUEST: dict[str, Any] = {
    "prompts": PROMPTS,
    "num_new_tokens": NUM_NEW_TOKENS,
    "max_length": 200,
}


def in_vllm(folder: Path, expected_class: str = "", implementation: str = "auto") -> None:
    """Compare vLLM's results; the model class is the one that the export names, unless given."""
    request = REQUEST | {
        "folder": str(folder),
        "chunk": 32,
        "implementation": implementation,
    }
    found = environments.run("vllm", request)
    assert found["class"] == (expected_class or config_of(folder)["architectures"][0])
    compare(found, folder, "vLLM")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_uniform_export(family: str, tmp_path: Path) -> None:
    in_vllm(exported(family, "uniform", folder=tmp_path))


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma3", "gpt2", "qwen3_moe", "gpt_oss"]
)
def test_export_with_fewer_blocks(family: str, tmp_path: Path) -> None:
    folder = exported(family, "uniform", folder=tmp_path, **BLOCKS)
    dense = (FAMILIES | MIXTURES)[family].num_hidden_layers
    assert AutoConfig.from_pretrained(folder).num_hidden_layers < dense
    in_vllm(folder)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt_oss"]
)
def test_uniform_export_with_fewer_heads(family: str, tmp_path: Path) -> None:
    # of all linears, of which experts are many
    sparsity = 0.02 if family in MIXTURES else 0.1
    options = {"pruning__groups": ["attention"], "pruning__target_sparsity": sparsity}
    folder = exported(family, "uniform", folder=tmp_path, **options)
    assert config_of(folder)["num_key_value_heads"] == 1
    # vLLM's own Qwen2 wants heads that fill the hidden size
    other = ("TransformersForCausalLM", "transformers") if family == "qwen2" else ()
    in_vllm(folder, *other)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_mixtures_with_heads_that_do_not_divide_the_hidden_size(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of four KV heads are left, with nine query heads for a hidden size of 128."""
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 32}
    config = MIXTURES[family]
    monkeypatch.setitem(MIXTURES, family, type(config)(**config.to_dict() | heads))
    options = {"pruning__groups": ["attention"], "pruning__target_sparsity": 0.01}
    folder = exported(family, "uniform", folder=tmp_path, **options)
    assert config_of(folder)["num_attention_heads"] == 9
    in_vllm(folder)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gpt2", "granite"}))
def test_per_block_export(family: str, tmp_path: Path) -> None:
    """The number of KV heads differs from block to block, and so does the size of the cache."""
    in_vllm(exported(family, "per_block", folder=tmp_path), "TransformersForCausalLM")


@pytest.mark.parametrize(
    "kinds",
    [["experts"], ["expert_channels"], ["experts", "expert_channels"]],
    ids="-".join,
)
@pytest.mark.parametrize("family", sorted(MIXTURES))
def test_fewer_and_narrower_experts(
    family: str, kinds: list[str], tmp_path: Path
) -> None:
    in_vllm(exported(family, "uniform", folder=tmp_path, pruning__groups=kinds))


@pytest.mark.parametrize(
    ("scheme", "size"), [("int8", None), ("fp8", None), ("w4a16", 64)]
)
def test_quantised_export(scheme: str, size: int | None, tmp_path: Path) -> None:
    """vLLM also rounds activations or computes in bfloat16, so results differ; a wrong scale would
    make the log-probabilities random.

    Its int8 kernels on CPUs with AMX accept only bfloat16.
    """
    options: dict[str, Any] = {"pruning__groups": ["ffn"], "pruning__width_multiple": 128}
    options["output__quantize"] = {"scheme": scheme, "group_size": size}
    folder = (
        exported("llama", "uniform", folder=tmp_path, **options).parent
        / f"uniform-{scheme}"
    )
    dtype = "float32" if scheme == "fp8" else "bfloat16"
    request = REQUEST | {"folder": str(folder), "chunk": 128, "dtype": dtype}
    found = environments.run("vllm", request)
    assert found["class"] == "LlamaForCausalLM"
    assert mean_difference(found, folder, f"vLLM {scheme}") < 0.15


@pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(),
    reason="vLLM's kernel for such experts needs AMX",
)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_quantised_mixture_of_experts(family: str, tmp_path: Path) -> None:
    """Against the same numbers in an ordinary checkpoint, and against the unrounded export: in
    bfloat16 some tokens go to other experts. vLLM's CPU kernel takes groups of 128 columns.
    """
    options: dict[str, Any] = {
        "pruning__groups": ["experts"],
        "pruning__width_multiple": 128,
    }
    options["output__quantize"] = {"scheme": "w4a16"}
    uniform = exported(family, "uniform", folder=tmp_path, **options)
    folder = uniform.parent / "uniform-w4a16"
    stored = tensors_in(folder)
    plain = shutil.copytree(uniform, tmp_path / "plain")
    tensors = {}
    for name in tensors_in(uniform):
        linear = name.removesuffix(".weight")
        if (weight := stored.get(name)) is None:
            leaves = ("weight_packed", "weight_scale", "weight_shape")
            parts = {leaf: stored[f"{linear}.{leaf}"] for leaf in leaves}
            weight = restored(parts, scheme_of("w4a16", 128)).float()
        tensors[name] = weight
    tensor_files.write(str(plain / "model.safetensors"), tensors)
    request = REQUEST | {"folder": str(folder), "chunk": 128, "dtype": "bfloat16"}
    found = environments.run("vllm", request)
    near, far = (
        mean_difference(found, place, "vLLM w4a16") for place in (plain, uniform)
    )
    assert near < 0.4 < far
