"""Families of models, as data: where the blocks are, which linears read the same input, what belongs to the ends.

A shard runs the family's own `forward` over its own blocks (see `shard.py`), so an adapter only has to name modules.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig


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
    """

    base: str
    blocks: str
    embeddings: tuple[str, ...]
    positions: tuple[str, ...]
    final: tuple[str, ...]
    head: str
    token_embedding: str
    sites: tuple[tuple[str, ...], ...]

    def block_prefix(self, block: int) -> str:
        """Return the name of a block in the whole model, e.g. ``model.layers.3.``."""
        return f"{self.base}.{self.blocks}.{block}."


ADAPTERS: dict[str, Adapter] = {
    "llama": Adapter(
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
    ),
}


def adapter_for(config: PretrainedConfig) -> Adapter:
    """Return the adapter of a model's family.

    Raises:
        ValueError: the family is unknown; names the known ones.
    """
    family = config.model_type
    if family not in ADAPTERS:
        raise ValueError(
            f"model.source: the model type is {family!r}, which has no adapter; known families: {', '.join(sorted(ADAPTERS))}. "
            "Choose a model of one of these"
        )
    return ADAPTERS[family]
