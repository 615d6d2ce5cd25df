"""Configurations of models that have lost channels, heads, experts or blocks.

A configuration here is the content of config.json, because the exported model may belong to
another family than the source.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PretrainedConfig

from ray_surgeon.errors import ConfigError
from ray_surgeon.models.layers import layers_of
from ray_surgeon.models.layout import GroupSet, ModelLayout

_FIELDS_PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Fields of configurations that list the kind of every block."""
Document = dict[str, Any]
"""Content of a config.json."""


@dataclass(frozen=True)
class BlockWidths:
    """Widths of one remaining block."""

    num_channels: int  # of the feed-forward layer, or of the shared experts
    num_kv_heads: int  # each with its query heads
    experts: tuple[
        int, ...
    ] = ()  # channels of every remaining expert, if the block has experts

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> BlockWidths:
        """Return the widths that were sent as JSON."""
        return cls(
            num_channels=document["num_channels"],
            num_kv_heads=document["num_kv_heads"],
            experts=tuple(document["experts"]),
        )

    @property
    def of_a_token(self) -> int:
        """Channels of one expert, or of the feed-forward layer of a block without experts."""
        if self.experts:
            return self.experts[0]
        return self.num_channels


Widths = Sequence[BlockWidths]
"""Widths of every block."""


def in_llama_cpp(layout: ModelLayout, widths: Widths) -> dict[str, int]:
    """Return llama.cpp's names of a mixture's sizes -> the sizes, the same in all blocks."""
    if not layout.is_mixture:
        return {}
    return {
        "expert_count": len(widths[0].experts),
        "expert_used_count": layout.num_active_experts,
        "expert_feed_forward_length": widths[0].of_a_token,
    }


def block_widths(layout: ModelLayout, rows_kept: Mapping[str, int]) -> list[BlockWidths]:
    """Return the widths of every block that remains after coupled groups were pruned.

    Args:
        layout: layout of the dense model.
        rows_kept: name of each linear -> number of its kept rows.
    """
    num_left = {}
    for groups in layout.group_sets:
        num_left[groups.block, groups.kind] = _num_left(groups, rows_kept)
    attentions = {}
    for layer in layers_of(layout, ("attention_layers",)):
        attentions[layer.block] = layer
    experts = {experts.block: experts.linears for experts in layout.expert_sets}
    # a block without an attention gets the number of the first block that has one
    of_attentions = [n for (_, kind), n in num_left.items() if kind == "attention"]
    num_elsewhere = layout.heads.num_kv
    if of_attentions:
        num_elsewhere = of_attentions[0]
    widths = []
    for block in blocks_left(layout, rows_kept):
        num_shared = num_left.get((block, "shared_experts"), 0)
        num_channels = num_left.get((block, "ffn"), num_shared)
        num_kv_heads = num_left.get((block, "attention"), layout.heads.num_kv)
        if block in attentions:
            attention = attentions[block]
            producers = set(attention.linears) - {attention.consumer}
            if not any(rows_kept[name] for name in producers):
                num_kv_heads = 0
        else:
            num_kv_heads = num_elsewhere
        expert_widths = []
        for up, *_, down in experts.get(block, ()):
            if rows_kept[down]:
                expert_widths.append(rows_kept[up])
        widths.append(BlockWidths(num_channels, num_kv_heads, tuple(expert_widths)))
    return widths


def blocks_left(layout: ModelLayout, rows_kept: Mapping[str, int]) -> list[int]:
    """Return the numbers of the blocks that keep at least one row; see `block_widths`."""
    blocks = {shape.block for shape in layout.linears if rows_kept[shape.name]}
    return sorted(blocks)


