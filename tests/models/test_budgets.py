from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ray_surgeon.models.budgets import Budget, bytes_budget, flops_budget, linears_budget, parameters_budget
from ray_surgeon.models.couplings import group_sets, head_layout
from ray_surgeon.models.skeleton import linear_shapes
from tests.conftest import CONFIGS, tiny_model


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_what_a_group_needs_is_what_its_tensors_hold(family: str) -> None:
    """The oracle counts the entries of every group's rows and columns."""
    config, model = CONFIGS[family], tiny_model(family)
    heads = head_layout(config).num_kv_heads
    left = {"attention": [1] + [heads] * 3, "ffn": [16, 40, 48, 48]}
    gone = sum(
        (len(groups.columns) - left[groups.kind][groups.block]) * groups.num_parameters
        for groups in group_sets(config, linear_shapes(config))
    )
    flat = [(kind, number) for kind, numbers in left.items() for number in numbers]
    in_all = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    for budget, dense, each in (
        (parameters_budget(config), in_all, 1),
        (bytes_budget(config, 2), 2 * in_all, 2),
        (linears_budget(config), sum(s.num_rows * s.num_columns for s in linear_shapes(config)), 1),
    ):
        assert budget.dense == dense
        assert budget.of(flat) == dense - each * gone
    assert parameters_budget(config).least({"ffn": 8}) == parameters_budget(config).of([("ffn", 8)] * 4)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3"])
def test_flops_are_those_that_torch_counts(family: str) -> None:
    """torch counts the attention of every token to every other one, and we to those before it."""
    config, length = CONFIGS[family], 24
    model = tiny_model(family)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    layout = head_layout(config)
    pairs = length * (length - 1) / 2 * 4 * layout.head_dim * layout.num_query_heads * config.num_hidden_layers
    biases = 2 * sum(s.num_rows for s in linear_shapes(config) if s.has_bias)
    assert length * (flops_budget(config, length).dense - biases) + pairs == counter.get_total_flops()


def test_a_budget_adds_up_its_blocks() -> None:
    budget = Budget("latency_s", 0.5, {"ffn": (0.0, 1.0, 1.5), "attention": (-0.25, 0.0)}, 3)
    assert budget.dense == 5.0
    assert budget.of([("ffn", 1), ("ffn", 0), ("attention", 0)]) == 0.5 + 1.5 + 1.0 + 0.0 - 0.25
    assert budget.least({"ffn": 1}) == 3.5
    assert budget.size("ffn") == 1.0
    assert budget.of([("attention", 0)] * 3) == 4.25
