from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from ray_surgeon.models import budgets
from ray_surgeon.models.budgets import (
    Budget,
    fewest_left,
    flops_budget,
    parameters_budget,
)
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import shallower
from tests.conftest import CONFIGS, LAYOUTS, tiny_model
from tests.integration.runs import config_like


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_parameters_of_groups_match_their_tensors(family: str) -> None:
    """The oracle counts the entries of every group's rows and columns."""
    layout = LAYOUTS[family]
    left = {"attention": [1] + [layout.heads.num_kv] * 3, "ffn": [16, 40, 48, 48]}
    gone = sum(
        (len(groups.columns) - left[groups.kind][groups.block]) * groups.num_parameters
        for groups in layout.group_sets
    )
    flat = [
        (groups.kind, left[groups.kind][groups.block]) for groups in layout.group_sets
    ]
    in_all = sum(p.numel() for p in tiny_model(family).parameters())
    of_linears = sum(s.num_rows * s.num_columns for s in layout.linears)
    whole = parameters_budget(layout)
    for budget, dense, each in (
        (whole, in_all, 1),
        (budgets.bytes_budget(layout, 2), 2 * in_all, 2),
        (budgets.linears_budget(layout), of_linears, 1),
    ):
        assert budget.dense == dense
        assert budget.of(flat) == dense - each * gone
    assert whole.least({"ffn": 8}) == whole.of([("ffn", 8)] * 4)


def counted_flops(family: str, length: int) -> Counter[object]:
    """Return torch's count, which includes attention to later tokens, unlike our budgets."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    return Counter(counter.get_flop_counts()["Global"])


@pytest.mark.parametrize("family", ["llama", "opt-projections", "gpt2", "phi3"])
def test_flops_match_torch(family: str) -> None:
    layout = LAYOUTS[family]
    heads = layout.heads
    pairs = 24 * 23 / 2 * 4 * heads.head_dim * heads.num_query * layout.num_blocks
    biases = 2 * sum(s.num_rows for s in layout.linears if s.has_bias)
    found = 24 * (flops_budget(layout, 24).dense - biases) + pairs
    assert found == counted_flops(family, 24).total()


def test_flops_of_latent_attention_match_torch() -> None:
    """Only the part that grows with the square of the length: the dimension of queries and keys
    differs from that of values.
    """
    layout = LAYOUTS["deepseek_v3"]
    short, long = (counted_flops("deepseek_v3", n)[torch.ops.aten.bmm] for n in (24, 48))
    a_token_more = flops_budget(layout, 2).dense - flops_budget(layout, 1).dense
    assert long - 2 * short == 2 * a_token_more * (48**2 - 2 * 24**2)


ONE_KV_HEAD = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


@pytest.mark.parametrize(
    ("family", "kind", "left", "smaller"),
    [
        ("llama", "attention", 1, ONE_KV_HEAD),
        ("llama", "ffn", 40, {"intermediate_size": 40}),
        ("qwen3_moe", "expert_channels", 8, {"moe_intermediate_size": 8}),
    ],
)
def test_flops_of_a_pruned_model_match_a_smaller_model(
    family: str, kind: str, left: int, smaller: dict[str, int]
) -> None:
    budget = flops_budget(LAYOUTS[family], 24)
    found = budget.of([(kind, left)] * budget.num_consumers[kind])
    other = ModelLayout.of(config_like(family, **smaller))
    assert found == pytest.approx(flops_budget(other, 24).dense)
    assert found < budget.dense


def test_experts_share_the_indices_of_channels() -> None:
    """A layout is sent to every worker, and there may be tens of thousands of experts."""
    sets = [
        one for one in LAYOUTS["qwen3_moe"].group_sets if one.kind == "expert_channels"
    ]
    assert len(sets) > 4
    indices = [(one.columns, *(rows for _, rows in one.producers)) for one in sets]
    assert len({id(tensor) for tensors in indices for tensor in tensors}) == 1


def test_least_budget_of_a_mixture_counts_experts_and_channels() -> None:
    """Two layers of four experts."""
    tables = {"expert_channels": (0.0, 2.0, 3.0), "attention": (0.0, 5.0)}
    consumers = {"expert_channels": 8, "attention": 2}
    budget = Budget(
        "parameters", 1.0, tables, consumers, {"experts": ("expert_channels", 4, 1)}
    )
    assert budget.least({"experts": 3}) == 1 + 2 * 3 * 3 + 2 * 5
    assert (
        budget.least({"experts": 3, "expert_channels": 1, "attention": 0})
        == 1 + 2 * 3 * 2
    )
    assert budget.least({"expert_channels": 1}) == 1 + 2 * 4 * 2 + 2 * 5


ONE_EXPERT_A_TOKEN = ModelLayout.of(config_like("deepseek_v3", num_experts_per_tok=1))
"""Its router has groups, and takes the best two of a group."""


@pytest.mark.parametrize(
    ("layout", "heads", "expected"),
    [
        (LAYOUTS["llama"], 1, {"attention": 1, "ffn": 48}),
        (LAYOUTS["llama"], 2, {"attention": 2}),
        (LAYOUTS["olmoe"], 1, {"experts": 3, "expert_channels": 8}),
        (ONE_EXPERT_A_TOKEN, 1, {"experts": 2}),
    ],
)
def test_fewest_groups_left(
    layout: ModelLayout, heads: int, expected: dict[str, int]
) -> None:
    """At least the requested number, limited by the number of groups, the heads, and the router."""
    least = {"attention": heads, "ffn": 100, "expert_channels": 8, "experts": 1}
    wanted = {kind: least[kind] for kind in expected}
    assert fewest_left(layout, wanted, uniform=True) == expected


@pytest.mark.parametrize("family", sorted(LAYOUTS))
def test_savings_of_a_layer_match_a_shallower_model(family: str) -> None:
    """Its parts save the parameters of their linears, which is less than the block with
    its norms.
    """
    layout = LAYOUTS[family]
    last = layout.num_blocks - 1
    document = shallower(layout, layout.config.to_dict(), range(last))
    less = ModelLayout.of(AutoConfig.for_model(**document))
    for budget, rest in (
        (parameters_budget(layout), parameters_budget(less)),
        (budgets.linears_budget(layout), budgets.linears_budget(less)),
        (flops_budget(layout, 24), flops_budget(less, 24)),
    ):
        gone = [("blocks", last), ("ffn_layers", last)]
        assert budget.saved_without(gone) == pytest.approx(budget.dense - rest.dense)
        parts = budget.saved_without([("attention_layers", last), ("ffn_layers", last)])
        assert parts <= budget.saved_without(gone) * (1 + 1e-9)
        assert budget.most_saved(["blocks"], 2) >= 2 * min(
            budget.of_layers["blocks", block] for block in range(last + 1)
        )
