"""Families of models, as data: where the blocks are, which linears read the same input, what belongs to the ends.

A shard runs the family's own `forward` over its own blocks (see `shard.py`), so an adapter only has to name modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Coupling:
    """Which linears of a block lose rows when columns of its last one go.

    Attributes:
        reader: the linear whose columns decide, e.g. ``mlp.down_proj``.
        writers: (linear, part, number of parts): the rows that write the reader's inputs; parts of a fused linear lie one after the
            other, e.g. ("mlp.gate_up_proj", 1, 2) for the second half.
    """

    reader: str
    writers: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class AttentionCoupling:
    """Which linears of a block lose rows when the columns of a KV group's query heads go from its last one.

    Attributes:
        reader: e.g. ``self_attn.o_proj``.
        query: linear that writes the query heads; if it is also that of keys and values, the three lie one after the other.
        key: linear that writes the key heads.
        value: linear that writes the value heads.
    """

    reader: str
    query: str
    key: str
    value: str


@dataclass(frozen=True)
class Adapter:
    """One family.

    Attributes:
        base: path of the module whose forward loops over the blocks, e.g. ``model``.
        blocks: name of the block list below `base`, e.g. ``layers``.
        embeddings: modules below `base` that only the first shard needs, e.g. ``embed_tokens``.
        positions: those of them whose output is added to the hidden states by `base.forward`.
        final: modules below `base` that only the last shard needs, e.g. ``norm``.
        head: path of the output linear.
        token_embedding: path of the embedding that a tied head shares its weight with.
        sites: per block, groups of linears that read the same input and therefore share one A.
        ffn: what a channel of the feed-forward layer is.
        attention: what a KV group with its query heads is.
        width_field: name of the feed-forward layer's width in the configuration.
        has_free_heads: whether the configuration may have fewer heads than fill the hidden size.
    """

    base: str
    blocks: str
    embeddings: tuple[str, ...]
    positions: tuple[str, ...]
    final: tuple[str, ...]
    head: str
    token_embedding: str
    sites: tuple[tuple[str, ...], ...]
    ffn: Coupling
    attention: AttentionCoupling
    width_field: str = "intermediate_size"
    has_free_heads: bool = True

    def block_prefix(self, block: int) -> str:
        """Return the name of a block in the whole model, e.g. ``model.layers.3.``."""
        return f"{self.base}.{self.blocks}.{block}."


_LLAMA = Adapter(
    base="model",
    blocks="layers",
    embeddings=("embed_tokens",),
    positions=(),
    final=("norm",),
    head="lm_head",
    token_embedding="model.embed_tokens",
    sites=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    ffn=Coupling("mlp.down_proj", (("mlp.gate_proj", 0, 1), ("mlp.up_proj", 0, 1))),
    attention=AttentionCoupling("self_attn.o_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)

ADAPTERS: dict[str, Adapter] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi3": replace(
        _LLAMA,
        sites=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
        ffn=Coupling("mlp.down_proj", (("mlp.gate_up_proj", 0, 2), ("mlp.gate_up_proj", 1, 2))),
        attention=AttentionCoupling("self_attn.o_proj", "self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.qkv_proj"),
    ),
    "opt": Adapter(
        base="model.decoder",
        blocks="layers",
        embeddings=("embed_tokens", "embed_positions", "project_in"),
        positions=("embed_positions",),
        final=("final_layer_norm", "project_out"),
        head="lm_head",
        token_embedding="model.decoder.embed_tokens",
        sites=(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.out_proj",),
            ("fc1",),
            ("fc2",),
        ),
        ffn=Coupling("fc2", (("fc1", 0, 1),)),
        attention=AttentionCoupling("self_attn.out_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        width_field="ffn_dim",
        has_free_heads=False,
    ),
    "gpt2": Adapter(
        base="transformer",
        blocks="h",
        embeddings=("wte", "wpe"),
        positions=("wpe",),
        final=("ln_f",),
        head="lm_head",
        token_embedding="transformer.wte",
        sites=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        ffn=Coupling("mlp.c_proj", (("mlp.c_fc", 0, 1),)),
        attention=AttentionCoupling("attn.c_proj", "attn.c_attn", "attn.c_attn", "attn.c_attn"),
        width_field="n_inner",
        has_free_heads=False,
    ),
}


_LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 2_000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "head_dim"), 100_000),
    **dict.fromkeys(("hidden_size", "n_embd", "word_embed_proj_dim"), 1_000_000),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "vocab_size"), 10_000_000),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 1_000_000_000),
}
"""Sizes in config.json far beyond any model; building one would fill the memory."""


def check_sizes(document: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration of absurd sizes, before transformers builds anything from it.

    Raises:
        ValueError: names the field.
    """
    for name, most in _LARGEST.items():
        value = document.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ValueError(f"model.source: {name} in config.json of {where} is {str(value)[:40]!r}, expected 1 to {most}; fetch it again")


def check_family(family: str) -> None:
    """Refuse a family without an adapter.

    Raises:
        ValueError: names the known ones.
    """
    if family not in ADAPTERS:
        raise ValueError(
            f"model.source: the model type is {family!r}, which has no adapter; known families: {', '.join(sorted(ADAPTERS))}. "
            "Choose a model of one of these"
        )


def adapter_for(config: PretrainedConfig) -> Adapter:
    """Return the adapter of a model's family.

    Raises:
        ValueError: the family is unknown, and names the known ones; or its head does more than multiply.
    """
    check_family(config.model_type)
    if getattr(config, "final_logit_softcapping", None):
        raise ValueError("model.source: the model caps its logits (final_logit_softcapping), which the loss here does not; choose another")
    return ADAPTERS[config.model_type]
