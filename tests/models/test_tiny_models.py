from __future__ import annotations

import pytest
from transformers import AutoConfig

from ray_surgeon.models.build import empty_model
from ray_surgeon.models.tiny_models import NoTinyCopyError, tiny_copy
from tests.conftest import CONFIGS, SPARSE_CONFIGS

LLAMA_70B = AutoConfig.for_model(
    "llama",
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
DEEPSEEK = {"first_k_dense_replace": 3, "num_hidden_layers": 61}


def test_copy_of_a_large_model_is_tiny() -> None:
    copy = tiny_copy(LLAMA_70B)
    num_entries = sum(weight.numel() for weight in empty_model(copy.config).parameters())
    assert copy.blocks == (0, 1)
    assert copy.config.hidden_size == 4 * 128  # heads keep their dimension
    assert num_entries < 2_000_000


def test_copy_has_a_block_of_every_kind() -> None:
    # listed in the configuration, computed from the number of the block, and both
    assert tiny_copy(AutoConfig.for_model("smollm3")).blocks == (0, 3)
    jamba = tiny_copy(AutoConfig.for_model("jamba"))
    assert jamba.blocks == (0, 1, 2, 3, 4)
    assert jamba.config.layers_block_type[4] == "attention"
    mixtures = tiny_copy(AutoConfig.for_model("deepseek_v3", **DEEPSEEK))
    assert mixtures.blocks == (0, 1, 2, 3)


@pytest.mark.parametrize("family", [*CONFIGS, *SPARSE_CONFIGS])
def test_every_family_has_a_tiny_copy(family: str) -> None:
    config = (CONFIGS | SPARSE_CONFIGS)[family]
    tiny = tiny_copy(config)
    assert tiny.config.hidden_size <= config.hidden_size
    assert len(tiny.blocks) == tiny.config.num_hidden_layers <= 4


def test_a_configuration_that_cannot_be_built_has_no_copy() -> None:
    config = AutoConfig.for_model("llama", hidden_size=64, num_attention_heads=4)
    config.rope_parameters = {"rope_type": "unheard of"}
    with pytest.raises(NoTinyCopyError, match="unheard of"):
        tiny_copy(config)
