"""Configurations of models whose blocks have lost whole channels and heads.

Configurations are the content of config.json, because an export may be of another family than its
source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PretrainedConfig

from ray_surgeon.models.families import SparseLayer
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.spec.output import DECI_MULTIPLE

Document = dict[str, Any]
"""Content of a config.json."""


@dataclass(frozen=True)
class BlockWidths:
    """What is left of one block."""

    num_channels: int  # of the feed-forward layer, or of the shared experts
    num_kv_heads: int  # each with its query heads
    experts: tuple[int, ...] = ()  # channels of every expert that is left, if the block has some


def block_widths(layout: ModelLayout, rows_kept: Mapping[str, int]) -> list[BlockWidths]:
    """Return the widths of every block after coupled groups were pruned.

    Args:
        layout: of the dense model.
        rows_kept: name of each linear -> rows that are left.
    """
    family = layout.family
    heads = layout.heads
    attention = layout.family.attention
    producer, _, num_parts = family.ffn.producers[0]
    heads_in_rows = 1 if attention is None or attention.query != attention.key else heads.n_rep + 2
    experts = {expert_set.block: expert_set.linears for expert_set in layout.expert_sets}
    widths = []
    for block in range(layout.num_blocks):
        prefix = family.block_prefix(block)
        producers = [producer]
        if family.sparse is not None and family.sparse.shared is not None:
            producers.append(f"{family.sparse.shared}.{family.sparse.producers[0]}")
        num_channels = next(
            (
                rows_kept[prefix + name] // num_parts
                for name in producers
                if prefix + name in rows_kept
            ),
            0,
        )
        num_kv_heads = (
            heads.num_kv
            if attention is None
            else rows_kept[prefix + attention.key] // (heads_in_rows * heads.head_dim)
        )
        left = tuple(
            rows_kept[linears[0]] for linears in experts.get(block, ()) if rows_kept[linears[-1]]
        )
        widths.append(BlockWidths(num_channels, num_kv_heads, left))
    return widths


def plain_kv_heads(layout: ModelLayout) -> tuple[int, ...]:
    """Return the numbers of KV heads that a plain class can hold in every block.

    The number that the model has is included.

    Some classes tie the number of heads to the hidden size. Llama does, but without biases a
    Mistral computes the same.
    """
    heads = layout.heads
    return tuple(
        k
        for k in range(1, heads.num_kv + 1)
        if k == heads.num_kv or _holds_heads(layout, k * heads.n_rep)
    )


def kv_heads_left(layout: ModelLayout, tensor_parallel: int, *, uniform: bool) -> tuple[int, ...]:
    """Return the numbers of KV heads that may be left in a block.

    Args:
        layout: of the dense model.
        tensor_parallel: devices over which an engine will split them; it splits query heads evenly,
            and KV heads evenly or copies them.
        uniform: whether a plain class must hold them in every block; without that 0 is allowed,
            too.
    """
    heads = layout.heads
    possible = plain_kv_heads(layout) if uniform else range(heads.num_kv + 1)
    return tuple(
        k
        for k in possible
        if k * heads.n_rep % tensor_parallel == 0
        and (k % tensor_parallel == 0 or (k > 0 and tensor_parallel % k == 0))
    )


def _holds_heads(layout: ModelLayout, num_query_heads: int) -> bool:
    config = layout.config
    if not layout.family.has_free_heads or not _fits_factors(config, num_query_heads):
        return False
    return (
        config.hidden_size % num_query_heads == 0
        or layout.family.has_any_heads
        or _is_mistral(config)
    )


def _fits_factors(config: PretrainedConfig, num_query_heads: int) -> bool:
    """Whether a Phi-3 has a factor for every rotated pair.

    It counts pairs by the hidden size over the heads, whatever head_dim is.
    """
    parameters = config.rope_parameters if config.model_type == "phi3" else {}
    rotated = int(
        config.hidden_size // num_query_heads * parameters.get("partial_rotary_factor", 1.0)
    )
    lists = [parameters.get(name) for name in ("short_factor", "long_factor")]
    return all(len(factors) == rotated // 2 for factors in lists if factors is not None)


def _is_mistral(config: PretrainedConfig) -> bool:
    """Whether a Llama computes what a Mistral without a sliding window does."""
    return config.model_type == "llama" and not config.attention_bias and not config.mlp_bias


def uniform_document(
    layout: ModelLayout, document: Mapping[str, Any], widths: Sequence[BlockWidths]
) -> Document:
    """Return the config.json of a model with the same widths in every block.

    Args:
        layout: of the dense model.
        document: its config.json.
        widths: of every block.

    Raises:
        ValueError: the widths differ, or no plain class can hold them.
    """
    kinds = {
        "dense": [w for w in widths if not w.experts],
        "sparse": [w for w in widths if w.experts],
    }
    of_experts = {width for of_block in widths for width in of_block.experts}
    if (
        any(len(set(of_kind)) > 1 for of_kind in kinds.values())
        or len({w.num_kv_heads for w in widths}) > 1
        or len(of_experts) > 1
    ):
        raise ValueError(
            "the blocks have different widths, which no plain class can hold; set "
            "pruning.allocation to uniform"
        )
    config = layout.config
    heads = layout.heads
    width = widths[0]
    sparse = layout.family.sparse
    if width.num_kv_heads not in plain_kv_heads(layout):
        raise ValueError(
            f"{config.model_type} cannot hold {width.num_kv_heads} of {heads.num_kv} KV heads in a "
            "plain class"
        )
    narrow = dict(document)
    if kinds["dense"]:
        narrow[layout.family.width_field] = kinds["dense"][0].num_channels
    if sparse is not None and kinds["sparse"]:
        narrow |= _sparse_fields(sparse, document, kinds["sparse"][0])
    if width.num_kv_heads == heads.num_kv:
        return narrow
    num_query_heads = width.num_kv_heads * heads.n_rep
    narrow |= {
        "num_attention_heads": num_query_heads,
        "num_key_value_heads": width.num_kv_heads,
        "head_dim": heads.head_dim,
    }
    if config.model_type == "llama" and config.hidden_size % num_query_heads:
        narrow |= {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": None,
        }
        # of a Mistral from before 5 it doubts the tokenizer
        narrow["transformers_version"] = transformers.__version__
        for name in ("attention_bias", "mlp_bias", "pretraining_tp"):
            narrow.pop(name, None)
        # a Mistral's default is another one
        narrow.setdefault("max_position_embeddings", config.max_position_embeddings)
    return narrow


def _sparse_fields(
    sparse: SparseLayer, document: Mapping[str, Any], width: BlockWidths
) -> Document:
    """Return config.json's fields of experts: their number, by its names, and widths."""
    names = [name for name in sparse.num_experts if name in document] or sparse.num_experts[:1]
    fields: Document = dict.fromkeys(names, len(width.experts)) | {sparse.width: width.experts[0]}
    if sparse.shared_width is not None:
        fields[sparse.shared_width] = width.num_channels
    return fields


