"""Losses of the tokens that count: against the dense formulas in float64, and factors against
autograd on the whole model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ray_surgeon.models.loss import Comparison, compare_with_dense, next_token_loss
from ray_surgeon.runtime.local import LocalCluster
from ray_surgeon.runtime.passes import (
    compared,
    divergences_of,
    measure,
    num_counted,
    remember,
    sequence_losses,
)
from ray_surgeon.runtime.pipelines import forward_and_backward
from ray_surgeon.runtime.wave import Labels
from ray_surgeon.stages.curvature.gather import gather_curvature
from tests.conftest import VOCABULARY
from tests.integration.runs import loaded

T = 70
SUMMED_IN_FLOAT32 = 1e-5
WORKERS = ((1, 1), (3, 1), (2, 2))


def a_text(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states of a model and of the dense one [5, T, 8], a head [11, 8], tokens and
    which count [5, T].
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, T, 8, generator=generator)
    dense = hidden + 0.5 * torch.randn(5, T, 8, generator=generator)
    head = torch.randn(11, 8, generator=generator)
    tokens = torch.randint(0, 11, (5, T), generator=generator)
    counts = torch.rand(5, T, generator=generator) < 0.4
    counts[3] = False
    counts[4] = True
    return hidden.to(dtype), dense.to(dtype), head.to(dtype), tokens, counts


def test_only_the_tokens_that_count_are_in_the_loss_and_its_gradient() -> None:
    hidden, _, head, tokens, counts = a_text()
    leaf = hidden.double().requires_grad_()
    logits = (leaf @ head.double().T)[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    expected = (nll * counts[:, 1:]).sum(dim=1)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    found, found_gradient = next_token_loss(hidden, head, tokens, with_gradient=True, counts=counts)
    torch.testing.assert_close(found, expected.detach(), rtol=SUMMED_IN_FLOAT32, atol=1e-9)
    assert found_gradient is not None
    torch.testing.assert_close(found_gradient.double(), gradient, rtol=1e-4, atol=1e-5)
    aside = torch.ones_like(counts)
    aside[:, :-1] = ~counts[:, 1:]
    assert not found_gradient[aside].any(), "also of the last position, which predicts nothing"


def test_divergence_acceptance_and_agreement_are_those_of_the_tokens_that_count() -> None:
    hidden, dense, head, tokens, counts = a_text()
    leaf = hidden.double().requires_grad_()
    q, p = ((h @ head.double().T)[:, :-1].softmax(dim=-1) for h in (leaf, dense.double()))
    weights = counts[:, 1:]
    divergence = ((p * (p / q).log()).sum(dim=-1) * weights).sum(dim=1)
    (gradient,) = torch.autograd.grad(divergence.sum(), leaf, retain_graph=True)
    found = compare_with_dense(
        hidden, dense, tokens, head, with_gradient=True, counts=counts, with_acceptance=True
    )
    torch.testing.assert_close(
        found.divergence, divergence.detach(), rtol=SUMMED_IN_FLOAT32, atol=1e-9
    )
    assert found.gradient is not None
    assert found.acceptance is not None
    assert found.agreement is not None
    torch.testing.assert_close(found.gradient.double(), gradient, rtol=1e-4, atol=1e-5)
    acceptance = (torch.minimum(p, q).sum(dim=-1) * weights).sum(dim=1).detach()
    torch.testing.assert_close(found.acceptance, acceptance, rtol=SUMMED_IN_FLOAT32, atol=1e-9)
    agreement = ((p.argmax(dim=-1) == q.argmax(dim=-1)) * weights).sum(dim=1)
    assert found.agreement.tolist() == agreement.tolist()
    assert 0 < float(agreement.sum()) < int(weights.sum()), "some agree"
    assert found.acceptance.dtype == found.agreement.dtype == torch.float64
    expected_nll = next_token_loss(hidden, head, tokens, with_gradient=False, counts=counts)[0]
    torch.testing.assert_close(found.nll, expected_nll, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_accepts_all_that_it_says_itself(dtype: torch.dtype) -> None:
    hidden, _, head, tokens, counts = a_text(dtype)
    found = compare_with_dense(hidden, hidden, tokens, head, counts=counts, with_acceptance=True)
    num_tokens = counts[:, 1:].sum(dim=1).tolist()
    assert found.acceptance is not None
    assert found.agreement is not None
    assert found.acceptance.tolist() == found.agreement.tolist() == num_tokens
    assert not found.divergence.any()


def outcomes(counts: Tensor | None) -> list[Tensor | None]:
    hidden, dense, head, tokens, _ = a_text()
    seeded = torch.Generator().manual_seed(3)
    compared: Comparison = compare_with_dense(
        hidden, dense, tokens, head, with_gradient=True, counts=counts
    )
    return [
        *next_token_loss(hidden, head, tokens, with_gradient=True, counts=counts),
        *next_token_loss(hidden, head, tokens, with_gradient=True, generator=seeded, counts=counts),
        compared.divergence,
        compared.nll,
        compared.gradient,
    ]


def test_if_all_tokens_count_every_bit_is_as_without_counts() -> None:
    everything = torch.ones(5, T, dtype=torch.bool)
    for one, other in zip(outcomes(None), outcomes(everything), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_labels_that_a_token_draws_do_not_depend_on_which_tokens_count() -> None:
    hidden, _, head, tokens, counts = a_text()

    def gradient(which: Tensor | None) -> Tensor:
        seeded = torch.Generator().manual_seed(5)
        found = next_token_loss(
            hidden, head, tokens, with_gradient=True, generator=seeded, counts=which
        )[1]
        assert found is not None
        return found[:, :-1]

    torch.testing.assert_close(
        gradient(counts), gradient(None) * counts[:, 1:, None], rtol=1e-5, atol=1e-6
    )


def test_of_no_token_the_loss_is_nothing() -> None:
    hidden, dense, head, tokens, counts = a_text()
    none = torch.zeros_like(counts)
    nll, gradient = next_token_loss(hidden, head, tokens, with_gradient=True, counts=none)
    assert gradient is not None
    assert not nll.any()
    assert not gradient.any()
    assert not compare_with_dense(hidden, dense, tokens, head, counts=none).divergence.any()


def test_the_number_of_tokens_leaves_out_first_ones() -> None:
    sequences = np.zeros((3, 5), dtype=np.int64)
    counts = np.array([[1, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0, 1, 1, 1, 1]], dtype=np.bool_)
    assert num_counted(sequences) == 12
    assert num_counted(sequences, only=[0, 2]) == 8
    assert num_counted(sequences, counts) == 6
    assert num_counted(sequences, counts, [2, 1]) == 4
    assert num_counted(sequences, counts, range(1)) == 2
    assert num_counted(sequences, counts, []) == 0


# In a cluster

SEQUENCES = np.random.default_rng(2).integers(0, VOCABULARY, (5, 24))
COUNTS = np.random.default_rng(3).random((5, 24)) < 0.5


def factors_of(cluster: LocalCluster) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Return linear -> A, G and the number of tokens, from its owner."""
    found = {}
    for worker in cluster.workers.values():
        for name in filter(worker.owns, worker.shard.linears):
            factors = worker.shard.own_factors(name).dense()
            found[name] = factors.A, factors.G, factors.num_tokens
    return found


