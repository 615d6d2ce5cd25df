"""Experts as linears: what the family's own layers compute, and what the removal of an expert
changes.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ray_surgeon.api import curvature
from ray_surgeon.maths.experts import rerouting_costs
from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.checkpoint import check_checkpoint, find_stored, read_state, tensor_reader
from ray_surgeon.models.experts import Mixture, routed
from ray_surgeon.models.families import FAMILIES
from ray_surgeon.models.hooks import removals
from ray_surgeon.models.runner import BlockRunner
from ray_surgeon.models.shard import ModelShard
from tests.conftest import LAYOUTS, SPARSE_CONFIGS, VOCABULARY, tiny_model

TOKENS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
FAMILIES_WITH_EXPERTS = sorted(SPARSE_CONFIGS)


@pytest.fixture(scope="module")
def states(model_folders: dict[str, object]) -> dict[str, dict[str, Tensor]]:
    """Checkpoints as transformers writes them."""
    return {
        family: load_file(f"{model_folders[family]}/model.safetensors")
        for family in FAMILIES_WITH_EXPERTS
    }


def shard(family: str, state: dict[str, Tensor], first: int = 0, last: int = 4) -> ModelShard:
    layout = LAYOUTS[family]
    found = ModelShard(layout, BlockRange(first, last, 4), torch.float32, torch.device("cpu"))
    found.load(tensor_reader(layout, state, read_state(state), "here"))
    return found


def gather(part: ModelShard, experts: bool = False) -> None:
    runner = BlockRunner(part)
    part.start_curvature(experts=experts)
    for i, sequence in enumerate(TOKENS):
        (hidden,) = runner.forward(i, sequence[None])
        _, gradient, _ = runner.loss(hidden, sequence[None])
        runner.backward(i, [gradient])
    part.stop_curvature()


@pytest.mark.parametrize("family", FAMILIES_WITH_EXPERTS)
def test_a_checkpoint_has_the_names_of_the_experts_linears(
    family: str, states: dict[str, dict[str, Tensor]]
) -> None:
    layout = LAYOUTS[family]
    state = states[family]
    check_checkpoint(layout, {key: tuple(tensor.shape) for key, tensor in state.items()}, "here")
    assert {
        key
        for name in layout.parameters
        if name not in layout.tied
        for key in find_stored(layout, name, state).keys
    } == set(state)


@pytest.mark.parametrize("cuts", [[0, 4], [0, 1, 2, 4]])
@pytest.mark.parametrize("family", FAMILIES_WITH_EXPERTS)
def test_logits_are_the_familys_own(
    family: str, cuts: list[int], states: dict[str, dict[str, Tensor]]
) -> None:
    hidden = TOKENS
    for first, last in itertools.pairwise(cuts):
        part = shard(family, states[family], first, last)
        hidden = torch.cat(BlockRunner(part).infer(hidden))
    with torch.no_grad():
        torch.testing.assert_close(
            part.logits(hidden), tiny_model(family)(TOKENS).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES_WITH_EXPERTS)
def test_gradients_are_the_familys_own(family: str, states: dict[str, dict[str, Tensor]]) -> None:
    """The gradients of all weights of all experts, and of the routers."""
    part = shard(family, states[family])
    models: tuple[Any, Any] = (part.model.requires_grad_(), tiny_model(family))
    for of in models:
        of(TOKENS, labels=TOKENS).loss.backward()
    sparse = FAMILIES[SPARSE_CONFIGS[family].model_type].sparse
    num_compared = 0
    for block in range(4):
        layer, own = (of.model.layers[block].mlp for of in models)
        if not hasattr(own, "experts"):
            continue
        router = sparse.router.rpartition(".")[2]
        for name, parameter in layer.get_submodule(router).named_parameters():
            torch.testing.assert_close(
                parameter.grad, own.get_parameter(f"{router}.{name}").grad, rtol=1e-4, atol=1e-6
            )
        whole = {name: parameter.grad for name, parameter in own.experts.named_parameters()}
        for number in range(len(layer.experts)):
            expert = layer.experts[number]
            num_compared = num_compared + 1
            for name, parameter in expert.named_parameters():
                linear, _, kind = name.partition(".")
                suffix = "" if kind == "weight" else "_bias"
                rows = slice(None)
                other = whole[
                    ("down_proj" if linear == sparse.linears.consumer else "gate_up_proj") + suffix
                ][number]
                if sparse.stacked:  # [inputs, outputs], the producers' in turns
                    other = other.T if other.dim() == 2 else other
                    rows = (
                        slice(None)
                        if linear == sparse.linears.consumer
                        else slice(sparse.linears.producers.index(linear), None, 2)
                    )
                elif linear != sparse.linears.consumer:
                    half = len(other) // 2
                    rows = (
                        slice(0, half)
                        if linear == sparse.linears.producers[0]
                        else slice(half, None)
                    )
                # no token came here
                one = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.testing.assert_close(one, other[rows], rtol=0, atol=1e-5)
    assert num_compared >= 8


def test_routed_tokens_of_every_expert() -> None:
    numbers = torch.tensor([[2, 0], [0, 3], [3, 2]])
    found = {
        number: list(zip(token.tolist(), place.tolist(), strict=True))
        for number, token, place in routed(numbers, 5)
    }
    assert found == {0: [(0, 1), (1, 0)], 2: [(0, 0), (2, 1)], 3: [(1, 1), (2, 0)]}


def layer_without(mixture: Mixture, layer: nn.Module, x: Tensor, expert: int | None) -> Tensor:
    """Return the output of a layer whose router has no such expert."""
    before = mixture.router.kept
    mixture.router.kept = before.clone()
    if expert is not None:
        mixture.router.kept[expert] = False
    with torch.no_grad():
        output = layer(x[None])
    mixture.router.kept = before
    whole: Tensor = output[0] if isinstance(output, tuple) else output
    return whole[0]


WITHOUT_GROUPS = [family for family in FAMILIES_WITH_EXPERTS if family != "deepseek_v3"]


@pytest.mark.parametrize("family", WITHOUT_GROUPS)
def test_what_a_removal_changes_is_the_difference_of_two_layers(
    family: str, states: dict[str, dict[str, Tensor]]
) -> None:
    part = shard(family, states[family])
    place, mixture = max(part.mixtures.items())
    mixture.router.kept[0] = False  # as after an earlier shot
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(2))
    _, weights, numbers = mixture.router(x)
    found = removals(mixture, x, numbers, weights)
    experts = found.experts
    tokens = found.tokens
    changes = found.changes
    norms = found.norms
    assert not (experts == 0).any()
    assert len(experts) == numbers.numel()
    dense = layer_without(mixture, mixture.layer, x, None)
    for expert in experts.unique().tolist():
        mine = experts == expert
        assert sorted(tokens[mine].tolist()) == sorted(
            (numbers == expert).any(dim=1).nonzero()[:, 0].tolist()
        )
        change = layer_without(mixture, mixture.layer, x, expert) - dense
        torch.testing.assert_close(changes[mine], change[tokens[mine]], rtol=1e-4, atol=1e-5)
        others = torch.ones(len(x), dtype=torch.bool)
        others[tokens[mine]] = False
        rises = (
            0.0 if found.rises is None else found.rises[others, expert, None] * found.output[others]
        )
        torch.testing.assert_close(
            change[others] - rises, torch.zeros_like(change[others]), rtol=0, atol=1e-5
        )
        with torch.no_grad():
            norm = mixture.experts[expert](x[tokens[mine]]).norm(dim=1)
        torch.testing.assert_close(
            norms[mine],
            norm * (weights * (numbers == expert)).sum(dim=1)[tokens[mine]],
            rtol=1e-4,
            atol=1e-5,
        )
    assert (found.rises is None) == (family not in ("olmoe", "qwen2_moe")), (
        "their weights are not normalised"
    )
    assert place == 3


@pytest.mark.parametrize("family", WITHOUT_GROUPS)
def test_sums_of_a_pass_give_the_predicted_increase_of_each_removal(
    family: str, states: dict[str, dict[str, Tensor]]
) -> None:
    """Mean over all tokens of g^T dy + 1/2 (g^T dy)^2, with g by autograd on the family's own
    model.
    """
    part = shard(family, states[family])
    gather(part, experts=True)
    for place, mixture in part.mixtures.items():
        model = tiny_model(family)
        inputs = list[Tensor]()
        gradients = list[Tensor]()
        layer = model.model.layers[place].mlp
        layer.register_forward_pre_hook(
            lambda m, i, to=inputs: to.append(i[0].detach().flatten(0, 1))
        )
        layer.register_full_backward_hook(
            lambda m, gi, go, to=gradients: to.append(go[0].flatten(0, 1))
        )
        logits = model(TOKENS).logits
        nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum"
        ).backward()
        x = inputs[0]
        g = gradients[0]
        dense = layer_without(mixture, mixture.layer, x, None)
        wanted = []
        for expert in range(len(mixture.experts)):
            change = layer_without(mixture, mixture.layer, x, expert) - dense
            gains = (change * g).sum(dim=1).double()
            wanted.append((float(gains.mean()), 0.5 * float(gains.square().mean())))
        first, second = torch.tensor(wanted, dtype=torch.float64).T
        found = rerouting_costs(part.expert_sums[place], mixture.num_chosen, first_order=False)
        torch.testing.assert_close(found, second, rtol=2e-3, atol=1e-9)
        found = rerouting_costs(part.expert_sums[place], mixture.num_chosen)
        torch.testing.assert_close(found, first + second, rtol=2e-3, atol=1e-7)
        assert (
            float(part.expert_sums[place].of("tokens").sum()) == TOKENS.numel() * mixture.num_chosen
        )


@pytest.mark.parametrize("family", FAMILIES_WITH_EXPERTS)
def test_factors_of_an_expert_are_of_its_tokens_and_shrunk_towards_the_layer(
    family: str, states: dict[str, dict[str, Tensor]]
) -> None:
    part = shard(family, states[family])
    reached: dict[str, list[Tensor]] = {}
    for name, module in part.linears.items():
        module.register_forward_pre_hook(
            lambda m, i, name=name: reached.setdefault(name, []).append(i[0].detach())
        )
    gather(part)
    experts = LAYOUTS[family].expert_sets[-1]
    consumers = [linears[-1] for linears in experts.linears]
    inputs = {
        name: torch.cat(reached[name])
        if name in reached
        else torch.zeros(0, part.linears[name].in_features)
        for name in consumers
    }
    num_tokens = sum(map(len, inputs.values()))
    assert num_tokens == TOKENS.numel() * LAYOUTS[family].num_active_experts
    width = next(iter(inputs.values())).shape[1]
    mean = (
        torch.eye(width)
        * sum(float(a.square().sum()) for a in inputs.values())
        / num_tokens
        / width
    )
    for name, own in inputs.items():
        has_bias = LAYOUTS[family].shapes[name].has_bias
        a = own
        prior = mean
        if has_bias:
            a = torch.cat([own, torch.ones(len(own), 1)], dim=1)
            prior = torch.block_diag(mean, torch.ones(1, 1))
        factors = part.factors(name).dense()
        wanted = (a.T @ a + 256 * prior) / (len(a) + 256)
        torch.testing.assert_close(factors.A, wanted, rtol=1e-4, atol=1e-6)
        assert factors.num_tokens == 1
        assert float(factors.G.diagonal().min()) > 0


@pytest.mark.parametrize("family", FAMILIES_WITH_EXPERTS)
def test_curvature_of_a_model_in_memory(family: str, states: dict[str, dict[str, Tensor]]) -> None:
    """Sums over the tokens of each expert, equal to those of the checkpoint; all tokens together
    are those of the layer.
    """
    found = curvature(tiny_model(family), TOKENS)
    part = shard(family, states[family])
    gather(part)
    for name, factors in found.items():
        own = part.own_factors(name).dense()
        assert factors.num_tokens == own.num_tokens
        torch.testing.assert_close(factors.A, own.A, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(factors.G, own.G, rtol=1e-3, atol=1e-8)
    experts = LAYOUTS[family].expert_sets[-1]
    total = sum(found[linears[-1]].num_tokens for linears in experts.linears)
    assert total == TOKENS.numel() * LAYOUTS[family].num_active_experts


def test_copies_of_a_router_do_not_change_it(states: dict[str, dict[str, Tensor]]) -> None:
    part = shard("glm4_moe", states["glm4_moe"])
    router = part.mixtures[1].router
    before = copy.deepcopy(router.module.state_dict())
    kept = torch.tensor([True, False, True, True])
    _, weights, numbers = router.among(torch.randn(5, 32), kept)
    assert set(numbers.flatten().tolist()) <= {0, 2, 3}
    torch.testing.assert_close(weights.sum(dim=1), torch.full((5,), 1.5), rtol=1e-5, atol=1e-5)
    assert all(
        torch.equal(before[name], value) for name, value in router.module.state_dict().items()
    )
