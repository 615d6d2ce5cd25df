"""Loads this checkpoint, whose blocks differ in width.

``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.

``per_layer_config`` in config.json has, for every block, the width of its feed-forward layer, its
numbers of query and KV heads, and the widths of its experts; a block with no heads has no
attention. Everything else is the dense family's own code. vLLM serves it by its transformers
backend, if it has no experts, is no GPT-2, and every block has an attention.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.pytorch_utils import Conv1D

DENSE = "llama"
DenseConfig: Any = CONFIG_MAPPING[DENSE]
DenseModel: Any = MODEL_MAPPING[DenseConfig]
DenseForCausalLM: Any = MODEL_FOR_CAUSAL_LM_MAPPING[DenseConfig]


class PrunedConfig(DenseConfig):  # type: ignore[misc]
    """The dense model's configuration, and ``per_layer_config``.

    The classes are transformers' own where it has them, and a list of plain values otherwise.
    """

    model_type = f"pruned_{DENSE}"

    def __init__(
        self, per_layer_config: dict[str, dict[str, Any]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        by_block = sorted((per_layer_config or {}).items(), key=lambda item: int(item[0]))
        self.block_sizes = [dict(sizes) for _, sizes in by_block]
        if hasattr(DenseConfig, "per_layer_config"):
            # the dense model is built first, with the dense widths
            self.allow_global_per_layer_attribute_access = True
            self.per_layer_config = dict(enumerate(self.block_sizes))

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json says."""
        document: dict[str, Any] = super().to_dict()
        by_block = enumerate(document.pop("block_sizes", []))
        document["per_layer_config"] = {str(block): sizes for block, sizes in by_block}
        return document


class NoInputs(nn.Module):
    """A linear without inputs, or without outputs: what is left is its bias."""

    def __init__(self, num_outputs: int, bias: bool) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self.bias = nn.Parameter(torch.zeros(num_outputs)) if bias and num_outputs else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the bias for every token, or zeros."""
        outputs = inputs.new_zeros(*inputs.shape[:-1], self.num_outputs)
        return outputs if self.bias is None else outputs + self.bias


class NoAttention(nn.Module):
    """Stands for an attention whose heads are all pruned.

    What is left is the bias of its last linear.
    """

    def __init__(self, output_name: str, output: nn.Module, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.add_module(output_name, output)

    def forward(
        self, hidden_states: Tensor, cache: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Return the bias for every token, and tell the cache how many tokens there were.

        transformers has called the cache by both names.
        """
        cache = past_key_values if cache is None else cache
        if cache is not None:
            nothing = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(nothing, nothing, self.layer_idx)
        (output,) = self.children()
        return output(hidden_states), None


def new_linear(num_inputs: int, num_outputs: int, bias: bool, is_conv: bool = False) -> nn.Module:
    """Return a linear, or its bias if it has no inputs or outputs; with `is_conv` GPT-2's kind."""
    if num_inputs == 0 or num_outputs == 0:
        return NoInputs(num_outputs, bias)
    if is_conv:
        return Conv1D(num_outputs, num_inputs)  # type: ignore[no-any-return]
    return nn.Linear(num_inputs, num_outputs, bias=bias)