def moments(
    model: torch.nn.Module, names: list[str], counts: np.ndarray
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return linear -> A of all tokens and G of the loss of those that count, by autograd in
    float64.
    """
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def watch(name: str) -> None:
        module: Any = model.get_submodule(name)
        module.register_forward_hook(lambda m, i, o: inputs.__setitem__(name, i[0].detach()))
        module.register_full_backward_hook(
            lambda m, gi, go: gradients.__setitem__(name, go[0].detach())
        )

    for name in names:
        watch(name)
    tokens = torch.from_numpy(SEQUENCES)
    logits = model(tokens).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    (nll * torch.from_numpy(counts)[:, 1:]).sum().backward()
    flat = {name: (inputs[name].flatten(0, -2), gradients[name].flatten(0, -2)) for name in names}
    return {name: (a.T @ a, g.T @ g) for name, (a, g) in flat.items()}


@pytest.mark.parametrize("workers", WORKERS)
def test_factors_are_of_the_tokens_that_count(
    workers: tuple[int, int], model_folders: dict[str, Path]
) -> None:
    cluster = loaded(model_folders["llama"], *workers)
    loss = gather_curvature(cluster, SEQUENCES, "kfac", counts=COUNTS)
    found = factors_of(cluster)
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"], dtype=torch.float64)
    num_tokens = num_counted(SEQUENCES, COUNTS)
    expected = moments(model, list(found), COUNTS)
    for name, (A, G, of_all) in found.items():
        assert of_all == SEQUENCES.size
        torch.testing.assert_close(A.double(), expected[name][0], rtol=1e-4, atol=1e-4)
        G_of_a_token = expected[name][1] * (5 * 23 / num_tokens)
        torch.testing.assert_close(
            G.double(), G_of_a_token, rtol=1e-3, atol=1e-4 * float(G_of_a_token.abs().max())
        )
    assert loss == pytest.approx(
        sum(sequence_losses(cluster, SEQUENCES, COUNTS)) / num_tokens, rel=1e-6
    )


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("options", [{}, {"label_seed": 4}, {"num_backward": 3}], ids=str)
def test_factors_are_the_same_bits_if_all_tokens_count(
    workers: tuple[int, int], options: dict[str, Any], model_folders: dict[str, Path]
) -> None:
    cluster = loaded(model_folders["llama"], *workers)
    losses = []
    factors = []
    for counts in (None, np.ones_like(COUNTS)):
        losses.append(gather_curvature(cluster, SEQUENCES, "kfac", counts=counts, **options))
        factors.append(factors_of(cluster))
    assert losses[0] == losses[1]
    for name, (A, G, num_tokens) in factors[0].items():
        assert torch.equal(A, factors[1][name][0])
        assert torch.equal(G, factors[1][name][1])
        assert num_tokens == factors[1][name][2]


def test_gradients_of_a_part_of_the_sequences_are_brought_to_all_tokens(
    model_folders: dict[str, Path],
) -> None:
    cluster = loaded(model_folders["llama"])
    gather_curvature(cluster, SEQUENCES, "kfac", counts=COUNTS, num_backward=3)
    part = factors_of(cluster)
    numbers = np.sort(np.random.default_rng(0).permutation(5)[:3])
    only = np.zeros_like(COUNTS)
    only[numbers] = COUNTS[numbers]
    gather_curvature(cluster, SEQUENCES, "kfac", counts=only)
    for name, (_, G, _) in factors_of(cluster).items():
        torch.testing.assert_close(part[name][1], G, rtol=1e-4, atol=1e-6 * float(G.abs().max()))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("num_backward", [None, 5])
def test_costs_of_experts_are_per_token_that_counts(
    num_backward: int | None, family: str, model_folders: dict[str, Path]
) -> None:
    """Twice the same sequences, of which once nothing counts, cost the same as once; likewise if
    half of them pass backward.
    """
    cluster = loaded(model_folders[family])

    def sums(
        sequences: np.ndarray, counts: np.ndarray | None, num_backward: int | None
    ) -> list[Tensor]:
        gather_curvature(
            cluster, sequences, "kfac", counts=counts, experts=True, num_backward=num_backward
        )
        (worker,) = cluster.workers.values()
        return [one.total.clone() for one in worker.shard.expert_sums.values()]

    once = sums(SEQUENCES, None, None)
    drawn = np.sort(np.random.default_rng(0).permutation(10)[:5])
    rest = sorted(set(range(10)) - set(drawn.tolist()))
    twice = np.empty((10, 24), dtype=np.int64)
    twice[drawn] = twice[rest] = SEQUENCES
    counts = np.zeros((10, 24), dtype=np.bool_)
    counts[drawn] = True
    found = sums(twice, counts, None) if num_backward is None else sums(twice, None, num_backward)
    for one, other in zip(once, found, strict=True):
        torch.testing.assert_close(other, 2 * one, rtol=1e-4, atol=1e-6)


def test_a_pass_in_which_no_token_counts_is_refused(model_folders: dict[str, Path]) -> None:
    cluster = loaded(model_folders["llama"])
    with pytest.raises(ValueError, match="in none of the 5 sequences"):
        gather_curvature(cluster, SEQUENCES, "kfac", counts=np.zeros_like(COUNTS))


@pytest.mark.parametrize("workers", WORKERS)
def test_means_of_an_evaluation_are_over_the_tokens_that_count(
    workers: tuple[int, int], model_folders: dict[str, Path]
) -> None:
    cluster = loaded(model_folders["llama"], *workers)
    num_tokens = num_counted(SEQUENCES, COUNTS)
    perplexity = remember(cluster, "text", SEQUENCES, COUNTS)
    with torch.no_grad():
        tokens = torch.from_numpy(SEQUENCES)
        model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
        logits = model(tokens).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    weights = torch.from_numpy(COUNTS)[:, 1:]
    assert perplexity == pytest.approx(float(((nll * weights).sum() / num_tokens).exp()), rel=1e-4)
    change(cluster)
    measured = measure(cluster, "text", SEQUENCES, COUNTS)
    found = compared(cluster, "text", SEQUENCES, COUNTS)
    assert measured.divergence == sum(one.divergence for one in found) / num_tokens > 1e-3
    per_window = divergences_of(cluster, "text", SEQUENCES, COUNTS)
    assert per_window == [
        one.divergence / int(own) for one, own in zip(found, COUNTS[:, 1:].sum(axis=1), strict=True)
    ]
    whole = np.ones_like(COUNTS)
    assert measure(cluster, "text", SEQUENCES, whole) == measure(cluster, "text", SEQUENCES)
    assert divergences_of(cluster, "text", SEQUENCES, whole) == divergences_of(
        cluster, "text", SEQUENCES
    )


def change(cluster: LocalCluster) -> None:
    """Damage the weights of every linear a little."""
    for worker in cluster.workers.values():
        for name in worker.shard.linears:
            worker.shard.set_weight(name, 0.9 * worker.shard.weight(name))


@pytest.mark.parametrize("labels", [Labels(), Labels(seed=3), Labels(of_dense_model=True)])
def test_rows_of_the_counts_are_taken_by_number(
    labels: Labels, model_folders: dict[str, Path]
) -> None:
    cluster = loaded(model_folders["llama"], 2, 2)
    remember(cluster, "(calibration)", SEQUENCES)
    change(cluster)
    whole = forward_and_backward(cluster, SEQUENCES, labels, counts=COUNTS)
    some = forward_and_backward(cluster, SEQUENCES, labels, only=[3, 1], counts=COUNTS)
    assert some == [whole[3], whole[1]]
    if not labels.of_dense_model:
        assert whole == pytest.approx(sequence_losses(cluster, SEQUENCES, COUNTS), rel=1e-6)
