"""The benchmark of peers: what each of them removes, against its definition."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.peers import (
    PEERS,
    POINTS,
    gather,
    inputs_of_spec,
    linear,
    load,
    main,
    measure,
    prune,
    save,
    scores,
    specs,
    states,
    with_biases,
    without_own_text,
)
from ray_surgeon.run.inputs import Inputs, check
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.spec.parsing import parse_spec
from ray_surgeon.storage import tensor_files
from tests.integration.runs import tiny_spec


@pytest.fixture
def inputs(model_folders: dict[str, Path], tmp_path: Path) -> Inputs:
    pruning = {"structure": "groups", "target_sparsity": 0.2, "num_shots": 1, "width_multiple": 4}
    spec = tiny_spec(tmp_path, model_folders["llama"], pruning=pruning)
    return check(parse_spec(spec.read_text()))


def dense(inputs: Inputs) -> PreTrainedModel:
    return load(Path(inputs.spec.model.source), inputs.spec.model.dtype)


def outputs_of(model: torch.nn.Module, name: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return what went into a linear and what came out, of all calibration tokens, float64."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = linear(model, name).register_forward_hook(
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
    W = linear(model, groups.consumer).weight.double()
    found = gather(model, inputs, [g.consumer for g in inputs.layout.group_sets])
    weights: dict[str, Any] = {
        name: linear(model, name).weight.requires_grad_()
        for name in (groups.consumer, *(p for p, _ in groups.producers))
    }
    tokens = torch.from_numpy(inputs.calibration)
    model(input_ids=tokens, labels=tokens).loss.backward()
    taken = {name: (weight * weight.grad).abs().double() for name, weight in weights.items()}
    for number, columns in enumerate(groups.columns):
        own = x[:, columns]
        expected = {
            "FLAP": (own.var(dim=0, correction=0) * W[:, columns].square().sum(dim=0))
            .square()
            .sum(),
            "Wanda-sp": (W[:, columns].abs() * own.square().mean(dim=0).sqrt()).sum(),
            "Minitron": own.square().sum(dim=1).mean(),
            "Taylor": taken[groups.consumer][:, columns].sum()
            + sum(taken[name][rows[number]].sum() for name, rows in groups.producers),
        }
        for peer in PEERS:
            torch.testing.assert_close(
                scores(peer, model, groups, found)[number].sum(),
                expected[peer],
                rtol=1e-4,
                atol=1e-12,
            )


def test_scores_are_comparable_between_blocks(inputs: Inputs) -> None:
    """A block whose activations are a hundred times as large does not keep more for it."""
    model = dense(inputs)
    found = gather(model, inputs, [g.consumer for g in inputs.layout.group_sets])
    louder = replace(
        found,
        square={
            name: square * (1e4 if ".0." in name else 1) for name, square in found.square.items()
        },
        mean={name: mean * (100 if ".0." in name else 1) for name, mean in found.mean.items()},
    )
    pruned = [dense(inputs), dense(inputs)]
    for each, statistics in zip(pruned, (found, louder), strict=True):
        prune("Wanda-sp", each, inputs, statistics)
    for shape in inputs.layout.linears:
        assert torch.equal(*(linear(each, shape.name).weight for each in pruned))


def test_ways_of_ours(inputs: Inputs, tmp_path: Path) -> None:
    """Without and with corrections, and the same with a search where widths may differ; each in a
    folder of its own.
    """
    correction = {"steps_per_shot": 2}
    document = inputs.spec.model_dump(mode="json") | {"correction": correction}
    found = {
        name: {
            way: (getattr(spec.pruning, "search", None) is not None, spec.correction is not None)
            for way, spec in jobs.items()
        }
        for name, point in POINTS.items()
        for jobs in [specs(document, point, 0.1, tmp_path, ["ours", "search", "peers"])]
    }
    plain = {
        "The LLM Surgeon": (False, False),
        "The LLM Surgeon, corrections on divergence": (False, True),
    }
    searching = {
        "The LLM Surgeon, search": (True, False),
        "The LLM Surgeon, search, corrections on divergence": (True, True),
    }
    uniform, *others = found.values()
    assert uniform == plain
    assert others == [plain | searching] * 3
    document["pruning"]["reconstruction"] = {"num_epochs": 3}
    jobs = specs(
        document, POINTS["groups, 20 %"], 0.1, tmp_path, ["ours", "reconstruction", "search"]
    )
    assert len({spec.output.uri for spec in jobs.values()}) == 6
    trained = {way: job.pruning.reconstruction for way, job in jobs.items()}
    assert [way for way, section in trained.items() if section is not None] == [
        "The LLM Surgeon, reconstruction",
        "The LLM Surgeon, reconstruction, corrections on divergence",
    ]
    assert trained["The LLM Surgeon, reconstruction"].num_epochs == 3


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_removes_what_the_budget_says(peer: str, inputs: Inputs) -> None:
    model = dense(inputs)
    pruned = dense(inputs)
    found = gather(model, inputs, [g.consumer for g in inputs.layout.group_sets])
    before = states(model, inputs, inputs.texts)
    prune(peer, pruned, inputs, found)
    zeros = sum(
        int((linear(pruned, shape.name).weight == 0).sum()) for shape in inputs.layout.linears
    )
    assert 0.2 <= zeros / inputs.layout.linear_size < 0.35, (
        "a KV group of the tiny model is a large step"
    )
    # its inputs are those of the dense model
    first = next(g.consumer for g in inputs.layout.group_sets if g.block == 0)
    mean = [outputs_of(each, first, inputs)[1].mean(dim=0) for each in (model, pruned)]
    if peer == "FLAP":
        torch.testing.assert_close(mean[0], mean[1], rtol=1e-4, atol=1e-6)
    perplexity, divergence = measure(pruned, inputs, before)
    assert all(value > 0 for value in divergence.values())
    assert measure(model, inputs, before)[1] == pytest.approx(
        dict.fromkeys(divergence, 0.0), abs=1e-6
    )
    assert set(perplexity) == set(inputs.texts)


def test_text_of_the_models_own_is_left_out_and_no_other() -> None:
    spec = parse_spec(Path("pipelines/quickstart.yaml").read_text())
    document = without_own_text(spec)
    left = JobSpec.model_validate(document).calibration
    assert [(text.source, count) for text, count in left.shares] == [
        (text.source, count) for text, count in spec.calibration.shares if text.source != "self"
    ]
    assert len(left.shares) == len(spec.calibration.shares) - 1
    alone = without_own_text(
        parse_spec(
            Path("pipelines/quickstart.yaml").read_text(), ["calibration.mix=[{source: self}]"]
        )
    )
    assert (alone["calibration"]["mix"], alone["calibration"]["num_sequences"]) == (
        [],
        spec.calibration.num_sequences // 2,
    )
    ((text, _),) = JobSpec.model_validate(alone).calibration.shares
    assert text.source == spec.calibration.source


@pytest.mark.parametrize("peer", ["FLAP", "Taylor"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_saved_model_computes_the_same(
    family: str, peer: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Biases of FLAP, for which a Qwen2 has no place, are there, and so is the tokenizer."""
    pruning = {"structure": "groups", "target_sparsity": 0.2, "num_shots": 1, "width_multiple": 4}
    spec = tiny_spec(tmp_path, model_folders[family], pruning=pruning)
    inputs = check(parse_spec(spec.read_text()))
    pruned = dense(inputs)
    found = gather(pruned, inputs, [g.consumer for g in inputs.layout.group_sets])
    prune(peer, pruned, inputs, found)
    folder = tmp_path / "saved"
    save(pruned, inputs.model, folder)
    loaded = load(folder, inputs.spec.model.dtype)
    assert any(name.endswith("down_proj.bias") for name in loaded.state_dict()) == (peer == "FLAP")
    tokens = torch.from_numpy(inputs.calibration)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, pruned(tokens).logits)
    text = "def f(x):\n    return x"
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (model_folders[family], folder)]
    assert len({str(tokenizer(text).input_ids) for tokenizer in tokenizers}) == 1


