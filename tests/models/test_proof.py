from __future__ import annotations

import time
from dataclasses import replace

import pytest
from transformers import AutoConfig

from ray_surgeon.errors import ConfigError
from ray_surgeon.models import proof
from ray_surgeon.models.experts import Coupling
from ray_surgeon.models.families import FAMILIES, Family
from ray_surgeon.models.proof import NotProvedError, prove, prove_copy
from tests.conftest import CONFIGS, LAYOUTS, SPARSE_CONFIGS
from tests.models.test_tiny_models import LLAMA_70B

OF_EXPERTS = ("expert_channels", "experts")


@pytest.mark.parametrize(
    ("family", "cut"),
    [
        ("llama", ("attention", "ffn")),
        ("gpt2", ("ffn",)),  # its class ties the number of heads to the hidden size
        ("phi3", ("attention", "ffn")),
        ("qwen2_moe", ("ffn", "shared_experts", *OF_EXPERTS)),
        ("gpt_oss", ("attention", *OF_EXPERTS)),
        # the width of its shared experts is a multiple of that of the others
        ("deepseek_v3", ("ffn", "experts")),
    ],
)
def test_known_families_are_proved(family: str, cut: tuple[str, ...]) -> None:
    layout = LAYOUTS[family]
    assert prove_copy(layout.config, layout.family, layout.kinds) == cut


def test_proof_of_a_large_model_takes_seconds() -> None:
    start = time.monotonic()
    found = prove(LLAMA_70B, FAMILIES["llama"], ("attention", "ffn"))
    assert time.monotonic() - start < 20
    assert str(found).startswith("proved: attention, ffn in ")


def test_a_process_proves_the_same_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["mistral"]
    first = prove(config, FAMILIES["mistral"], ("ffn",))
    monkeypatch.setattr(proof, "tiny_copy", None)
    assert prove(config, FAMILIES["mistral"], ("ffn",)) is first


HALF = Coupling(consumer="mlp.down_proj", producers=("mlp.gate_proj",))


@pytest.mark.parametrize(
    ("config", "family", "problem"),
    [
        # what the config calls a width is not that of the feed-forward layer
        ("llama", Family(width_field="max_position_embeddings"), "cutting ffn"),
        # one of two producers keeps its rows
        ("llama", Family(ffn=HALF), "cutting ffn .*; proved are attention"),
        # the norm after the last block is left out
        ("qwen3", Family(final=()), "cannot be run one by one"),
        # multipliers of embeddings and logits are left out
        ("granite", Family(), "run one by one, and the whole model give logits"),
        # no linear has this name
        ("llama", Family(base="transformer"), "cannot be run one by one"),
    ],
)
def test_a_wrong_description_is_refused(
    config: str, family: Family, problem: str
) -> None:
    with pytest.raises(NotProvedError, match=problem):
        prove_copy(CONFIGS[config], family, ("attention", "ffn"))


def test_experts_of_the_wrong_field_are_refused() -> None:
    family = FAMILIES["olmoe"]
    wrong = replace(family, sparse=replace(family.sparse, width="hidden_size"))
    with pytest.raises(NotProvedError, match="cutting expert_channels"):
        prove_copy(SPARSE_CONFIGS["olmoe"], wrong, ("expert_channels",))


def test_refusal_says_what_to_do() -> None:
    config = AutoConfig.for_model("qwen3", num_hidden_layers=2)
    with pytest.raises(ConfigError, match=r"not proved .* for qwen3.*adding-a-family"):
        prove(config, Family(width_field="head_dim"), ("ffn",))
