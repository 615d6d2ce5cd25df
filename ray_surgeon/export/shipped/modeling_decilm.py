"""Loads this DeciLM checkpoint in transformers.

``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.

Programs with an implementation of DeciLM of their own need the configuration class only:
``block_configs[i].attention`` and ``.ffn`` are objects with attributes there, and plain JSON in
config.json.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from .modeling_pruned import narrow_block

MULTIPLE = 256


def width_of(ffn: SimpleNamespace, hidden_size: int) -> int:
    """Return the width of a feed-forward layer, as DeciLM computes it from its multiplier."""
    if ffn.no_op:
        return 0
    width = int(2 * ffn.ffn_mult * hidden_size / 3)
    return width + -width % MULTIPLE


class DeciLMConfig(LlamaConfig):  # type: ignore[misc]
    """A Llama's configuration with ``block_configs``."""

    model_type = "nemotron-nas"

    def __init__(
        self, block_configs: list[dict[str, dict[str, Any]]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.block_configs = [
            SimpleNamespace(**{part: SimpleNamespace(**values) for part, values in block.items()})
            for block in block_configs or []
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        document: dict[str, Any] = super().to_dict()
        document["block_configs"] = [
            {part: vars(values) for part, values in vars(block).items()}
            for block in self.block_configs
        ]
        return document


class DeciLMForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """A Llama whose blocks differ in width, or have no attention or no feed-forward layer."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        blocks = zip(self.model.layers, config.block_configs, strict=True)
        for layer_idx, (block, sizes) in enumerate(blocks):
            num_heads = 0 if sizes.attention.no_op else config.num_attention_heads
            num_kv_heads = num_heads // (sizes.attention.n_heads_in_group or 1)
            width = width_of(sizes.ffn, config.hidden_size)
            narrow_block(block, config, layer_idx, width, num_heads, num_kv_heads)
            if sizes.attention.no_op:
                block.input_layernorm = nn.Identity()
            if sizes.ffn.no_op:
                block.post_attention_layernorm = nn.Identity()
        self.post_init()
