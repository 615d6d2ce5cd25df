from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ray_surgeon.models.budgets import (
    Budget,
    bytes_budget,
    fewest_left,
    flops_budget,
    linears_budget,
    parameters_budget,
)
from ray_surgeon.models.layout import ModelLayout
from tests.conftest import CONFIGS, LAYOUTS, tiny_model


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_what_a_group_needs_is_what_its_tensors_hold(family: str) -> None:
    """The oracle counts the entries of every group's rows and columns."""
    layout = LAYOUTS[family]
    model = tiny_model(family)
    heads = layout.heads.num_kv
    left = {"attention": [1] + [heads] * 3, "ffn": [16, 40, 48, 48]}
    gone = sum(
        (len(groups.columns) - left[groups.kind][groups.block]) * groups.num_parameters
        for groups in layout.group_sets
    )
    flat = [(kind, number) for kind, numbers in left.items() for number in numbers]
    in_all = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    for budget, dense, each in (
        (parameters_budget(layout), in_all, 1),
        (bytes_budget(layout, 2), 2 * in_all, 2),
        (linears_budget(layout), sum(s.num_rows * s.num_columns for s in layout.linears), 1),
    ):
        assert budget.dense == dense
        assert budget.of(flat) == dense - each * gone
    assert parameters_budget(layout).least({"ffn": 8}) == parameters_budget(layout).of(
        [("ffn", 8)] * 4
    )


@pytest.mark.parametrize("family", ["llama", "opt", "opt-projections", "gpt2", "phi3"])
def test_flops_are_those_that_torch_counts(family: str) -> None:
    """torch counts the attention of every token to every other one, and we to those before it."""
    config = CONFIGS[family]
    layout = LAYOUTS[family]
    length = 24
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    heads = layout.heads
    pairs = (
        length * (length - 1) / 2 * 4 * heads.head_dim * heads.num_query * config.num_hidden_layers
    )
    biases = 2 * sum(s.num_rows for s in layout.linears if s.has_bias)
    assert (
        length * (flops_budget(layout, length).dense - biases) + pairs == counter.get_total_flops()
    )


def test_flops_of_latent_attention_are_those_that_torch_counts() -> None:
    """What grows with the square of the length: queries and keys have another dimension than
    values.
    """
    layout = LAYOUTS["deepseek_v3"]
    model = tiny_model("deepseek_v3")
    model.set_attn_implementation("eager")
    counted = []
    for length in (24, 48):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, length, dtype=torch.long))
        counted.append(counter.get_flop_counts()["Global"][torch.ops.aten.bmm])
    a_token_more = flops_budget(layout, 2).dense - flops_budget(layout, 1).dense
    assert counted[1] - 2 * counted[0] == 2 * a_token_more * (48**2 - 2 * 24**2)


@pytest.mark.parametrize(
    ("family", "kind", "left", "smaller"),
    [
        (
            "llama",
            "attention",
            1,
            {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
        ),
        ("llama", "ffn", 40, {"intermediate_size": 40}),
        ("qwen3_moe", "expert_channels", 8, {"moe_intermediate_size": 8}),
    ],
)
def test_flops_with_fewer_groups_are_those_of_a_smaller_model(
    family: str, kind: str, left: int, smaller: dict[str, int]
) -> None:
    config = copy.deepcopy(LAYOUTS[family].config)
    budget = flops_budget(LAYOUTS[family], 24)
    for name, value in smaller.items():
        setattr(config, name, value)
    found = budget.of([(kind, left)] * budget.num_consumers[kind])
    assert found == pytest.approx(flops_budget(ModelLayout.of(config), 24).dense)
    assert found < budget.dense


def test_indices_of_channels_are_there_once_for_all_experts() -> None:
    """A layout travels to every worker, and there may be tens of thousands of experts."""
    sets = [
        groups for groups in LAYOUTS["qwen3_moe"].group_sets if groups.kind == "expert_channels"
    ]
    assert len(sets) > 4
    assert (
        len(
            {
                id(tensor)
                for groups in sets
                for tensor in (groups.columns, *(rows for _, rows in groups.producers))
            }
        )
        == 1
    )


def test_a_budget_adds_up_its_blocks() -> None:
    budget = Budget(
        "latency_s",
        0.5,
        {"ffn": (0.0, 1.0, 1.5), "attention": (-0.25, 0.0)},
        {"ffn": 3, "attention": 3},
    )
    assert budget.dense == 5.0
    assert budget.of([("ffn", 1), ("ffn", 0), ("attention", 0)]) == 0.5 + 1.5 + 1.0 + 0.0 - 0.25
    assert budget.least({"ffn": 1}) == 3.5
    assert budget.size("ffn") == 1.0
    assert budget.of([("attention", 0)] * 3) == 4.25
    assert budget.size("attention") == 0.25


def test_the_least_of_a_mixture_counts_whole_experts_and_the_channels_of_the_others() -> None:
    """Two layers of four experts."""
    tables = {"expert_channels": (0.0, 2.0, 3.0), "attention": (0.0, 5.0)}
    budget = Budget(
        "parameters", 1.0, tables, {"expert_channels": 8, "attention": 2}, num_experts=4
    )
    assert budget.least({"experts": 3}) == 1 + 2 * 3 * 3 + 2 * 5
    assert budget.least({"experts": 3, "expert_channels": 1, "attention": 0}) == 1 + 2 * 3 * 2
    assert budget.least({"expert_channels": 1}) == 1 + 2 * 4 * 2 + 2 * 5


def test_the_fewest_groups_that_may_be_left() -> None:
    """As many as are asked for, but for those that there are, those that heads allow, and those
    that a router asks.
    """
    least = {"attention": 1, "ffn": 100, "expert_channels": 8, "experts": 1}
    assert fewest_left(LAYOUTS["llama"], ["attention", "ffn"], least, uniform=True) == {
        "attention": 1,
        "ffn": 48,
    }
    assert fewest_left(LAYOUTS["llama"], ["attention"], least | {"attention": 2}, uniform=True) == {
        "attention": 2
    }
    assert fewest_left(LAYOUTS["olmoe"], ["experts", "expert_channels"], least, uniform=True) == {
        "experts": 3,
        "expert_channels": 8,
    }
    config = copy.deepcopy(LAYOUTS["deepseek_v3"].config)
    config.num_experts_per_tok = 1
    layout = ModelLayout.of(config)
    assert fewest_left(layout, ["experts"], least, uniform=True) == {"experts": 2}, (
        "a router with groups takes the best two of a group"
    )
