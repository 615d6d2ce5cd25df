"""The benchmark of peers: the removals of each peer, against its definition."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import peers
from benchmarks.peers import PEERS
from ray_surgeon.config.job import parse_spec
from ray_surgeon.preparation.inputs import Inputs, check
from tests.integration.runs import tiny_spec


@pytest.fixture
def spec(model_folders: dict[str, Path], tmp_path: Path) -> Path:
    """Return a job on a Qwen2, which has no place for most biases."""
    pruning = {
        "structure": "groups",
        "target_sparsity": 0.2,
        "width_multiple": 4,
        "num_shots": 2,
    }
    return tiny_spec(tmp_path, model_folders["qwen2"], pruning=pruning)


@pytest.fixture
def inputs(spec: Path) -> Inputs:
    return check(parse_spec(spec.read_text()))


def dense(inputs: Inputs) -> PreTrainedModel:
    return peers.load(Path(inputs.spec.model.source), inputs.spec.model.dtype)


def gathered(model: PreTrainedModel, inputs: Inputs) -> Any:
    return peers.gather(
        model, inputs, [groups.consumer for groups in inputs.layout.group_sets]
    )


def outputs_of(
    model: torch.nn.Module, name: str, inputs: Inputs
) -> tuple[Tensor, Tensor]:
    """Return the inputs and outputs of a linear for all calibration tokens, in float64."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = peers.linear(model, name).register_forward_hook(
        lambda _, given, out: seen.append((given[0].flatten(0, 1), out.flatten(0, 1)))
    )
    with torch.no_grad():
        model(input_ids=torch.from_numpy(inputs.calibration))
    hook.remove()
    return seen[0][0].double(), seen[0][1].double()


def test_scores_match_their_definitions(inputs: Inputs) -> None:
    model = dense(inputs)
    groups = next(g for g in inputs.layout.group_sets if g.kind == "attention")
    x, _ = outputs_of(model, groups.consumer, inputs)
    W = peers.linear(model, groups.consumer).weight.double()
    found = gathered(model, inputs)
    weights: dict[str, Any] = {
        name: peers.linear(model, name).weight.requires_grad_()
        for name in (groups.consumer, *(p for p, _ in groups.producers))
    }
    tokens = torch.from_numpy(inputs.calibration)
    model(input_ids=tokens, labels=tokens).loss.backward()
    taken = {
        name: (weight * weight.grad).abs().double() for name, weight in weights.items()
    }
    for number, columns in enumerate(groups.columns):
        own = x[:, columns]
        norms = W[:, columns].square().sum(dim=0)
        produced = [taken[name][rows[number]].sum() for name, rows in groups.producers]
        expected = {
            "FLAP": (own.var(dim=0, correction=0) * norms).square().sum(),
            "Wanda-sp": (W[:, columns].abs() * own.square().mean(dim=0).sqrt()).sum(),
            "Minitron": own.square().sum(dim=1).mean(),
            "Taylor": taken[groups.consumer][:, columns].sum() + sum(produced),
        }
        for peer in PEERS:
            score = peers.scores(peer, model, groups, found)[number].sum()
            torch.testing.assert_close(score, expected[peer], rtol=1e-4, atol=1e-12)


def test_scores_are_comparable_between_blocks(inputs: Inputs) -> None:
    """A block with a hundred times larger activations does not keep more groups."""
    found = gathered(dense(inputs), inputs)
    factors = {name: 100 if ".0." in name else 1 for name in found.mean}
    louder = replace(
        found,
        square={name: value * factors[name] ** 2 for name, value in found.square.items()},
        mean={name: value * factors[name] for name, value in found.mean.items()},
    )
    pruned = [dense(inputs), dense(inputs)]
    for each, statistics in zip(pruned, (found, louder), strict=True):
        peers.prune("Wanda-sp", each, inputs, statistics)
    for shape in inputs.layout.linears:
        assert torch.equal(*(peers.linear(each, shape.name).weight for each in pruned))


def test_saved_model_computes_the_same(inputs: Inputs, tmp_path: Path) -> None:
    """FLAP's biases are saved, and so is the tokenizer."""
    model = dense(inputs)
    pruned = dense(inputs)
    peers.prune("FLAP", pruned, inputs, gathered(pruned, inputs))
    # of the first block, whose inputs are those of the dense model
    first = next(g.consumer for g in inputs.layout.group_sets if g.block == 0)
    mean = [outputs_of(each, first, inputs)[1].mean(dim=0) for each in (model, pruned)]
    torch.testing.assert_close(mean[0], mean[1], rtol=1e-4, atol=1e-6)
    folder = tmp_path / "saved"
    peers.save(pruned, inputs.model, folder)
    loaded = peers.load(folder, inputs.spec.model.dtype)
    tokens = torch.from_numpy(inputs.calibration)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, pruned(tokens).logits)
    assert (folder / "tokenizer.json").exists()
    of_itself = peers.measure(model, inputs, peers.states(model, inputs, inputs.texts))[1]
    assert of_itself == pytest.approx(dict.fromkeys(inputs.texts, 0.0), abs=1e-6)


def test_peers_prune_to_the_target_of_a_spec(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert peers.main([str(folder), "--spec", str(spec), "--save"]) == 0
    rows = json.loads((folder / "peers.json").read_text())
    assert [row["method"] for row in rows] == ["dense", *PEERS]
    assert capsys.readouterr().out.count("| spec |") == 1 + len(PEERS)
    assert all(value > 0 for row in rows[1:] for value in row["divergence"].values())
    for peer in PEERS:
        state = peers.load(folder / "peers" / f"{peer}-spec", "float32").state_dict()
        linears = [
            weight for name, weight in state.items() if name.endswith("_proj.weight")
        ]
        share = sum(int((w == 0).sum()) for w in linears) / sum(
            w.numel() for w in linears
        )
        assert 0.2 <= share < 0.35, "the last shot's share"
