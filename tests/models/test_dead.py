"""What is called dead may hold anything; what is not called dead matters."""

from __future__ import annotations

import pytest
import torch

from ray_surgeon.models.couplings import group_sets
from ray_surgeon.models.dead import shrinkable, without_dead
from ray_surgeon.models.linears import as_linear, matrix
from ray_surgeon.models.skeleton import linear_shapes
from ray_surgeon.surgery.masks import StructuredMask
from tests.conftest import CONFIGS, tiny_model

TOKENS = torch.arange(24)[None] * 7 % 300 + 3


def write(model: torch.nn.Module, masks: dict[str, StructuredMask], value: float) -> None:
    """Put a value into everything that a mask removes and that was not removed before: rows with their biases, and columns."""
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
    for shape in linear_shapes(CONFIGS[family]):
        rows, columns = torch.rand(shape.num_rows) > share, torch.rand(shape.num_columns) > share
        if shape.has_bias:
            columns[-1] = True
        masks[shape.name] = StructuredMask(rows, columns)
    return masks


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_removing_what_is_dead_does_not_change_the_logits(family: str) -> None:
    config, model, masks = CONFIGS[family], tiny_model(family), random_masks(family, 0.3)
    sets = group_sets(config, linear_shapes(config))
    write(model, masks, 0.0)
    before = model(TOKENS).logits
    dead = without_dead(config, masks, sets)
    assert dead, "with 30 % of rows and columns gone something is dead"
    after = {name: dead.get(name, mask) for name, mask in masks.items()}
    assert sum(m.num_kept for m in after.values()) < sum(m.num_kept for m in masks.values())
    for name, mask in dead.items():
        assert not (mask.rows & ~masks[name].rows).any()
        assert not (mask.columns & ~masks[name].columns).any()
    write(model, after, 0.0)
    torch.testing.assert_close(model(TOKENS).logits, before, atol=1e-5, rtol=1e-5)
    assert without_dead(config, after, sets).keys() <= {n for n in after if "mlp" not in n and "fc" not in n}
    assert 0 < shrinkable(after, sets) < sum(m.num_parameters for m in masks.values())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_one_row_less_that_is_alive_changes_the_logits(family: str) -> None:
    config, model, masks = CONFIGS[family], tiny_model(family), random_masks(family, 0.3)
    sets = group_sets(config, linear_shapes(config))
    for _ in range(3):
        masks |= without_dead(config, masks, sets)
    write(model, masks, 0.0)
    before = model(TOKENS).logits
    reader = next(groups for groups in sets if groups.kind == "ffn").reader
    alive = int(masks[reader].columns[: len(masks[reader].columns) - 1].nonzero()[0])
    with torch.no_grad():
        matrix(as_linear(model.get_submodule(reader)))[:, alive] = 0
    assert (model(TOKENS).logits - before).abs().max() > 1e-4


def test_nothing_is_dead_in_the_dense_model() -> None:
    for family, config in CONFIGS.items():
        masks = {s.name: StructuredMask.full(s.num_rows, s.num_columns) for s in linear_shapes(config)}
        sets = group_sets(config, linear_shapes(config))
        assert without_dead(config, masks, sets) == {}, family
        assert shrinkable(masks, sets) == 0
