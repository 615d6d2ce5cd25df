"""Coupled groups, and rows and columns that have no influence because others are pruned."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.models.attention import rope_of

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
    names = (shape.name for shape in layout.linears if shape.block == block)
    modules = dict.fromkeys(name.removeprefix(prefix).rpartition(".")[0] for name in names)
    for kind, inside, coupling in layout.family.couplings_in(modules):
        consumer = layout.shapes.get(prefix + inside + coupling.consumer)
        if consumer is None or (kind == "attention" and not layout.family.prunes_heads):
            continue
        if kind == "attention":
            columns, *rows = _rows_of_heads(layout.heads, is_fused=coupling.num_parts > 1)
        else:
            num_channels = consumer.num_columns - consumer.has_bias
            columns = _places(0, num_channels)
            rows = [_places(part * num_channels, num_channels) for _, part in coupling.parts]
        names = (prefix + inside + name for name, _ in coupling.parts)
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


_KEEP_ZERO = {"silu", "swish", "relu", "relu2"}
_KEEP_ZERO |= {"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python"}
"""Activations with f(0) = 0."""


def propagate(
    layout: ModelLayout, masks: Mapping[str, StructuredMask], sets: Sequence[GroupSet]
) -> dict[str, StructuredMask]:
    """Return the masks that change when everything without influence is pruned too.

    Args:
        layout: of the model.
        masks: name of a linear -> what is kept of it.
        sets: the groups of the blocks whose linears are in `masks`.
    """
    kept = {n: StructuredMask(m.rows.clone(), m.columns.clone()) for n, m in masks.items()}
    for groups in sets:
        if groups.kind == "attention":
            _propagate_in_heads(layout, groups, kept)
        elif layout.activation in _KEEP_ZERO:
            _propagate_in_ffn(layout, groups, kept)
    return {name: mask for name, mask in kept.items() if not _are_same(mask, masks[name])}


def _are_same(mask: StructuredMask, before: StructuredMask) -> bool:
    return torch.equal(mask.rows, before.rows) and torch.equal(mask.columns, before.columns)


def shrinkable(masks: Mapping[str, StructuredMask], sets: Sequence[GroupSet]) -> int:
    """Return the parameters in groups of which every column of the consumer is pruned.

    These could be cut out of the dense shapes.
    """
    gone = [~masks[groups.consumer].columns[groups.columns].any(dim=1) for groups in sets]
    return sum(int(part.sum()) * g.num_parameters for part, g in zip(gone, sets, strict=True))


Kept = Mapping[str, StructuredMask]
"""Name of a linear -> what is kept of it."""


def _propagate_in_ffn(layout: ModelLayout, groups: GroupSet, kept: Kept) -> None:
    """A channel is a product or a function of its producers' outputs: zero if one of them is.

    Not each of them does that in every mixture.
    """
    names = tuple(name for name, _ in groups.producers)
    zeroing = names if groups.kind == "ffn" else layout.family.sparse.zeroing
    channels = groups.columns[:, 0]
    alive = kept[groups.consumer].columns[channels]
    for name, written in groups.producers:
        if name.endswith(zeroing):
            alive = alive & kept[name].rows[written[:, 0]]
    kept[groups.consumer].columns[channels] = alive
    for name, written in groups.producers:
        kept[name].rows[written[:, 0]] &= alive


def _propagate_in_heads(layout: ModelLayout, groups: GroupSet, kept: Kept) -> None:
    num_groups = len(groups.columns)
    head_dim = layout.heads.head_dim
    (query, query_rows), (key, key_rows), (value, value_rows) = groups.producers
    read = kept[groups.consumer].columns[groups.columns].view(num_groups, -1, head_dim)
    values = kept[value].rows[value_rows].view(num_groups, 1, head_dim)
    read, values = read & values, values & read.any(dim=1, keepdim=True)
    is_read = read.any(dim=2, keepdim=True)
    queries = kept[query].rows[query_rows].view(num_groups, -1, head_dim) & is_read
    keys = kept[key].rows[key_rows].view(num_groups, 1, head_dim) & is_read.any(dim=1, keepdim=True)
    if layout.family.positions:
        queries, keys = queries & keys, keys & queries.any(dim=1, keepdim=True)
    elif not layout.family.norms_queries:
        is_queried = _rotated(queries, layout.config).any(dim=1, keepdim=True)
        queries = queries & _rotated(keys, layout.config)
        keys = keys & is_queried
    kept[groups.consumer].columns[groups.columns.flatten()] = read.flatten()
    for (name, places), alive in zip(groups.producers, (queries, keys, values), strict=True):
        kept[name].rows[places.flatten()] = alive.flatten()


def _rotated(alive: Tensor, config: PretrainedConfig) -> Tensor:
    """Return which dimensions of a head are not zero after the rotation of positions.

    The rotation mixes pairs of them.
    """
    rotated = int(alive.shape[-1] * (rope_of(config).get("partial_rotary_factor") or 1.0))
    halves = alive[..., :rotated].reshape(*alive.shape[:-1], 2, rotated // 2).any(dim=-2)
    return torch.cat([halves, halves, alive[..., rotated:]], dim=-1)