def check_uniform(layout: ModelLayout, kinds: Sequence[str]) -> None:
    """Refuse groups whose removal no plain class can hold, although it is the same in every block.

    Raises:
        ValueError: says why.
    """
    sparse = layout.family.sparse
    if (
        sparse is not None
        and sparse.shared is not None
        and sparse.shared_width is None
        and {"expert_channels", "shared_experts"} & set(kinds)
    ):
        raise ValueError(
            f"output.exports: in {layout.config.model_type} the shared experts are as wide as "
            "n_shared_experts others, so neither can get narrower alone in a plain class; export "
            "per_block, or prune experts"
        )


def per_block_document(
    layout: ModelLayout, document: Mapping[str, Any], widths: Sequence[BlockWidths], files: str
) -> Document:
    """Return the config.json of a model whose widths differ, for the shipped classes.

    Args:
        layout: of the dense model.
        document: its config.json.
        widths: of every block.
        files: name of the module with ``PrunedConfig``, ``PrunedModel`` and ``PrunedForCausalLM``.
    """
    layers = {
        str(block): {
            layout.family.width_field: width.num_channels,
            "num_attention_heads": width.num_kv_heads * layout.heads.n_rep,
            "num_key_value_heads": width.num_kv_heads,
        }
        | ({"expert_widths": list(width.experts)} if layout.num_experts else {})
        for block, width in enumerate(widths)
    }
    return dict(document) | {
        "model_type": f"pruned_{layout.config.model_type}",
        "architectures": ["PrunedForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{files}.PrunedConfig",
            "AutoModel": f"{files}.PrunedModel",
            "AutoModelForCausalLM": f"{files}.PrunedForCausalLM",
        },
        "head_dim": layout.heads.head_dim,
        "per_layer_config": layers,
    }


