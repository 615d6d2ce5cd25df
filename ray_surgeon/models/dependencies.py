"""Dependency propagation: rows and columns without influence because others are pruned.

A pruned row writes zeros, its bias included, so nothing has to be folded into other biases. A
column whose input is always zero can be pruned. So can a row whose output no consumer uses. Inside
the feed-forward layer this needs an activation that keeps zero. Inside attention a head whose
values are not read does not need its queries, and a dimension of the queries that is zero does not
need that of the keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.models.groups import GroupSet
from ray_surgeon.models.layout import ModelLayout

_KEEP_ZERO = (
    "silu",
    "swish",
    "relu",
    "relu2",
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "gelu_python",
)
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
    rows = {name: mask.rows.clone() for name, mask in masks.items()}
    columns = {name: mask.columns.clone() for name, mask in masks.items()}
    for groups in sets:
        if groups.kind == "attention":
            _propagate_in_attention(layout, groups, rows, columns)
        elif layout.activation in _KEEP_ZERO:
            sparse = layout.family.sparse
            zeroing = None if sparse is None or groups.kind == "ffn" else sparse.zeroing
            _propagate_in_ffn(groups, rows, columns, zeroing)
    return {
        name: StructuredMask(rows[name], columns[name])
        for name, mask in masks.items()
        if not (torch.equal(rows[name], mask.rows) and torch.equal(columns[name], mask.columns))
    }


def shrinkable(masks: Mapping[str, StructuredMask], sets: Sequence[GroupSet]) -> int:
    """Return the parameters in groups of which every column of the consumer is pruned.

    These could be cut out of the dense shapes.
    """
    return sum(
        int((~masks[g.consumer].columns[g.columns].any(dim=1)).sum()) * g.num_parameters
        for g in sets
    )


def _propagate_in_ffn(
    groups: GroupSet,
    rows: dict[str, Tensor],
    columns: dict[str, Tensor],
    zeroing: tuple[str, ...] | None,
) -> None:
    """What zeroes a channel, which is a product or a function of its producers' outputs.

    It is zero if one of those in `zeroing`, or any, is zero.
    """
    channels = groups.columns[:, 0]
    alive = columns[groups.consumer][channels]
    for name, written in groups.producers:
        if zeroing is None or name.endswith(zeroing):
            alive = alive & rows[name][written[:, 0]]
    columns[groups.consumer][channels] = alive
    for name, written in groups.producers:
        rows[name][written[:, 0]] &= alive


def _propagate_in_attention(
    layout: ModelLayout, groups: GroupSet, rows: dict[str, Tensor], columns: dict[str, Tensor]
) -> None:
    num_groups = len(groups.columns)
    head_dim = layout.heads.head_dim
    (query, query_rows), (key, key_rows), (value, value_rows) = groups.producers
    read = columns[groups.consumer][groups.columns].view(num_groups, -1, head_dim)
    values = rows[value][value_rows].view(num_groups, 1, head_dim)
    read, values = read & values, values & read.any(dim=1, keepdim=True)
    queries = rows[query][query_rows].view(num_groups, -1, head_dim) & read.any(dim=2, keepdim=True)
    keys = rows[key][key_rows].view(num_groups, 1, head_dim) & read.any(dim=2, keepdim=True).any(
        dim=1, keepdim=True
    )
    if layout.family.positions:
        queries, keys = queries & keys, keys & queries.any(dim=1, keepdim=True)
    elif not layout.family.norms_queries:
        queries, keys = (
            queries & _rotated(keys, layout.config),
            keys & _rotated(queries, layout.config).any(dim=1, keepdim=True),
        )
    columns[groups.consumer][groups.columns.flatten()] = read.flatten()
    for (name, places), alive in zip(groups.producers, (queries, keys, values), strict=True):
        rows[name][places.flatten()] = alive.flatten()


def _rotated(alive: Tensor, config: PretrainedConfig) -> Tensor:
    """Return which dimensions of a head are not zero after the rotation of positions.

    The rotation mixes pairs of them.
    """
    head_dim = alive.shape[-1]
    parameters = getattr(config, "rope_parameters", None) or {}
    of_config = getattr(config, "partial_rotary_factor", None)
    rotated = int(head_dim * (parameters.get("partial_rotary_factor") or of_config or 1.0))
    halves = alive[..., :rotated].reshape(*alive.shape[:-1], 2, rotated // 2).any(dim=-2)
    return torch.cat([halves, halves, alive[..., rotated:]], dim=-1)
