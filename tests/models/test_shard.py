"""Shards of a model: logits, and factors against autograd on the whole model."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig

from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.checkpoint import reader_of
from ray_surgeon.models.families import family_of
from ray_surgeon.models.loss import Predicted, next_token_loss
from ray_surgeon.models.runner import BlockRunner
from ray_surgeon.models.shard import ModelShard
from tests.conftest import CONFIGS, LAYOUTS, VOCABULARY, tiny_model

TOKENS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
NUM_PREDICTED = 2 * 23


@functools.cache
def reader(family: str) -> Callable[[str], Tensor]:
    return reader_of(LAYOUTS[family], tiny_model(family))


def shards(
    family: str, cuts: list[int], dtype: torch.dtype = torch.float32
) -> list[ModelShard]:
    found = []
    for first, last in itertools.pairwise(cuts):
        shard = ModelShard(
            LAYOUTS[family], BlockRange(first, last, 4), dtype, torch.device("cpu")
        )
        shard.load(reader(family))
        found.append(shard)
    return found


def gather(parts: list[ModelShard], *, experts: bool = False) -> None:
    runners = [BlockRunner(part) for part in parts]
    for part in parts:
        part.start_curvature(experts=experts)
    for i, sequence in enumerate(TOKENS):
        hidden = sequence[None]
        for runner in runners:
            (hidden,) = runner.forward(i, hidden)
        _, gradient, _ = runners[-1].loss(hidden, Predicted(sequence[None]))
        for runner in reversed(runners):
            (gradient,) = runner.backward(i, [gradient])
    for part in parts:
        part.stop_curvature()


def watch(
    modules: dict[str, torch.nn.Module],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return lists that will receive the inputs of modules and their outputs'
    gradients, by token.
    """
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def keep(found: dict[str, Tensor], name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, at: Any, *outputs: Any) -> None:
            first = at[0] if found is inputs else outputs[0][0]
            found[name] = first.detach().flatten(0, -2)

        return hook

    for name, module in modules.items():
        module.register_forward_hook(keep(inputs, name))
        module.register_full_backward_hook(keep(gradients, name))
    return inputs, gradients


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_shards_match_the_whole_model(family: str) -> None:
    """Logits, losses, and factors by autograd are bit-identical for every way to cut the model.
    Tied parameters count once. A written weight can be read again, with its bias as the last
    column.
    """
    layout = LAYOUTS[family]
    cut = shards(family, [0, 1, 3, 4])
    (whole,) = shards(family, [0, 4])
    hidden = TOKENS
    for part in cut:
        hidden = torch.cat(BlockRunner(part).infer(hidden))
    model = tiny_model(family)
    assert layout.num_parameters == sum(p.numel() for p in model.parameters())
    inputs, gradients = watch(
        {shape.name: model.get_submodule(shape.name) for shape in layout.linears}
    )
    found = model(TOKENS, labels=TOKENS)
    (NUM_PREDICTED * found.loss).backward()
    logits = part.logits(hidden)
    torch.testing.assert_close(logits, found.logits.detach(), rtol=1e-5, atol=1e-5)
    nll, _ = next_token_loss(hidden, part.head_weight, Predicted(TOKENS))
    assert float(nll.sum()) / NUM_PREDICTED == pytest.approx(
        float(found.loss.detach()), rel=1e-5
    )
    gather(cut)
    gather([whole])
    for shape in layout.linears:
        a = inputs[shape.name]
        if shape.has_bias:
            a = torch.cat([a, torch.ones(len(a), 1)], dim=1)
        g = gradients[shape.name]
        factors = whole.factors(shape.name)
        assert factors.num_tokens == TOKENS.numel()
        torch.testing.assert_close(factors.A.dense(), a.T @ a, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(factors.G.dense(), g.T @ g, rtol=1e-3, atol=5e-5)
        (other,) = (
            part.factors(shape.name) for part in cut if shape.name in part.linears
        )
        assert torch.equal(factors.A.flat, other.A.flat)
        assert torch.equal(factors.G.flat, other.G.flat)
        W = whole.weight(shape.name)
        assert W.shape == (shape.num_rows, shape.num_columns)
        whole.set_weight(shape.name, W * 2)
        torch.testing.assert_close(whole.weight(shape.name), W * 2)
    assert list(whole.linears) == [shape.name for shape in layout.linears]
    assert all(not p.requires_grad and p.grad is None for p in whole.model.parameters())


def test_linears_with_the_same_input_share_A() -> None:
    (part,) = shards("llama", [0, 4])
    gather([part])
    prefix = "model.layers.2."
    q, k, v = (part.factors(f"{prefix}self_attn.{name}_proj") for name in "qkv")
    assert q.A.flat.data_ptr() == k.A.flat.data_ptr() == v.A.flat.data_ptr()
    gate, up = (part.factors(f"{prefix}mlp.{name}_proj") for name in ("gate", "up"))
    assert gate.A.flat.data_ptr() == up.A.flat.data_ptr()
    assert (q.G.n, k.G.n) == (32, 16)


def test_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'bert'.*gpt2, gpt_oss, .*llama"):
        family_of(BertConfig())


def test_shard_does_not_change_the_configuration_of_the_model() -> None:
    before = LAYOUTS["llama"].config.to_dict()
    shards("llama", [0, 4], dtype=torch.bfloat16)
    assert LAYOUTS["llama"].config.to_dict() == before
