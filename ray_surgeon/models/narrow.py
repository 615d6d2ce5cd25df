"""Blocks of which whole channels and heads are gone: their widths, and the configurations of models that have them.

Configurations are the content of config.json, because an export may be of another family than its source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from ray_surgeon.models.adapters import adapter_for
from ray_surgeon.models.couplings import HeadLayout, head_layout

Document = dict[str, Any]
"""Content of a config.json."""


@dataclass(frozen=True)
class BlockWidths:
    """What is left of one block.

    Attributes:
        num_channels: of the feed-forward layer.
        num_kv_heads: each with its query heads.
    """

    num_channels: int
    num_kv_heads: int


def block_widths(config: PretrainedConfig, rows_kept: Mapping[str, int]) -> list[BlockWidths]:
    """Return the widths of every block after coupled groups were removed.

    Args:
        config: of the dense model.
        rows_kept: name of each linear -> rows that are left.
    """
    adapter, layout = adapter_for(config), head_layout(config)
    n_rep = layout.num_query_heads // layout.num_kv_heads
    widths = []
    for block in range(int(config.num_hidden_layers)):
        prefix = adapter.block_prefix(block)
        writer, _, num_parts = adapter.ffn.writers[0]
        attention = adapter.attention
        heads_in_rows = n_rep + 2 if attention.query == attention.key else 1
        kept = rows_kept[prefix + attention.key]
        widths.append(BlockWidths(rows_kept[prefix + writer] // num_parts, kept // (heads_in_rows * layout.head_dim)))
    return widths


def plain_kv_heads(config: PretrainedConfig) -> tuple[int, ...]:
    """Return the numbers of KV heads that a plain class of transformers can hold in every block, all of them included.

    Some classes tie the number of heads to the hidden size. Llama does, but without biases a Mistral says the same.
    """
    layout, n_rep = head_layout(config), head_layout(config).num_query_heads // head_layout(config).num_kv_heads
    return tuple(k for k in range(1, layout.num_kv_heads + 1) if k == layout.num_kv_heads or _holds_heads(config, layout, k * n_rep))


def _holds_heads(config: PretrainedConfig, layout: HeadLayout, num_query_heads: int) -> bool:
    if not adapter_for(config).has_free_heads:
        return False
    divides = config.hidden_size % num_query_heads == 0
    return divides or config.model_type in ("mistral", "qwen2", "qwen3", "phi3") or _is_mistral(config)


def _is_mistral(config: PretrainedConfig) -> bool:
    """Whether a Llama computes what a Mistral without a sliding window does."""
    return config.model_type == "llama" and not config.attention_bias and not config.mlp_bias


def uniform_document(config: PretrainedConfig, document: Mapping[str, Any], widths: Sequence[BlockWidths]) -> Document:
    """Return the config.json of a model with the same widths in every block.

    Args:
        config: of the dense model.
        document: its config.json.
        widths: of every block.

    Raises:
        ValueError: the widths differ, or no plain class can hold them.
    """
    if len(set(widths)) > 1:
        raise ValueError("the blocks have different widths, which no plain class can hold; set pruning.allocation to uniform")
    layout, width = head_layout(config), widths[0]
    if width.num_kv_heads not in plain_kv_heads(config):
        raise ValueError(f"{config.model_type} cannot hold {width.num_kv_heads} of {layout.num_kv_heads} KV heads in a plain class")
    narrow = dict(document) | {adapter_for(config).width_field: width.num_channels}
    if width.num_kv_heads == layout.num_kv_heads:
        return narrow
    num_query_heads = width.num_kv_heads * (layout.num_query_heads // layout.num_kv_heads)
    narrow |= {"num_attention_heads": num_query_heads, "num_key_value_heads": width.num_kv_heads, "head_dim": layout.head_dim}
    if config.model_type == "llama" and config.hidden_size % num_query_heads:
        narrow |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
        for name in ("attention_bias", "mlp_bias", "pretraining_tp"):
            narrow.pop(name, None)
    return narrow


def per_block_document(config: PretrainedConfig, document: Mapping[str, Any], widths: Sequence[BlockWidths], files: str) -> Document:
    """Return the config.json of a model whose widths differ, for the classes that are shipped beside the weights.

    Args:
        config: of the dense model.
        document: its config.json.
        widths: of every block.
        files: name of the module with ``PrunedConfig`` and ``PrunedForCausalLM``.
    """
    layout = head_layout(config)
    n_rep = layout.num_query_heads // layout.num_kv_heads
    layers = [
        {
            adapter_for(config).width_field: width.num_channels,
            "num_attention_heads": width.num_kv_heads * n_rep,
            "num_key_value_heads": width.num_kv_heads,
        }
        for width in widths
    ]
    return dict(document) | {
        "model_type": f"pruned_{config.model_type}",
        "architectures": ["PrunedForCausalLM"],
        "auto_map": {"AutoConfig": f"{files}.PrunedConfig", "AutoModelForCausalLM": f"{files}.PrunedForCausalLM"},
        "head_dim": layout.head_dim,
        "per_layer_config": layers,
    }


DECI_MULTIPLE = 256
"""DeciLM rounds the width of a feed-forward layer up to a multiple of this."""


def check_deci(config: PretrainedConfig) -> None:
    """Refuse a model that DeciLM cannot describe.

    Raises:
        ValueError: says which property is in the way.
    """
    layout = head_layout(config)
    window = getattr(config, "sliding_window", None)
    if config.model_type not in ("llama", "mistral") or window is not None:
        what = f"{config.model_type} with a sliding window" if window is not None else config.model_type
        raise ValueError(f"output.exports: deci holds Llama models and Mistral models without a sliding window, not {what}; use per_block")
    if layout.head_dim * layout.num_query_heads != config.hidden_size:
        raise ValueError(
            f"output.exports: deci needs head_dim * num_attention_heads = hidden_size, here {layout.head_dim} * {layout.num_query_heads} "
            f"and {config.hidden_size}; use per_block"
        )


def deci_document(config: PretrainedConfig, document: Mapping[str, Any], widths: Sequence[BlockWidths], files: str) -> Document:
    """Return the config.json of a DeciLM / Nemotron-NAS with these widths.

    Args:
        config: of the dense model, which passed `check_deci`.
        document: its config.json.
        widths: of every block; all KV heads or none, channels a multiple of `DECI_MULTIPLE`.
        files: name of the module with ``DeciLMConfig`` and ``DeciLMForCausalLM``.

    Raises:
        ValueError: a block has another number of heads or channels.
    """
    layout, blocks = head_layout(config), []
    for number, width in enumerate(widths):
        if width.num_kv_heads not in (0, layout.num_kv_heads) or width.num_channels % DECI_MULTIPLE:
            raise ValueError(
                f"block {number} has {width.num_kv_heads} of {layout.num_kv_heads} KV heads and {width.num_channels} channels; deci needs "
                f"all heads or none, and a multiple of {DECI_MULTIPLE}: set pruning.groups [ffn] and pruning.width_multiple {DECI_MULTIPLE}"
            )
        n_heads_in_group = layout.num_query_heads // layout.num_kv_heads if width.num_kv_heads else None
        multiplier = 1.5 * width.num_channels / config.hidden_size if width.num_channels else None
        attention = {"n_heads_in_group": n_heads_in_group, "no_op": not width.num_kv_heads, "replace_with_linear": False}
        ffn = {"ffn_mult": multiplier, "no_op": not width.num_channels, "replace_with_linear": False}
        blocks.append({"attention": attention, "ffn": ffn})
    return dict(document) | {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{files}.DeciLMConfig", "AutoModelForCausalLM": f"{files}.DeciLMForCausalLM"},
        "block_configs": blocks,
    }
