"""Compares criteria for pruning coupled groups, as a Markdown table.

Groups, text, budgets and evaluation are the same for all.

``python -m benchmarks.peers FOLDER`` prunes SmolLM2-135M to every point by every method.
``--model`` selects another checkpoint, and ``--set`` another text or other options of our methods.
``--spec`` takes the text and pruning of a job spec or of a run directory, including the text
written by the model in that run, as the only point of the peers. ``--save`` writes the pruned
models of the peers as checkpoints.

The peers are implemented from their definitions. They rank groups of the dense model, in one shot;
the groups are zeroed instead of cut out, which gives the same outputs: FLAP (An et al. 2024, arXiv
2312.11983: fluctuation of a consumer's inputs times its columns' squared norm, and a bias that
compensates for the mean of the removed inputs), Wanda-sp (same source: |W| |X| summed over a
group), Minitron (Muralidharan et al. 2024, arXiv 2407.14679: norm of a group's activations, here
over all tokens), Taylor (LLM-Pruner, Ma et al. 2023, arXiv 2305.11627: sum of |w dL/dw| over all
weights of a group). If widths may differ, the scores of a block's columns are standardised, as in
FLAP, the score of a group is the mean of its columns, and there is one threshold for all groups.
All methods use the quickstart's texts, without text written by the model, unless ``--spec`` gives
others. CPU-s are those of scores, updates and corrections, without evaluation.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import ray_surgeon
from benchmarks.real_models import MODELS, fetch
from ray_surgeon.config.job import JobSpec, parse_spec
from ray_surgeon.config.sections import ModelSection
from ray_surgeon.data.texts import order
from ray_surgeon.export.folder import copy_small_files
from ray_surgeon.maths.allocate import GroupCosts, allocate_globally, allocate_uniformly
from ray_surgeon.models.layout import GroupSet, ModelLayout
from ray_surgeon.models.loss import Predicted, compare_with_dense, perplexity_of
from ray_surgeon.preparation.inputs import Inputs, check
from ray_surgeon.pruning.coupled_groups import Groups
from ray_surgeon.storage import tensor_files
from ray_surgeon.storage.sources import open_model

POINTS: dict[str, dict[str, Any]] = {
    "uniform FFN width, a quarter of the channels": {
        "groups": ["ffn"],
        "allocation": "uniform",
    },
    "groups, 20 %": {"target_sparsity": 0.2},
    "groups, 30 %": {"target_sparsity": 0.3},
    "groups, 40 %": {"target_sparsity": 0.4},
}
"""Name -> changed fields of the section `pruning`."""
PEERS = ("FLAP", "Wanda-sp", "Minitron", "Taylor")
CHOICES = ("ours", "reconstruction", "peers")

Row = dict[str, Any]


@dataclass
class Statistics:
    """Statistics of the dense model on the calibration text."""

    mean: dict[str, Tensor]  # consumer -> [C] mean of its inputs
    square: dict[str, Tensor]  # consumer -> [C] mean of their squares
    saliency: dict[str, Tensor]  # linear -> [R, C] |w dL/dw|
    forward_s: float  # CPU-seconds of the passes without gradients
    both_s: float  # CPU-seconds of the passes with gradients


def linear(model: nn.Module, name: str) -> nn.Linear:
    """Return a linear by its name."""
    found = model.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def gather(model: nn.Module, inputs: Inputs, consumers: Sequence[str]) -> Statistics:
    """Run two passes over the calibration text, and return the statistics for the peers.

    The first pass collects the inputs of consumers, the second the gradients of all weights.
    """
    total = dict[str, Tensor]()
    squares = dict[str, Tensor]()

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].flatten(0, -2).double()
            total[name] = total.get(name, 0) + x.sum(dim=0)
            squares[name] = squares.get(name, 0) + x.square().sum(dim=0)

        return hook

    hooks = [
        linear(model, name).register_forward_pre_hook(watch(name)) for name in consumers
    ]
    start = time.process_time()
    base = model.get_submodule(inputs.layout.family.base)
    with torch.no_grad():
        for tokens in inputs.calibration:
            base(input_ids=torch.from_numpy(tokens)[None], use_cache=False)
    forward_s = time.process_time() - start
    for hook in hooks:
        hook.remove()
    weights = {
        shape.name: linear(model, shape.name).weight.requires_grad_()
        for shape in inputs.layout.linears
    }
    gradients = {name: torch.zeros(weight.shape) for name, weight in weights.items()}
    start = time.process_time()
    for tokens in inputs.calibration:
        sequence = torch.from_numpy(tokens)[None]
        (
            model(input_ids=sequence, labels=sequence, use_cache=False).loss
            / len(inputs.calibration)
        ).backward()
        for (
            name,
            weight,
        ) in weights.items():  # summed in float32, regardless of the model's dtype
            assert weight.grad is not None
            gradients[name] += weight.grad
            weight.grad = None
    saliency = gradients
    for name, weight in weights.items():
        saliency[name].mul_(weight.detach()).abs_()
    model.requires_grad_(False)
    both_s = time.process_time() - start
    count = inputs.calibration.size
    mean, square = (
        {name: value / count for name, value in sums.items()} for sums in (total, squares)
    )
    return Statistics(mean, square, saliency, forward_s, both_s)


def scores(peer: str, model: nn.Module, groups: GroupSet, found: Statistics) -> Tensor:
    """Return the scores of the columns of each group [num_groups, num_columns] float64.

    A group's score is their mean; the lowest groups are removed first.
    """
    name = groups.consumer
    columns = groups.columns
    W = linear(model, name).weight.double()
    if peer == "FLAP":
        fluctuation = (
            (found.square[name] - found.mean[name].square()) * W.square().sum(dim=0)
        )[columns]
        return fluctuation.square() if groups.kind == "attention" else fluctuation
    if peer == "Wanda-sp":
        return (W.abs().sum(dim=0) * found.square[name].sqrt())[columns]
    if peer == "Minitron":
        return found.square[name][columns]
    taken = found.saliency[name].double().sum(dim=0)[columns]
    for producer, rows in groups.producers:
        taken = (
            taken
            + found.saliency[producer].double().sum(dim=1)[rows].sum(dim=1, keepdim=True)
            / columns.shape[1]
        )
    return taken


@torch.no_grad()
def prune(peer: str, model: nn.Module, inputs: Inputs, found: Statistics) -> None:
    """Zero the groups removed by a peer, and compensate for their mean if the peer does.

    The spec of the inputs gives the point.
    """
    method = inputs.method
    assert isinstance(method, Groups)
    sets = {
        groups.consumer: groups
        for groups in inputs.layout.group_sets
        if groups.kind in method.section.groups
    }
    budget = method.budget
    costs = []
    shot = method.section.shots
    for name, groups in sets.items():
        of_columns = scores(peer, model, groups, found)
        score = (
            (of_columns - of_columns.mean()) / of_columns.std().clamp(min=1e-12)
        ).mean(dim=1)
        score = score + 1e3  # costs must be positive; only the order counts
        score[score.argsort(descending=True)[: method.fewest[groups.kind]]] = torch.inf
        allowed = frozenset(range(0, len(score) + 1, method.multiple(groups.kind, shot)))
        costs.append(
            GroupCosts(
                name, groups.kind, score, len(score), allowed, budget.by_left[groups.kind]
            )
        )
    missing = budget.dense - method.goal(shot)
    counts = (
        allocate_uniformly(costs, missing)
        if method.section.uniform
        else allocate_globally(costs, missing, per_unit=False)
    ).counts
    for cost in costs:
        groups = sets[cost.consumer]
        module = linear(model, cost.consumer)
        gone = cost.costs.argsort(stable=True)[: counts[cost.consumer]]
        columns = groups.columns[gone].flatten()
        if peer == "FLAP" and len(columns):
            made_up = (
                module.weight[:, columns].double() @ found.mean[cost.consumer][columns]
            ).to(module.weight.dtype)
            module.bias = nn.Parameter(
                made_up if module.bias is None else module.bias + made_up,
                requires_grad=False,
            )
        module.weight[:, columns] = 0
        for producer, rows in groups.producers:
            linear(model, producer).weight[rows[gone].flatten()] = 0
            if linear(model, producer).bias is not None:
                linear(model, producer).bias[rows[gone].flatten()] = 0


@torch.no_grad()
def states(
    model: nn.Module, inputs: Inputs, texts: Mapping[str, NDArray[np.int64]]
) -> dict[str, list[Tensor]]:
    """Return the last hidden states [1, T, d] of every window of every text."""
    base = model.get_submodule(inputs.layout.family.base)

    def last(window: NDArray[np.int64]) -> Tensor:
        hidden = base(
            input_ids=torch.from_numpy(window)[None], use_cache=False
        ).last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden

    return {name: [last(window) for window in windows] for name, windows in texts.items()}


def measure(
    model: nn.Module, inputs: Inputs, dense: Mapping[str, list[Tensor]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the perplexity and the divergence from the dense model on every text."""
    head = linear(model, inputs.layout.family.head).weight
    perplexity = dict[str, float]()
    divergence = dict[str, float]()
    for name, windows in states(model, inputs, inputs.texts).items():
        tokens = torch.from_numpy(inputs.texts[name])
        compared = [
            compare_with_dense(h, d, Predicted(tokens[i : i + 1]), head)
            for i, (h, d) in enumerate(zip(windows, dense[name], strict=True))
        ]
        count = tokens.shape[0] * (tokens.shape[1] - 1)
        perplexity[name] = perplexity_of(sum(float(c.nll) for c in compared) / count)
        divergence[name] = sum(float(c.divergence) for c in compared) / count
    return perplexity, divergence


