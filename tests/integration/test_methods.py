"""Methods and options beyond the default, run whole on tiny models: the same on shards, on
replicas, and resumed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_surgeon.maths.columns import sparsegpt, upper_inverse, wanda
from ray_surgeon.maths.experts import PRIOR_TOKENS
from ray_surgeon.memory.stores import Stores
from ray_surgeon.models.layout import LinearShape
from ray_surgeon.run.inputs import check
from ray_surgeon.runtime.collectives import ThreadReplica
from ray_surgeon.spec.parsing import parse_spec
from ray_surgeon.stages.curvature.gather import drawn, gather_curvature, gather_terms
from ray_surgeon.stages.curvature.section import ExtendedKfacSection
from tests.conftest import CONFIGS, LAYOUTS
from tests.integration.runs import (
    MOST_BY_ORDER_OF_SUMS,
    assert_same_shot,
    difference,
    loaded,
    report_of,
    run,
    tensors_of_shot,
    tiny_spec,
)

TERMS = ExtendedKfacSection(kind="extended_kfac", num_power_iterations=6)

METHODS: dict[str, dict[str, Any]] = {
    "once": {"pruning__costs": "obs"},
    "two-terms": {"curvature__kind": "extended_kfac"},
    "three-terms": {
        "curvature__kind": "extended_kfac",
        "curvature__num_kronecker_terms": 3,
        "curvature__num_power_iterations": 3,
    },
    "two-terms-element": {"curvature__kind": "extended_kfac", "pruning__structure": "element"},
    "sparsegpt": {"pruning__method": "sparsegpt", "pruning__structure": "element"},
    "wanda": {"pruning__method": "wanda", "pruning__structure": "element"},
    "lora": {
        "calibration__held_aside": 1 / 3,
        "correction__lora_rank": 2,
        "correction__final_epochs": 1,
        "correction__learning_rate": 1e-3,
    },
    "lora-element": {
        "calibration__held_aside": 1 / 3,
        "correction__loss": "cross_entropy",
        "correction__lora_rank": 2,
        "correction__learning_rate": 1e-3,
        "pruning__structure": "element",
    },
}


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("method", ["two-terms", "sparsegpt", "lora"])
def test_methods_run_on_every_family(
    family: str, method: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert (
        run(
            tmp_path,
            model_folders[family],
            **METHODS[method],
            cluster__num_shards=2,
            output__exports=["masked"],
        )
        == 0
    )
    for shot in report_of(tmp_path / "run")["shots"]:
        assert shot["sparsity"] == pytest.approx(shot["target_sparsity"], abs=0.02)


def test_what_sparsegpt_damped_more_than_asked_is_in_the_report(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Twenty tokens say nothing of 32 inputs."""
    few = {
        "calibration__num_sequences": 1,
        "calibration__sequence_length": 20,
        "pruning__damping": 0,
        "pruning__num_shots": 1,
    }
    assert (
        run(tmp_path, model_folders["llama"], **METHODS["sparsegpt"], **few, cluster__num_shards=2)
        == 0
    )
    (shot,) = report_of(tmp_path / "run")["shots"]
    names = [event["linear"] for event in shot["damping_used"]]
    assert names == [shape.name for shape in LAYOUTS["llama"].linears]
    assert all(event["asked"] == 0 < event["used"] for event in shot["damping_used"])


