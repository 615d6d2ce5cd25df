"""Experts and their channels pruned by ours and by others, and what the costs of experts say of measured losses, as Markdown.

``python -m benchmarks.upcycled MODEL && python -m benchmarks.experts MODEL FOLDER``

The same number of experts, or of channels, goes from every block of the dense mixture, calibrated on Python's help and measured on help and
docstrings. Others, from their definitions: REAP (Lasby et al. 2025, arXiv 2510.13999: mean over an expert's tokens of its weight times the
norm of its output), frequency of routing, magnitude (norm of the weights). For channels REAP's score is that of a channel, the root
mean square of its activation times the norm of its column; others have no updates.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig

from ray_surgeon.cluster.local import LocalCluster
from ray_surgeon.cluster.worker import LinearSummary, Worker, collective
from ray_surgeon.inputs import Inputs, check
from ray_surgeon.methods import Groups
from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.checkpoint import tensor_reader
from ray_surgeon.models.gguf import convert_gguf
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.runner import BlockRunner, Call
from ray_surgeon.models.shard import ModelShard
from ray_surgeon.run.directory import RunDirectory
from ray_surgeon.sections.texts import ModelSection
from ray_surgeon.shots import run_shots
from ray_surgeon.spec import parse_spec
from ray_surgeon.storage.sources import open_model
from ray_surgeon.surgery.experts import rerouting_costs, shrunk_factors
from ray_surgeon.surgery.masks import StructuredMask

FRACTIONS = (0.25, 0.5)
METHODS = {"experts": ("rerouting", "reap", "frequency", "magnitude"), "expert_channels": ("ours", "reap", "magnitude")}


@dataclass(frozen=True)
class Peer(Groups):
    """Others' scores in place of the costs, and no updates."""

    peer: str = "magnitude"

    def _expert_costs(self, worker: Worker, shot: int) -> dict[str, float]:
        found = super()._expert_costs(worker, shot)
        if self.peer == "magnitude" and self.ranks_experts:
            for experts in worker.expert_sets:
                for linears in experts.linears:
                    found[linears[-1]] = sum(float(worker.shard.weight(name).square().sum()) for name in linears) ** 0.5
        return found

    def costs(self, worker: Worker, reach: Any, shot: int) -> Any:
        """Return scores of channels, in the order of which they go."""
        found = super().costs(worker, reach, shot)
        if self.ranks_experts:
            return found
        return replace(found, costs=tuple(replace(c, costs=self._scores(worker, c.consumer, c.costs)) for c in found.costs))

    def _scores(self, worker: Worker, name: str, costs: Tensor) -> Tensor:
        norms = worker.shard.weight(name).norm(dim=0)
        if self.peer == "reap":
            norms = norms * worker.shard.factors(name).A.diagonal().clamp(min=0).sqrt()
        most = int(torch.isfinite(costs).sum())
        scores = torch.full_like(costs, torch.inf)
        cheapest = norms.argsort(stable=True)[:most]
        scores[cheapest] = norms[cheapest].to(scores.dtype)
        return scores

    @collective
    def prune(self, worker: Worker, counts: Mapping[str, int], experts: Mapping[str, float]) -> tuple[LinearSummary, ...]:
        """Remove the channels with the lowest scores and nothing else, or whole experts as ours does."""
        if self.ranks_experts:
            return super().prune(worker, counts, experts)
        for groups in self._sets(worker):
            scores = self._scores(worker, groups.consumer, torch.zeros(len(groups.columns)))
            gone, mask = scores.argsort(stable=True)[: counts[groups.consumer]], worker.mask(groups.consumer, StructuredMask)
            removed = torch.zeros_like(mask.columns)
            removed[groups.columns[gone].flatten()] = True
            worker.masks[groups.consumer] = mask.without(torch.zeros_like(mask.rows), removed)
            W = worker.shard.weight(groups.consumer)
            W[:, removed] = 0
            worker.shard.set_weight(groups.consumer, W)
        worker.shard.drop_curvature()
        return tuple(worker.summary(name, 0.0, 0.0) for name in worker.owned())