def specs(
    document: Mapping[str, Any],
    point: Mapping[str, Any],
    share: float,
    folder: Path,
    which: Sequence[str],
) -> dict[str, JobSpec]:
    """Return the job of each of our methods at a point, from the quickstart's; see ``--which``."""
    pruning = {"structure": "groups", "num_shots": 1, "target_sparsity": share} | dict(
        point
    )
    ways: dict[str, dict[str, Any]] = {}
    if "ours" in which:
        ways |= {
            "The LLM Surgeon": {"recovery": None},
            "The LLM Surgeon, corrections on divergence": {},
        }
    if "reconstruction" in which:
        trained = {
            "pruning": pruning
            | {"reconstruction": document["pruning"].get("reconstruction") or {}}
        }
        ways["The LLM Surgeon, reconstruction"] = trained | {"recovery": None}
        ways["The LLM Surgeon, reconstruction, corrections on divergence"] = trained
    changed = dict(document) | {
        "pruning": pruning,
        "cluster": {"backend": "local", "cpus_per_worker": 2},
    }
    return {
        way: JobSpec.model_validate(
            changed
            | options
            | {"output": {"uri": str(folder / file_name(way)), "exports": []}}
        )
        for way, options in ways.items()
    }


def without_own_text(spec: JobSpec) -> dict[str, Any]:
    """Return a spec without text written by the model, which exists only in a run.

    The other texts keep their numbers of sequences.
    """
    document: dict[str, Any] = spec.model_dump(mode="json")
    given = [
        (text, count) for text, count in spec.calibration.shares if not text.is_written
    ]
    mix = [{**text.model_dump(mode="json"), "weight": count} for text, count in given[1:]]
    counts = {
        "weight": given[0][1] if mix else 1.0,
        "num_sequences": sum(count for _, count in given),
    }
    return document | {"calibration": document["calibration"] | counts | {"mix": mix}}


