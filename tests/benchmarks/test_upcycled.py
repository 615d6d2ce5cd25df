"""The small upcycled mixture of experts for measurements."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import upcycled
from tests.conftest import VOCABULARY, tiny_model

NUM_EXPERTS = 4
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (8, 24))


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.from_numpy(TOKENS)).logits
    return found


def inputs_of_layer(model: PreTrainedModel, block: int) -> Tensor:
    """Return the inputs of a block's feed-forward layer for all tokens."""
    seen: list[Tensor] = []
    hook = model.model.layers[block].mlp.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].flatten(0, 1))
    )
    logits(model)
    hook.remove()
    return seen[0]


@pytest.fixture
def dense() -> PreTrainedModel:
    return tiny_model("llama")


def test_every_expert_starts_with_its_own_channels_dropped(
    dense: PreTrainedModel,
) -> None:
    model = upcycled.upcycled(dense, NUM_EXPERTS)
    for block, original in zip(model.model.layers, dense.model.layers, strict=True):
        expected = original.mlp.down_proj.weight / (1 - upcycled.DROPPED)
        weights = [expert.down_proj.weight for expert in block.mlp.experts]
        kept = [(weight != 0).any(dim=0) for weight in weights]
        for weight, columns in zip(weights, kept, strict=True):
            torch.testing.assert_close(weight[:, columns], expected[:, columns])
        assert len({tuple(columns.tolist()) for columns in kept}) == NUM_EXPERTS
    assert 0.6 < float(torch.cat(kept).float().mean()) < 0.9


@pytest.fixture
def started(dense: PreTrainedModel) -> PreTrainedModel:
    """Return a mixture with initialised routers."""
    model = upcycled.upcycled(dense, NUM_EXPERTS).eval()
    upcycled.start_routers(model, dense, TOKENS)
    return model


def test_initialised_routers(
    dense: PreTrainedModel, started: PreTrainedModel, tmp_path: Path
) -> None:
    """The logits have variance one and do not depend on the mean input."""
    upcycled.save(started, tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert read.config.architectures == ["MixtralForCausalLM"]
    torch.testing.assert_close(logits(read), logits(started))
    scores = inputs_of_layer(dense, 0) @ started.model.layers[0].mlp.gate.weight.T
    torch.testing.assert_close(scores.std(dim=0), torch.ones(NUM_EXPERTS))
    torch.testing.assert_close(
        scores.mean(dim=0), torch.zeros(NUM_EXPERTS), atol=1e-4, rtol=0
    )


def test_training_lowers_the_loss_and_is_absorbed(started: PreTrainedModel) -> None:
    before = {
        name: parameter.detach().clone() for name, parameter in started.named_parameters()
    }
    perplexity, _ = upcycled.measured(started, TOKENS)
    labels = torch.from_numpy(TOKENS)[:, 1:].flatten()
    predicted = logits(started)[:, :-1].flatten(0, 1)
    loss = float(torch.nn.functional.cross_entropy(predicted, labels))
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    upcycled.train(started.train(), np.concatenate([TOKENS] * 6))
    assert upcycled.measured(started.eval(), TOKENS)[0] < 0.95 * perplexity
    after = dict(started.named_parameters())
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    trained = {
        name for name in before if ".experts." in name or name.endswith("gate.weight")
    }
    assert changed == trained