def inputs_of(model: Path, folder: Path, kind: str, sparsity: float, shots: int, **pruning: Any) -> Inputs:
    """Return a checked job."""
    document = {
        "version": 2,
        "name": "experts",
        "model": {"source": str(model)},
        "calibration": {"source": "python-docs", "num_sequences": 24, "sequence_length": 512},
        "evaluation": [
            {"name": text, "source": text, "split": "test", "num_sequences": 16, "sequence_length": 512}
            for text in ("python-docs", "python-docstrings")
        ],
        "pruning": {
            "structure": "groups",
            "allocation": "uniform",
            "groups": [kind],
            "target_sparsity": sparsity,
            "num_shots": shots,
            "width_multiple": 64,
        }
        | pruning,
        "cluster": {"backend": "local", "cpus_per_worker": 2},
        "output": {"uri": str(folder), "exports": [], "keep_shots": 1},
    }
    return check(parse_spec(json.dumps(document)))


def pruned(inputs: Inputs) -> dict[str, Any]:
    """Run a job and return the dense and the last perplexities, and divergences."""
    cluster = LocalCluster(inputs.layout, inputs.placement, 2)
    run_shots(inputs, cluster, RunDirectory(inputs.spec.output.uri), lambda news: None)
    report = json.loads((Path(inputs.spec.output.uri) / "report.json").read_text())
    return {"dense": report["dense"]["perplexity"]} | {name: report["shots"][-1][name] for name in ("perplexity", "divergence", "sparsity")}


def table(model: Path, folder: Path, layout: ModelLayout, kinds: Sequence[str], fractions: Sequence[float]) -> list[dict[str, Any]]:
    """Return the records of every point and method. Ours removes channels in two shots, and experts in as many as go from a block."""
    of_experts = sum(e.num_parameters * len(e.linears) for e in layout.expert_sets) / layout.linear_size
    rows = []
    for fraction in fractions:
        for kind in kinds:
            shots = round(fraction * layout.num_experts) if kind == "experts" else 2
            for name in METHODS[kind]:
                own = name in ("rerouting", "ours")
                score = {"expert_costs": name} if kind == "experts" and name != "magnitude" else {}
                where = folder / f"{kind}-{fraction:g}-{name}"
                inputs = inputs_of(model, where, kind, fraction * of_experts - 1e-9, shots if own else 1, **score)
                if not own:
                    method = inputs.method
                    assert isinstance(method, Groups)
                    peer = Peer(method.section, method.curvature, method.budget, method.fewest, method.consumers, name)
                    inputs = replace(inputs, method=peer)
                rows.append({"kind": kind, "fraction": fraction, "method": name} | pruned(inputs))
                sys.stderr.write(json.dumps(rows[-1]) + "\n")
                (folder / "experts.json").write_text(json.dumps(rows, indent=2) + "\n")
    return rows


@dataclass(frozen=True)
class SingleRemovals:
    """What it takes to measure removals: the model, and where the sequences stand before a block."""

    shard: ModelShard
    runner: BlockRunner
    tokens: Tensor  # [num_sequences, T]
    calls: list[Call]

    @torch.no_grad()
    def last_states(self, first: int, states: list[Tensor]) -> list[Tensor]:
        """Return the hidden states before the head of sequences whose states before block `first` are given."""
        for place in range(first, len(self.calls)):
            states = [self.runner.through(place, hidden, self.calls) for hidden in states]
        return [self.runner.leave(hidden) for hidden in states]

    @torch.no_grad()
    def compare(self, states: list[Tensor], dense: list[Tensor]) -> tuple[float, float]:
        """Return the mean NLL, and the mean divergence from the dense model, of states before the head."""
        found = [self.shard.compare(h, d, t[None]) for h, d, t in zip(states, dense, self.tokens, strict=True)]
        count = len(self.tokens) * (self.tokens.shape[1] - 1)
        return sum(float(c.nll) for c in found) / count, sum(float(c.divergence) for c in found) / count


def loaded(model: Path, layout: ModelLayout) -> ModelShard:
    """Return a whole model in float32."""
    reader, blocks = open_model(ModelSection(source=str(model)), convert_gguf).reader(), BlockRange(0, layout.num_blocks, layout.num_blocks)
    shard = ModelShard(layout, blocks, torch.float32, torch.device("cpu"))
    shard.load(tensor_reader(layout, reader.file_of, reader.read, str(model)))
    return shard


