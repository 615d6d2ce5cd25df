from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.checkpoint import read_state, tensor_reader
from ray_surgeon.models.families import family_of
from ray_surgeon.models.loss import compare_with_dense, next_token_loss, next_tokens, perplexity_of
from ray_surgeon.models.runner import BlockRunner
from ray_surgeon.models.shard import ModelShard
from tests.conftest import CONFIGS, LAYOUTS, VOCABULARY, tiny_model

TOKENS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
FAMILIES = sorted(CONFIGS)


def reader(family: str) -> Callable[[str], Tensor]:
    state = tiny_model(family).state_dict()
    return tensor_reader(LAYOUTS[family], state, read_state(state), "here")


def shards(family: str, cuts: list[int], dtype: torch.dtype = torch.float32) -> list[ModelShard]:
    found = []
    for first, last in itertools.pairwise(cuts):
        shard = ModelShard(LAYOUTS[family], BlockRange(first, last, 4), dtype, torch.device("cpu"))
        shard.load(reader(family))
        found.append(shard)
    return found


def gather(parts: list[ModelShard], tokens: Tensor) -> None:
    runners = [BlockRunner(part) for part in parts]
    for part in parts:
        part.start_curvature()
    for i, sequence in enumerate(tokens):
        hidden = sequence[None]
        for runner in runners:
            (hidden,) = runner.forward(i, hidden)
        _, gradient, _ = runners[-1].loss(hidden, sequence[None])
        for runner in reversed(runners):
            (gradient,) = runner.backward(i, [gradient])
    for part in parts:
        part.stop_curvature()


