"""Compares methods of pruning experts and their channels, as Markdown tables.

``python -m benchmarks.upcycled MODEL && python -m benchmarks.experts MODEL FOLDER``

Every method removes the same number of experts, or of channels, from every block of the dense
mixture, calibrates on Python's help and is evaluated on help and docstrings. The other methods
follow their definitions: REAP (Lasby et al. 2025, arXiv 2510.13999: mean over an expert's tokens of
its weight times the norm of its output), frequency of routing, magnitude (norm of the weights). For
channels, REAP's score is the root mean square of the channel's activation times the norm of its
column. Other methods have one shot and no updates; ours has one shot per expert removed from a
block, and two for channels.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from ray_surgeon.checkpointing import RunDirectory
from ray_surgeon.config.job import parse_spec
from ray_surgeon.distributed.cluster import LocalCluster
from ray_surgeon.distributed.worker import LinearSummary, Worker, collective
from ray_surgeon.job import run_job
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.preparation.inputs import Inputs, check
from ray_surgeon.pruning.coupled_groups import Groups

FRACTIONS = (0.25, 0.5)
NUM_AT_ONCE = 2
"""Number of concurrent jobs, one thread each.

Experts see too few tokens for products to use two threads.
"""
METHODS = {
    "experts": ("rerouting", "rerouting, one shot", "reap", "frequency", "magnitude"),
    "expert_channels": ("ours", "reap", "magnitude"),
}


@dataclass(frozen=True)
class Peer(Groups):
    """Methods with other scores in place of the costs, and without updates."""

    peer: str = "magnitude"

    def _expert_costs(self, worker: Worker, shot: int) -> dict[str, float]:
        found = super()._expert_costs(worker, shot)
        if self.peer == "magnitude" and self.ranks_experts:
            for experts in worker.shard.expert_sets:
                for linears in experts.linears:
                    found[linears[-1]] = (
                        sum(
                            float(worker.shard.weight(name).square().sum())
                            for name in linears
                        )
                        ** 0.5
                    )
        return found

    def costs(self, worker: Worker, reach: Any, shot: int) -> Any:
        """Return the scores of channels; the lowest are removed first."""
        found = super().costs(worker, reach, shot)
        if self.ranks_experts:
            return found
        return replace(
            found,
            costs=tuple(
                replace(c, costs=self._scores(worker, c.consumer, c.costs))
                for c in found.costs
            ),
        )

    def _scores(self, worker: Worker, name: str, costs: Tensor) -> Tensor:
        norms = worker.shard.weight(name).norm(dim=0)
        if self.peer == "reap":
            norms = (
                norms * worker.shard.own_factors(name).A.diagonal().clamp(min=0).sqrt()
            )
        most = int(torch.isfinite(costs).sum())
        scores = torch.full_like(costs, torch.inf)
        cheapest = norms.argsort(stable=True)[:most]
        scores[cheapest] = norms[cheapest].to(scores.dtype)
        return scores

    @collective
    def prune(
        self,
        worker: Worker,
        counts: Mapping[str, int],
        experts: Mapping[str, float],
        rate: float,
    ) -> tuple[LinearSummary, ...]:
        """Remove the channels with the lowest scores, or whole experts like ours."""
        if self.ranks_experts:
            return super().prune(worker, counts, experts, rate)
        for groups in self.sets(worker):
            scores = self._scores(
                worker, groups.consumer, torch.zeros(len(groups.columns))
            )
            gone = scores.argsort(stable=True)[: counts[groups.consumer]]
            mask = worker.mask(groups.consumer, StructuredMask)
            removed = torch.zeros_like(mask.columns)
            removed[groups.columns[gone].flatten()] = True
            worker.masks[groups.consumer] = mask.without(
                torch.zeros_like(mask.rows), removed
            )
            W = worker.shard.weight(groups.consumer)
            W[:, removed] = 0
            worker.shard.set_weight(groups.consumer, W)
        worker.shard.drop_curvature()
        return tuple(worker.summary(name, 0.0, 0.0) for name in worker.owned())


def inputs_of(
    model: Path,
    folder: Path,
    kind: str,
    sparsity: float,
    shots: int,
    num_sequences: int = 24,
    *,
    dry_run: bool = False,
    **pruning: Any,
) -> Inputs:
    """Return a validated job."""
    document = {
        "version": 2,
        "name": "experts",
        "model": {"source": str(model), "dtype": "bfloat16"},
        "calibration": {
            "source": "python-docs",
            "num_sequences": num_sequences,
            "sequence_length": 512,
        },
        "evaluation": [
            {
                "name": text,
                "source": text,
                "split": "test",
                "num_sequences": 16,
                "sequence_length": 512,
            }
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
        "cluster": {"backend": "local", "cpus_per_worker": 1},
        "output": {"uri": str(folder), "exports": [], "keep_shots": 1},
    }
    return check(parse_spec(json.dumps(document)), dry_run=dry_run)


@dataclass(frozen=True)
class Point:
    """One line of the table."""

    kind: str  # removed kind
    fraction: float  # removed fraction
    method: str

    def inputs(self, model: Path, folder: Path, layout: ModelLayout) -> Inputs:
        """Return its job.

        Ours removes channels in two shots, and experts in one shot per expert of a block; other
        methods have one shot.
        """
        of_experts = (
            sum(s.size for s in layout.linears if not s.sees_all_tokens)
            / layout.linear_size
        )
        is_ours = self.method.partition(",")[0] in ("rerouting", "ours")
        num_shots = 1
        if self.method in ("rerouting", "ours"):
            num_shots = (
                round(self.fraction * layout.num_experts) if self.kind == "experts" else 2
            )
        score: dict[str, Any] = (
            {"expert_costs": self.method}
            if self.method in ("frequency", "reap") and self.kind == "experts"
            else {}
        )
        where = (
            folder
            / f"{self.kind}-{self.fraction:g}-{self.method.replace(', ', '-').replace(' ', '-')}"
        )
        inputs = inputs_of(
            model, where, self.kind, self.fraction * of_experts - 1e-9, num_shots, **score
        )
        if is_ours:
            return inputs
        method = inputs.method
        assert isinstance(method, Groups)
        peer = Peer(
            method.section,
            method.curvature,
            method.budget,
            method.fewest,
            method.consumers,
            peer=self.method,
        )
        return replace(inputs, method=peer)


def record_of(point: Point, model: Path, folder: Path) -> dict[str, Any]:
    """Run the job of a point and return the dense and the last perplexities, and divergences."""
    torch.set_num_threads(1)
    inputs = point.inputs(
        model, folder, ModelLayout.of(AutoConfig.from_pretrained(model))
    )
    cluster = LocalCluster(inputs.layout, inputs.placement, 1)
    run_job(inputs, cluster, RunDirectory(inputs.spec.output.uri), lambda news: None)
    report = json.loads((Path(inputs.spec.output.uri) / "report.json").read_text())
    last = {
        name: report["shots"][-1][name]
        for name in ("perplexity", "divergence", "sparsity")
    }
    return vars(point) | {"dense": report["dense"]["perplexity"]} | last


def table(
    model: Path, folder: Path, kinds: Sequence[str], fractions: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Return the records of every point."""
    points = [
        Point(kind, fraction, method)
        for fraction in fractions
        for kind in kinds
        for method in METHODS[kind]
    ]
    with ProcessPoolExecutor(NUM_AT_ONCE, get_context("spawn")) as pool:
        for running in [pool.submit(record_of, point, model, folder) for point in points]:
            yield running.result()


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a mixture of experts")
    parser.add_argument("folder", type=Path, help="where runs go")
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=list(METHODS),
        choices=list(METHODS),
        help="kinds to remove",
    )
    parser.add_argument(
        "--fractions",
        nargs="+",
        type=float,
        default=list(FRACTIONS),
        help="fractions to remove",
    )
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in table(
        arguments.model, arguments.folder, arguments.kinds, arguments.fractions
    ):
        rows.append(row)
        sys.stderr.write(json.dumps(row) + "\n")
        (arguments.folder / "experts.json").write_text(json.dumps(rows, indent=2) + "\n")
    texts = list(rows[0]["perplexity"])
    lines = [
        "| what goes | method | " + " | ".join(texts) + " |",
        "|---|---|" + "---:|" * len(texts),
    ]
    of_dense = [f"{rows[0]['dense'][text]:.3f}" for text in texts]
    lines.append(f"| nothing | dense | {' | '.join(of_dense)} |")
    for row in rows:
        values = " | ".join(
            f"{row['perplexity'][t]:.3f} ({row['divergence'][t]:.3f})" for t in texts
        )
        lines.append(
            f"| {row['fraction']:.0%} of {row['kind']} | {row['method']} | {values} |"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
