"""Methods and options beyond the defaults in whole runs of tiny models."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ray_surgeon.distributed.collectives import ThreadReplica
from ray_surgeon.experimental.extended_kfac.collector import further_terms, gather_terms
from ray_surgeon.factors.collector import WantedFactors, drawn, gather_curvature
from ray_surgeon.maths.columns import sparsegpt, upper_inverse, wanda
from ray_surgeon.maths.experts import PRIOR_TOKENS
from ray_surgeon.memory.stores import Stores
from tests.conftest import LAYOUTS
from tests.integration import runs
from tests.integration.runs import (
    Jobs,
    assert_same_shot,
    difference,
    kept_of,
    loaded,
    windows,
)

EXTENDED = {"curvature__kind": "extended_kfac"}
LORA = {"calibration__held_aside": 1 / 3, **runs.LORA, "recovery__learning_rate": 1e-3}
THREE_TERMS = {"curvature__num_kronecker_terms": 3, "curvature__num_power_iterations": 3}
SEQUENCES = {"recovery__num_tokens": 400, "recovery__num_tokens_between_shots": 240}
METHODS: dict[str, dict[str, Any]] = {
    "greedy": runs.GREEDY,
    "once": {},
    "three-terms": EXTENDED | THREE_TERMS,
    "sparsegpt": runs.SPARSEGPT | {"model": "opt"},
    "lora": LORA | SEQUENCES | {"curvature__num_backward": 2},
    "element": runs.ELEMENT
    | EXTENDED
    | runs.LORA
    | {"calibration__held_aside": 0}
    | {"pruning__target_sparsity": 0.4, "model": "opt"},
    "n_m": runs.N_M | EXTENDED | {"model": "gpt2"},
}


def changed(job: Jobs, change: Callable[[Any], object]) -> Path:
    """Write a copy of the tiny Llama with changed blocks."""
    model = AutoModelForCausalLM.from_pretrained(job.models["llama"])
    with torch.no_grad():
        change(model.model.layers)
    folder = shutil.copytree(job.models["llama"], job.folder / "model")
    model.save_pretrained(folder)
    return Path(folder)


@pytest.mark.parametrize("options", [runs.N_M | EXTENDED, runs.ELEMENT], ids=str)
def test_linears_with_zero_inputs_are_pruned_first(
    options: dict[str, Any], job: Jobs
) -> None:
    """A pruned attention or feed-forward layer leaves such linears. Their weights cost nothing."""

    def change(layers: Any) -> None:
        layers[1].mlp.up_proj.weight.zero_()
        layers[2].self_attn.v_proj.weight.zero_()

    shots = job(options, model=changed(job, change)).shots
    assert shots[-1]["sparsity"] == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("target", [0.3, 0.97])
def test_target_is_met_if_the_sampled_blocks_exceed_it(target: float, job: Jobs) -> None:
    """The first of every four blocks predicts the length of greedy paths; here it alone is pruned
    far beyond the target of the second shot.
    """

    def change(layers: Any) -> None:
        for module in layers[0].modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= 0.2

    options = {"pruning__target_sparsity": target, "pruning__num_shots": 3}
    for shot in job(runs.GREEDY | options, model=changed(job, change)).shots:
        assert 0 <= shot["sparsity"] - shot["target_sparsity"] < 0.03


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(
            name, marks=[] if name in {"greedy", "element", "lora"} else pytest.mark.slow
        )
        for name in METHODS
    ],
)
def test_results_do_not_depend_on_workers_or_resuming(
    method: str, job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run on any number of shards gives the same bits, and replicas give the same result
    up to the order of sums. Removed entries stay removed. If the owner leaves out the other
    replica, the comparison of replicas fails.
    """
    options = METHODS[method]
    one = job(options, folder="one")
    before = Path(shutil.copytree(one.uri, job.folder / "before"))
    perplexities = [shot["perplexity"] for shot in one.shots]
    shutil.rmtree(one.uri / "shots/0002")
    job(options, "--resume", folder="one", cluster__num_shards=3)
    assert_same_shot(one.uri, before, 2)
    assert [shot["perplexity"] for shot in one.shots] == perplexities
    replicas = job(options, folder="replicas", cluster__num_replicas=2)
    # some single elements are near the threshold, and the second shot builds on the first one
    last = 1 if method == "element" else 2
    assert difference(one.uri, replicas.uri, last) < runs.MOST_BY_ORDER_OF_SUMS
    family = options.get("model", "llama")
    first, second = (kept_of(one.tensors(shot), family) for shot in (1, 2))
    for name, kept in second.items():
        assert not (kept & ~first[name]).any(), "a removed entry was restored"
        if method == "n_m":
            groups = (
                kept[:, : kept.shape[1] // 4 * 4].reshape(len(kept), -1, 4).sum(dim=2)
            )
            assert set(groups.unique().tolist()) == {2, 4}
    tolerance = 1e-3 if "pruning__structure" in options else 0.02
    for shot in one.shots:
        assert shot["sparsity"] == pytest.approx(shot["target_sparsity"], abs=tolerance)

    def leave_out(self: ThreadReplica, tensor: Tensor, owner: int) -> None:
        self._barrier.wait()

    if method in ("once", "sparsegpt"):
        monkeypatch.setattr(ThreadReplica, "reduce", leave_out)
        wrong = job(options, folder="wrong", cluster__num_replicas=2)
        assert difference(one.uri, wrong.uri, 2) > 2 * runs.MOST_BY_ORDER_OF_SUMS


def test_reported_divergence_matches_the_export(job: Jobs) -> None:
    """The tolerance is due to the bfloat16 states of the dense model. The first loss of corrections
    equals the divergence without corrections.
    """
    seen = windows(job.folder / "text.txt", 6, stride=64, name="seen", split="train")
    uniform = {"pruning__allocation": "uniform", "evaluation": [seen]}
    options = runs.GROUPS | runs.ONE | runs.FOUR | uniform
    done = job(options, output__exports=["uniform"])
    (shot,) = done.shots
    inputs = job.inputs(options, output__uri=str(job.folder / "x"))
    sequences = torch.from_numpy(inputs.texts["seen"])
    dense, pruned = (
        torch.log_softmax(
            AutoModelForCausalLM.from_pretrained(folder)(sequences)
            .logits[:, :-1]
            .double(),
            dim=-1,
        )
        for folder in (job.models["llama"], done.uri / "export/uniform")
    )
    expected = (dense.exp() * (dense - pruned)).sum(dim=-1).mean()
    assert shot["divergence"]["seen"] == pytest.approx(float(expected.detach()), rel=0.02)
    lora = runs.LORA | {"recovery__sequences_per_step": 6}
    (corrected,) = job(options | lora, folder="kl", calibration__held_aside=0).shots
    assert corrected["recovery_losses"][0] == pytest.approx(
        shot["divergence"]["seen"], rel=1e-4
    )
    assert corrected["divergence"]["seen"] < shot["divergence"]["seen"]


Pairs = dict[str, tuple[list[Tensor], list[Tensor]]]
"""Inputs and gradients of linears, one tensor [tokens, n] for each pass."""


@contextmanager
def noted(model: Any, names: Sequence[str]) -> Iterator[Pairs]:
    """Record inputs and gradients of linears in the `with` block."""
    found: Pairs = {name: ([], []) for name in names}

    def keep(store: list[Tensor]) -> Any:
        return lambda m, one, other, *_: store.append(
            one[0].detach().flatten(0, -2).double()
        )

    hooks = []
    for name, (inputs, gradients) in found.items():
        module = model.get_submodule(name)
        hooks.append(module.register_forward_hook(keep(inputs)))
        hooks.append(
            module.register_full_backward_hook(
                lambda m, gi, go, store=gradients: keep(store)(m, go, gi)
            )
        )
    yield found
    for hook in hooks:
        hook.remove()


def of_whole_model(
    job: Jobs, sequences: Any, chosen: Sequence[int]
) -> tuple[Pairs, float]:
    """Return inputs of the tiny Llama's linears for all sequences, gradients for the chosen ones,
    and the sum of the losses of the chosen ones.
    """
    model = AutoModelForCausalLM.from_pretrained(job.models["llama"])
    total = 0.0
    with noted(model, [shape.name for shape in LAYOUTS["llama"].linears]) as pairs:
        for number, tokens in enumerate(torch.from_numpy(sequences)):
            logits = model(tokens[None]).logits[0, :-1]
            if number in chosen:
                loss = torch.nn.functional.cross_entropy(
                    logits, tokens[1:], reduction="sum"
                )
                total += float(loss.detach())
                loss.backward()
    return pairs, total


def first_term(a: Tensor, g: Tensor) -> Tensor:
    return torch.kron(g.T @ g / len(g), a.T @ a / len(a))


def second_term(a: Tensor, g: Tensor) -> Tensor:
    """Return kron(G, A) of the best further term for the inputs and gradients of tokens, by three
    double steps of the power method.
    """
    n = len(a)
    first_A = a.T @ a / n
    first_G = g.T @ g / n
    G = torch.eye(len(first_G)).double() / len(first_G) ** 0.5
    sigma = torch.tensor(0.0)
    A = first_A
    for _ in range(3):
        of_A = torch.einsum("n,ni,nj->ij", (g @ G * g).sum(1), a, a) / n
        A = of_A - (first_G * G).sum() * first_A
        A = A / A.norm()
        of_G = torch.einsum("n,ni,nj->ij", (a @ A * a).sum(1), g, g) / n
        G = of_G - (first_A * A).sum() * first_G
        sigma = G.norm()
        G = G / sigma
    return torch.kron(G, A) * sigma


def assert_near(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    assert float((found - expected).norm() / expected.norm()) < tolerance, name


def owned_factors(cluster: Any) -> dict[str, Any]:
    return {
        name: worker.shard.factors(name)
        for worker in cluster.workers.values()
        for name in worker.owned()
    }


def test_further_terms_match_the_power_method_on_samples(job: Jobs) -> None:
    """The second term of every linear equals that of the power method on samples from autograd."""
    sequences = job.inputs().calibration
    pairs, _ = of_whole_model(job, sequences, range(len(sequences)))
    expected = {}
    for name, (inputs, gradients) in pairs.items():
        a = torch.cat(inputs)
        g = torch.cat(gradients)
        expected[name] = (second_term(a, g), first_term(a, g))
    for shards, replicas in ((1, 1), (2, 2)):
        cluster = loaded(job.models["llama"], shards, replicas)
        gather_curvature(cluster, sequences)
        (sizes,) = gather_terms(
            cluster, sequences, num_terms=1, num_iterations=6, label_seed=None
        )
        owned = {
            name: further_terms(worker, name)
            for worker in cluster.workers.values()
            for name in worker.owned()
        }
        assert sizes.keys() == owned.keys() == pairs.keys()
        for name, (second, first) in expected.items():
            found = torch.kron(*[x.double() for x in owned[name][0]])
            assert_near(found, second, 1e-2, name)
            assert sizes[name] == pytest.approx(
                float(second.norm() / first.norm()), rel=1e-3
            )


def test_further_terms_of_experts_are_weighted_by_their_tokens(job: Jobs) -> None:
    """The expected term is the best second term of the expert's Fisher, times n_e / (n_e + k) and
    its share of all tokens.
    """
    sequences = job.inputs(model="mixtral").calibration
    cluster = loaded(job.models["mixtral"])
    (worker,) = cluster.workers.values()
    names = [f"model.layers.2.mlp.experts.{expert}.down_proj" for expert in (0, 3)]
    names += ["model.layers.2.mlp.experts.0.gate_proj"]
    with noted(worker.shard.model, names) as pairs:
        gather_curvature(cluster, sequences)
    (sizes,) = gather_terms(
        cluster, sequences, num_terms=1, num_iterations=6, label_seed=None
    )
    for name, (inputs, gradients) in pairs.items():
        a = torch.cat(inputs)
        n = len(a)
        N = sequences.size
        assert 0 < n < N
        share = n / (n + PRIOR_TOKENS) * (n + 1) / (N + 2)
        expected = second_term(a, torch.cat(gradients)) * share
        (term,) = further_terms(worker, name)
        assert_near(torch.kron(*[x.double() for x in term]), expected, 1e-2, name)
        factors = worker.shard.factors(name)
        first = float(factors.dense().A.norm() * factors.dense().G.norm())
        assert sizes[name] == pytest.approx(float(expected.norm()) / first, rel=1e-2)


@pytest.mark.parametrize(
    ("stores", "num_backward"),
    [
        (Stores(), None),
        (Stores(), 2),
        (Stores("host", "host", "recompute", 2), 2),
        (Stores(wave=3, together=2), None),
        (Stores("host", "host", "recompute", wave=3, together=2), None),
    ],
    ids=["all", "kept", "streamed", "together", "streamed-together"],
)
def test_gradients_of_some_sequences_and_inputs_of_all(
    stores: Stores, num_backward: int | None, job: Jobs
) -> None:
    """A comes from all sequences. G and the loss come from the chosen ones, by autograd on the
    whole model; G is scaled to all sequences.
    """
    sequences = job.inputs().calibration
    both = drawn(len(sequences), num_backward or len(sequences))
    pairs, total = of_whole_model(job, sequences, both)
    mean = total / len(both) / (sequences.shape[1] - 1)
    for shards, replicas in ((1, 1), (2, 2 if num_backward else 3)):
        cluster = loaded(job.models["llama"], shards, replicas, stores)
        found = gather_curvature(
            cluster, sequences, WantedFactors(num_backward=num_backward)
        )
        assert found == pytest.approx(mean, rel=1e-6)
        owned = owned_factors(cluster)
        assert owned.keys() == pairs.keys()
        for name, (inputs, gradients) in pairs.items():
            factors = owned[name].dense()
            a = torch.cat(inputs)
            g = torch.cat(gradients)
            assert factors.num_tokens == sequences.size
            assert_near(factors.A, a.T @ a, 1e-5, name)
            assert_near(factors.G, g.T @ g * len(sequences) / len(both), 1e-4, name)


def test_sampled_fisher_matches_the_exact_fisher_in_the_mean(job: Jobs) -> None:
    """G of one linear is averaged over many samples of labels. The exact Fisher sums over all
    labels with their probabilities.
    """
    tokens = job.inputs(
        calibration__num_sequences=1, calibration__sequence_length=6
    ).calibration
    # no later layer mixes tokens, so each predicted token has its own gradient
    name = "model.layers.3.mlp.down_proj"
    model = AutoModelForCausalLM.from_pretrained(job.models["llama"])
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(o))
    logits = model(torch.from_numpy(tokens)).logits[0, :-1]
    probabilities = torch.softmax(logits, dim=-1).detach()
    exact = torch.zeros(32, 32)
    for t, row in enumerate(torch.log_softmax(logits, dim=-1)):
        (gradients,) = torch.autograd.grad(
            row, seen[0], torch.eye(len(row)), retain_graph=True, is_grads_batched=True
        )
        exact += gradients[:, 0, t].T @ (probabilities[t, :, None] * gradients[:, 0, t])
    cluster = loaded(job.models["llama"], 2)
    last = cluster.workers[cluster.placement.workers[1]]
    total = torch.zeros(32, 32)
    # a hundred samples each; samples of seeds side by side overlap
    for seed in range(0, 4000, 1000):
        gather_curvature(
            cluster, np.repeat(tokens, 100, axis=0), WantedFactors(label_seed=seed)
        )
        total += last.shard.factors(name).G.dense()
    assert float((total / 400 - exact).norm() / exact.norm()) < 0.15
    gather_curvature(cluster, tokens)
    empirical = last.shard.factors(name).G.dense()
    assert float((empirical - exact).norm() / exact.norm()) > 0.3


@pytest.mark.parametrize(
    ("family", "method", "structure"),
    [
        ("gemma3", "sparsegpt", "n_m"),
        ("opt-projections", "sparsegpt", "element"),
        ("phi3", "wanda", "element"),
        ("gpt2", "wanda", "n_m"),
    ],
)
def test_blocks_are_pruned_with_inputs_from_pruned_blocks(
    family: str, method: str, structure: str, job: Jobs
) -> None:
    """The reference is a plain loop over the blocks of the whole model."""
    options: dict[str, Any] = runs.ONE | {"model": family, "pruning__method": method}
    options |= {"pruning__structure": structure, "pruning__target_sparsity": 0.5}
    found = job(options, cluster__num_shards=2).tensors(1)
    sequences = torch.from_numpy(job.inputs(options, "again").calibration)
    model = AutoModelForCausalLM.from_pretrained(job.models[family])
    n, m = (2, 4) if structure == "n_m" else (0, 1)
    for block in range(4):
        shapes = [shape for shape in LAYOUTS[family].linears if shape.block == block]
        with noted(model, [shape.name for shape in shapes]) as pairs, torch.no_grad():
            for tokens in sequences:
                model(tokens[None])
        for shape in shapes:
            weight = model.get_parameter(f"{shape.name}.weight")
            W, pruned = (
                tensor.detach().T if family == "gpt2" else tensor.detach()
                for tensor in (weight, found[f"{shape.name}.weight"])
            )
            x = torch.cat(pairs[shape.name][0]).float()
            A = x.T @ x / len(x)
            share = 0.5 * shape.num_columns / (shape.num_columns - shape.has_bias), n, m
            before = torch.ones_like(W, dtype=torch.bool)
            if method == "wanda":
                kept = wanda(W, A.diagonal(), *share, before=before)
            else:
                U, _ = upper_inverse(A, 0.01, 1.0, shape.name)
                live = W.masked_fill(A.diagonal() == 0, 0.0)
                _, kept = sparsegpt(live, U, *share, before=before)
            same = float(((~kept) == (pruned == 0)).double().mean())
            assert same > 0.99, f"{shape.name}: {same}"
            with torch.no_grad():
                weight.copy_(found[f"{shape.name}.weight"])
