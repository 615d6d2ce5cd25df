"""Losses of counted tokens, against dense formulas in float64, and factors against autograd."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ray_surgeon.distributed import passes
from ray_surgeon.distributed.cluster import LocalCluster
from ray_surgeon.distributed.dense_states import CALIBRATION
from ray_surgeon.distributed.microbatch import Labels
from ray_surgeon.distributed.passes import compared, forward_and_backward, measure
from ray_surgeon.factors.collector import WantedFactors, gather_curvature
from ray_surgeon.models import loss as losses
from ray_surgeon.models.loss import (
    Predicted,
    compare_with_dense,
    next_token_loss,
    next_tokens,
)
from ray_surgeon.pruning.experts import ExpertSumsBeside
from tests.conftest import VOCABULARY
from tests.integration.runs import loaded
from tests.models.test_shard import watch

T = 70


def a_text() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states of a model and of the dense one, a head, tokens and counts.

    Hidden states are [5, T, 8], the head [11, 8], tokens and counts [5, T].
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, T, 8, generator=generator)
    dense = hidden + 0.5 * torch.randn(5, T, 8, generator=generator)
    head = torch.randn(11, 8, generator=generator)
    tokens = torch.randint(0, 11, (5, T), generator=generator)
    counts = torch.rand(5, T, generator=generator) < 0.4
    counts[3] = False
    counts[4] = True
    return hidden, dense, head, tokens, counts


def sampled(which: Tensor | None) -> Any:
    """Return the gradient with labels drawn from the model."""
    hidden, _, head, tokens, _ = a_text()
    predicted = Predicted(tokens, which, torch.Generator().manual_seed(5))
    return next_token_loss(hidden, head, predicted, with_gradient=True)[1]


def nll_of(logits: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    """Return the sums over the counted tokens of each sequence."""
    predicted = logits[:, :-1].transpose(1, 2)
    nll = torch.nn.functional.cross_entropy(predicted, tokens[:, 1:], reduction="none")
    return (nll * counts[:, 1:]).sum(dim=1)


def assert_sums(found: Tensor | None, expected: Tensor) -> None:
    """Compare sums that are made in float32."""
    assert found is not None
    torch.testing.assert_close(found, expected.detach().double(), rtol=1e-5, atol=1e-9)


def test_losses_and_gradients_of_counted_tokens() -> None:
    """One sequence has no counted tokens, another one only counted ones."""
    hidden, dense, head, tokens, counts = a_text()
    leaf = hidden.double().requires_grad_()
    logits = leaf @ head.double().T
    expected = nll_of(logits, tokens, counts)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf, retain_graph=True)
    predicted = Predicted(tokens, counts)
    nll, found = next_token_loss(hidden, head, predicted, with_gradient=True)
    assert_sums(nll, expected)
    assert found is not None
    torch.testing.assert_close(found.double(), gradient, rtol=1e-4, atol=1e-5)
    aside = torch.ones_like(counts)
    aside[:, :-1] = ~counts[:, 1:]
    assert not found[aside].any(), "also of the last position, which predicts nothing"

    options: dict[str, Any] = {"with_gradient": True, "with_acceptance": True}
    comparison = compare_with_dense(hidden, dense, predicted, head, **options)
    q = logits[:, :-1].softmax(dim=-1)
    p = (dense.double() @ head.double().T)[:, :-1].softmax(dim=-1)
    weights = counts[:, 1:]
    divergence = ((p * (p / q).log()).sum(dim=-1) * weights).sum(dim=1)
    (gradient,) = torch.autograd.grad(divergence.sum(), leaf)
    assert_sums(comparison.divergence, divergence)
    assert comparison.gradient is not None
    torch.testing.assert_close(
        comparison.gradient.double(), gradient, rtol=1e-4, atol=1e-5
    )
    assert_sums(
        comparison.acceptance, (torch.minimum(p, q).sum(dim=-1) * weights).sum(dim=1)
    )
    agreement = ((p.argmax(dim=-1) == q.argmax(dim=-1)) * weights).sum(dim=1)
    assert_sums(comparison.agreement, agreement)
    assert 0 < int(agreement.sum()) < int(weights.sum()), "some agree"
    torch.testing.assert_close(comparison.nll, nll, rtol=1e-6, atol=1e-9)


def test_dense_model_with_its_own_head() -> None:
    """The hidden size differs. Giving the same head twice changes only the rounding of sums."""
    hidden, dense, head, tokens, counts = a_text()
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(5, T, 12, generator=generator)
    other = torch.randn(11, 12, generator=generator)
    leaf = hidden.double().requires_grad_()
    log_q = (leaf @ head.double().T)[:, :-1].log_softmax(dim=-1)
    log_p = (wide.double() @ other.double().T)[:, :-1].log_softmax(dim=-1)
    divergence = ((log_p.exp() * (log_p - log_q)).sum(dim=-1) * counts[:, 1:]).sum(dim=1)
    (gradient,) = torch.autograd.grad(divergence.sum(), leaf)
    predicted = Predicted(tokens, counts)
    found = compare_with_dense(hidden, wide, predicted, head, other, with_gradient=True)
    assert_sums(found.divergence, divergence)
    assert found.gradient is not None
    torch.testing.assert_close(found.gradient.double(), gradient, rtol=1e-4, atol=1e-5)
    ways = [
        compare_with_dense(hidden, dense, predicted, head, own) for own in (None, head)
    ]
    torch.testing.assert_close(
        ways[0].divergence, ways[1].divergence, rtol=1e-5, atol=1e-9
    )


def test_losses_of_a_large_vocabulary_are_precise() -> None:
    """Its exponentials share errors, which do not cancel in a sum."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 40, 16, generator=generator)
    head = torch.randn(20_000, 16, generator=generator)
    tokens = torch.randint(0, 20_000, (1, 40), generator=generator)
    every = torch.ones_like(tokens, dtype=torch.bool)
    exact = nll_of(hidden.double() @ head.double().T, tokens, every)
    predicted = Predicted(tokens)
    of_text, _ = next_token_loss(hidden, head, predicted)
    beside = compare_with_dense(hidden, hidden, predicted, head)
    for found in (of_text, beside.nll):
        torch.testing.assert_close(found / 39, exact / 39, rtol=0, atol=5e-7)
    assert float(beside.divergence) == 0