def shallower(layout: ModelLayout, document: Document, left: Sequence[int]) -> Document:
    """Return the config.json of a model that has lost whole blocks.

    Lists with an entry for every block are shortened. Kinds of blocks that transformers derives
    from the numbers of the blocks are written out.

    Args:
        layout: layout of the dense model.
        document: config.json of the dense model.
        left: numbers of the remaining blocks.
    """
    num_blocks = layout.num_blocks
    if len(left) == num_blocks:
        return document
    config = layout.config
    cut = dict(document)
    # transformers derives these from the numbers of the blocks unless they are given
    for name in _FIELDS_PER_BLOCK:
        values = getattr(config, name, None)
        if values is not None:
            cut[name] = list(values)
    for name, values in cut.items():
        if isinstance(values, list) and len(values) == num_blocks:
            cut[name] = [values[block] for block in left]
    cut[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(left)
    mixtures = {experts.block for experts in layout.expert_sets}
    dense_places = [place for place, block in enumerate(left) if block not in mixtures]
    if "first_k_dense_replace" in cut:  # blocks before this number have no experts
        cut["first_k_dense_replace"] = len(dense_places)
    if "mlp_only_layers" in cut or "decoder_sparse_step" in cut:
        cut["mlp_only_layers"] = dense_places
        cut["decoder_sparse_step"] = 1
    return cut


def left_out(layout: ModelLayout, widths: Mapping[int, BlockWidths]) -> list[str]:
    """Return the names of tensors in removed layers that do not belong to prunable linears.

    Args:
        layout: layout of the dense model.
        widths: number of each remaining block -> its widths.
    """
    mixtures = {experts.block for experts in layout.expert_sets}
    removed_layers = []
    for block, width in widths.items():
        prefix = layout.family.block_prefix(block)
        if width.num_kv_heads == 0:
            attention, _, _ = layout.family.attention.consumer.rpartition(".")
            removed_layers.append(f"{prefix}{attention}.")
        if block in mixtures and not width.experts and width.num_channels == 0:
            removed_layers.append(f"{prefix}{layout.family.sparse.layer}.")
    names = []
    for name in layout.parameters:
        owner, _, _ = name.rpartition(".")
        if name.startswith(tuple(removed_layers)) and owner not in layout.shapes:
            names.append(name)
    return names


def num_parameters_left(layout: ModelLayout, kept: Mapping[str, tuple[int, int]]) -> int:
    """Return the number of parameters of the model without the pruned groups, heads and layers.

    That is the number of parameters of its export `uniform` or `per_block`.

    Args:
        layout: layout of the dense model.
        kept: name of each linear -> numbers of its kept rows and columns; a bias is a column.
    """
    rows_kept = {linear: num_rows for linear, (num_rows, _) in kept.items()}
    blocks = blocks_left(layout, rows_kept)
    width_of_block = dict(zip(blocks, block_widths(layout, rows_kept), strict=True))
    not_written = set(left_out(layout, width_of_block))
    not_written.update(layout.tied)
    total = 0
    for linear, (num_rows, num_columns) in kept.items():
        # the bias stays as long as there are rows, although a removed layer's mask has no columns
        if layout.shapes[linear].has_bias:
            num_columns = max(num_columns, 1)
        total += num_rows * num_columns
    for name in layout.trained:
        owner, _, _ = name.rpartition(".")
        block = layout.block_of(name)
        if owner in kept or name in not_written:
            continue
        if block is None:
            total += math.prod(layout.parameters[name])
        elif block in width_of_block:
            total += _entries_left(layout, name, block, width_of_block[block])
    return total


def _entries_left(layout: ModelLayout, name: str, block: int, width: BlockWidths) -> int:
    """Return the number of entries that remain of a parameter that is not a prunable linear's."""
    inside = name.removeprefix(layout.family.block_prefix(block))
    first, *rest = layout.parameters[name]
    if inside in layout.family.per_head:
        first = width.num_kv_heads * layout.heads.n_rep
    elif width.experts and inside.rpartition(".")[0] == layout.family.sparse.router:
        first = len(width.experts)
    return first * math.prod(rest)


def _num_left(groups: GroupSet, rows_kept: Mapping[str, int]) -> int:
    name, _ = groups.producers[-1]
    rows_per_group = 0
    for producer, rows in groups.producers:
        if producer == name:
            rows_per_group += rows.shape[1]
    return rows_kept[name] // rows_per_group


def kv_heads_left(
    layout: ModelLayout, tensor_parallel: int, *, uniform: bool
) -> tuple[int, ...]:
    """Return the numbers of KV heads that a block may keep, ascending.

    Args:
        layout: layout of the dense model.
        tensor_parallel: devices over which an engine will split the heads. It splits query heads
            evenly, and splits KV heads evenly or copies them.
        uniform: whether a class of transformers must hold this number in every block; otherwise 0
            is also allowed.
    """
    allowed = []
    for num_kv in range(layout.heads.num_kv + 1):
        if uniform and not _holds_heads(layout, num_kv):
            continue
        if num_kv * layout.heads.n_rep % tensor_parallel != 0:
            continue
        is_split = num_kv % tensor_parallel == 0
        is_copied = num_kv > 0 and tensor_parallel % num_kv == 0
        if is_split or is_copied:
            allowed.append(num_kv)
    return tuple(allowed)


def _holds_heads(layout: ModelLayout, num_kv_heads: int) -> bool:
    """Return whether a class of transformers can hold this number of KV heads.

    Some classes tie the number of heads to the hidden size. Llama does, but without biases a
    Mistral computes the same.
    """
    config = layout.config
    family = layout.family
    num_query_heads = num_kv_heads * layout.heads.n_rep
    if num_kv_heads == 0:
        return False
    if num_kv_heads == layout.heads.num_kv:
        return True
    if not family.has_free_heads or not _fits_factors(config, num_query_heads):
        return False
    if family.has_any_heads or config.hidden_size % num_query_heads == 0:
        return True
    # with biases no Mistral computes the same as a Llama
    return config.model_type == "llama" and not (config.attention_bias or config.mlp_bias)


def _fits_factors(config: PretrainedConfig, num_query_heads: int) -> bool:
    """Return whether a Phi-3 has one rotary factor for every pair of a head's entries.

    Its class takes the dimension of a head from the hidden size and the number of heads, not from
    head_dim. Other families fit.
    """
    if config.model_type != "phi3":
        return True
    parameters = config.rope_parameters
    width = config.hidden_size // num_query_heads
    num_pairs = int(width * parameters.get("partial_rotary_factor", 1.0)) // 2
    for name in ("short_factor", "long_factor"):
        factors = parameters.get(name)
        if factors is not None and len(factors) != num_pairs:
            return False
    return True


def uniform_document(layout: ModelLayout, document: Document, widths: Widths) -> Document:
    """Return the config.json of a model with the same widths in every block.

    Args:
        layout: layout of the dense model.
        document: config.json of the dense model.
        widths: widths of every block; the same in all blocks with experts, and in all without.
    """
    config = layout.config
    heads = layout.heads
    sparse = layout.family.sparse
    narrow = dict(document)
    for width in widths:
        if not width.experts:
            narrow[layout.family.width_field] = width.num_channels
            if layout.family.adjusts_width:
                narrow[layout.family.adjusts_width] = False
            continue
        fields = [name for name in sparse.num_experts if name in document]
        for name in fields or sparse.num_experts[:1]:
            narrow[name] = len(width.experts)
        narrow[sparse.width] = width.experts[0]
        if sparse.shared_width is not None:
            narrow[sparse.shared_width] = width.num_channels
    num_kv_heads = widths[0].num_kv_heads
    if num_kv_heads == heads.num_kv:
        return narrow
    num_query_heads = num_kv_heads * heads.n_rep
    narrow["num_attention_heads"] = num_query_heads
    narrow["num_key_value_heads"] = num_kv_heads
    narrow["head_dim"] = heads.head_dim
    if config.model_type == "llama" and config.hidden_size % num_query_heads != 0:
        return _as_mistral(config, narrow)
    return narrow


def _as_mistral(config: PretrainedConfig, document: Document) -> Document:
    """Return the config.json of a Mistral that computes the same as a Llama without biases."""
    mistral = dict(document)
    mistral.update(
        model_type="mistral",
        architectures=["MistralForCausalLM"],
        sliding_window=None,
        # transformers doubts the tokenizer of a Mistral from before version 5
        transformers_version=transformers.__version__,
    )
    for name in ("attention_bias", "mlp_bias", "pretraining_tp"):
        mistral.pop(name, None)
    # Mistral has another default
    mistral.setdefault("max_position_embeddings", config.max_position_embeddings)
    return mistral


def check_uniform(layout: ModelLayout, kinds: Sequence[str]) -> None:
    """Refuse kinds of groups that no class of transformers can lose, even in every block alike.

    Raises:
        ValueError: the widths of shared experts and of experts depend on each other.
    """
    sparse = layout.family.sparse
    changes_width = not {"expert_channels", "shared_experts"}.isdisjoint(kinds)
    if sparse.shared and sparse.shared_width is None and changes_width:
        raise ConfigError(
            field="output.exports",
            found=(
                f"in {layout.config.model_type} shared experts are n_shared_experts "
                "others wide, so neither narrows alone"
            ),
            remedy="export per_block, or prune experts",
        )


def per_block_document(
    layout: ModelLayout, document: Document, widths: Widths
) -> Document:
    """Return the config.json of a model whose widths differ, for the shipped classes.

    Args:
        layout: layout of the dense model.
        document: config.json of the dense model.
        widths: widths of every block.
    """
    blocks = {}
    for block, width in enumerate(widths):
        fields: Document = {
            layout.family.width_field: width.num_channels,
            "num_attention_heads": width.num_kv_heads * layout.heads.n_rep,
            "num_key_value_heads": width.num_kv_heads,
        }
        if layout.num_experts:
            fields["expert_widths"] = list(width.experts)
        blocks[str(block)] = fields
    return {
        **document,
        "model_type": f"pruned_{layout.config.model_type}",
        "architectures": ["PrunedForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_pruned.PrunedConfig",
            "AutoModel": "modeling_pruned.PrunedModel",
            "AutoModelForCausalLM": "modeling_pruned.PrunedForCausalLM",
        },
        "head_dim": layout.heads.head_dim,
        "per_layer_config": blocks,
    }


@dataclass(frozen=True)
class WidthLimits:
    """Limits on the widths that pruning may leave in the blocks."""

    # kind of pruned groups -> least number that every block keeps; other kinds are not pruned
    fewest: Mapping[str, int]
    multiple: int  # final feed-forward widths are multiples of this
    tensor_parallel: int  # devices over which engines will split heads and channels
    # whether all blocks have the same widths, as a class of transformers needs
    uniform: bool
    layers: tuple[str, ...] = ()  # kinds of layers that may be removed whole

    @property
    def same_in_all_blocks(self) -> bool:
        """Whether the remaining blocks have the same widths, so that plain classes hold them.

        That is so for `uniform`, and if only whole blocks may be removed.
        """
        return self.uniform or (not self.fewest and set(self.layers) <= {"blocks"})

    def channels(self, layout: ModelLayout) -> list[int]:
        """Return the possible widths of a feed-forward layer, ascending."""
        possible = range(0, layout.num_channels, self.multiple)
        return self._left("ffn", layout.num_channels, possible)

    def kv_heads(self, layout: ModelLayout) -> list[int]:
        """Return the possible numbers of KV heads of a block, ascending."""
        possible = kv_heads_left(layout, self.tensor_parallel, uniform=self.uniform)
        return self._left("attention", layout.heads.num_kv, possible)

    def inputs(self, layout: ModelLayout) -> dict[str, list[int]]:
        """Return consumer of coupled groups -> its possible numbers of columns, ascending."""
        possible = {}
        for groups in layout.group_sets:
            num_groups, width = groups.columns.shape
            if groups.kind == "attention":
                left = self.kv_heads(layout)
            else:
                numbers = range(0, num_groups, self.multiple)
                left = self._left(groups.kind, num_groups, numbers)
            possible[groups.consumer] = [number * width for number in left]
        return possible

    def _left(self, kind: str, whole: int, possible: Iterable[int]) -> list[int]:
        """Return the possible numbers of groups that a block may keep, and all `whole` of them."""
        least = self.fewest.get(kind, whole)
        if f"{kind}_layers" in self.layers:
            least = 0
        allowed = {number for number in possible if number >= least}
        allowed.add(whole)
        return sorted(allowed)
