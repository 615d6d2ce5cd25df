"""What dependency propagation prunes has no influence; everything else has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.models.build import BlockRange, as_linear, matrix
from ray_surgeon.models.checkpoint import read_state, tensor_reader
from ray_surgeon.models.groups import propagate, shrinkable
from ray_surgeon.models.shard import ModelShard
from tests.conftest import CONFIGS, LAYOUTS, SPARSE_CONFIGS, tiny_model

TOKENS = torch.arange(24)[None] * 7 % 300 + 3


def write(model: torch.nn.Module, masks: dict[str, StructuredMask], value: float) -> None:
    """Put a value into everything that a mask removes and that was not removed before: rows with
    their biases, and columns.
    """
    for name, mask in masks.items():
        module = as_linear(model.get_submodule(name))
        with torch.no_grad():
            W = matrix(module)
            W[~mask.rows] = value
            W[:, ~mask.columns[: W.shape[1]]] = value
            if module.bias is not None:
                module.bias[~mask.rows] = value


def random_masks(family: str, share: float) -> dict[str, StructuredMask]:
    masks = {}
    for shape in LAYOUTS[family].linears:
        rows = torch.rand(shape.num_rows) > share
        columns = torch.rand(shape.num_columns) > share
        if shape.has_bias:
            columns[-1] = True
        masks[shape.name] = StructuredMask(rows, columns)
    return masks


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_propagation_does_not_change_the_logits(family: str) -> None:
    layout = LAYOUTS[family]
    model = tiny_model(family)
    masks = random_masks(family, 0.3)
    sets = layout.group_sets
    write(model, masks, 0.0)
    before = model(TOKENS).logits
    changed = propagate(layout, masks, sets)
    assert changed, "with 30 % of rows and columns pruned, others have no influence"
    after = {name: changed.get(name, mask) for name, mask in masks.items()}
    assert sum(m.num_kept for m in after.values()) < sum(m.num_kept for m in masks.values())
    for name, mask in changed.items():
        assert not (mask.rows & ~masks[name].rows).any()
        assert not (mask.columns & ~masks[name].columns).any()
    write(model, after, 0.0)
    torch.testing.assert_close(model(TOKENS).logits, before, atol=1e-5, rtol=1e-5)
    assert propagate(layout, after, sets).keys() <= {
        n for n in after if "mlp" not in n and "fc" not in n
    }
    assert 0 < shrinkable(after, sets) < sum(m.num_parameters for m in masks.values())


# whose attention is no pair of plain halves
@pytest.mark.parametrize("family", sorted(set(SPARSE_CONFIGS) - {"deepseek_v3"}))
def test_propagation_in_experts_does_not_change_the_logits(
    family: str, model_folders: dict[str, Path]
) -> None:
    """In gpt-oss a channel whose gate is zero is zero, and one whose up is zero is not."""
    layout = LAYOUTS[family]
    masks = random_masks(family, 0.3)
    state = load_file(model_folders[family] / "model.safetensors")
    part = ModelShard(layout, BlockRange(0, 4, 4), torch.float32, torch.device("cpu"))
    part.load(tensor_reader(layout, state, read_state(state), "here"))
    with torch.no_grad():
        write(part.model, masks, 0.0)
        before = part.model(TOKENS).logits
        changed = propagate(layout, masks, layout.group_sets)
        assert any("experts" in name for name in changed)
        write(part.model, masks | changed, 0.0)
        torch.testing.assert_close(part.model(TOKENS).logits, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_one_row_less_that_is_alive_changes_the_logits(family: str) -> None:
    layout = LAYOUTS[family]
    model = tiny_model(family)
    masks = random_masks(family, 0.3)
    sets = layout.group_sets
    for _ in range(3):
        masks |= propagate(layout, masks, sets)
    write(model, masks, 0.0)
    before = model(TOKENS).logits
    consumer = next(groups for groups in sets if groups.kind == "ffn").consumer
    alive = int(masks[consumer].columns[: len(masks[consumer].columns) - 1].nonzero()[0])
    with torch.no_grad():
        matrix(as_linear(model.get_submodule(consumer)))[:, alive] = 0
    assert (model(TOKENS).logits - before).abs().max() > 1e-4


def test_nothing_is_propagated_in_the_dense_model() -> None:
    for family, layout in LAYOUTS.items():
        masks = {s.name: StructuredMask.full(s.num_rows, s.num_columns) for s in layout.linears}
        sets = layout.group_sets
        assert propagate(layout, masks, sets) == {}, family
        assert shrinkable(masks, sets) == 0