@pytest.mark.parametrize(
    "options",
    [
        {"pruning__structure": "n_m"},
        {"pruning__structure": "n_m", "pruning__costs": "obs_sum"},
        {"pruning__structure": "n_m", "curvature__kind": "extended_kfac"},
        {"pruning__structure": "element", "curvature__kind": "extended_kfac"},
        {"pruning__structure": "element", "pruning__update": {"solver": "single"}},
    ],
    ids=str,
)
def test_linears_whose_inputs_are_always_zero(
    options: dict[str, Any], model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """As after attention or a feed-forward layer was pruned away; their weights cost nothing, and
    all of them go first.
    """
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
        model.model.layers[2].self_attn.v_proj.weight.zero_()
    model.save_pretrained(tmp_path / "model")
    for path in model_folders["llama"].glob("tokenizer*"):
        shutil.copy(path, tmp_path / "model")
    assert run(tmp_path, tmp_path / "model", **options) == 0
    assert report_of(tmp_path / "run")["shots"][-1]["sparsity"] == pytest.approx(0.3, abs=0.02)


def test_a_target_beside_biases_is_refused_before_anything_runs(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in (
        {"pruning__structure": "n_m", "pruning__target_sparsity": 0.5},
        {"pruning__target_sparsity": 0.995},
    ):
        assert (
            run(tmp_path, model_folders["opt"], **{"pruning__structure": "element", **options}) == 2
        )
        assert "biases count and stay" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("target", [0.3, 0.97])
def test_rows_and_columns_where_the_blocks_that_are_asked_are_ahead(
    target: float, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Of every four blocks the first says how far greedy paths go; here it alone is far above the
    target of the second shot.
    """
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    for module in (
        module for module in model.model.layers[0].modules() if isinstance(module, torch.nn.Linear)
    ):
        module.weight.data *= 0.2
    shutil.copytree(model_folders["llama"], tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    assert (
        run(tmp_path, tmp_path / "model", pruning__target_sparsity=target, pruning__num_shots=5)
        == 0
    )
    shots = report_of(tmp_path / "run")["shots"]
    assert all(
        shot["target_sparsity"] <= shot["sparsity"] < shot["target_sparsity"] + 0.03
        for shot in shots
    )


@pytest.mark.parametrize("method", sorted(METHODS))
def test_shards_replicas_and_resume(
    method: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Any number of shards gives the same bits, replicas the same up to the order of sums, and a
    resumed run the same bits.
    """
    options = METHODS[method]
    for name, cluster in (
        ("one", {}),
        ("shards", {"cluster__num_shards": 3}),
        ("replicas", {"cluster__num_replicas": 2}),
    ):
        assert run(tmp_path / name, model_folders["llama"], **options, **cluster) == 0
    for shot in (1, 2):
        assert_same_shot(tmp_path / "one/run", tmp_path / "shards/run", shot)
    assert difference(tmp_path / "one/run", tmp_path / "replicas/run", 2) < MOST_BY_ORDER_OF_SUMS
    shutil.copytree(tmp_path / "one/run/shots/0002", tmp_path / "kept")
    shutil.rmtree(tmp_path / "one/run/shots/0002")
    assert run(tmp_path / "one", model_folders["llama"], "--resume", **options) == 0
    assert_same_shot(tmp_path / "one/run", tmp_path / "shards/run", 2)


@pytest.mark.parametrize("method", ["once", "two-terms-element", "sparsegpt", "lora-element"])
def test_a_wrong_sum_between_replicas_is_seen(
    method: str, model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of replicas can fail: here the owner leaves the other replica out."""
    options = {**METHODS[method], "pruning__num_shots": 1}

    def leave_out(self: ThreadReplica, tensor: torch.Tensor, owner: int) -> None:
        self._barrier.wait()

    assert run(tmp_path / "one", model_folders["llama"], **options) == 0
    monkeypatch.setattr(ThreadReplica, "reduce", leave_out)
    assert run(tmp_path / "wrong", model_folders["llama"], **options, cluster__num_replicas=2) == 0
    assert difference(tmp_path / "one/run", tmp_path / "wrong/run", 1) > 2 * MOST_BY_ORDER_OF_SUMS


@pytest.mark.parametrize("method", ["lora", "lora-element", "sparsegpt", "two-terms-element"])
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_what_is_removed_is_exactly_zero(
    method: str, family: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert run(tmp_path, model_folders[family], **METHODS[method]) == 0
    tensors = tensors_of_shot(tmp_path / "run", 2)
    checked = 0
    for name in (key for key in tensors if key.endswith((".kept", ".rows"))):
        linear, part = name.rsplit(".", 1)
        W = tensors[f"{linear}.weight"].T if family == "gpt2" else tensors[f"{linear}.weight"]
        kept = (
            tensors[name]
            if part == "kept"
            else torch.outer(tensors[name], tensors[f"{linear}.columns"])
        )
        assert not W[~kept[:, : W.shape[1]]].any()
        checked += int((~kept).sum())
    assert checked > 0


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_corrections_lower_the_loss_and_their_curve_is_kept(
    loss: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    lora = {
        "correction__loss": loss,
        "correction__lora_rank": 4,
        "correction__learning_rate": 3e-3,
        "correction__steps_per_shot": 20,
        "correction__final_epochs": 5,
    }
    sequences = {"calibration__num_sequences": 4, "correction__sequences_per_step": 4}
    assert run(tmp_path / "with", model_folders["llama"], **lora, **sequences) == 0
    first, last = report_of(tmp_path / "with/run")["shots"]
    assert (len(first["correction_losses"]), len(last["correction_losses"])) == (20, 25)
    for shot in (first, last):
        assert shot["correction_losses"][-1] < 0.9 * shot["correction_losses"][0]
    if loss == "cross_entropy":
        assert last["calibration_loss"] < first["correction_losses"][-1], (
            "absorbed, and measured on the same sequences"
        )


@pytest.mark.parametrize(("shards", "replicas"), [(1, 1), (2, 2)])
def test_divergence_is_that_of_the_export_from_the_dense_model(
    shards: int, replicas: int, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """The dense model's states are bfloat16, hence the tolerance; the divergence of corrections
    starts where that of the text ends.
    """
    groups = {
        "pruning__structure": "groups",
        "pruning__allocation": "uniform",
        "pruning__width_multiple": 8,
        "pruning__num_shots": 1,
    }
    cluster = {
        "cluster__num_shards": shards,
        "cluster__num_replicas": replicas,
        "output__exports": ["uniform"],
    }
    text = {
        "source": str(tmp_path / "text.txt"),
        "split": "train",
        "num_sequences": 6,
        "sequence_length": 40,
        "stride": 64,
    }
    evaluation = [{"name": "seen", "max_tokens": 4000, **text}]
    assert run(tmp_path, model_folders["llama"], **groups, **cluster, evaluation=evaluation) == 0
    report = report_of(tmp_path / "run")
    (shot,) = report["shots"]
    windows = torch.from_numpy(
        check(parse_spec((tmp_path / "spec.yaml").read_text()), resume=True).texts["seen"]
    )
    dense, pruned = (
        torch.log_softmax(
            AutoModelForCausalLM.from_pretrained(folder)(windows).logits[:, :-1].double(), dim=-1
        )
        for folder in (model_folders["llama"], tmp_path / "run/export/uniform")
    )
    expected = (dense.exp() * (dense - pruned)).sum(dim=-1).mean()
    assert shot["divergence"]["seen"] == pytest.approx(float(expected.detach()), rel=0.02)
    lora = {
        "correction__lora_rank": 2,
        "correction__sequences_per_step": 6,
        "calibration__held_aside": 0,
    }
    assert (
        run(
            tmp_path / "kl",
            model_folders["llama"],
            **groups,
            **cluster,
            evaluation=evaluation,
            **lora,
        )
        == 0
    )
    (corrected,) = report_of(tmp_path / "kl/run")["shots"]
    assert corrected["correction_losses"][0] == pytest.approx(shot["divergence"]["seen"], rel=1e-4)
    assert corrected["divergence"]["seen"] < shot["divergence"]["seen"]


def first_term(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return torch.kron(g.T @ g / len(g), a.T @ a / len(a))


def second_term(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
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
        A = (
            torch.einsum("n,ni,nj->ij", (g @ G * g).sum(1), a, a) / n
            - (first_G * G).sum() * first_A
        )
        A = A / A.norm()
        G = (
            torch.einsum("n,ni,nj->ij", (a @ A * a).sum(1), g, g) / n
            - (first_A * A).sum() * first_G
        )
        sigma = G.norm()
        G = G / sigma
    return torch.kron(G, A) * sigma


def test_further_terms_of_shards_and_replicas_are_those_of_samples(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """The second term of every linear against the power method on its inputs and gradients from
    autograd on the whole model.
    """
    checked = check(parse_spec(tiny_spec(tmp_path, model_folders["llama"]).read_text()))
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    pairs: dict[str, list[Any]] = {shape.name: [[], []] for shape in LAYOUTS["llama"].linears}
    for name, (inputs, gradients) in pairs.items():
        module = model.get_submodule(name)
        module.register_forward_hook(
            lambda m, i, o, store=inputs: store.append(i[0].detach()[0].double())
        )
        module.register_full_backward_hook(
            lambda m, gi, go, store=gradients: store.append(go[0].detach()[0].double())
        )
    for tokens in torch.from_numpy(checked.calibration):
        logits = model(tokens[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").backward()
    for shards, replicas in ((1, 1), (2, 1), (1, 2)):
        cluster = loaded(model_folders["llama"], shards, replicas)
        gather_curvature(cluster, checked.calibration, "kfac")
        (sizes,) = gather_terms(cluster, checked.calibration, TERMS, None)
        owned = {
            name: w.shard.factors(name) for w in cluster.workers.values() for name in w.owned()
        }
        assert sizes.keys() == owned.keys() == pairs.keys()
        for name, factors in owned.items():
            a = torch.cat(pairs[name][0])
            g = torch.cat(pairs[name][1])
            found = torch.kron(*[x.double() for x in factors.terms[0]])
            expected = second_term(a, g)
            assert float((found - expected).norm() / expected.norm()) < 1e-2, name
            assert sizes[name] == pytest.approx(
                float(expected.norm() / first_term(a, g).norm()), rel=1e-3
            )


def test_further_terms_of_experts_weigh_what_their_own_tokens_do(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """The best second term of an expert's own Fisher, times n_e / (n_e + k) and its share of all
    tokens.
    """
    checked = check(parse_spec(tiny_spec(tmp_path, model_folders["mixtral"]).read_text()))
    cluster = loaded(model_folders["mixtral"])
    (worker,) = cluster.workers.values()
    names = [
        f"model.layers.2.mlp.experts.{expert}.{linear}"
        for expert in (0, 3)
        for linear in ("gate_proj", "down_proj")
    ]
    pairs: dict[str, list[Any]] = {name: [[], []] for name in names}
    hooks = []
    for name, (inputs, gradients) in pairs.items():
        module: Any = worker.shard.model.get_submodule(name)
        hooks.append(
            module.register_forward_hook(
                lambda m, i, o, store=inputs: store.append(i[0].detach().double())
            )
        )
        hooks.append(
            module.register_full_backward_hook(
                lambda m, gi, go, store=gradients: store.append(go[0].detach().double())
            )
        )
    gather_curvature(cluster, checked.calibration, "kfac")
    for hook in hooks:
        hook.remove()
    (sizes,) = gather_terms(cluster, checked.calibration, TERMS, None)
    for name, (inputs, gradients) in pairs.items():
        a = torch.cat(inputs)
        g = torch.cat(gradients)
        n = len(a)
        N = checked.calibration.size
        assert 0 < n < N
        expected = second_term(a, g) * n / (n + PRIOR_TOKENS) * (n + 1) / (N + 2)
        factors = worker.shard.factors(name)
        assert (
            float(
                (torch.kron(*[x.double() for x in factors.terms[0]]) - expected).norm()
                / expected.norm()
            )
            < 1e-2
        ), name
        first = float(factors.dense().A.norm() * factors.dense().G.norm())
        assert sizes[name] == pytest.approx(float(expected.norm()) / first, rel=1e-2)


@pytest.mark.parametrize(
    "stores", [Stores(), Stores("host", "host", "recompute", 2)], ids=["kept", "streamed"]
)
def test_gradients_of_some_sequences_and_inputs_of_all(
    stores: Stores, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """A of every linear from all sequences, G and the loss from autograd on the whole model over
    the drawn ones, G brought to all.
    """
    sequences = check(
        parse_spec(tiny_spec(tmp_path, model_folders["llama"]).read_text())
    ).calibration
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    both = drawn(len(sequences), 2)
    A, G = (
        {shape.name: torch.zeros(n, n).double() for shape, n in sizes}
        for sizes in zip(*map(sides, LAYOUTS["llama"].linears), strict=True)
    )
    for name in A:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, i, o, n=name: add_second_moment(A[n], i[0]))
        module.register_full_backward_hook(lambda m, gi, go, n=name: add_second_moment(G[n], go[0]))
    losses = []
    for number, tokens in enumerate(torch.from_numpy(sequences)):
        loss = torch.nn.functional.cross_entropy(
            model(tokens[None]).logits[0, :-1], tokens[1:], reduction="sum"
        )
        if number in both:
            losses.append(loss)
            loss.backward()
    mean = float(torch.stack(losses).detach().mean()) / (sequences.shape[1] - 1)
    for shards, replicas in ((1, 1), (2, 1), (1, 2)):
        cluster = loaded(model_folders["llama"], shards, replicas, stores)
        assert gather_curvature(cluster, sequences, "kfac", num_backward=2) == pytest.approx(
            mean, rel=1e-6
        )
        for name, factors in (
            (name, w.shard.factors(name).dense())
            for w in cluster.workers.values()
            for name in w.owned()
        ):
            assert factors.num_tokens == sequences.size
            assert float((factors.A - A[name]).norm() / A[name].norm()) < 1e-5, name
            assert (
                float((factors.G - G[name] * len(sequences) / 2).norm() / factors.G.norm()) < 1e-4
            ), name


def test_sequences_without_gradients_are_remembered_for_corrections(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "calibration__held_aside": 1 / 3,
        "curvature__num_backward": 2,
        "correction": {"lora_rank": 2, "steps_per_shot": 6},
    }
    for shards in (1, 2):
        assert (
            run(
                tmp_path / str(shards),
                model_folders["llama"],
                cluster__num_shards=shards,
                **options,
            )
            == 0
        )
    for shot in (1, 2):
        assert_same_shot(tmp_path / "1/run", tmp_path / "2/run", shot)
    # each sequence was compared with the dense model
    assert len(report_of(tmp_path / "1/run")["shots"][0]["correction_losses"]) == 6
    assert (
        run(tmp_path / "replicas", model_folders["llama"], cluster__num_replicas=2, **options) == 0
    )
    assert difference(tmp_path / "1/run", tmp_path / "replicas/run", 2) < MOST_BY_ORDER_OF_SUMS


def sides(shape: LinearShape) -> tuple[tuple[LinearShape, int], tuple[LinearShape, int]]:
    return (shape, shape.num_columns), (shape, shape.num_rows)


def add_second_moment(total: torch.Tensor, x: torch.Tensor) -> None:
    flat = x.detach().flatten(0, -2).double()
    total += flat.T @ flat


def test_sampled_fisher_is_the_exact_one_in_the_mean(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """G of one linear over many draws of labels against the exact Fisher's, the sum over all labels
    with their probabilities.
    """
    options = {"calibration__num_sequences": 1, "calibration__sequence_length": 6}
    inputs = check(parse_spec(tiny_spec(tmp_path, model_folders["llama"], **options).read_text()))
    # after it the tokens do not mix, so that each predicted token has its own gradient
    name = "model.layers.3.mlp.down_proj"
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    seen: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(o))
    logits = model(torch.from_numpy(inputs.calibration)).logits[0, :-1]
    probabilities = torch.softmax(logits, dim=-1).detach()
    exact = torch.zeros(32, 32)
    for t, row in enumerate(torch.log_softmax(logits, dim=-1)):
        for label in range(len(row)):
            (gradient,) = torch.autograd.grad(row[label], seen[0], retain_graph=True)
            exact += probabilities[t, label] * torch.outer(gradient[0, t], gradient[0, t])
    cluster = loaded(model_folders["llama"], 2)
    total = torch.zeros(32, 32)
    draws = 400
    for seed in range(draws):
        gather_curvature(cluster, inputs.calibration, "kfac", seed)
        total += cluster.workers[cluster.placement.workers[1]].shard.factors(name).G.dense()
    assert float((total / draws - exact).norm() / exact.norm()) < 0.15
    gather_curvature(cluster, inputs.calibration, "kfac")
    empirical = cluster.workers[cluster.placement.workers[1]].shard.factors(name).G.dense()
    assert float((empirical - exact).norm() / exact.norm()) > 0.3


@pytest.mark.parametrize(
    ("method", "structure"), [("sparsegpt", "element"), ("sparsegpt", "n_m"), ("wanda", "element")]
)
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_blocks_are_pruned_from_the_inputs_of_the_pruned_ones_before(
    family: str, method: str, structure: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Against a plain loop over the blocks of the whole model."""
    sparsity = 0.5
    options = {
        "pruning__method": method,
        "pruning__structure": structure,
        "pruning__target_sparsity": sparsity,
        "pruning__num_shots": 1,
    }
    assert run(tmp_path, model_folders[family], **options, cluster__num_shards=2) == 0
    found = tensors_of_shot(tmp_path / "run", 1)
    checked = check(
        parse_spec(tiny_spec(tmp_path / "again", model_folders[family], **options).read_text())
    )
    model = AutoModelForCausalLM.from_pretrained(model_folders[family])
    shapes = LAYOUTS[family].linears
    n, m = (2, 4) if structure == "n_m" else (0, 1)
    for block in range(4):
        inputs: dict[str, list[torch.Tensor]] = {s.name: [] for s in shapes if s.block == block}
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda m, i, store=store: store.append(i[0].detach().flatten(0, -2))
            )
            for name, store in inputs.items()
        ]
        with torch.no_grad():
            for tokens in torch.from_numpy(checked.calibration):
                model(tokens[None])
        for hook in hooks:
            hook.remove()
        for name, store in inputs.items():
            weight = model.get_parameter(f"{name}.weight")
            x = torch.cat(store)
            shape = next(s for s in shapes if s.name == name)
            fraction = sparsity * shape.num_columns / (shape.num_columns - shape.has_bias)
            before = torch.ones_like(weight, dtype=torch.bool)
            A = x.T @ x / len(x)
            share = fraction, n, m
            if method == "wanda":
                kept = wanda(weight.detach(), A.diagonal(), *share, before=before)
            else:
                U, _ = upper_inverse(A, 0.01, 1.0, name)
                live = weight.detach().masked_fill(A.diagonal() == 0, 0.0)
                _, kept = sparsegpt(live, U, *share, before=before)
            same = float(((~kept) == (found[f"{name}.weight"] == 0)).double().mean())
            assert same > 0.99, f"{name}: {same}"
            with torch.no_grad():
                weight.copy_(found[f"{name}.weight"])
