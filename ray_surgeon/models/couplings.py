"""Coupled groups: what can be cut out of a block so that it really becomes smaller.

Source: method.md section 8. A group is a set of columns of its block's last linear (down or o), with everything upstream that only
writes those columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ray_surgeon.models.adapters import adapter_for
from ray_surgeon.models.skeleton import LinearShape


@dataclass(frozen=True)
class HeadLayout:
    """Attention heads of every block."""

    num_query_heads: int
    num_kv_heads: int
    head_dim: int


def head_layout(config: PretrainedConfig) -> HeadLayout:
    """Return the heads of a configuration."""
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return HeadLayout(heads, kv_heads, head_dim)


@dataclass(frozen=True)
class GroupSet:
    """All groups of one kind in one block.

    Attributes:
        kind: ``ffn`` or ``attention``.
        block: its number.
        reader: global name of the linear whose columns decide.
        columns: [num_groups, width] columns of the reader.
        writers: (global name of a linear, [num_groups, rows] rows of it that go with each group).
        num_parameters: that go with one group, biases included.
    """

    kind: str
    block: int
    reader: str
    columns: Tensor
    writers: tuple[tuple[str, Tensor], ...]
    num_parameters: int


def group_sets(config: PretrainedConfig, linears: Sequence[LinearShape]) -> list[GroupSet]:
    """Return the groups of every block: first those of attention, then those of the feed-forward layer.

    Args:
        config: of the model.
        linears: its `linear_shapes`.
    """
    adapter, layout = adapter_for(config), head_layout(config)
    shapes = {s.name: s for s in linears}
    found = []
    for block in range(int(config.num_hidden_layers)):
        prefix = adapter.block_prefix(block)
        attention = adapter.attention
        reader = prefix + attention.reader
        n_rep = layout.num_query_heads // layout.num_kv_heads
        queries = torch.arange(layout.num_query_heads * layout.head_dim).view(layout.num_kv_heads, n_rep * layout.head_dim)
        keys = torch.arange(layout.num_kv_heads * layout.head_dim).view(layout.num_kv_heads, layout.head_dim)
        fused = attention.query == attention.key
        offsets = (0, queries.numel(), queries.numel() + keys.numel()) if fused else (0, 0, 0)
        parts = ((attention.query, queries), (attention.key, keys), (attention.value, keys))
        writers = tuple((prefix + name, rows + offset) for (name, rows), offset in zip(parts, offsets, strict=True))
        found.append(_group_set("attention", block, reader, queries, writers, shapes))
        reader = prefix + adapter.ffn.reader
        num_channels = shapes[reader].num_columns - shapes[reader].has_bias
        channels = torch.arange(num_channels)[:, None]
        writers = tuple((prefix + name, channels + part * num_channels) for name, part, _ in adapter.ffn.writers)
        found.append(_group_set("ffn", block, reader, channels, writers, shapes))
    return found


def _group_set(
    kind: str, block: int, reader: str, columns: Tensor, writers: tuple[tuple[str, Tensor], ...], shapes: dict[str, LinearShape]
) -> GroupSet:
    size = columns.shape[1] * shapes[reader].num_rows + sum(rows.shape[1] * shapes[name].num_columns for name, rows in writers)
    return GroupSet(kind, block, reader, columns, writers, size)