@pytest.mark.parametrize("cuts", [[0, 4], [0, 1, 4], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_together_are_the_whole_model(family: str, cuts: list[int]) -> None:
    parts = shards(family, cuts)
    hidden = TOKENS
    for part in parts:
        hidden = torch.cat(BlockRunner(part).infer(hidden))
    model = tiny_model(family)
    with torch.no_grad():
        torch.testing.assert_close(
            parts[-1].logits(hidden), model(TOKENS).logits, rtol=1e-5, atol=1e-5
        )
        loss = model(TOKENS, labels=TOKENS).loss
    nll, _ = next_token_loss(hidden, parts[-1].head_weight, TOKENS)
    assert float(nll.sum()) / (2 * 23) == pytest.approx(float(loss.detach()), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_are_those_of_autograd_on_the_whole_model(family: str) -> None:
    parts = shards(family, [0, 2, 4])
    gather(parts, TOKENS)
    model = tiny_model(family)
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for shape in LAYOUTS[family].linears:
        module = model.get_submodule(shape.name)
        module.register_forward_hook(
            lambda m, i, o, name=shape.name: inputs.__setitem__(name, i[0].detach())
        )
        module.register_full_backward_hook(
            lambda m, gi, go, name=shape.name: gradients.__setitem__(name, go[0].detach())
        )
    logits = model(TOKENS).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCABULARY), TOKENS[:, 1:].reshape(-1), reduction="sum"
    ).backward()
    for shape in LAYOUTS[family].linears:
        a = inputs[shape.name].flatten(0, -2)
        g = gradients[shape.name].flatten(0, -2)
        if shape.has_bias:
            a = torch.cat([a, torch.ones(len(a), 1)], dim=1)
        part = parts[0] if shape.block < 2 else parts[1]
        factors = part.factors(shape.name)
        assert factors.num_tokens == TOKENS.numel()
        dense = factors.dense()
        torch.testing.assert_close(dense.A, a.T @ a, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dense.G, g.T @ g, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_do_not_depend_on_the_cuts(family: str) -> None:
    whole = shards(family, [0, 4])
    cut = shards(family, [0, 1, 3, 4])
    gather(whole, TOKENS)
    gather(cut, TOKENS)
    for part in cut:
        for name in part.linears:
            one = whole[0].factors(name)
            other = part.factors(name)
            assert torch.equal(one.A.flat, other.A.flat)
            assert torch.equal(one.G.flat, other.G.flat)


def test_linears_that_read_one_input_share_one_A() -> None:
    (part,) = shards("llama", [0, 4])
    gather([part], TOKENS)
    prefix = "model.layers.2."
    q, k, v = (part.factors(f"{prefix}self_attn.{name}_proj") for name in "qkv")
    assert q.A is k.A is v.A
    assert part.factors(f"{prefix}mlp.gate_proj").A is part.factors(f"{prefix}mlp.up_proj").A
    assert k.G.n == 16
    assert q.G.n == 32


def test_weights_need_no_gradient() -> None:
    (part,) = shards("llama", [0, 4])
    gather([part], TOKENS)
    assert all(not p.requires_grad and p.grad is None for p in part.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_round_trip_with_bias_as_last_column(family: str) -> None:
    (part,) = shards(family, [0, 4])
    shapes = {s.name: s for s in LAYOUTS[family].linears}
    assert list(part.linears) == list(shapes)
    for name, shape in shapes.items():
        W = part.weight(name)
        assert W.shape == (shape.num_rows, shape.num_columns)
        part.set_weight(name, W * 2)
        torch.testing.assert_close(part.weight(name), W * 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_number_of_parameters_counts_tied_ones_once(family: str) -> None:
    assert LAYOUTS[family].num_parameters == sum(p.numel() for p in tiny_model(family).parameters())


def test_loss_gradient_is_autograd_and_sampled_labels_are_drawn_from_the_model() -> None:
    hidden = torch.randn(2, 150, 8, dtype=torch.float32)
    weight = torch.randn(11, 8)
    tokens = torch.randint(0, 11, (2, 150))
    leaf = hidden.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(
        (leaf @ weight.T)[:, :-1].reshape(-1, 11), tokens[:, 1:].reshape(-1), reduction="sum"
    )
    (expected,) = torch.autograd.grad(loss, leaf)
    nll, gradient = next_token_loss(hidden, weight, tokens, with_gradient=True)
    assert float(nll.sum()) == pytest.approx(float(loss.detach()), rel=1e-5)
    for one, sequence, labels in zip(nll, hidden, tokens, strict=True):
        own = torch.nn.functional.cross_entropy(
            (sequence @ weight.T)[:-1], labels[1:], reduction="sum"
        )
        assert float(one) == pytest.approx(float(own), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)

    sums = torch.zeros_like(hidden)
    for seed in range(400):
        _, sampled = next_token_loss(
            hidden,
            weight,
            tokens,
            with_gradient=True,
            generator=torch.Generator().manual_seed(seed),
        )
        assert sampled is not None
        sums += sampled
    assert float((sums / 400).norm() / expected.norm()) < 0.1, "the sampled gradient has mean zero"


def test_a_token_is_drawn_where_the_cumulated_probabilities_pass_the_chance() -> None:
    """Of probabilities 0, 1/4, 3/4 and 0, and of 0, 1/10, 9/10 and 0 at half of the temperature."""
    head = torch.tensor([[-300.0], [0.0], [math.log(3)], [-300.0]])
    for temperature, bound in ((1.0, 0.25), (0.5, 0.1)):
        chances = torch.tensor([0.0, bound - 1e-4, bound + 1e-4, 1 - 2**-24])
        assert next_tokens(torch.ones(4, 1), head, chances, temperature).tolist() == [1, 1, 2, 2]


def test_a_perplexity_is_a_number_infinite_or_an_error() -> None:
    assert perplexity_of(math.log(20.0)) == pytest.approx(20)
    assert perplexity_of(699.0) == math.exp(699)
    assert perplexity_of(1e4) == perplexity_of(math.inf) == math.inf
    with pytest.raises(FloatingPointError, match="not a number"):
        perplexity_of(math.nan)


def test_divergence_from_the_dense_model_and_its_gradient_are_those_of_autograd() -> None:
    hidden = torch.randn(2, 150, 8)
    dense = torch.randn(2, 150, 8)
    weight = torch.randn(11, 8)
    tokens = torch.randint(0, 11, (2, 150))
    leaf = hidden.double().requires_grad_()
    exact = weight.double()
    log_p, log_q = (torch.log_softmax(h @ exact.T, dim=-1)[:, :-1] for h in (dense.double(), leaf))
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(
        dim=(1, 2)
    )
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    found = compare_with_dense(hidden, dense, tokens, weight, with_gradient=True)
    torch.testing.assert_close(found.divergence, expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.gradient, gradient.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found.nll,
        next_token_loss(hidden, weight, tokens, with_gradient=False)[0],
        rtol=1e-6,
        atol=0,
    )
    same = compare_with_dense(hidden, hidden, tokens, weight)
    assert same.divergence.abs().max() < 1e-4
    assert same.gradient is None


def test_unknown_family_is_refused_with_the_known_ones() -> None:
    from transformers import BertConfig

    with pytest.raises(ValueError, match=r"'bert'.*gpt2, gpt_oss, llama"):
        family_of(BertConfig())


def test_a_shard_leaves_the_configuration_of_the_model_as_it_is() -> None:
    before = LAYOUTS["llama"].config.to_dict()
    shards("llama", [0, 4], dtype=torch.bfloat16)
    assert LAYOUTS["llama"].config.to_dict() == before
