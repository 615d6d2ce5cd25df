"""Measures on texts: of the dense model once, and of the pruned model after every shot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ray_surgeon.distributed.passes import measure, remember
from ray_surgeon.run_state import HELD, Facts, RunState, Text


class CollapseError(RuntimeError):
    """Raised if the model is worse than the spec allows."""


def measure_dense_model(run: RunState, further: Mapping[str, Text], facts: Facts) -> None:
    """Measure the dense model, and let the last shards keep its states for later comparisons.

    Args:
        run: before the first shot.
        further: texts in addition to those of the evaluation on which later weights are compared
            with the dense model, by name.
        facts: facts of the step.
    """
    perplexity = {}
    for name, text in run.texts.items():
        perplexity[name] = remember(run.cluster, name, text)
        facts[f"perplexity {name}"] = perplexity[name]
    run.report.dense["perplexity"] = perplexity
    for name, (tokens, counts) in further.items():
        remember(run.cluster, name, tokens, counts)
    if len(run.text.held):
        remember(run.cluster, HELD, run.text.held, run.text.held_counts)
        facts["windows held aside"] = len(run.text.held)


@dataclass(frozen=True)
class Evaluation:
    """Measures the pruned model on texts."""

    # limit on the perplexity relative to the dense model's; None for no limit
    stop_above: float | None

    def measure(self, run: RunState, facts: Facts) -> None:
        """Measure every text."""
        facts["sparsity"] = run.sparsity
        perplexity = {}
        divergence = {}
        for name, text in run.texts.items():
            measured = measure(run.cluster, name, text)
            perplexity[name] = measured.perplexity
            divergence[name] = measured.divergence
        run.record["perplexity"] = perplexity
        run.record["divergence"] = divergence
        for name, value in perplexity.items():
            facts[f"perplexity {name}"] = value
        for name, value in divergence.items():
            facts[f"divergence {name}"] = value

    def check_limit(self, run: RunState) -> None:
        """End the run if the model is too much worse than the dense one.

        Raises:
            CollapseError: a perplexity is above the limit.
        """
        limit = self.stop_above
        if limit is None:
            return
        for text, value in run.record["perplexity"].items():
            dense = run.report.dense["perplexity"][text]
            if not value <= limit * dense:
                raise CollapseError(
                    f"after round {run.shot} the perplexity on {text} is {value:.4g}, "
                    f"{value / dense:.3g} times the dense model's; evaluation.stop_above allows "
                    f"{limit:g}. The rounds before are committed; prune less, or raise the limit"
                )
