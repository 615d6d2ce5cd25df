"""Which architecture of llama.cpp holds a pruned model, and what it would misread."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from ray_surgeon.models.attention import rope_kind, rope_of
from ray_surgeon.models.families import LlamaCpp
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import BlockWidths, misread_of_mixtures

PRE_TOKENIZERS = {
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "gpt-4o",  # noqa: E501
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": "llama-bpe",  # noqa: E501
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",  # noqa: E501
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",  # noqa: E501
}
"""Expression by which byte-level tokenizers cut text -> llama.cpp's name.

The expression is that of tokenizer.json.
"""


def _refusal(problem: str) -> ValueError:
    """Return an error that says what to do, if the problem does not."""
    remedy = "" if "; " in problem else "; export uniform or per_block instead"
    return ValueError(f"output.exports: gguf: {problem}{remedy}")


def architecture_of(layout: ModelLayout, widths: Sequence[BlockWidths]) -> LlamaCpp:
    """Return the architecture of llama.cpp that holds a model with these widths.

    Raises:
        ValueError: there is none; says what to do.
    """
    known = layout.family.llama_cpp
    if known is None:
        raise _refusal(f"llama.cpp does not know the family {layout.config.model_type}")
    for problem in _misread(layout, known, widths):
        raise _refusal(problem)
    return known if len(set(widths)) == 1 else LlamaCpp("deci", "silu", pairs_rotary=True)


def _misread(layout: ModelLayout, known: LlamaCpp, widths: Sequence[BlockWidths]) -> Iterator[str]:
    """Yield what llama.cpp would misread; see `_refusal`."""
    config = layout.config
    its = f"llama.cpp's {known.name}"
    if layout.activation != known.activation:
        yield f"{its} has the activation {known.activation}, the model {layout.activation}"
    for name in ("attention_bias", "mlp_bias", "scale_attn_by_inverse_layer_idx"):
        if getattr(config, name, False) and name not in known.biases:
            yield f"{its} has no {name}, the model's config.json has it"
    if not getattr(config, "scale_attn_weights", True):
        yield f"{its} scales attention, the model's config.json has scale_attn_weights false"
    yield from _misread_of_attention(config, known, its)
    if not _knows_rope(config, known):
        yield f"rotary embeddings {dict(rope_of(config))} are not written for {known.name}"
    yield from _misread_of_widths(layout, known, its, widths)


def _misread_of_attention(config: PretrainedConfig, known: LlamaCpp, its: str) -> Iterator[str]:
    window = getattr(config, "sliding_window", None)
    if known.attention_kinds:
        kinds = list(config.layer_types)
        usual = itertools.islice(itertools.cycle(known.attention_kinds), len(kinds))
        if kinds != list(usual):
            yield f"{its} has {', '.join(known.attention_kinds)} in turns, the model {kinds}"
        yield from _MISREAD_OF_FAMILY.get(known.name, lambda _: ())(config)
    elif window is not None and getattr(config, "use_sliding_window", True):
        remedy = "or set it to null in config.json if no text is longer"
        yield f"llama.cpp would ignore sliding_window {window}; export uniform, {remedy}"


def _misread_of_widths(
    layout: ModelLayout, known: LlamaCpp, its: str, widths: Sequence[BlockWidths]
) -> Iterator[str]:
    heads = layout.heads
    sizes = {width.num_kv_heads * heads.n_rep * heads.head_dim for width in widths}
    if not known.has_free_heads and sizes != {layout.config.hidden_size}:
        yield f"{its} wants heads that fill the hidden size; set pruning.groups: [ffn]"
    differ = len(set(widths)) > 1
    if layout.is_mixture:
        yield from misread_of_mixtures(layout, its, widths)
    elif differ and known.name != "llama":
        yield f"{its} has blocks of one width only; set pruning.allocation: uniform"
    if differ and any(not width.num_kv_heads or not width.num_channels for width in widths):
        yield "it misreads blocks without heads or channels; set pruning.groups: [blocks]"


def _misread_of_gemma(config: PretrainedConfig) -> Iterator[str]:
    if config.query_pre_attn_scalar != config.head_dim:
        scale = f"here query_pre_attn_scalar is {config.query_pre_attn_scalar}"
        yield f"llama.cpp scales the queries of a Gemma 3 by head_dim, {scale}"
    sliding = config.rope_parameters["sliding_attention"]
    if sliding.get("rope_type", "default") != "default":
        yield f"rotary embeddings {sliding} of sliding blocks have no place in llama.cpp"


def _misread_of_gpt_oss(config: PretrainedConfig) -> Iterator[str]:
    own = getattr(config, "swiglu_alpha", 1.702), getattr(config, "swiglu_limit", 7.0)
    if own != (1.702, 7.0):
        yield f"llama.cpp's gpt-oss has swiglu_alpha 1.702 and swiglu_limit 7, the model {own}"


_MISREAD_OF_FAMILY = {"gemma3": _misread_of_gemma, "gpt-oss": _misread_of_gpt_oss}

_OF_YARN = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
_OF_YARN |= {"partial_rotary_factor"}
_DEFAULTS_OF_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def _knows_rope(config: PretrainedConfig, known: LlamaCpp) -> bool:
    parameters = rope_of(config)
    kind = rope_kind(config)
    # others fail to load
    is_whole = parameters.get("partial_rotary_factor", 1.0) == 1.0 or known.name == "phi3"
    if kind == "yarn":
        rest = {name: value for name, value in parameters.items() if name not in _OF_YARN}
        if known.name == "gpt-oss":  # of which llama.cpp, too, rounds the borders of frequencies
            rest.pop("truncate", None)
        return is_whole and rest.items() <= _DEFAULTS_OF_YARN.items()
    return is_whole and (kind in ("default", "linear") or (kind, known.name) == ("llama3", "llama"))


def tokenizer_names(document: Mapping[str, Any]) -> tuple[str, str]:
    """Return llama.cpp's names of a tokenizer and of how it cuts text before it merges.

    Args:
        document: content of tokenizer.json.

    Raises:
        ValueError: llama.cpp has no such tokenizer, or its name there is not known.
    """
    model = document["model"]
    normaliser = document.get("normalizer")
    if model["type"] == "BPE" and (document.get("decoder") or {}).get("type") == "ByteLevel":
        steps = (normaliser or {"normalizers": []}).get("normalizers", [normaliser])
        if unknown := [step["type"] for step in steps if step["type"] != "NFC"]:
            raise _refusal(f"llama.cpp would not apply the normalizer {', '.join(unknown)}")
        return "gpt2", _pre_tokenizer(document.get("pre_tokenizer"))
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return "llama", "default"
    known = "BPE of bytes, and SentencePiece's BPE with bytes for what has no piece"
    raise _refusal(f"the tokenizer is of type {model['type']}, known are {known}")


def _pre_tokenizer(document: Mapping[str, Any] | None) -> str:
    steps = list((document or {}).get("pretokenizers", [document]))
    kinds = [step and step["type"] for step in steps]
    last = steps[-1]
    if last is not None and kinds[-1] == "ByteLevel" and not last["add_prefix_space"]:
        first = steps[0]
        if kinds == ["ByteLevel"] and last["use_regex"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and first["individual_digits"] and last["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and first["pattern"].get("Regex") in PRE_TOKENIZERS:
            return PRE_TOKENIZERS[first["pattern"]["Regex"]]
    known = "as those of GPT-2, GPT-4o, Llama 3, Qwen 2 and SmolLM have"
    cut = json.dumps(document)[:300]
    raise _refusal(f"how the tokenizer cuts text has no known name in llama.cpp, {known}: {cut}")
