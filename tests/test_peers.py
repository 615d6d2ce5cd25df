"""The benchmark of peers: what each of them removes, against its definition."""

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
from ray_surgeon.run.inputs import Inputs, check
from ray_surgeon.spec.parsing import parse_spec
from ray_surgeon.storage import tensor_files
from tests.integration.runs import tiny_spec


def spec_file(model: Path, folder: Path, num_shots: int = 1) -> Path:
    pruning = {"structure": "groups", "target_sparsity": 0.2, "width_multiple": 4}
    return tiny_spec(folder, model, pruning=pruning | {"num_shots": num_shots})


@pytest.fixture
def inputs(
    request: pytest.FixtureRequest, model_folders: dict[str, Path], tmp_path: Path
) -> Inputs:
    """Return those of a job on a Llama, or on the family that the test asks for."""
    family = getattr(request, "param", "llama")
    return check(parse_spec(spec_file(model_folders[family], tmp_path).read_text()))


def dense(inputs: Inputs) -> PreTrainedModel:
    return peers.load(Path(inputs.spec.model.source), inputs.spec.model.dtype)


def gathered(model: PreTrainedModel, inputs: Inputs) -> Any:
    return peers.gather(model, inputs, [groups.consumer for groups in inputs.layout.group_sets])


def outputs_of(model: torch.nn.Module, name: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return what went into a linear and what came out, of all calibration tokens, float64."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = peers.linear(model, name).register_forward_hook(
        lambda _, given, out: seen.append((given[0].flatten(0, 1), out.flatten(0, 1)))
    )
    with torch.no_grad():
        model(input_ids=torch.from_numpy(inputs.calibration))
    hook.remove()
    return seen[0][0].double(), seen[0][1].double()


def test_scores_are_those_of_the_definitions(inputs: Inputs) -> None:
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
    taken = {name: (weight * weight.grad).abs().double() for name, weight in weights.items()}
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
    """A block whose activations are a hundred times as large does not keep more for it."""
    found = gathered(dense(inputs), inputs)
    louder = replace(
        found,
        square={
            name: value * (1e4 if ".0." in name else 1) for name, value in found.square.items()
        },
        mean={name: value * (100 if ".0." in name else 1) for name, value in found.mean.items()},
    )
    pruned = [dense(inputs), dense(inputs)]
    for each, statistics in zip(pruned, (found, louder), strict=True):
        peers.prune("Wanda-sp", each, inputs, statistics)
    for shape in inputs.layout.linears:
        assert torch.equal(*(peers.linear(each, shape.name).weight for each in pruned))


def test_ways_of_ours(inputs: Inputs, tmp_path: Path) -> None:
    """Without and with a search and corrections, each in a folder of its own."""
    document = inputs.spec.model_dump(mode="json") | {"correction": {"steps_per_shot": 2}}
    point = peers.POINTS["groups, 20 %"]
    jobs = peers.specs(document, point, 0.1, tmp_path, ["ours", "search"]).values()
    found = [(job.pruning.search is not None, job.correction is not None) for job in jobs]
    assert found == [(False, False), (False, True), (True, False), (True, True)]
    assert len({job.output.uri for job in jobs}) == 4


SAVED = [("FLAP", "llama"), ("FLAP", "qwen2"), ("Taylor", "llama")]


@pytest.mark.parametrize(("peer", "inputs"), SAVED, indirect=["inputs"])
def test_a_saved_model_computes_the_same(peer: str, inputs: Inputs, tmp_path: Path) -> None:
    """Biases of FLAP, for which a Qwen2 has no place, are there, and so is the tokenizer."""
    model = dense(inputs)
    pruned = dense(inputs)
    peers.prune(peer, pruned, inputs, gathered(pruned, inputs))
    if peer == "FLAP":  # of the first block, whose inputs are those of the dense model
        first = next(g.consumer for g in inputs.layout.group_sets if g.block == 0)
        mean = [outputs_of(each, first, inputs)[1].mean(dim=0) for each in (model, pruned)]
        torch.testing.assert_close(mean[0], mean[1], rtol=1e-4, atol=1e-6)
    folder = tmp_path / "saved"
    peers.save(pruned, inputs.model, folder)
    loaded = peers.load(folder, inputs.spec.model.dtype)
    assert any(name.endswith("down_proj.bias") for name in loaded.state_dict()) == (peer == "FLAP")
    tokens = torch.from_numpy(inputs.calibration)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, pruned(tokens).logits)
    assert (folder / "tokenizer.json").exists()
    of_itself = peers.measure(model, inputs, peers.states(model, inputs, inputs.texts))[1]
    assert of_itself == pytest.approx(dict.fromkeys(inputs.texts, 0.0), abs=1e-6)


def test_a_run_gives_what_the_model_wrote(model_folders: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    spec = spec_file(model_folders["llama"], tmp_path)
    mix = ["calibration.mix=[{source: self}]", f"output.uri={tmp_path / 'other'}"]
    parsed = parse_spec(spec.read_text(), mix)
    (run / "spec.yaml").write_text(json.dumps(parsed.model_dump(mode="json")))
    with pytest.raises(ValueError, match=r"written\.safetensors is not there"):
        peers.inputs_of_spec(run, [], tmp_path / "peers")
    (_, num_read), (_, num_written) = parsed.calibration.shares
    length = parsed.calibration.sequence_length
    written = torch.arange(num_written * length).reshape(num_written, length) % 7
    tensor_files.write(str(run / "written.safetensors"), {"1": written, "1.other": written + 1})
    inputs = peers.inputs_of_spec(run, [], tmp_path / "peers")
    assert inputs.calibration.shape == (num_read + num_written, length)
    rows = {tuple(row) for row in inputs.calibration.tolist()}
    assert {tuple(row) for row in written.tolist()} <= rows
    tensor_files.write(str(run / "written.safetensors"), {"1": written[:, 1:]})
    with pytest.raises(ValueError, match="what the model wrote for text 1"):
        peers.inputs_of_spec(run, [], tmp_path / "peers")


def test_peers_at_the_point_of_a_spec(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_file(model_folders["llama"], tmp_path, num_shots=2)
    folder = tmp_path / "out"
    assert peers.main([str(folder), "--spec", str(spec), "--save"]) == 0
    rows = json.loads((folder / "peers.json").read_text())
    assert [row["method"] for row in rows] == ["dense", *PEERS]
    assert capsys.readouterr().out.count("| spec |") == 1 + len(PEERS)
    assert all(value > 0 for row in rows[1:] for value in row["divergence"].values())
    for peer in PEERS:
        state = peers.load(folder / "peers" / f"{peer}-spec", "float32").state_dict()
        linears = [weight for name, weight in state.items() if name.endswith("_proj.weight")]
        share = sum(int((w == 0).sum()) for w in linears) / sum(w.numel() for w in linears)
        assert 0.2 <= share < 0.35, "the last shot's share"
