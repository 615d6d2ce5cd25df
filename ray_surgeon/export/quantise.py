"""The stage that writes the quantised copy of an export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray_surgeon.export.exports import Size, pruned_of, tell_of
from ray_surgeon.export.folder import Pruned, write_weights
from ray_surgeon.export.for_engines import write_quantised
from ray_surgeon.export.rounding import NUM_BACKWARD, round_linears, write_scales
from ray_surgeon.maths.packed import PackedSymmetric
from ray_surgeon.maths.rounding import ROWS_TOGETHER, Grid
from ray_surgeon.models.loss import perplexity_of
from ray_surgeon.plan.counts import Counted, StepPlan
from ray_surgeon.plan.estimate import WorkerView
from ray_surgeon.plan.step_estimates import block_by_block
from ray_surgeon.run_state import Facts, RunState, Stage
from ray_surgeon.runtime.passes import num_counted, sequence_losses
from ray_surgeon.spec.sections import QuantizeSection
from ray_surgeon.storage import files

_OF_A_COLUMN = 8
_OF_A_TILE = 4
"""Launches of the rounding of a column of tiles, and for what a tile's errors change elsewhere."""


def quantise(
    pruned: Pruned, uniform: Mapping[str, Any], target: str, section: QuantizeSection
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


def _perplexities(pruned: Pruned) -> dict[str, float]:
    """Return text -> perplexity of the workers' current weights."""
    perplexities = {}
    for text, windows in pruned.texts.items():
        losses = sequence_losses(pruned.cluster, windows)
        perplexities[text] = perplexity_of(sum(losses) / num_counted(windows))
    return perplexities


@dataclass(frozen=True)
class Quantise(Stage):
    """Writes a quantised copy of the export uniform; may round the workers' weights permanently."""

    name = "quantise"
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

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the passes of rounding by the calibration text; the nearest number needs none."""
        size = self.section.columns_together
        if size is None or not self.section.is_by_text:
            return
        both = self.section.rounding == "both_sides"
        device_type = "cpu" if worker.device_is_host else "cuda"
        of_G = sum(4.0 * PackedSymmetric.size(s.num_rows, device_type) for s in worker.linears)
        if both:
            yield self._pass_for_G(worker, of_G)
        shapes = [(linear.num_rows, linear.num_columns) for linear in worker.linears]
        of_linears = [
            (
                16.0 * (C**2 + R * C) + 16.0 * both * R**2,
                2 / 3 * (C**3 + both * R**3) + 2.0 * R * C * (C + both * R),
            )
            for R, C in shapes
        ]
        height = [min(R, ROWS_TOGETHER) if both else R for R, _ in shapes]
        columns = sum((R // h - 1) * size + C for (R, C), h in zip(shapes, height, strict=True))
        tiles = sum(R // h * (C // size) for (R, C), h in zip(shapes, height, strict=True))
        counts = Counted(_OF_A_COLUMN * columns + _OF_A_TILE * tiles)
        step = block_by_block(worker, self.name, of_linears, counts.times(1 / worker.num_replicas))
        yield replace(step, device=step.device + both * of_G / worker.num_replicas)

    def _pass_for_G(self, worker: WorkerView, of_G: float) -> StepPlan:
        """Return the pass forward and backward, which sums A, too."""
        own = -(-min(NUM_BACKWARD, worker.num_sequences) // worker.num_replicas)
        tokens = own * worker.sequence_length
        columns = {s.shared_input: s.num_columns for s in worker.linears}.values()
        flops = 6.0 * worker.active + 3 * worker.head_flops
        flops += sum(C**2 for C in columns) + sum(s.num_rows**2 for s in worker.linears)
        sums = of_G + sum(2.0 * C**2 for C in columns)
        device = worker.weights + sums + worker.passing(num_sequences=own)
        counts = worker.pass_counts(own, worker.sequence_length, 1.0, 1.0)
        moved = worker.moved(worker.stores.weights, 2 * worker.all_blocks)
        host = worker.host + sums * (worker.stores.factors == "host")
        return StepPlan(self.name, device, host, tokens * flops, 0.0, *moved, counts=counts)
