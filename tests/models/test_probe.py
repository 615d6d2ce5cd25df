from __future__ import annotations

import pytest
from transformers import AutoConfig

from ray_surgeon.errors import ConfigError
from ray_surgeon.models.experts import Coupling
from ray_surgeon.models.families import FAMILIES
from ray_surgeon.models.probe import probed_family

GATED = ("gate_proj", "up_proj")


@pytest.mark.parametrize(
    ("model_type", "ffn", "activation"),
    [
        # gate and up in one linear
        ("glm4", Coupling("mlp.down_proj", ("mlp.gate_up_proj",), num_parts=2), "silu"),
        # w1, w2 and w3 beside convolutions and two kinds of attention
        (
            "lfm3",
            Coupling("feed_forward.w2", ("feed_forward.w1", "feed_forward.w3")),
            "silu",
        ),
        # Mamba layers, and blocks that return tuples
        (
            "bamba",
            Coupling("feed_forward.down_proj", tuple(f"feed_forward.{n}" for n in GATED)),
            "silu",
        ),
        # no gate
        ("phi", Coupling("mlp.fc2", ("mlp.fc1",)), "gelu_new"),
    ],
)
def test_feed_forward_layers_are_found(
    model_type: str, ffn: Coupling, activation: str
) -> None:
    assert model_type not in FAMILIES
    family = probed_family(AutoConfig.for_model(model_type))
    assert (family.ffn, family.activation) == (ffn, activation)
    assert family.width_field == "intermediate_size"
    assert not family.has_attention


@pytest.mark.parametrize("model_type", ["llama", "olmo3", "gpt2"])
def test_probing_finds_what_is_described(model_type: str) -> None:
    described = FAMILIES[model_type]
    family = probed_family(AutoConfig.for_model(model_type, n_inner=1024))
    for name in ("base", "blocks", "embeddings", "positions", "final", "head", "ffn"):
        assert getattr(family, name) == getattr(described, name), name
    assert (family.width_field, family.transposed) == (
        described.width_field,
        described.transposed,
    )


@pytest.mark.parametrize(
    ("model_type", "problem"),
    [
        # its width is four times the hidden size
        ("gptj", "no field of config.json names a feed-forward width; found: 2 blocks"),
        # experts are in one tensor
        ("jamba", "sets the width of feed_forward.experts, which is no linear"),
        # the field is twice the width
        ("recurrent_gemma", "does not have this width"),
        # it multiplies logits
        ("cohere2", "run one by one, and the whole model give logits that differ"),
        ("bert", "not supported"),
        ("zamba2", "its blocks share weights: model.layers.12.shared_transformer"),
    ],
)
def test_what_is_not_found_is_said(model_type: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        probed_family(AutoConfig.for_model(model_type))
    assert "docs/adding-a-family.md" in str(refused.value)