def gather(runner: BlockRunner, tokens: Tensor) -> None:
    """Pass sequences [num_sequences, T] forward and backward."""
    for i, sequence in enumerate(tokens):
        (hidden,) = runner.forward(i, sequence[None])
        _, gradient, _ = runner.loss(hidden, sequence[None])
        runner.backward(i, [gradient])


def predictions(model: Path, layout: ModelLayout, sequences: NDArray[np.int64], every: int) -> dict[str, Any]:
    """Return predicted and measured loss increases of single experts, of every so many blocks, on the same text.

    Measured is the increase of the loss on the text, and the divergence from the dense model: the increase of the loss on all that the
    dense model might say at each token, weighted by how likely it says so. The first has the noise of the text's labels.
    """
    shard, tokens = loaded(model, layout), torch.from_numpy(sequences)
    runner = BlockRunner(shard)
    shard.start_curvature(only=frozenset(), experts=True)
    gather(runner, tokens)
    shard.stop_curvature()
    entered = [runner.enter(sequence[None]) for sequence in tokens]
    states, found = [hidden for hidden, _ in entered], list[dict[str, float]]()
    removals = SingleRemovals(shard, runner, tokens, entered[0][1])
    of_dense = removals.last_states(0, states)
    dense, _ = removals.compare(of_dense, of_dense)
    for place in range(layout.num_blocks):
        if place % every == every // 2 and place in shard.mixtures:
            mixture, sums = shard.mixtures[place], shard.expert_sums[place]
            costs, second = (rerouting_costs(sums, mixture.num_chosen, first_order=first) for first in (True, False))
            for expert in range(len(mixture.experts)):
                mixture.router.kept[expert] = False
                nll, divergence = removals.compare(removals.last_states(place, states), of_dense)
                mixture.router.kept[expert] = True
                entry = {
                    "block": place,
                    "expert": expert,
                    "predicted": float(costs[expert]),
                    "second_order": float(second[expert]),
                    "measured": nll - dense,
                    "divergence": divergence,
                }
                found.append(entry)
        with torch.no_grad():
            states = [runner.through(place, hidden, removals.calls) for hidden in states]
    predicted, second_order, measured, diverged = (
        [entry[name] for entry in found] for name in ("predicted", "second_order", "measured", "divergence")
    )
    return {
        "experts": found,
        "rank_correlation": rank_correlation(predicted, measured),
        "of the second order": rank_correlation(second_order, measured),
        "of the second order with the divergence": rank_correlation(second_order, diverged),
    }


PRIORS = (1, 4, 8, 16, 32, 64, 128, 256, 1024)