class Experts(nn.Module):
    """Experts of different widths, each with linears of its own.

    The family's experts lie in one tensor.
    """

    def __init__(self, whole: Any, widths: list[int]) -> None:
        super().__init__()
        bias = hasattr(whole, "down_proj_bias")
        hidden = whole.down_proj.shape[2 if bias else 1]
        whole._parameters.clear()
        self.whole = [whole]  # in a list, so that it is no part of this module
        for number, width in enumerate(widths):
            linears = {name: new_linear(hidden, width, bias) for name in ("gate_proj", "up_proj")}
            linears["down_proj"] = new_linear(width, hidden, bias)
            self.add_module(str(number), nn.ModuleDict(linears))

    def combine(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return channels [num_tokens, width] as the family has them.

        Families with biases take gate and up in turns.
        """
        (whole,) = self.whole
        if hasattr(whole, "act_fn"):
            return whole.act_fn(gate) * up  # type: ignore[no-any-return]
        return whole._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))  # type: ignore[no-any-return]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum [num_tokens, d] of every token's experts [num_tokens, k]."""
        total = torch.zeros_like(hidden_states)
        expert: Any
        for number, expert in enumerate(self.children()):
            token, place = torch.where(top_k_index == number)
            x = hidden_states[token]
            output = expert.down_proj(self.combine(expert.gate_proj(x), expert.up_proj(x)))
            output = output * top_k_weights[token, place, None]
            total = total.index_add(0, token, output.to(total.dtype))
        return total


class NoMixture(nn.Module):
    """Stands for a mixture of experts that is gone."""

    def __init__(self, gives_scores: bool) -> None:
        super().__init__()
        self.gives_scores = gives_scores  # whether the family returns those of its router, too

    def forward(self, hidden_states: Tensor) -> Any:
        """Return zeros."""
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.gives_scores else nothing


def narrow_experts(layer: Any, widths: list[int]) -> None:
    """Replace the experts of a mixture by as many as there are widths.

    The router chooses among them.
    """
    layer.experts = Experts(layer.experts, widths)
    router = layer.gate if hasattr(layer, "gate") else layer.router
    router.num_experts = len(widths)
    router.top_k = min(router.top_k, len(widths))
    for name, parameter in router.named_parameters(recurse=False):
        setattr(router, name, nn.Parameter(parameter[: len(widths)]))
    for name, buffer in router.named_buffers(recurse=False):
        setattr(router, name, buffer[: len(widths)].clone())


def narrow_block(block: nn.Module, config: Any, sizes: dict[str, Any]) -> None:
    """Replace the linears of a dense block by narrower ones of given sizes."""
    (width_field,) = {"intermediate_size", "ffn_dim", "n_inner"} & sizes.keys()
    width = sizes[width_field]
    num_heads = sizes["num_attention_heads"]
    names: dict[str, Any] = dict(block.named_modules())
    attention_name = "self_attn" if "self_attn" in names else "attn"
    head_dim = getattr(names[attention_name], "head_dim", 0)
    # an attention that is not pruned may be of any kind
    is_whole = num_heads == config.num_attention_heads
    num_outputs = dict.fromkeys(("gate_proj", "up_proj", "fc1", "c_fc"), width)
    num_outputs |= {"gate_up_proj": 2 * width, "q_proj": num_heads * head_dim}
    num_outputs |= dict.fromkeys(("k_proj", "v_proj"), sizes["num_key_value_heads"] * head_dim)
    fused = num_outputs["q_proj"] + 2 * num_outputs["k_proj"]
    num_outputs |= dict.fromkeys(("qkv_proj", "c_attn"), fused)
    for name, module in names.items():
        owner, _, last = name.rpartition(".")
        is_attention = owner == attention_name
        is_linear = isinstance(module, (nn.Linear, Conv1D)) and last != "shared_expert_gate"
        if not is_linear or (is_attention and is_whole):
            continue
        is_conv = isinstance(module, Conv1D)
        inputs, outputs = module.weight.shape if is_conv else module.weight.shape[::-1]
        if last in num_outputs:
            outputs = num_outputs[last]
        else:
            inputs = num_heads * head_dim if is_attention else width
        linear = new_linear(inputs, outputs, module.bias is not None, is_conv)
        setattr(names[owner], last, linear)
    if not is_whole:
        narrow_attention(block, attention_name, copy.copy(config), sizes)


def narrow_attention(block: nn.Module, name: str, config: Any, sizes: dict[str, Any]) -> None:
    """Tell an attention, whose linears are narrow, how many heads it has; without any it goes.

    The configuration becomes its own.
    """
    num_heads = sizes["num_attention_heads"]
    attention: Any = block.get_submodule(name)
    attention.config = config
    if hasattr(attention, "sinks"):
        attention.sinks = nn.Parameter(attention.sinks[:num_heads])
    counts = dict.fromkeys(("num_attention_heads", "num_heads"), num_heads)
    counts["num_key_value_heads"] = sizes["num_key_value_heads"]
    counts["split_size"] = num_heads * attention.head_dim
    for field, value in counts.items():
        for place in (attention, config):
            if field in vars(place):
                setattr(place, field, value)
    if num_heads == 0:
        output = next(name for name in ("o_proj", "out_proj", "c_proj") if hasattr(attention, name))
        setattr(block, name, NoAttention(output, getattr(attention, output), attention.layer_idx))


class Narrow(nn.Module):
    """A model whose blocks are made as narrow as its configuration says."""

    config_class = PrunedConfig

    def __init__(self, config: PrunedConfig) -> None:
        super().__init__(config)
        lists = (module for module in self.modules() if isinstance(module, nn.ModuleList))
        (blocks,) = (blocks for blocks in lists if len(blocks) == config.num_hidden_layers)
        for block, sizes in zip(blocks, config.block_sizes, strict=True):
            narrow_block(block, config, sizes)
            if sizes.get("expert_widths"):
                narrow_experts(block.mlp, sizes["expert_widths"])
            elif hasattr(getattr(block, "mlp", None), "experts"):
                block.mlp = NoMixture(gives_scores=hasattr(block.mlp, "router"))
        self.post_init()  # type: ignore[operator]


class PrunedModel(Narrow, DenseModel):  # type: ignore[misc]
    """The dense model without a head, with narrower blocks."""


class PrunedForCausalLM(Narrow, DenseForCausalLM):  # type: ignore[misc]
    """The dense model with narrower blocks."""
