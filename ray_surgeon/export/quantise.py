"""The quantised copy of an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ray_surgeon.export.exports import Size, pruned_of, tell_of
from ray_surgeon.export.folder import Pruned, write_weights
from ray_surgeon.export.for_engines import write_quantised
from ray_surgeon.export.rounding import round_linears, write_scales
from ray_surgeon.maths.rounding import Grid
from ray_surgeon.models.loss import perplexity_of
from ray_surgeon.run_state import Facts, RunState
from ray_surgeon.runtime.passes import num_counted, sequence_losses
from ray_surgeon.spec.sections import QuantizeSection
from ray_surgeon.storage import files


def quantise(
    pruned: Pruned, uniform: Mapping[str, Any], target: str, section: QuantizeSection
) -> dict[str, Any]:
    """Write the quantised copy of the export uniform, and evaluate it in a process of its own.

    Args:
        pruned: the model; the workers' weights, which are the export's, may be rounded for good.
        uniform: entry of the export.
        target: folder of the copy.
        section: how.

    Returns:
        The copy's entry in the report, with its size and its perplexities.

    Raises:
        RuntimeError: it cannot be quantised or loaded.
    """
    size = section.columns_together
    if size is None or not section.is_by_text:
        return write_quantised(pruned, uniform, target, section, uniform["uri"])
    grid = Grid(section.num_bits, size)
    rounded = f"{target}-rounded"
    both = section.rounding == "both_sides"
    try:
        round_linears(pruned.cluster, pruned.calibration, grid, both_sides=both)
        write_weights(pruned.cluster, rounded, pruned.blocks)
        scales = files.join(rounded, "scales")
        pruned.cluster.run_all(write_scales, scales, pruned.blocks)
        # of mixtures, which transformers would not load
        found = _perplexities(pruned) if pruned.layout.is_mixture else None
        return write_quantised(pruned, uniform, target, section, rounded, found)
    finally:
        files.remove_folder(rounded)


def _perplexities(pruned: Pruned) -> dict[str, float]:
    """Return those of the workers' weights, as they are now."""
    losses = {text: sequence_losses(pruned.cluster, w) for text, w in pruned.texts.items()}
    return {
        text: perplexity_of(sum(losses[text]) / num_counted(windows))
        for text, windows in pruned.texts.items()
    }


@dataclass(frozen=True)
class Quantise:
    """The quantised copy of the export uniform; it may round the workers' weights, for good."""

    name: ClassVar[str] = "quantise"  # of its step
    size: Size
    section: QuantizeSection

    def write(self, run: RunState, facts: Facts) -> None:
        """Write and evaluate the copy."""
        exports = {(entry["kind"], entry.get("size")): entry for entry in run.report.exports}
        uniform = exports["uniform", self.size.value]
        target = f"{uniform['uri']}-{self.section.scheme}"
        entry = quantise(pruned_of(run, self.size.shot), uniform, target, self.section)
        tell_of(entry, run, facts, self.size)
