"""What a job will need, by arithmetic on shapes: the plan that ``--dry-run`` prints."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from rich.table import Table

from ray_surgeon.cluster.placement import Placement
from ray_surgeon.models.layout import ModelLayout


@dataclass(frozen=True)
class WorkerPlan:
    """One worker's needs."""

    shard: int  # its number
    first_block: int  # of the shard
    last_block: int  # of the shard, inclusive
    weight_bytes: int  # parameters in the model's dtype
    factor_bytes: int  # A and G in float32
    workspace_bytes: int  # of the costs step: copies of the largest factors that are alive, damped and factorised
    activation_bytes: int  # estimated, of micro-batches in flight: inputs and outputs of linears, a slice of logits


def plan_workers(
    layout: ModelLayout, placement: Placement, dtype: str, sequence_length: int, *, consumers_only: bool = False
) -> list[WorkerPlan]:
    """Return the plan of every shard; replicas need the same again.

    Args:
        layout: of the model.
        placement: of its blocks.
        dtype: of weights and activations.
        sequence_length: tokens of a micro-batch.
        consumers_only: whether curvature is gathered only for the consumers of coupled groups; see `ModelShard.start_curvature`.
    """
    width = getattr(torch, dtype).itemsize
    consumers = (layout.family.ffn.consumer, layout.family.attention.consumer) if consumers_only else ("",)
    plans = []
    for shard, blocks in enumerate(placement.blocks):
        own = [s for s in layout.linears if blocks.first <= s.block < blocks.last]
        gathered = [s for s in own if s.name.endswith(consumers)]
        inputs = {s.shared_input: s.num_columns for s in own}
        weights = sum(math.prod(shape) for shape in layout.parameters_of(blocks).values()) * width
        factors = 4 * (sum(s.num_rows**2 for s in gathered) + sum(c**2 for c in {s.shared_input: s.num_columns for s in gathered}.values()))
        largest = max(s.num_rows**2 + s.num_columns**2 for s in gathered)
        workspace = 4 * 4 * largest
        in_flight = placement.num_shards - shard
        per_token = (sum(s.num_rows for s in own) + sum(inputs.values())) * width
        logits = 2 * 4 * 128 * layout.config.vocab_size if blocks.is_last else 0
        activations = in_flight * sequence_length * per_token + logits
        plans.append(WorkerPlan(shard, blocks.first, blocks.last - 1, weights, factors, workspace, activations))
    return plans


def plan_table(plans: list[WorkerPlan], num_replicas: int) -> Table:
    """Return the plan as a table."""
    table = Table(title=f"{len(plans)} shards x {num_replicas} replicas; per worker")
    for column in ("shard", "blocks", "weights MiB", "factors MiB", "workspace MiB", "activations MiB (estimate)"):
        table.add_column(column, justify="right")
    for plan in plans:
        sizes = [f"{size / 2**20:.0f}" for size in (plan.weight_bytes, plan.factor_bytes, plan.workspace_bytes, plan.activation_bytes)]
        table.add_row(str(plan.shard), f"{plan.first_block}-{plan.last_block}", *sizes)
    return table
