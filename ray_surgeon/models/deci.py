"""DeciLM / Nemotron-NAS: blocks of one Llama that have fewer channels, or no attention at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import BlockWidths, Document
from ray_surgeon.spec.sections import DECI_MULTIPLE


def check_deci(layout: ModelLayout) -> None:
    """Refuse a model that DeciLM cannot describe.

    Raises:
        ValueError: says which property is in the way.
    """
    config = layout.config
    heads = layout.heads
    window = getattr(config, "sliding_window", None)
    if config.model_type not in ("llama", "mistral") or window is not None:
        what = config.model_type + ("" if window is None else " with a sliding window")
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
        sizes = {
            "attention": {"n_heads_in_group": heads.n_rep if width.num_kv_heads else None},
            "ffn": {"ffn_mult": 1.5 * width.num_channels / layout.config.hidden_size or None},
        }
        blocks.append(
            {
                part: size | {"no_op": None in size.values(), "replace_with_linear": False}
                for part, size in sizes.items()
            }
        )
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