def test_counting_all_tokens_changes_no_bit_and_counting_none_gives_zero() -> None:
    hidden, dense, head, tokens, counts = a_text()

    def outcomes(which: Tensor | None) -> list[Any]:
        predicted = Predicted(tokens, which)
        found = compare_with_dense(hidden, dense, predicted, head, with_gradient=True)
        of_text = next_token_loss(hidden, head, predicted, with_gradient=True)
        return [*of_text, sampled(which), found.divergence, found.nll, found.gradient]

    everything = outcomes(torch.ones_like(counts))
    for one, other in zip(outcomes(None), everything, strict=True):
        assert torch.equal(one, other)
    assert not any(outcome.any() for outcome in outcomes(torch.zeros_like(counts)))


def test_sampled_labels_do_not_depend_on_counted_tokens() -> None:
    counts = a_text()[-1]
    expected = sampled(None)[:, :-1] * counts[:, 1:, None]
    torch.testing.assert_close(sampled(counts)[:, :-1], expected, rtol=1e-5, atol=1e-6)


def test_sampled_labels_are_drawn_from_the_model() -> None:
    """The mean of the gradients of one state is zero."""
    hidden, _, head, _, _ = a_text()
    states = hidden[:1, :1].expand(1, 20_001, 8)
    tokens = torch.zeros(1, 20_001, dtype=torch.int64)
    predicted = Predicted(tokens, generator=torch.Generator().manual_seed(0))
    found: Any = next_token_loss(states, head, predicted, with_gradient=True)[1]
    assert found.mean(dim=1).norm() < 0.03 * found.norm(dim=2).mean()


def test_token_is_drawn_by_inverse_transform_sampling() -> None:
    """The probabilities are 0, 1/4, 3/4 and 0; at half the temperature 0, 1/10, 9/10 and 0."""
    head = torch.tensor([[-300.0], [0.0], [math.log(3)], [-300.0]])
    for temperature, bound in ((1.0, 0.25), (0.5, 0.1)):
        chances = torch.tensor([0.0, bound - 1e-4, bound + 1e-4, 1 - 2**-24])
        assert next_tokens(torch.ones(4, 1), head, chances, temperature).tolist() == [
            1,
            1,
            2,
            2,
        ]


def test_perplexity_is_finite_infinite_or_an_error() -> None:
    assert losses.perplexity_of(699.0) == math.exp(699)
    assert losses.perplexity_of(1e4) == losses.perplexity_of(math.inf) == math.inf
    with pytest.raises(FloatingPointError, match="not a number"):
        losses.perplexity_of(math.nan)


# In a cluster of two shards and two replicas

SEQUENCES = np.random.default_rng(2).integers(0, VOCABULARY, (5, 24))
COUNTS = np.random.default_rng(3).random((5, 24)) < 0.5
NUM_TOKENS = int(COUNTS[:, 1:].sum())


@pytest.fixture(scope="module")
def cluster(model_folders: dict[str, Path]) -> LocalCluster:
    return loaded(model_folders["llama"], 2, 2)


def gathered(
    cluster: LocalCluster, counts: np.ndarray | None, num_backward: int | None = None
) -> tuple[float, dict[str, Any]]:
    """Return the loss of a pass, and linear -> A, G and the number of tokens, from its owner."""
    wanted = WantedFactors(num_backward=num_backward)
    loss = gather_curvature(cluster, SEQUENCES, wanted, counts=counts)
    found = {}
    for worker in cluster.workers.values():
        for name in filter(worker.owns, worker.shard.linears):
            factors = worker.shard.own_factors(name).dense()
            found[name] = factors.A, factors.G, factors.num_tokens
    return loss, found


