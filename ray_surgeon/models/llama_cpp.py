"""Chooses llama.cpp's architecture for a pruned model, and refuses models that it misreads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from ray_surgeon.errors import ConfigError
from ray_surgeon.models.attention import rope_kind, rope_of
from ray_surgeon.models.families import LlamaCpp
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import BlockWidths

PRE_TOKENIZERS = {
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "gpt-4o",  # noqa: E501
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": "llama-bpe",  # noqa: E501
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",  # noqa: E501
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",  # noqa: E501
}
"""Regular expression of a byte-level pre-tokenizer in tokenizer.json -> llama.cpp's name."""


def architecture_of(layout: ModelLayout, widths: Sequence[BlockWidths]) -> LlamaCpp:
    """Return the architecture of llama.cpp that can hold a model with these widths.

    Args:
        layout: layout of the dense model.
        widths: widths of every block.

    Raises:
        ValueError: no architecture can; the message says what to do.
    """
    known = layout.family.llama_cpp
    if known is None:
        raise ConfigError(
            field="output.exports",
            found=f"gguf: llama.cpp does not know the family {layout.config.model_type}",
            remedy="export uniform or per_block instead",
        )
    config = layout.config
    _check_feed_forward(layout, known)
    _check_attention(config, known)
    if not _knows_rope(config, known):
        raise ConfigError(
            field="output.exports",
            found=(
                f"gguf: rotary embeddings {dict(rope_of(config))} are not written for {known.name}"
            ),
            remedy="export uniform or per_block instead",
        )
    _check_widths(layout, known, widths)
    if len(set(widths)) == 1:
        return known
    return LlamaCpp("deci", "silu", pairs_rotary=True)


def _check_feed_forward(layout: ModelLayout, known: LlamaCpp) -> None:
    """Refuse an activation, biases or attention scales that llama.cpp does not have."""
    config = layout.config
    if layout.activation != known.activation:
        raise ConfigError(
            field="output.exports",
            found=(
                f"gguf: llama.cpp's {known.name} has the activation "
                f"{known.activation}, the model {layout.activation}"
            ),
            remedy="export uniform or per_block instead",
        )
    for name in ("attention_bias", "mlp_bias", "scale_attn_by_inverse_layer_idx"):
        if getattr(config, name, False) and name not in known.biases:
            raise ConfigError(
                field="output.exports",
                found=(
                    f"gguf: llama.cpp's {known.name} has no {name}, the model's config.json has it"
                ),
                remedy="export uniform or per_block instead",
            )
    if not getattr(config, "scale_attn_weights", True):
        raise ConfigError(
            field="output.exports",
            found=(
                f"gguf: llama.cpp's {known.name} scales attention, the model's "
                "config.json has scale_attn_weights false"
            ),
            remedy="export uniform or per_block instead",
        )


def _check_attention(config: PretrainedConfig, known: LlamaCpp) -> None:
    """Refuse an order of kinds of attention, or a sliding window, that llama.cpp misreads."""
    window = getattr(config, "sliding_window", None)
    if known.attention_kinds:
        kinds = list(config.layer_types)
        usual = itertools.islice(itertools.cycle(known.attention_kinds), len(kinds))
        if kinds != list(usual):
            raise ConfigError(
                field="output.exports",
                found=(
                    f"gguf: llama.cpp's {known.name} has "
                    f"{', '.join(known.attention_kinds)} in turns, the model {kinds}"
                ),
                remedy="export uniform or per_block instead",
            )
        if known.name in _CHECKS_OF_FAMILIES:
            _CHECKS_OF_FAMILIES[known.name](config)
    elif window is not None and getattr(config, "use_sliding_window", True):
        raise ConfigError(
            field="output.exports",
            found=f"gguf: llama.cpp would ignore sliding_window {window}",
            remedy="export uniform, or set it to null in config.json if no text is longer",
        )


def _check_widths(
    layout: ModelLayout, known: LlamaCpp, widths: Sequence[BlockWidths]
) -> None:
    """Refuse widths of blocks that the architecture cannot hold."""
    heads = layout.heads
    sizes = {width.num_kv_heads * heads.n_rep * heads.head_dim for width in widths}
    if not known.has_free_heads and sizes != {layout.config.hidden_size}:
        raise ConfigError(
            field="output.exports",
            found=f"gguf: llama.cpp's {known.name} wants heads that fill the hidden size",
            remedy="set pruning.groups: [ffn]",
        )
    differ = len(set(widths)) > 1
    if layout.is_mixture:
        _check_experts(layout, known, widths)
    elif differ and known.name != "llama":
        raise ConfigError(
            field="output.exports",
            found=f"gguf: llama.cpp's {known.name} has blocks of one width only",
            remedy="set pruning.allocation: uniform",
        )
    if not differ:
        return
    for width in widths:
        if width.num_kv_heads == 0 or width.num_channels == 0:
            raise ConfigError(
                field="output.exports",
                found="gguf: it misreads blocks without heads or channels",
                remedy="set pruning.groups: [blocks]",
            )