def test_biases_of_other_families_are_refused(model_folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="gemma3_text of this kind cannot be written"):
        with_biases(load(model_folders["gemma3"], "float32"))


def test_a_run_gives_what_the_model_wrote(model_folders: dict[str, Path], tmp_path: Path) -> None:
    pruning = {"structure": "groups", "target_sparsity": 0.2, "num_shots": 1, "width_multiple": 4}
    run = tmp_path / "run"
    run.mkdir()
    spec = tiny_spec(tmp_path, model_folders["llama"], pruning=pruning)
    mix = ["calibration.mix=[{source: self}]", f"output.uri={tmp_path / 'other'}"]
    parsed = parse_spec(spec.read_text(), mix)
    (run / "spec.yaml").write_text(json.dumps(parsed.model_dump(mode="json")))
    with pytest.raises(ValueError, match=r"written\.safetensors is not there"):
        inputs_of_spec(run, [], tmp_path / "peers")
    (_, num_read), (_, num_written) = parsed.calibration.shares
    length = parsed.calibration.sequence_length
    written = torch.arange(num_written * length).reshape(num_written, length) % 7
    further = {"1.other": written + 1}
    tensor_files.write(str(run / "written.safetensors"), {"1": written} | further)
    inputs = inputs_of_spec(run, [], tmp_path / "peers")
    assert inputs.calibration.shape == (num_read + num_written, length)
    rows = {tuple(row) for row in inputs.calibration.tolist()}
    assert {tuple(row) for row in written.tolist()} <= rows
    tensor_files.write(str(run / "written.safetensors"), {"1": written[:, 1:]})
    with pytest.raises(ValueError, match="what the model wrote for text 1"):
        inputs_of_spec(run, [], tmp_path / "peers")


def test_peers_at_the_point_of_a_spec(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruning = {"structure": "groups", "target_sparsity": 0.2, "num_shots": 2, "width_multiple": 4}
    spec = tiny_spec(tmp_path, model_folders["llama"], pruning=pruning)
    folder = tmp_path / "out"
    assert main([str(folder), "--spec", str(spec), "--save"]) == 0
    rows = json.loads((folder / "peers.json").read_text())
    assert [row["method"] for row in rows] == ["dense", *PEERS]
    assert capsys.readouterr().out.count("| spec |") == 1 + len(PEERS)
    for peer in PEERS:
        state = load(folder / "peers" / f"{peer}-spec", "float32").state_dict()
        linears = [weight for name, weight in state.items() if name.endswith("_proj.weight")]
        share = sum(int((w == 0).sum()) for w in linears) / sum(w.numel() for w in linears)
        assert 0.2 <= share < 0.35, "the last shot's share"
