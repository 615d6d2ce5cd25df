"""Structures pruned by dependency propagation have no influence; all others have."""

from __future__ import annotations

import pytest
import torch

from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.models.build import as_linear, matrix
from ray_surgeon.models.dependencies import propagate, shrinkable
from tests.conftest import CONFIGS, LAYOUTS, SPARSE_CONFIGS
from tests.models.test_shard import shards

TOKENS = torch.arange(24)[None] * 7 % 300 + 3


def write(model: torch.nn.Module, masks: dict[str, StructuredMask]) -> torch.Tensor:
    """Zero everything that a mask removes: rows with their biases, and columns. Return
    the logits.
    """
    with torch.no_grad():
        for name, mask in masks.items():
            module = as_linear(model.get_submodule(name))
            W = matrix(module)
            W[~mask.rows] = 0.0
            W[:, ~mask.columns[: W.shape[1]]] = 0.0
            if module.bias is not None:
                module.bias[~mask.rows] = 0.0
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def random_masks(family: str) -> dict[str, StructuredMask]:
    masks = {}
    for shape in LAYOUTS[family].linears:
        mask = StructuredMask(
            torch.rand(shape.num_rows) > 0.3, torch.rand(shape.num_columns) > 0.3
        )
        mask.columns[-1] |= shape.has_bias
        masks[shape.name] = mask
    return masks


# not deepseek_v3, whose attention is no pair of plain halves
@pytest.mark.parametrize(
    "family", sorted(set(CONFIGS | SPARSE_CONFIGS) - {"deepseek_v3"})
)
def test_propagation_does_not_change_the_logits(family: str) -> None:
    """In gpt-oss a channel whose gate is zero is zero; one whose up projection is zero is not."""
    layout = LAYOUTS[family]
    model = shards(family, [0, 4])[0].model
    masks = random_masks(family)
    sets = layout.group_sets
    before = write(model, masks)
    changed = propagate(layout, masks, sets)
    assert any("experts" in name for name in changed) == (family in SPARSE_CONFIGS)
    for name, mask in changed.items():
        assert not (mask.rows & ~masks[name].rows).any()
        assert not (mask.columns & ~masks[name].columns).any()
        assert mask.num_kept < masks[name].num_kept
    after = masks | changed
    torch.testing.assert_close(write(model, after), before, atol=1e-5, rtol=1e-5)
    again = propagate(layout, after, sets)
    assert not [name for name in again if "mlp" in name or "fc" in name]
    assert (
        0
        < shrinkable(after, sets)
        < sum(len(m.rows) * len(m.columns) for m in masks.values())
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_removing_another_live_row_changes_the_logits(family: str) -> None:
    layout = LAYOUTS[family]
    model = shards(family, [0, 4])[0].model
    masks = random_masks(family)
    for _ in range(3):
        masks |= propagate(layout, masks, layout.group_sets)
    before = write(model, masks)
    consumer = next(
        groups for groups in layout.group_sets if groups.kind == "ffn"
    ).consumer
    masks[consumer].columns[int(masks[consumer].columns.nonzero()[0])] = False
    assert (write(model, masks) - before).abs().max() > 1e-4