def _check_experts(
    layout: ModelLayout, known: LlamaCpp, widths: Sequence[BlockWidths]
) -> None:
    """Refuse a mixture of experts that the architecture cannot hold."""
    if len(set(widths)) > 1 or any(len(set(width.experts)) > 1 for width in widths):
        raise ConfigError(
            field="output.exports",
            found=f"gguf: llama.cpp's {known.name} has experts of one width",
            remedy="set pruning.allocation: uniform",
        )
    if len(layout.expert_sets) < layout.num_blocks:
        raise ConfigError(
            field="output.exports",
            found=f"gguf: llama.cpp's {known.name} has experts in every block, the model has not",
            remedy="export uniform or per_block instead",
        )
    if not getattr(layout.config, "norm_topk_prob", True):
        raise ConfigError(
            field="output.exports",
            found=(
                f"gguf: llama.cpp's {known.name} makes the weights of a token's "
                "experts sum to 1, the model does not"
            ),
            remedy="export uniform or per_block instead",
        )


def _check_gemma(config: PretrainedConfig) -> None:
    if config.query_pre_attn_scalar != config.head_dim:
        raise ConfigError(
            field="output.exports",
            found=(
                "gguf: llama.cpp scales the queries of a Gemma 3 by head_dim, here "
                f"query_pre_attn_scalar is {config.query_pre_attn_scalar}"
            ),
            remedy="export uniform or per_block instead",
        )
    sliding = config.rope_parameters["sliding_attention"]
    if sliding.get("rope_type", "default") != "default":
        raise ConfigError(
            field="output.exports",
            found=(
                f"gguf: rotary embeddings {sliding} of sliding blocks have no place in llama.cpp"
            ),
            remedy="export uniform or per_block instead",
        )


def _check_gpt_oss(config: PretrainedConfig) -> None:
    alpha = getattr(config, "swiglu_alpha", 1.702)
    limit = getattr(config, "swiglu_limit", 7.0)
    if (alpha, limit) != (1.702, 7.0):
        raise ConfigError(
            field="output.exports",
            found=(
                "gguf: llama.cpp's gpt-oss has swiglu_alpha 1.702 and swiglu_limit "
                f"7, the model {(alpha, limit)}"
            ),
            remedy="export uniform or per_block instead",
        )


_CHECKS_OF_FAMILIES: dict[str, Callable[[PretrainedConfig], None]] = {
    "gemma3": _check_gemma,
    "gpt-oss": _check_gpt_oss,
}

_YARN_PARAMETERS = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
}
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def _knows_rope(config: PretrainedConfig, known: LlamaCpp) -> bool:
    parameters = rope_of(config)
    kind = rope_kind(config)
    # llama.cpp fails to load other architectures that rotate only a part of a head
    if parameters.get("partial_rotary_factor", 1.0) != 1.0 and known.name != "phi3":
        return False
    if kind == "llama3":
        return known.name == "llama"
    if kind == "yarn":
        rest = dict(parameters)
        for name in _YARN_PARAMETERS:
            rest.pop(name, None)
        if known.name == "gpt-oss":  # llama.cpp also rounds its frequency borders
            rest.pop("truncate", None)
        return rest.items() <= _YARN_DEFAULTS.items()
    return kind in ("default", "linear")


def tokenizer_names(document: Mapping[str, Any]) -> tuple[str, str]:
    """Return llama.cpp's names of a tokenizer and of its pre-tokenizer.

    Args:
        document: content of tokenizer.json.

    Raises:
        ValueError: llama.cpp has no such tokenizer, or its name there is not known.
    """
    model = document["model"]
    decoder = document.get("decoder") or {}
    if model["type"] == "BPE" and decoder.get("type") == "ByteLevel":
        unknown = _unknown_normalizers(document.get("normalizer"))
        if unknown:
            raise ConfigError(
                field="output.exports",
                found=f"gguf: llama.cpp would not apply the normalizer {', '.join(unknown)}",
                remedy="export uniform or per_block instead",
            )
        return "gpt2", _pre_tokenizer(document.get("pre_tokenizer"))
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return "llama", "default"
    raise ConfigError(
        field="output.exports",
        found=(
            f"gguf: the tokenizer is of type {model['type']}, known are BPE of bytes, "
            "and SentencePiece's BPE with bytes for what has no piece"
        ),
        remedy="export uniform or per_block instead",
    )


def _unknown_normalizers(normalizer: Mapping[str, Any] | None) -> list[str]:
    """Return the kinds of normalizers in a tokenizer.json that llama.cpp does not apply."""
    if not normalizer:
        return []
    steps = normalizer.get("normalizers", [normalizer])
    return [step["type"] for step in steps if step["type"] != "NFC"]


def _pre_tokenizer(document: Mapping[str, Any] | None) -> str:
    steps = [document]
    if document:
        steps = document.get("pretokenizers", [document])
    name = _name_of_steps(steps)
    if name is None:
        raise ConfigError(
            field="output.exports",
            found=(
                "gguf: how the tokenizer cuts text has no known name in llama.cpp, "
                "as those of GPT-2, GPT-4o, Llama 3, Qwen 2 and SmolLM have: "
                f"{json.dumps(document)[:300]}"
            ),
            remedy="export uniform or per_block instead",
        )
    return name


def _name_of_steps(steps: Sequence[Any]) -> str | None:
    """Return llama.cpp's name of a pre-tokenizer's steps, or None if it has none."""
    first = steps[0]
    last = steps[-1]
    if not last or last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and last["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"]:
        if first["individual_digits"] and last["use_regex"]:
            return "smollm"
        return None
    if kinds == ["Split", "ByteLevel"]:
        return PRE_TOKENIZERS.get(first["pattern"].get("Regex"))
    return None
