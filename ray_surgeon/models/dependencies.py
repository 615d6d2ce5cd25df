"""Rows and columns without influence because others are pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.models.attention import rope_of
from ray_surgeon.models.layout import GroupSet, ModelLayout

_KEEP_ZERO = {
    "silu",
    "swish",
    "relu",
    "relu2",
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "gelu_python",
}
"""Activations with f(0) = 0."""


def propagate(
    layout: ModelLayout, masks: Mapping[str, StructuredMask], sets: Sequence[GroupSet]
) -> dict[str, StructuredMask]:
    """Return the masks that change when everything without influence is pruned too.

    Args:
        layout: of the model.
        masks: name of a linear -> its kept rows and columns.
        sets: the groups of the blocks whose linears are in `masks`.
    """
    kept = dict[str, StructuredMask]()
    for name, mask in masks.items():
        kept[name] = StructuredMask(mask.rows.clone(), mask.columns.clone())
    for groups in sets:
        if groups.kind == "attention":
            _propagate_in_heads(layout, groups, kept)
        elif layout.activation in _KEEP_ZERO:
            _propagate_in_ffn(layout, groups, kept)
    return {name: mask for name, mask in kept.items() if not _are_same(mask, masks[name])}


def _are_same(mask: StructuredMask, before: StructuredMask) -> bool:
    return torch.equal(mask.rows, before.rows) and torch.equal(
        mask.columns, before.columns
    )


def shrinkable(masks: Mapping[str, StructuredMask], sets: Sequence[GroupSet]) -> int:
    """Return the number of parameters in groups whose columns of the consumer are all pruned.

    These could be cut out of the dense shapes.
    """
    total = 0
    for groups in sets:
        is_kept = masks[groups.consumer].columns[groups.columns].any(dim=1)
        num_gone = int((~is_kept).sum())
        total += num_gone * groups.num_parameters
    return total


Kept = Mapping[str, StructuredMask]
"""Name of a linear -> its kept rows and columns."""


def _propagate_in_ffn(layout: ModelLayout, groups: GroupSet, kept: Kept) -> None:
    """Prune channels that are always zero because a producer's row is pruned.

    A channel is a product or a function of its producers' outputs, so it is zero if one of them is;
    in some mixtures that is so for only some of the producers.
    """
    if groups.kind == "ffn":
        zeroing = tuple(name for name, _ in groups.producers)
    else:
        zeroing = layout.family.sparse.zeroing
    channels = groups.columns[:, 0]
    alive = kept[groups.consumer].columns[channels]
    for name, rows in groups.producers:
        if name.endswith(zeroing):
            alive = alive & kept[name].rows[rows[:, 0]]
    kept[groups.consumer].columns[channels] = alive
    for name, rows in groups.producers:
        kept[name].rows[rows[:, 0]] &= alive


def _propagate_in_heads(layout: ModelLayout, groups: GroupSet, kept: Kept) -> None:
    """Prune dimensions of heads whose outputs are not read, or whose products are zero."""
    num_groups = len(groups.columns)
    head_dim = layout.heads.head_dim
    (query, query_rows), (key, key_rows), (value, value_rows) = groups.producers
    columns = kept[groups.consumer].columns[groups.columns].view(num_groups, -1, head_dim)
    values = kept[value].rows[value_rows].view(num_groups, 1, head_dim)
    num_parts = 2 if layout.family.gates_heads else 1
    of_queries = kept[query].rows[query_rows].view(num_groups, -1, num_parts, head_dim)
    queries = of_queries[:, :, 0]
    keys = kept[key].rows[key_rows].view(num_groups, 1, head_dim)

    columns = columns & values
    values = values & columns.any(dim=1, keepdim=True)
    head_is_read = columns.any(dim=2, keepdim=True)
    queries = queries & head_is_read
    keys = keys & head_is_read.any(dim=1, keepdim=True)
    if layout.family.positions:
        queries = queries & keys
        keys = keys & queries.any(dim=1, keepdim=True)
    elif not layout.family.norms_queries:
        is_queried = _rotated(queries, layout.config).any(dim=1, keepdim=True)
        queries = queries & _rotated(keys, layout.config)
        keys = keys & is_queried

    kept[groups.consumer].columns[groups.columns.flatten()] = columns.flatten()
    parts = [queries]
    if layout.family.gates_heads:
        # a gate of 0 is no gate that is closed, so only gates that nothing reads are pruned
        parts.append(of_queries[:, :, 1] & columns)
    kept[query].rows[query_rows.flatten()] = torch.stack(parts, dim=2).flatten()
    kept[key].rows[key_rows.flatten()] = keys.flatten()
    kept[value].rows[value_rows.flatten()] = values.flatten()


def _rotated(alive: Tensor, config: PretrainedConfig) -> Tensor:
    """Return which dimensions of a head can be nonzero after the rotary embedding.

    The rotation mixes pairs of dimensions.
    """
    fraction = rope_of(config).get("partial_rotary_factor") or 1.0
    rotated = int(alive.shape[-1] * fraction)
    pairs = alive[..., :rotated].reshape(*alive.shape[:-1], 2, rotated // 2)
    halves = pairs.any(dim=-2)
    return torch.cat([halves, halves, alive[..., rotated:]], dim=-1)
