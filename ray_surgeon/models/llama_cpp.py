"""Which architecture of llama.cpp holds a pruned model, and what it would misread."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from ray_surgeon.models.families import LlamaCpp
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import BlockWidths


def architecture_of(layout: ModelLayout, widths: Sequence[BlockWidths]) -> LlamaCpp:
    """Return the architecture of llama.cpp that holds a model with these widths.

    Raises:
        ValueError: there is none; says what to do.
    """
    known, config = layout.family.llama_cpp, layout.config
    where = "output.exports: gguf"
    if known is None:
        raise ValueError(f"{where}: llama.cpp does not know the family {config.model_type}; export uniform or per_block")
    if known.name == "llama" and getattr(config, "sliding_window", None) is not None:
        raise ValueError(f"{where}: llama.cpp would ignore sliding_window {config.sliding_window}; export uniform or per_block")
    if known.name == "gemma3":
        _check_gemma(config)
    rope_kind(config)
    if len(set(widths)) == 1:
        return known
    if known.name != "llama" or not config.hidden_act == "silu":
        raise ValueError(
            f"{where}: blocks of {config.model_type} that differ in width have no place there; set pruning.allocation: uniform"
        )
    if any(width.num_kv_heads and not width.num_channels for width in widths):
        raise ValueError(f"{where}: llama.cpp leaves out the attention of a block without channels; set pruning.remove_blocks: false")
    return LlamaCpp("deci", pairs_rotary=True)


def _check_gemma(config: PretrainedConfig) -> None:
    pattern = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(config.num_hidden_layers)]
    if list(config.layer_types) != pattern or config.query_pre_attn_scalar != config.head_dim:
        raise ValueError(
            "output.exports: gguf: llama.cpp reads a Gemma 3 whose every sixth block attends to everything and whose queries are scaled by "
            f"head_dim, here layer_types {config.layer_types} and query_pre_attn_scalar {config.query_pre_attn_scalar}; export uniform"
        )


def rope_kind(config: PretrainedConfig) -> str:
    """Return the type of a model's rotary embeddings, ``default`` for none.

    Raises:
        ValueError: it is one that is not written.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = str(parameters.get("full_attention", parameters).get("rope_type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ValueError(f"output.exports: gguf: rotary embeddings of type {kind} are not written; export uniform or per_block")
    return kind
