"""Settings that a config.json has under two names, for older and newer programs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig

from ray_surgeon.models.attention import check_rope, for_older_readers, older_fields
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import BlockWidths, uniform_document
from tests.conftest import CONFIGS

LLAMA_3: dict[str, Any] = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
LLAMA_3 |= {"low_freq_factor": 1.0}
LLAMA_3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
THETA = {"rope_theta": 10000.0}
YARN = THETA | {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


def read(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = AutoConfig.for_model(**copy.deepcopy(document)).to_dict()
    return found


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", LLAMA_3),
        ("qwen3", YARN),
        ("gemma3", None),
        ("phi3", None),
        ("gpt2", None),
    ],
)
def test_transformers_reads_the_same_configuration(
    family: str, rope: dict[str, Any] | None
) -> None:
    document = CONFIGS[family].to_dict()
    if rope:
        document["rope_parameters"] = dict(rope)
    both = for_older_readers(document)
    check_rope(both)
    expected = read(document)
    assert {
        name: value for name, value in read(both).items() if name in expected
    } == expected
    if family == "gpt2":
        assert both == document
        return
    assert "rope_parameters" not in both
    of_all = document["rope_parameters"].get(
        "full_attention", document["rope_parameters"]
    )
    assert both["rope_theta"] == of_all["rope_theta"]
    assert ("rope_scaling" in both) == (rope is not None)
    assert ("rope_local_base_freq" in both) == (family == "gemma3")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"rope_theta": 5.0},
            r"config\.json has rope_theta 5\.0, and 10000\.0 in rope_parameters",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, "has rope_type yarn, and default in"),
    ],
)
def test_contradicting_values_are_refused(change: dict[str, Any], expected: str) -> None:
    document = CONFIGS["llama"].to_dict()
    document |= older_fields(document) | change
    with pytest.raises(ValueError, match=expected):
        check_rope(document)


def test_parameters_that_older_fields_cannot_hold_are_kept() -> None:
    """In Gemma 3, older fields have a base for sliding layers, but no scaling."""
    document = CONFIGS["gemma3"].to_dict()
    document["rope_parameters"] = {
        "full_attention": THETA | {"rope_type": "default"},
        "sliding_attention": THETA | {"rope_type": "linear", "factor": 2.0},
    }
    both = for_older_readers(document)
    assert both["rope_parameters"] == document["rope_parameters"]
    assert both["rope_local_base_freq"] == 10000.0


def test_llama_exported_as_mistral_keeps_its_context_length() -> None:
    """A config.json may leave out defaults of its class, and Mistral's defaults differ."""
    heads = {"num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 8}
    config = LlamaConfig(
        hidden_size=40, intermediate_size=64, num_hidden_layers=1, **heads
    )
    document = config.to_dict()
    del document["max_position_embeddings"]
    found = uniform_document(ModelLayout.of(config), document, [BlockWidths(64, 3)])
    assert found["model_type"] == "mistral"
    assert AutoConfig.for_model(**found).max_position_embeddings == 2048
