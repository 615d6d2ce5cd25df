"""Experts as linears, against the family's own layers, and the effect of removing an expert."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ray_surgeon.api import curvature
from ray_surgeon.maths.experts import rerouting_costs
from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.checkpoint import (
    check_checkpoint,
    find_stored,
    read_state,
    reader_of,
    tensor_reader,
)
from ray_surgeon.models.expert_removals import removals
from ray_surgeon.models.experts import Mixture
from ray_surgeon.models.runner import BlockRunner
from ray_surgeon.models.shard import ModelShard
from tests.conftest import HYBRIDS, LAYOUTS, SPARSE_CONFIGS, tiny_model
from tests.models.test_shard import NUM_PREDICTED, TOKENS, gather, watch

State = dict[str, Tensor]
WITHOUT_GROUPS = sorted(set(SPARSE_CONFIGS) - {"deepseek_v3"})
"""Families with removable single experts; the router of the other one has groups of experts."""
without_groups = pytest.mark.parametrize("family", WITHOUT_GROUPS, indirect=True)


def shard(family: str, state: State, first: int = 0, last: int = 4) -> ModelShard:
    layout = LAYOUTS[family]
    found = ModelShard(
        layout, BlockRange(first, last, 4), torch.float32, torch.device("cpu")
    )
    found.load(tensor_reader(layout, state, read_state(state), "here"))
    return found


@pytest.fixture(scope="module", params=[*WITHOUT_GROUPS, "deepseek_v3"])
def family(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def state(family: str, model_folders: dict[str, Path]) -> State:
    """Return a checkpoint as transformers writes it."""
    found: State = load_file(model_folders[family] / "model.safetensors")
    return found


@dataclass(frozen=True)
class Gathered:
    """A shard after a curvature pass."""

    part: ModelShard
    inputs: State  # of the linears that any token reached


@pytest.fixture(scope="module")
def gathered(family: str, state: State) -> Gathered:
    part = shard(family, state)
    reached: dict[str, list[Tensor]] = {}
    for name, module in part.linears.items():
        module.register_forward_pre_hook(
            lambda m, i, name=name: reached.setdefault(name, []).append(i[0].detach())
        )
    gather([part], experts=family in WITHOUT_GROUPS)
    return Gathered(part, {name: torch.cat(inputs) for name, inputs in reached.items()})


@dataclass(frozen=True)
class Own:
    """The family's own model after a forward and a backward pass of the mean loss."""

    model: Any
    logits: Tensor
    inputs: State  # of feed-forward layers
    gradients: State  # of their outputs


@pytest.fixture(scope="module")
def own(family: str) -> Own:
    model: Any = tiny_model(family)
    layers = {str(i): block.mlp for i, block in enumerate(model.model.layers)}
    inputs, gradients = watch(layers)
    found = model(TOKENS, labels=TOKENS)
    found.loss.backward()
    return Own(model, found.logits.detach(), inputs, gradients)


def test_names_of_expert_linears_match_the_checkpoint(family: str, state: State) -> None:
    layout = LAYOUTS[family]
    check_checkpoint(
        layout, {key: tuple(tensor.shape) for key, tensor in state.items()}, "here"
    )
    names = (name for name in layout.parameters if name not in layout.tied)
    assert {
        key for name in names for key in find_stored(layout, name, state).keys
    } == set(state)


def test_logits_match_the_family(family: str, state: State, own: Own) -> None:
    hidden = TOKENS
    for first, last in ((0, 1), (1, 4)):
        part = shard(family, state, first, last)
        hidden = torch.cat(BlockRunner(part).infer(hidden))
    torch.testing.assert_close(part.logits(hidden), own.logits, rtol=1e-5, atol=1e-5)


def test_gradients_match_the_family(family: str, gathered: Gathered, own: Own) -> None:
    """Gradients of all weights; an expert that received no token has none."""
    model = gathered.part.model.requires_grad_()
    model(TOKENS, labels=TOKENS).loss.backward()
    model.requires_grad_(False)
    of_own = copy.deepcopy(own.model)
    for name, parameter in of_own.named_parameters():
        gradient = own.model.get_parameter(name).grad
        parameter.data = torch.zeros_like(parameter) if gradient is None else gradient
    read = reader_of(LAYOUTS[family], of_own)
    for name, parameter in model.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        # experts sum in another order, and a recurrence passes the difference on
        differs_more = "experts" in name or family in HYBRIDS
        atol = 1e-5 if differs_more else 1e-6
        torch.testing.assert_close(found, read(name), rtol=1e-4, atol=atol)


@torch.no_grad()
def change_without(mixture: Mixture, x: Tensor, expert: int) -> Tensor:
    """Return how a layer's output changes if its router does not have an expert."""
    before = mixture.kept
    outputs = []
    for gone in ([], [expert]):
        mixture.kept = before.clone().index_fill_(
            0, torch.tensor(gone, dtype=torch.long), False
        )
        output = mixture.layer(x[None])
        outputs.append(output[0] if isinstance(output, tuple) else output)
    mixture.kept = before
    return (outputs[1] - outputs[0])[0]