def for_older_readers(document: Mapping[str, Any]) -> Document:
    """Return a config.json that older programs read, too.

    They do not know `rope_parameters`, but ``rope_theta``.
    """
    parameters = document.get("rope_parameters")
    if not parameters:
        return dict(document)
    of_all = parameters.get("full_attention", parameters)
    older = {"rope_theta": of_all["rope_theta"]}
    if "sliding_attention" in parameters:
        older["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    if "partial_rotary_factor" in of_all:
        older["partial_rotary_factor"] = of_all["partial_rotary_factor"]
    if of_all.get("rope_type", "default") != "default":
        older["rope_scaling"] = {
            name: value
            for name, value in of_all.items()
            if name not in ("rope_theta", "partial_rotary_factor")
        }
    return dict(document) | older


def check_rope(document: Mapping[str, Any]) -> None:
    """Refuse a config.json that says two things of the rotary embeddings.

    Programs read one or the other.

    Raises:
        ValueError: names both.
    """
    parameters = document.get("rope_parameters")
    if parameters is None:
        return
    tables: Document = parameters if isinstance(parameters, dict) else {}
    of_all = tables.get("full_attention", tables)
    for table in (of_all, tables.get("sliding_attention", of_all)):
        if not isinstance(table, dict) or not isinstance(table.get("rope_theta"), int | float):
            raise ValueError(
                f"model.source: rope_parameters in config.json is {str(parameters)[:200]}, "
                "expected an object with rope_theta; fetch it again"
            )
    scaling = document.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ValueError(
            f"model.source: rope_scaling in config.json is {str(scaling)[:200]}, expected an "
            "object; fetch it again"
        )
    said = for_older_readers(document) | dict(of_all)
    older = {
        name: document.get(name)
        for name in ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")
    }
    for name, value in (older | scaling).items():
        if value is not None and name in said and value != said[name]:
            raise ValueError(
                f"model.source: config.json has {name} {value}, and {said[name]} in "
                "rope_parameters; programs read one or the other: remove the wrong one"
            )


def check_deci(layout: ModelLayout) -> None:
    """Refuse a model that DeciLM cannot describe.

    Raises:
        ValueError: says which property is in the way.
    """
    config = layout.config
    heads = layout.heads
    window = getattr(config, "sliding_window", None)
    if config.model_type not in ("llama", "mistral") or window is not None:
        what = (
            f"{config.model_type} with a sliding window"
            if window is not None
            else config.model_type
        )
        raise ValueError(
            "output.exports: deci holds Llama models and Mistral models without a sliding window, "
            f"not {what}; use per_block"
        )
    if heads.head_dim * heads.num_query != config.hidden_size:
        raise ValueError(
            "output.exports: deci needs head_dim * num_attention_heads = hidden_size, here "
            f"{heads.head_dim} * {heads.num_query} and {config.hidden_size}; use per_block"
        )
    if layout.num_channels % DECI_MULTIPLE:
        raise ValueError(
            f"output.exports: deci has multiples of {DECI_MULTIPLE} channels, and blocks that lose "
            f"none keep all {layout.num_channels}; use per_block"
        )


def deci_document(
    layout: ModelLayout, document: Mapping[str, Any], widths: Sequence[BlockWidths], files: str
) -> Document:
    """Return the config.json of a DeciLM / Nemotron-NAS with these widths.

    Args:
        layout: of the dense model, which passed `check_deci`.
        document: its config.json.
        widths: of every block; all KV heads or none, channels a multiple of `DECI_MULTIPLE`.
        files: name of the module with ``DeciLMConfig`` and ``DeciLMForCausalLM``.

    Raises:
        ValueError: a block has another number of heads or channels.
    """
    heads = layout.heads
    blocks = []
    for number, width in enumerate(widths):
        if width.num_kv_heads not in (0, heads.num_kv) or width.num_channels % DECI_MULTIPLE:
            raise ValueError(
                f"block {number} has {width.num_kv_heads} of {heads.num_kv} KV heads and "
                f"{width.num_channels} channels; deci needs all heads or none, and a multiple of "
                f"{DECI_MULTIPLE}: set pruning.groups [ffn] and pruning.width_multiple "
                f"{DECI_MULTIPLE}"
            )
        n_heads_in_group = heads.n_rep if width.num_kv_heads else None
        multiplier = (
            1.5 * width.num_channels / layout.config.hidden_size if width.num_channels else None
        )
        attention = {
            "n_heads_in_group": n_heads_in_group,
            "no_op": not width.num_kv_heads,
            "replace_with_linear": False,
        }
        ffn = {
            "ffn_mult": multiplier,
            "no_op": not width.num_channels,
            "replace_with_linear": False,
        }
        blocks.append({"attention": attention, "ffn": ffn})
    return dict(document) | {
        "max_position_embeddings": layout.config.max_position_embeddings,
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{files}.DeciLMConfig",
            "AutoModelForCausalLM": f"{files}.DeciLMForCausalLM",
        },
        "block_configs": blocks,
    }
