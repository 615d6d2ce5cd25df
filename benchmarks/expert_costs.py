"""Compares costs of experts with measured losses, and their factors with other text.

The model is a mixture of experts.

``python -m benchmarks.upcycled MODEL && python -m benchmarks.expert_costs MODEL FOLDER``
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig

from benchmarks.experts import inputs_of
from ray_surgeon.config.sections import ModelSection
from ray_surgeon.maths.experts import rerouting_costs, share_of_tokens, shrunk_factors
from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.checkpoint import tensor_reader
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.loss import Comparison, Predicted, compare_with_dense
from ray_surgeon.models.runner import BlockRunner, Call
from ray_surgeon.models.shard import ModelShard
from ray_surgeon.storage.sources import open_model

NUM_THREADS = 2


def sequences_of_help(model: Path, num_sequences: int) -> NDArray[np.int64]:
    """Return calibration sequences [num_sequences, 512]."""
    return inputs_of(
        model, Path("unused"), "experts", 0.01, 1, num_sequences, dry_run=True
    ).calibration


@dataclass(frozen=True)
class SingleRemovals:
    """The model, and the hidden states before every block, to measure removals."""

    shard: ModelShard
    runner: BlockRunner
    tokens: Tensor  # [num_sequences, T]
    calls: list[Call]  # one per block
    # of each sequence, the hidden states before the dense model's head
    dense: list[Tensor]

    def without(
        self, place: int, expert: int, states: list[Tensor]
    ) -> tuple[float, float]:
        """Return the result of `compare` for the model without an expert of a block.

        States before the block are given.
        """
        mixture = self.shard.mixtures[place]
        kept = mixture.kept
        mixture.kept = kept.clone().index_fill_(0, torch.tensor([expert]), False)
        found = self.compare(place, states)
        mixture.kept = kept
        return found

    def compare(self, place: int, states: list[Tensor]) -> tuple[float, float]:
        """Return the mean NLL and divergence from the dense model of sequences.

        States before a block are given.
        """
        with ThreadPoolExecutor(
            NUM_THREADS, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            found = list(
                pool.map(partial(self._compare, place), states, self.dense, self.tokens)
            )
        count = len(self.tokens) * (self.tokens.shape[1] - 1)
        return sum(float(c.nll) for c in found) / count, sum(
            float(c.divergence) for c in found
        ) / count

    @torch.no_grad()
    def _compare(
        self, first: int, hidden: Tensor, dense: Tensor, tokens: Tensor
    ) -> Comparison:
        for place in range(first, len(self.calls)):
            hidden = self.runner.through(place, hidden, self.calls)
        states = self.runner.leave(hidden)
        return compare_with_dense(
            states, dense, Predicted(tokens[None]), self.shard.head_weight
        )


def loaded(model: Path, layout: ModelLayout) -> ModelShard:
    """Return a whole model in float32."""
    source = open_model(ModelSection(source=str(model)))
    blocks = BlockRange(0, layout.num_blocks, layout.num_blocks)
    shard = ModelShard(layout, blocks, torch.float32, torch.device("cpu"))
    shard.load(tensor_reader(layout, source.uri_of, source.read, str(model)))
    return shard


def gather(runner: BlockRunner, tokens: Tensor) -> None:
    """Pass sequences [num_sequences, T] forward and backward."""
    for i, sequence in enumerate(tokens):
        (hidden,) = runner.forward(i, sequence[None])
        _, gradient, _ = runner.loss(hidden, Predicted(sequence[None]))
        runner.backward(i, [gradient])


def predictions(
    model: Path, layout: ModelLayout, sequences: NDArray[np.int64], every: int
) -> dict[str, Any]:
    """Return predicted and measured loss increases of single experts on the same text.

    The experts are those of every n-th block.

    Two increases are measured: that of the loss on the text, which has the noise of the text's
    labels, and the divergence from the dense model, which is the expected increase of the loss over
    the dense model's own predictions.
    """
    shard = loaded(model, layout)
    tokens = torch.from_numpy(sequences)
    runner = BlockRunner(shard)
    shard.start_curvature(only=frozenset(), experts=True)
    gather(runner, tokens)
    shard.stop_curvature()
    entered = [runner.enter(sequence[None]) for sequence in tokens]
    states = [hidden for hidden, _ in entered]
    found = list[dict[str, float]]()
    removals = SingleRemovals(
        shard,
        runner,
        tokens,
        entered[0][1],
        [runner.infer(sequence[None])[0] for sequence in tokens],
    )
    dense, _ = removals.compare(0, states)
    for place in range(layout.num_blocks):
        if place % every == every // 2 and place in shard.mixtures:
            mixture = shard.mixtures[place]
            sums = shard.expert_sums[place]
            costs, second = (
                rerouting_costs(sums, mixture.num_chosen, first_order=first)
                for first in (True, False)
            )
            for expert in range(len(mixture.experts)):
                nll, divergence = removals.without(place, expert, states)
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
        [entry[name] for entry in found]
        for name in ("predicted", "second_order", "measured", "divergence")
    )
    return {
        "experts": found,
        "rank_correlation": rank_correlation(predicted, measured),
        "of the second order": rank_correlation(second_order, measured),
        "of the second order with the divergence": rank_correlation(
            second_order, diverged
        ),
    }


PRIORS = (1, 4, 8, 16, 32, 64, 128, 256, 1024)


def priors(
    model: Path, layout: ModelLayout, sequences: NDArray[np.int64], every: int
) -> dict[str, Any]:
    """Return the error on other text of factors shrunk with each weight.

    Factors of experts are estimated on a quarter of the sequences. For normally distributed inputs
    and gradients with these second moments, the negative log-likelihood of the other sequences is
    1/2 (log det M + tr M^-1 M_other). The error is this value divided by the size of M, minus that
    of the best weight, averaged over the experts of every n-th block with tokens in both parts.
    """
    shard = loaded(model, layout)
    tokens = torch.from_numpy(sequences)
    runner = BlockRunner(shard)
    experts = layout.family.sparse.experts
    linears = layout.family.sparse.linears
    roles = {
        f"{experts}.*.{linear}" for linear in (linears.producers[0], linears.consumer)
    }
    wanted = [
        s for s in layout.linears if s.role in roles and s.block % every == every // 2
    ]

    def gather_factors(part: Tensor) -> None:
        shard.start_curvature(only=frozenset(roles))
        shard.gathering = [
            group for group in shard.gathering if group.place % every == every // 2
        ]
        gather(runner, part)
        shard.stop_curvature()

    found: dict[str, list[list[float]]] = {}
    count = len(tokens) // 4
    gather_factors(tokens[:count])
    estimates = {
        shape.name: (
            shard.own_factors(shape.name),
            shard.layer_mean(shape.block, shape.role),
        )
        for shape in wanted
    }
    gather_factors(tokens[count:])
    for shape in wanted:
        own = shard.own_factors(shape.name)
        (few, mean) = estimates[shape.name]
        if not own.num_tokens or not few.num_tokens:
            continue
        others = own.dense()
        share = share_of_tokens(few.num_tokens, mean)
        for side, other in (("A", others.A), ("G", others.G)):
            losses = []
            for prior in PRIORS:
                estimate = shrunk_factors(few, mean, prior).dense()
                matrix = (
                    estimate.A.double() if side == "A" else estimate.G.double() / share
                )
                level = 1e-4 * matrix.diagonal().mean()
                factor = torch.linalg.cholesky(
                    matrix + level * torch.eye(len(matrix), dtype=torch.float64)
                )
                fit = torch.cholesky_solve(
                    other.double() / own.num_tokens, factor
                ).trace()
                losses.append(
                    float(factor.diagonal().log().sum() + fit / 2) / len(matrix)
                )
            found.setdefault(f"{side} of {shape.role}", []).append(losses)
    means = {name: np.array(losses).mean(axis=0) for name, losses in found.items()}
    return {
        "tokens": sorted(few.num_tokens for few, _ in estimates.values()),
        "excess": {
            name: dict(zip(map(str, PRIORS), (mean - mean.min()).tolist(), strict=True))
            for name, mean in means.items()
        },
    }


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation."""
    ranks = np.array([a, b]).argsort(axis=1).argsort(axis=1)
    return float(np.corrcoef(*ranks)[0][1])


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a mixture of experts")
    parser.add_argument("folder", type=Path, help="where all figures go")
    parser.add_argument(
        "--every",
        type=int,
        default=10,
        help="measure the experts of every N-th block",
    )
    parser.add_argument(
        "--sequences", type=int, default=64, help="of 512 tokens of Python's help"
    )
    parser.add_argument(
        "--which",
        nargs="+",
        default=["predictions"],
        choices=["predictions", "priors"],
        help="what is measured",
    )
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(NUM_THREADS)
    layout = ModelLayout.of(AutoConfig.from_pretrained(arguments.model))
    sequences = sequences_of_help(arguments.model, arguments.sequences)
    if "predictions" in arguments.which:
        found = predictions(arguments.model, layout, sequences, arguments.every)
        (arguments.folder / "predictions.json").write_text(
            json.dumps(found, indent=2) + "\n"
        )
        said = ", ".join(
            f"{name} {value:.3f}" for name, value in found.items() if name != "experts"
        )
        sys.stdout.write(
            f"{len(found['experts'])} experts removed one at a time, predicted and measured: "
            f"{said}\n"
        )
    if "priors" in arguments.which:
        found = priors(arguments.model, layout, sequences, arguments.every)
        (arguments.folder / "priors.json").write_text(json.dumps(found, indent=2) + "\n")
        lines = [
            f"| tokens of the prior | {' | '.join(map(str, PRIORS))} |",
            "|---|" + "---:|" * len(PRIORS),
        ]
        lines += [
            f"| {name} | {' | '.join(f'{value:.3f}' for value in by_weight.values())} |"
            for name, by_weight in found["excess"].items()
        ]
        sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