def test_factors_of_counted_tokens(
    cluster: LocalCluster, model_folders: dict[str, Path]
) -> None:
    """A of all tokens, and G of the loss of counted tokens, by autograd in float64."""
    loss, found = gathered(cluster, COUNTS)
    model = AutoModelForCausalLM.from_pretrained(
        model_folders["llama"], dtype=torch.float64
    )
    inputs, gradients = watch({name: model.get_submodule(name) for name in found})
    tokens = torch.from_numpy(SEQUENCES)
    counts = torch.from_numpy(COUNTS)
    expected = nll_of(model(tokens).logits, tokens, counts)
    expected.sum().backward()
    assert loss == pytest.approx(float(expected.detach().sum()) / NUM_TOKENS, rel=1e-6)
    for name, (A, G, num_tokens) in found.items():
        assert num_tokens == SEQUENCES.size
        a = inputs[name]
        torch.testing.assert_close(A.double(), a.T @ a, rtol=1e-4, atol=1e-4)
        g = gradients[name]
        of_a_token = g.T @ g * (5 * 23 / NUM_TOKENS)
        atol = 1e-4 * float(of_a_token.abs().max())
        torch.testing.assert_close(G.double(), of_a_token, rtol=1e-3, atol=atol)


def test_factor_G_of_some_sequences_is_scaled_to_all_tokens(
    cluster: LocalCluster,
) -> None:
    _, part = gathered(cluster, COUNTS, num_backward=3)
    only = np.zeros_like(COUNTS)
    numbers = np.random.default_rng(0).permutation(5)[:3]
    only[numbers] = COUNTS[numbers]
    for name, (_, G, _) in gathered(cluster, only)[1].items():
        torch.testing.assert_close(
            part[name][1], G, rtol=1e-4, atol=1e-6 * float(G.abs().max())
        )


def test_pass_without_counted_tokens_is_refused(cluster: LocalCluster) -> None:
    with pytest.raises(ValueError, match="in none of the 5 sequences"):
        gathered(cluster, np.zeros_like(COUNTS))


def test_costs_of_experts_are_means_over_counted_tokens(
    model_folders: dict[str, Path],
) -> None:
    """Sequences that are repeated without counted tokens do not change the costs, nor if half of
    the sequences pass backward.
    """
    cluster = loaded(model_folders["qwen2_moe"])

    def sums(
        sequences: np.ndarray,
        counts: np.ndarray | None = None,
        num_backward: int | None = None,
    ) -> list[Tensor]:
        wanted = WantedFactors(num_backward=num_backward)
        gather_curvature(
            cluster, sequences, wanted, counts=counts, beside=ExpertSumsBeside()
        )
        (worker,) = cluster.workers.values()
        return [one.total.clone() for one in worker.shard.expert_sums.values()]

    once = sums(SEQUENCES)
    drawn = np.sort(np.random.default_rng(0).permutation(10)[:5])
    counts = np.zeros((10, 24), dtype=np.bool_)
    counts[drawn] = True
    twice = np.empty((10, 24), dtype=np.int64)
    twice[drawn] = SEQUENCES
    twice[~counts[:, 0]] = SEQUENCES
    for found in (sums(twice, counts=counts), sums(twice, num_backward=5)):
        for one, other in zip(once, found, strict=True):
            torch.testing.assert_close(other, 2 * one, rtol=1e-4, atol=1e-6)


def test_means_are_over_counted_tokens(model_folders: dict[str, Path]) -> None:
    """All linears are damaged a little between the dense model and its comparisons. Rows of the
    counts are selected by number.
    """
    cluster = loaded(model_folders["llama"], 2, 2)
    perplexity = passes.remember(cluster, "text", SEQUENCES, COUNTS)
    passes.remember(cluster, "(calibration)", SEQUENCES)
    tokens, counts = map(torch.from_numpy, (SEQUENCES, COUNTS))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model_folders["llama"])(
            tokens
        ).logits
    nll = nll_of(logits, tokens, counts)
    assert perplexity == pytest.approx(math.exp(float(nll.sum()) / NUM_TOKENS), rel=1e-4)
    for worker in cluster.workers.values():
        for name in worker.shard.linears:
            worker.shard.set_weight(name, 0.9 * worker.shard.weight(name))
    num_tokens = SEQUENCES.shape[1] - 1
    found = [one["divergence"] for one in compared(cluster, "text", SEQUENCES)]
    measured = measure(cluster, "text", SEQUENCES)
    assert measured.divergence == sum(found) / (num_tokens * len(SEQUENCES)) > 1e-3
    each = passes.divergences_of(cluster, "text", SEQUENCES)
    assert each == [one / num_tokens for one in found]
    for labels in (Labels(), Labels(seed=3), Labels(dense=CALIBRATION)):
        losses = forward_and_backward(cluster, SEQUENCES, labels, counts=COUNTS)
        some = forward_and_backward(
            cluster, SEQUENCES, labels, only=[3, 1], counts=COUNTS
        )
        assert some == [losses[3], losses[1]]
        if labels.dense is None:
            of_text = passes.sequence_losses(cluster, SEQUENCES, COUNTS)
            assert losses == pytest.approx(of_text, rel=1e-6)
