"""Coupled groups: rows and columns of several linears that are pruned together."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ray_surgeon.models.layout import Heads, ModelLayout


@dataclass(frozen=True)
class GroupSet:
    """All coupled groups of one kind in one block (docs/method.md, section 8)."""

    kind: str  # one of `GROUP_KINDS`
    block: int  # its number
    consumer: str  # global name of the linear whose columns decide
    columns: Tensor  # [num_groups, width] columns of the consumer
    # (global name of a linear, [num_groups, rows] its rows that are pruned with each group)
    producers: tuple[tuple[str, Tensor], ...]
    num_parameters: int  # of one group, biases included


def groups_of(layout: ModelLayout, block: int) -> Iterator[GroupSet]:
    """Yield the coupled groups of a block."""
    prefix = layout.family.block_prefix(block)
    layers = [("ffn", prefix, layout.family.ffn)]
    if (sparse := layout.family.sparse) is not None:
        names = (shape.name for shape in layout.linears if shape.block == block)
        modules = dict.fromkeys(name.removeprefix(prefix).rpartition(".")[0] for name in names)
        for name, kind in sparse.layers_in(modules).items():
            layers.append((kind, f"{prefix}{name}.", sparse.linears))
    if layout.family.prunes_heads:
        layers.insert(0, ("attention", prefix, layout.family.attention))
    for kind, inside, coupling in layers:
        consumer = layout.shapes.get(inside + coupling.consumer)
        if consumer is None:
            continue
        if kind == "attention":
            columns, *rows = _rows_of_heads(layout.heads, is_fused=coupling.num_parts > 1)
        else:
            num_channels = consumer.num_columns - consumer.has_bias
            columns = _places(0, num_channels)
            rows = [_places(part * num_channels, num_channels) for _, part in coupling.parts]
        names = (inside + name for name, _ in coupling.parts)
        producers = tuple(zip(names, rows, strict=True))
        size = columns.shape[1] * consumer.num_rows
        size += sum(own.shape[1] * layout.shapes[name].num_columns for name, own in producers)
        yield GroupSet(kind, block, consumer.name, columns, producers, size)


def _rows_of_heads(heads: Heads, *, is_fused: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what belongs to each KV group, [num_kv, rows].

    That are columns of the consumer, and rows of queries, keys and values, which a fused linear has
    one after the other.
    """
    queries = torch.arange(heads.num_query * heads.head_dim).view(heads.num_kv, -1)
    keys = torch.arange(heads.num_kv * heads.head_dim).view(heads.num_kv, -1)
    if not is_fused:
        return queries, queries, keys, keys
    first = queries.numel()
    return queries, queries, keys + first, keys + first + keys.numel()


@functools.cache
def _places(first: int, count: int) -> Tensor:
    """Return the numbers of channels, [count, 1].

    Layers of one width, which may be many, share one tensor, also where a layout travels.
    """
    return torch.arange(first, first + count, device="cpu")[:, None]