@without_groups
def test_predicted_removals_match_two_layers(family: str, gathered: Gathered) -> None:
    """Expert 0 is removed, as after an earlier shot."""
    mixture = gathered.part.mixtures[3]
    mixture.kept = mixture.kept.clone().index_fill_(0, torch.tensor([0]), False)
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(2))
    _, weights, numbers = mixture.router(x)
    found = removals(mixture, x, numbers, weights)
    assert len(found.experts) == numbers.numel()
    assert not (found.experts == 0).any()
    # weights that are not normalised rise
    assert (found.rises is None) == (family not in ("olmoe", "qwen2_moe"))
    for expert in found.experts.unique().tolist():
        mine = found.experts == expert
        tokens = found.tokens[mine]
        is_mine = (numbers == expert).any(dim=1)
        assert sorted(tokens.tolist()) == is_mine.nonzero()[:, 0].tolist()
        change = change_without(mixture, x, expert)
        torch.testing.assert_close(
            found.changes[mine], change[tokens], rtol=1e-4, atol=1e-5
        )
        rises = torch.zeros_like(x)
        if found.rises is not None:
            rises = found.rises[:, expert, None] * found.output
        torch.testing.assert_close(change[~is_mine], rises[~is_mine], rtol=0, atol=1e-5)
        with torch.no_grad():
            linears = mixture.experts[expert]
            hidden = linears.combine(
                linears.gate_proj(x[tokens]), linears.up_proj(x[tokens])
            )
            norm = linears.down_proj(hidden).norm(dim=1)
        weight = (weights * (numbers == expert)).sum(dim=1)[tokens]
        torch.testing.assert_close(found.norms[mine], norm * weight, rtol=1e-4, atol=1e-5)
    mixture.kept = torch.ones_like(mixture.kept)


@without_groups
def test_sums_of_a_pass_give_the_loss_increases(
    family: str, gathered: Gathered, own: Own
) -> None:
    """The mean over all tokens of g^T dy + 1/2 (g^T dy)^2, with g by autograd on the family's own
    model.
    """
    for place, mixture in gathered.part.mixtures.items():
        g = NUM_PREDICTED * own.gradients[str(place)]
        x = own.inputs[str(place)]
        experts = range(len(mixture.experts))
        changes = torch.stack([change_without(mixture, x, expert) for expert in experts])
        gains = (changes * g).sum(dim=2).double()
        second = 0.5 * gains.square().mean(dim=1)
        sums = gathered.part.expert_sums[place]
        found = rerouting_costs(sums, mixture.num_chosen, first_order=False)
        torch.testing.assert_close(found, second, rtol=2e-3, atol=1e-9)
        found = rerouting_costs(sums, mixture.num_chosen) - second
        torch.testing.assert_close(found, gains.mean(dim=1), rtol=2e-3, atol=1e-7)
        assert int(sums.of("tokens").sum()) == TOKENS.numel() * mixture.num_chosen


def test_factors_of_experts_are_shrunk_towards_the_layer(
    family: str, gathered: Gathered
) -> None:
    layout = LAYOUTS[family]
    part = gathered.part
    consumers = [linears[-1] for linears in layout.expert_sets[-1].linears]
    nothing = torch.zeros(0, part.linears[consumers[0]].in_features)
    inputs = {name: gathered.inputs.get(name, nothing) for name in consumers}
    num_tokens = sum(map(len, inputs.values()))
    assert num_tokens == TOKENS.numel() * layout.num_active_experts
    level = torch.cat(list(inputs.values())).square().mean()
    prior = level * torch.eye(nothing.shape[1])
    for name, a in inputs.items():
        wanted_prior = prior
        if layout.shapes[name].has_bias:
            a = torch.cat([a, torch.ones(len(a), 1)], dim=1)
            wanted_prior = torch.block_diag(prior, torch.ones(1, 1))
        factors = part.factors(name).dense()
        wanted = (a.T @ a + 256 * wanted_prior) / (len(a) + 256)
        torch.testing.assert_close(factors.A, wanted, rtol=1e-4, atol=1e-6)
        assert factors.num_tokens == 1
        assert float(factors.G.diagonal().min()) > 0


@pytest.mark.parametrize("name", ["gpt_oss", "qwen2_moe"])
def test_curvature_of_a_model_in_memory(
    name: str, model_folders: dict[str, Path]
) -> None:
    part = shard(name, load_file(model_folders[name] / "model.safetensors"))
    gather([part])
    for linear, sums in curvature(tiny_model(name), TOKENS).items():
        own = part.own_factors(linear).dense()
        assert sums.num_tokens == own.num_tokens
        torch.testing.assert_close(sums.A, own.A, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(sums.G, own.G, rtol=1e-3, atol=1e-8)
