"""The stage that writes the quantised copy of an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ray_surgeon.config.sections import QuantizeSection
from ray_surgeon.distributed.passes import num_counted, sequence_losses
from ray_surgeon.export.exports import Size, pruned_of, tell_of
from ray_surgeon.export.folder import PrunedModel, write_weights
from ray_surgeon.export.for_engines import write_quantised
from ray_surgeon.export.rounding import round_linears, write_scales
from ray_surgeon.maths.rounding import Grid
from ray_surgeon.models.loss import perplexity_of
from ray_surgeon.run_state import Facts, RunState
from ray_surgeon.storage import files


def quantise(
    pruned: PrunedModel, uniform: Mapping[str, Any], target: str, section: QuantizeSection
) -> dict[str, Any]:
    """Write the quantised copy of the export uniform, and evaluate it in a fresh process.

    Args:
        pruned: the model. The workers' weights, which are the export's, may be rounded
            permanently.
        uniform: entry of the export.
        target: folder of the copy.
        section: `output.quantize` of the job spec.

    Returns:
        The copy's entry in the report, with its size and its perplexities.

    Raises:
        RuntimeError: it cannot be quantised or loaded.
    """
    group_size = section.columns_together
    if group_size is None or not section.is_by_text:
        return write_quantised(pruned, uniform, target, section, source=uniform["uri"])
    cluster = pruned.cluster
    grid = Grid(section.num_bits, group_size)
    both_sides = section.rounding == "both_sides"
    rounded = f"{target}-rounded"
    try:
        round_linears(cluster, pruned.calibration, grid, both_sides=both_sides)
        write_weights(cluster, rounded, pruned.blocks)
        scales = files.join(rounded, "scales")
        cluster.run_all(write_scales, scales, pruned.blocks)
        perplexity = None
        # transformers would not load a quantised mixture
        if pruned.layout.is_mixture:
            perplexity = _perplexities(pruned)
        return write_quantised(
            pruned, uniform, target, section, source=rounded, perplexity=perplexity
        )
    finally:
        files.remove_folder(rounded)


def _perplexities(pruned: PrunedModel) -> dict[str, float]:
    """Return text -> perplexity of the workers' current weights."""
    perplexities = {}
    for text, windows in pruned.texts.items():
        losses = sequence_losses(pruned.cluster, windows)
        perplexities[text] = perplexity_of(sum(losses) / num_counted(windows))
    return perplexities


@dataclass(frozen=True)
class Quantise:
    """Writes a quantised copy of the export uniform; may round the workers' weights permanently."""

    name: ClassVar[str] = "quantise"  # of its step
    size: Size
    section: QuantizeSection

    def write(self, run: RunState, facts: Facts) -> None:
        """Write and evaluate the copy."""
        exports = {}
        for export in run.report.exports:
            exports[export["kind"], export.get("size")] = export
        uniform = exports["uniform", self.size.value]
        target = f"{uniform['uri']}-{self.section.scheme}"
        pruned = pruned_of(run, self.size.shot)
        entry = quantise(pruned, uniform, target, self.section)
        tell_of(entry, run, facts, self.size)
