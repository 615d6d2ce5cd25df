"""Coupled groups: rows and columns of several linears that are pruned together."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ray_surgeon.models.linears import Coupling

if TYPE_CHECKING:
    from ray_surgeon.models.layout import ModelLayout


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
    if layout.family.prunes_heads:
        yield _attention_groups(layout, block)
    layers = [("ffn", prefix, layout.family.ffn)]
    if (sparse := layout.family.sparse) is not None:
        names = (shape.name for shape in layout.linears if shape.block == block)
        modules = dict.fromkeys(name.removeprefix(prefix).rpartition(".")[0] for name in names)
        for name, kind in sparse.layers_in(modules).items():
            layers.append((kind, f"{prefix}{name}.", sparse.linears))
    for kind, inside, ffn in layers:
        if inside + ffn.consumer in layout.shapes:
            yield _channels(layout, kind, block, inside, ffn)


def _attention_groups(layout: ModelLayout, block: int) -> GroupSet:
    prefix = layout.family.block_prefix(block)
    attention = layout.family.attention
    heads = layout.heads
    queries = torch.arange(heads.num_query * heads.head_dim).view(heads.num_kv, -1)
    keys = torch.arange(heads.num_kv * heads.head_dim).view(heads.num_kv, -1)
    values = keys
    if attention.num_parts > 1:
        keys = keys + queries.numel()
        values = keys + keys.numel()
    names = [prefix + name for name, _ in attention.parts]
    producers = tuple(zip(names, (queries, keys, values), strict=True))
    return _group_set(layout, "attention", block, prefix + attention.consumer, queries, producers)


def _channels(layout: ModelLayout, kind: str, block: int, inside: str, ffn: Coupling) -> GroupSet:
    """Return the channels of a feed-forward layer, which lies `inside` of something."""
    consumer = layout.shapes[inside + ffn.consumer]
    num = consumer.num_columns - consumer.has_bias
    producers = tuple((inside + name, _places(part * num, num)) for name, part in ffn.parts)
    return _group_set(layout, kind, block, consumer.name, _places(0, num), producers)


def _group_set(
    layout: ModelLayout,
    kind: str,
    block: int,
    consumer: str,
    columns: Tensor,
    producers: tuple[tuple[str, Tensor], ...],
) -> GroupSet:
    size = columns.shape[1] * layout.shapes[consumer].num_rows
    size += sum(rows.shape[1] * layout.shapes[name].num_columns for name, rows in producers)
    return GroupSet(kind, block, consumer, columns, producers, size)


@functools.cache
def _places(first: int, count: int) -> Tensor:
    """Return the numbers of channels, [count, 1].

    Layers of one width, which may be many, share one tensor, also where a layout travels.
    """
    return torch.arange(first, first + count, device="cpu")[:, None]