def priors(model: Path, layout: ModelLayout, sequences: NDArray[np.int64], every: int) -> dict[str, Any]:
    """Return how well factors that are shrunk with each weight describe text they were not estimated on.

    Factors of experts are estimated on a quarter of the sequences. Were inputs and gradients normal with these second moments, the others
    would have the negative log-likelihood 1/2 (log det M + tr M^-1 M_other), here divided by the size of M, less that of the best weight;
    the mean over the experts of every so many blocks which have tokens in both parts.
    """
    shard, tokens = loaded(model, layout), torch.from_numpy(sequences)
    runner = BlockRunner(shard)
    assert layout.family.sparse is not None
    experts, of_expert = layout.family.sparse.experts, (layout.family.sparse.producers[0], layout.family.sparse.consumer)
    roles = {f"{experts}.*.{linear}" for linear in of_expert}
    wanted = [s for s in layout.linears if s.role in roles and s.block % every == every // 2]

    def gather_factors(part: Tensor) -> None:
        shard.start_curvature(only=frozenset(roles))
        shard.gathering = [group for group in shard.gathering if group.place % every == every // 2]
        gather(runner, part)
        shard.stop_curvature()

    found: dict[str, list[list[float]]] = {}
    count = len(tokens) // 4
    gather_factors(tokens[:count])
    estimates = {shape.name: (shard.own_factors(shape.name), shard.layer_mean(shape.block, shape.role)) for shape in wanted}
    gather_factors(tokens[count:])
    for shape in wanted:
        own, (few, mean) = shard.own_factors(shape.name), estimates[shape.name]
        if not own.num_tokens or not few.num_tokens:
            continue
        others, share = own.dense(), (few.num_tokens + 1) / (mean.num_tokens + 2)
        for side, other in (("A", others.A), ("G", others.G)):
            losses = []
            for prior in PRIORS:
                estimate = shrunk_factors(few, mean, prior).dense()
                matrix = estimate.A.double() if side == "A" else estimate.G.double() / share
                level = 1e-4 * matrix.diagonal().mean()
                factor = torch.linalg.cholesky(matrix + level * torch.eye(len(matrix), dtype=torch.float64))
                fit = torch.cholesky_solve(other.double() / own.num_tokens, factor).trace()
                losses.append(float(factor.diagonal().log().sum() + fit / 2) / len(matrix))
            found.setdefault(f"{side} of {shape.role}", []).append(losses)
    means = {name: np.array(losses).mean(axis=0) for name, losses in found.items()}
    return {
        "tokens": sorted(few.num_tokens for few, _ in estimates.values()),
        "excess": {name: dict(zip(map(str, PRIORS), (mean - mean.min()).tolist(), strict=True)) for name, mean in means.items()},
    }


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's."""
    ranks = np.array([a, b]).argsort(axis=1).argsort(axis=1)
    return float(np.corrcoef(*ranks)[0][1])


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a mixture of experts")
    parser.add_argument("folder", type=Path, help="where runs go")
    parser.add_argument("--kinds", nargs="+", default=list(METHODS), choices=list(METHODS), help="what goes in the table")
    parser.add_argument("--fractions", nargs="+", type=float, default=list(FRACTIONS), help="of it that go")
    parser.add_argument("--every", type=int, default=3, help="single experts are removed from every so many blocks")
    parser.add_argument("--sequences", type=int, default=8, help="of 512 tokens, on which single removals are measured")
    parser.add_argument("--which", nargs="+", default=["predictions", "table"], choices=["predictions", "priors", "table"])
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    layout = ModelLayout.of(AutoConfig.from_pretrained(arguments.model))
    if "predictions" in arguments.which:
        sequences = inputs_of(arguments.model, arguments.folder / "none", "experts", 0.01, 1).calibration[: arguments.sequences]
        found = predictions(arguments.model, layout, sequences, arguments.every)
        (arguments.folder / "predictions.json").write_text(json.dumps(found, indent=2) + "\n")
        said = ", ".join(f"{name} {value:.3f}" for name, value in found.items() if name != "experts")
        sys.stdout.write(f"{len(found['experts'])} experts removed one at a time, predicted and measured: {said}\n")
    if "priors" in arguments.which:
        sequences = inputs_of(arguments.model, arguments.folder / "none", "experts", 0.01, 1).calibration[: arguments.sequences]
        found = priors(arguments.model, layout, sequences, arguments.every)
        (arguments.folder / "priors.json").write_text(json.dumps(found, indent=2) + "\n")
        lines = [f"| tokens of the prior | {' | '.join(map(str, PRIORS))} |", "|---|" + "---:|" * len(PRIORS)]
        lines += [
            f"| {name} | {' | '.join(f'{value:.3f}' for value in by_weight.values())} |" for name, by_weight in found["excess"].items()
        ]
        sys.stdout.write("\n".join(lines) + "\n")
    if "table" in arguments.which:
        rows = table(arguments.model, arguments.folder, layout, arguments.kinds, arguments.fractions)
        texts = list(rows[0]["perplexity"])
        lines = ["| what goes | method | " + " | ".join(texts) + " |", "|---|---|" + "---:|" * len(texts)]
        of_dense = [f"{rows[0]['dense'][text]:.3f}" for text in texts]
        lines.append(f"| nothing | dense | {' | '.join(of_dense)} |")
        for row in rows:
            values = " | ".join(f"{row['perplexity'][t]:.3f} ({row['divergence'][t]:.3f})" for t in texts)
            lines.append(f"| {row['fraction']:.0%} of {row['kind']} | {row['method']} | {values} |")
        sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