def quickstart(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the quickstart's spec with other settings, without text written by the model."""
    path = Path(__file__).parents[1] / "pipelines/smollm2-balanced.yaml"
    return without_own_text(parse_spec(path.read_text(encoding="utf-8"), overrides))


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the command-line option for `quickstart`."""
    about = "override a field of the quickstart; repeatable"
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.field=value", help=about
    )


def file_name(way: str) -> str:
    """Return the folder of a method in the folder of a benchmark."""
    return "-".join(way.lower().replace(",", "").split())


def rows_of_ours(name: str, jobs: Mapping[str, JobSpec]) -> list[Row]:
    """Return the lines of the dense model and of our methods at a point."""
    rows: list[Row] = []
    for way, spec in jobs.items():
        report = ray_surgeon.prune(
            spec=spec, resume=Path(spec.output.uri, "spec.yaml").exists(), progress=False
        ).report
        last = report["shots"][-1]
        spent = sum(
            seconds
            for step, seconds in last["cpu_seconds"].items()
            if step not in ("evaluation", "commit")
        )
        if not rows:
            rows.append(
                {
                    "point": name,
                    "method": "dense",
                    "perplexity": report["dense"]["perplexity"],
                }
            )
        rows.append(
            {
                "point": name,
                "method": way,
                "perplexity": last["perplexity"],
                "divergence": last["divergence"],
                "cpu_s": spent,
            }
        )
    return rows


def rows_of_peers(
    name: str,
    inputs: Inputs,
    folder: Path,
    dense: Mapping[str, list[Tensor]],
    found: Statistics,
    saved: Path | None = None,
    suffix: str = "",
) -> list[Row]:
    """Return the lines of the peers at the point of the inputs' spec.

    Args:
        name: name of the point.
        inputs: validated inputs with all texts.
        folder: folder of the dense model.
        dense: last hidden states of the dense model, see `states`.
        found: statistics for the peers.
        saved: folder of the checkpoints of the pruned models; None for none.
        suffix: suffix of the names of these checkpoints.
    """
    rows: list[Row] = []
    for peer in PEERS:
        pruned = load(folder, inputs.spec.model.dtype)
        start = time.process_time()
        prune(peer, pruned, inputs, found)
        spent = (
            time.process_time()
            - start
            + (found.both_s if peer == "Taylor" else found.forward_s)
        )
        if saved is not None:
            save(pruned, inputs.model, saved / f"{peer}-{suffix}")
        perplexity, divergence = measure(pruned, inputs, dense)
        rows.append(
            {
                "point": name,
                "method": peer,
                "perplexity": perplexity,
                "divergence": divergence,
                "cpu_s": spent,
            }
        )
    return rows


def load(folder: Path, dtype: str) -> PreTrainedModel:
    """Return the dense model in the job's dtype."""
    of_dtype = getattr(torch, dtype)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=of_dtype)
    return model.eval().requires_grad_(False)


