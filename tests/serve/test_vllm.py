"""What vLLM computes from an export, against transformers: greedy continuations and
log-probabilities, in float32.

Three prompts of different lengths run as one batch with a cache; the longest is prefilled in
chunks.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.serve import environments
from tests.serve.compare import NUM_NEW_TOKENS, compare, mean_difference
from tests.serve.models import FAMILIES, MIXTURES, PLAIN, PROMPTS, exported

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(
        not environments.is_there("vllm"), reason="python -m tests.serve.environments vllm"
    ),
]
CHUNK = 32


def in_vllm(folder: Path, expected_class: str, implementation: str = "auto") -> None:
    request = {
        "folder": str(folder),
        "prompts": PROMPTS,
        "num_new_tokens": NUM_NEW_TOKENS,
        "chunk": CHUNK,
        "max_length": 200,
    }
    found = environments.run("vllm", request | {"implementation": implementation})
    assert found["class"] == expected_class
    compare(found, folder, "vLLM")


@pytest.mark.parametrize("family", PLAIN)
def test_uniform(family: str, tmp_path: Path) -> None:
    in_vllm(exported(family, "uniform", folder=tmp_path), FAMILIES[family].vllm_class)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt_oss"])
def test_uniform_with_fewer_heads(family: str, tmp_path: Path) -> None:
    sparsity = 0.02 if family in MIXTURES else 0.1  # of all linears, of which experts are many
    options = {"pruning__groups": ["attention"], "pruning__target_sparsity": sparsity}
    folder = exported(family, "uniform", folder=tmp_path, **options)
    assert json.loads((folder / "config.json").read_text())["num_key_value_heads"] == 1
    if family == "qwen2":  # vLLM's own wants heads that fill the hidden size
        in_vllm(folder, "TransformersForCausalLM", "transformers")
    else:
        in_vllm(folder, (FAMILIES | MIXTURES)[family].vllm_class)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_mixtures_with_heads_that_do_not_divide_the_hidden_size(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four KV heads three are left, with nine query heads for 128 numbers."""
    served = MIXTURES[family]
    config = type(served.config)(
        **served.config.to_dict()
        | {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 32}
    )
    monkeypatch.setitem(MIXTURES, family, replace(served, config=config))
    folder = exported(
        family,
        "uniform",
        folder=tmp_path,
        pruning__groups=["attention"],
        pruning__target_sparsity=0.01,
    )
    assert json.loads((folder / "config.json").read_text())["num_attention_heads"] == 9
    in_vllm(folder, served.vllm_class)


@pytest.mark.parametrize("family", sorted(set(PLAIN) - {"gpt2"}))
def test_per_block(family: str, tmp_path: Path) -> None:
    """KV heads differ from block to block, and so does the cache."""
    in_vllm(exported(family, "per_block", folder=tmp_path), "TransformersForCausalLM")


@pytest.mark.parametrize(
    "kinds", [["experts"], ["expert_channels"], ["experts", "expert_channels"]], ids="-".join
)
@pytest.mark.parametrize("family", sorted(MIXTURES))
def test_fewer_and_narrower_experts(family: str, kinds: list[str], tmp_path: Path) -> None:
    folder = exported(family, "uniform", folder=tmp_path, pruning__groups=kinds)
    in_vllm(folder, MIXTURES[family].vllm_class)


def test_deci(tmp_path: Path) -> None:
    in_vllm(exported("llama-wide", "deci", folder=tmp_path), "DeciLMForCausalLM")


@pytest.mark.parametrize(("scheme", "size"), [("int8", None), ("fp8", None), ("w4a16", 64)])
def test_quantised(scheme: str, size: int | None, tmp_path: Path) -> None:
    """vLLM rounds activations too, or computes in bfloat16, and so differs; a wrong scale would
    make the log-probabilities random.

    Its kernels for int8 on CPUs with AMX take bfloat16 alone.
    """
    options = {
        "pruning__groups": ["ffn"],
        "pruning__width_multiple": 128,
        "output__quantize": {"scheme": scheme, "group_size": size},
    }
    folder = exported("llama", "uniform", folder=tmp_path, **options).parent / f"uniform-{scheme}"
    request = {
        "folder": str(folder),
        "prompts": PROMPTS,
        "num_new_tokens": NUM_NEW_TOKENS,
        "chunk": 128,
        "max_length": 200,
    }
    found = environments.run(
        "vllm", request | {"dtype": "float32" if scheme == "fp8" else "bfloat16"}
    )
    assert found["class"] == "LlamaForCausalLM"
    assert mean_difference(found, folder, f"vLLM {scheme}") < 0.15