_SAME_IN_LLAMA = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *(
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
    ),
    *("rms_norm_eps", "rope_parameters", "tie_word_embeddings", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Fields of config.json."""


def with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """Return a Llama with the same outputs as a model with biases that its class does not have.

    Args:
        model: a Llama, Mistral or Qwen2 with added biases of linears.

    Raises:
        ValueError: the model is of another family, or has sliding-window attention.
    """
    config = model.config
    kind = config.model_type
    attentions = set(getattr(config, "layer_types", None) or ())
    if kind not in ("llama", "mistral", "qwen2") or attentions - {"full_attention"}:
        raise ValueError(
            f"--save: FLAP gives biases to linears, and a {kind} of this kind cannot be written as "
            "a Llama with biases; take a Llama, Mistral or Qwen2 without sliding window, or leave "
            "--save out"
        )
    given = {name: getattr(config, name, None) for name in _SAME_IN_LLAMA}
    same = {name: value for name, value in given.items() if value is not None}
    llama = LlamaForCausalLM(LlamaConfig(**same, attention_bias=True, mlp_bias=True))
    biases = {
        name: bias for name, bias in llama.state_dict().items() if name.endswith(".bias")
    }
    state = {
        name: torch.zeros_like(bias, dtype=model.dtype) for name, bias in biases.items()
    }
    llama.to(model.dtype).load_state_dict(state | dict(model.state_dict()))
    llama.generation_config = model.generation_config
    return llama.eval().requires_grad_(False)


def save(model: PreTrainedModel, dense: ModelSection, folder: Path) -> None:
    """Write a pruned model, zeros included, with the tokenizer of the dense one.

    Args:
        model: pruned.
        dense: folder of the dense model.
        folder: output folder, replaced if it exists.
    """
    has_more = bool(model.state_dict().keys() - _names_of_class(model))
    written = with_biases(model) if has_more else model
    folder.mkdir(parents=True, exist_ok=True)
    copy_small_files(dense, str(folder), another_type=written is not model)
    written.save_pretrained(folder)


def _names_of_class(model: PreTrainedModel) -> set[str]:
    with torch.device("meta"):
        return set(type(model)(model.config).state_dict())


def inputs_of_spec(path: Path, settings: Sequence[str], folder: Path) -> Inputs:
    """Return the inputs of a job spec, with the text written by the model in its run.

    Args:
        path: a spec, or a run directory with its spec.
        settings: each ``section.field=value``.
        folder: output folder of the job; not changed.

    Raises:
        ValueError: the job does not prune groups, its budget depends on measurements, or texts
            written by the model are missing.
    """
    path = path / "spec.yaml" if path.is_dir() else path
    output = f"output.uri={json.dumps(str(folder))}"
    inputs = check(
        parse_spec(path.read_text(), [*settings, output]), resume=True, dry_run=True
    )
    if not isinstance(inputs.method, Groups) or inputs.method.budget is None:
        raise ValueError(
            "--spec: the peers prune groups to a sparsity or a number of parameters or operations, "
            f"but {path} prunes to another target; give a spec of that kind"
        )
    if not written_in(inputs):
        return inputs
    return with_texts(inputs, written_texts(path.parent / "written.safetensors"))


def written_in(inputs: Inputs) -> list[int]:
    """Return the indices of the calibration texts written by the model."""
    self_text = inputs.stages.self_text
    return [] if self_text is None else list(self_text.requests)


def written_texts(path: Path) -> dict[int, NDArray[np.int64]]:
    """Return index of a calibration text -> tokens [n, sequence_length] written by the model.

    Raises:
        ValueError: the file does not exist.
    """
    if not path.exists():
        raise ValueError(
            f"--spec: the model writes a calibration text, but {path} does not exist; give the "
            "directory of a run with this file"
        )
    texts: dict[int, NDArray[np.int64]] = {}
    for name, tensor in tensor_files.read(str(path)).items():
        if match := re.fullmatch(r"(?:tokens\W)?(\d+)(?:\Wtokens)?", name):
            texts[int(match[1])] = tensor.numpy()
    return texts


def with_texts(inputs: Inputs, texts: Mapping[int, NDArray[np.int64]]) -> Inputs:
    """Return the inputs with texts in place of those to be written by the model.

    Raises:
        ValueError: a text is missing, or is of another shape.
    """
    calibration = inputs.calibration.copy()
    counts = [count for _, count in inputs.spec.calibration.shares]
    written = written_in(inputs)
    for number in written:
        expected = (counts[number], calibration.shape[1])
        got = texts[number].shape if number in texts else None
        if got != expected:
            raise ValueError(
                f"--spec: the text that the model wrote as calibration text {number} is {got}, "
                f"expected {expected}; give the run directory of this spec"
            )
    for row, (number, i) in enumerate(order(counts)):
        if number in written:
            calibration[row] = texts[number][i]
    return replace(inputs, calibration=calibration)


def rows_of_spec(arguments: argparse.Namespace) -> list[Row]:
    """Return the lines of the dense model and of the peers at the point of a spec."""
    settings = list(arguments.set)
    if arguments.model:
        source = source_of(arguments.model, arguments.folder)
        settings.append(f"model.source={json.dumps(source)}")
    inputs = inputs_of_spec(arguments.spec, settings, arguments.folder / "spec")
    folder = open_model(inputs.spec.model).small_files_folder()
    dense = load(folder, inputs.spec.model.dtype)
    hidden = states(dense, inputs, inputs.texts)
    found = gather(
        dense, inputs, [groups.consumer for groups in inputs.layout.group_sets]
    )
    perplexity, _ = measure(dense, inputs, hidden)
    del dense
    saved = arguments.folder / "peers" if arguments.save else None
    first = {"point": "spec", "method": "dense", "perplexity": perplexity}
    return [first, *rows_of_peers("spec", inputs, folder, hidden, found, saved, "spec")]


def source_of(model: str, folder: Path) -> str:
    """Return a model's folder; a model given by name is downloaded into `folder`."""
    return str(fetch(model, folder / model)) if model in MODELS else model


def rows_of_points(arguments: argparse.Namespace) -> list[Row]:
    """Return the lines of all points; the file is written after each."""
    document = quickstart(arguments.set)
    if arguments.model:
        source = source_of(arguments.model, arguments.folder)
        document["model"] = {"source": source, "dtype": document["model"]["dtype"]}
    folder = open_model(
        ModelSection.model_validate(document["model"])
    ).small_files_folder()
    layout = ModelLayout.of(AutoConfig.from_pretrained(folder))
    channels = sum(
        len(g.columns) * g.num_parameters for g in layout.group_sets if g.kind == "ffn"
    )
    # the same at all points
    of_dense: tuple[dict[str, list[Tensor]], Statistics] | None = None
    saved = arguments.folder / "peers" if arguments.save else None
    rows: list[Row] = []
    for number in arguments.points:
        name, point = list(POINTS.items())[number]
        share = 0.25 * channels / layout.linear_size
        place = arguments.folder / f"point-{number}"
        rows += rows_of_ours(name, specs(document, point, share, place, arguments.which))
        if "peers" in arguments.which:
            inputs = check(
                next(iter(specs(document, point, share, place, ["ours"]).values())),
                resume=True,
                dry_run=True,
            )
            if of_dense is None:
                dense = load(folder, inputs.spec.model.dtype)
                of_dense = (
                    states(dense, inputs, inputs.texts),
                    gather(dense, inputs, [g.consumer for g in layout.group_sets]),
                )
            rows += rows_of_peers(name, inputs, folder, *of_dense, saved, str(number))
        write(arguments.folder, rows)
    return rows


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Write the lines as JSON."""
    (folder / "peers.json").write_text(json.dumps(rows, indent=2) + "\n")


def table(rows: Sequence[Row]) -> str:
    """Return the lines as a Markdown table."""
    texts = list(rows[0]["perplexity"])
    lines = [
        "| point | method | "
        + " | ".join(f"{t} (divergence)" for t in texts)
        + " | CPU-s |",
        "|---|---|" + "---:|" * (len(texts) + 1),
    ]
    for row in rows:
        values = [
            f"{row['perplexity'][t]:.3f}"
            + (f" ({row['divergence'][t]:.3f})" if "divergence" in row else "")
            for t in texts
        ]
        lines.append(
            f"| {row['point']} | {row['method']} | {' | '.join(values)} | "
            f"{row.get('cpu_s', 0):.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write FOLDER/peers.json and the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description="Compare criteria for pruning coupled groups.",
    )
    add = parser.add_argument
    points = list(range(len(POINTS)))
    which = ["ours", "reconstruction", "peers"]
    add("folder", type=Path, help="output folder")
    add(
        "--model",
        help=f"folder of another checkpoint, or the name of one to download: {', '.join(MODELS)}",
    )
    add_settings(parser)
    add(
        "--spec",
        type=Path,
        help="a job spec or a run directory, as the only point of the peers",
    )
    add(
        "--save",
        action="store_true",
        help="write the peers' models as FOLDER/peers/PEER-POINT",
    )
    add("--points", type=int, nargs="+", default=points, help="numbers of points, from 0")
    add("--which", nargs="+", default=which, choices=CHOICES, help="whose lines")
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    rows = rows_of_spec(arguments) if arguments.spec else rows_of_points(arguments)
    write(arguments.folder, rows)
    sys.stdout.write(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
