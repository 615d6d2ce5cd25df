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
from transformers import LlamaConfig as DenseConfig
from transformers import LlamaForCausalLM as DenseForCausalLM
from transformers import LlamaModel as DenseModel
from transformers.pytorch_utils import Conv1D


class PrunedConfig(DenseConfig):  # type: ignore[misc]
    """The dense model's configuration, and ``per_layer_config``.

    The classes are transformers' own where it has them, and a list of plain values otherwise.
    """

    model_type = "pruned_llama"

    def __init__(
        self, per_layer_config: dict[str, dict[str, Any]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.block_sizes = [
            dict(sizes)
            for _, sizes in sorted((per_layer_config or {}).items(), key=lambda item: int(item[0]))
        ]
        if hasattr(DenseConfig, "per_layer_config"):
            self.allow_global_per_layer_attribute_access = (
                True  # the dense model is built first, with the dense widths
            )
            self.per_layer_config = dict(enumerate(self.block_sizes))

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json says."""
        document: dict[str, Any] = super().to_dict()
        document["per_layer_config"] = {
            str(block): sizes for block, sizes in enumerate(document.pop("block_sizes", []))
        }
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
        self.output_name = output_name
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
        bias: Tensor = self.get_submodule(self.output_name)(hidden_states)
        return bias, None


def narrow_linear(module: nn.Linear | Conv1D, num_inputs: int, num_outputs: int) -> nn.Module:
    """Return a linear of the same kind with another shape."""
    if num_inputs == 0 or num_outputs == 0:
        return NoInputs(num_outputs, module.bias is not None)
    if isinstance(module, Conv1D):
        return Conv1D(num_outputs, num_inputs)  # type: ignore[no-any-return]
    return nn.Linear(num_inputs, num_outputs, bias=module.bias is not None)


class Experts(nn.Module):
    """Experts of different widths, each with linears of its own.

    The family's experts lie in one tensor.
    """

    def __init__(self, whole: Any, widths: list[int]) -> None:
        super().__init__()
        self.numbers = range(len(widths))
        bias = hasattr(whole, "down_proj_bias")
        hidden = whole.down_proj.shape[2 if bias else 1]
        whole._parameters.clear()
        self.whole = [whole]  # in a list, so that it is no part of this module
        for number, width in enumerate(widths):
            expert = nn.Module()
            for name, inputs, outputs in (
                ("gate_proj", hidden, width),
                ("up_proj", hidden, width),
                ("down_proj", width, hidden),
            ):
                expert.add_module(
                    name,
                    nn.Linear(inputs, outputs, bias=bias)
                    if width
                    else NoInputs(outputs, bias=bias),
                )
            self.add_module(str(number), expert)

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
        for number in self.numbers:
            expert: Any = self.get_submodule(str(number))
            token, place = torch.where(top_k_index == number)
            x = hidden_states[token]
            output = (
                expert.down_proj(self.combine(expert.gate_proj(x), expert.up_proj(x)))
                * top_k_weights[token, place, None]
            )
            total = total.index_add(0, token, output.to(total.dtype))
        return total


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


def narrow_block(
    block: nn.Module, config: Any, layer_idx: int, width: int, num_heads: int, num_kv_heads: int
) -> None:
    """Replace the linears of a dense block by narrower ones.

    The feed-forward width and the numbers of query and KV heads are given.
    """
    names = dict(block.named_modules())
    attention_name = "self_attn" if "self_attn" in names else "attn"
    attention = names[attention_name]
    head_dim: Any = getattr(attention, "head_dim", None)
    # an attention that is not pruned may be of any kind
    is_whole = num_heads == config.num_attention_heads
    sizes = {"q_proj": num_heads, "k_proj": num_kv_heads, "v_proj": num_kv_heads}
    for fused in ("qkv_proj", "c_attn"):
        sizes[fused] = num_heads + 2 * num_kv_heads
    for name, module in names.items():
        owner, _, last = name.rpartition(".")
        if (
            not isinstance(module, (nn.Linear, Conv1D))
            or last == "shared_expert_gate"
            or (owner == attention_name and is_whole)
        ):
            continue
        inputs, outputs = (
            module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
        )
        if owner == attention_name:
            inputs, outputs = (
                (inputs, sizes[last] * head_dim)
                if last in sizes
                else (num_heads * head_dim, outputs)
            )
        elif last in ("gate_proj", "up_proj", "fc1", "c_fc"):
            outputs = width
        elif last == "gate_up_proj":
            outputs = 2 * width
        else:
            inputs = width
        setattr(names[owner], last, narrow_linear(module, inputs, outputs))
    if is_whole:
        return
    attention.config = copy.copy(config)
    if hasattr(attention, "sinks"):
        attention.sinks = nn.Parameter(attention.sinks[:num_heads])
    counts = dict.fromkeys(("num_attention_heads", "num_heads"), num_heads)
    counts |= {"num_key_value_heads": num_kv_heads, "split_size": num_heads * head_dim}
    for name, value in counts.items():
        for place in (attention, attention.config):
            if name in vars(place):
                setattr(place, name, value)
    if num_heads == 0:
        output = next(name for name in ("o_proj", "out_proj", "c_proj") if hasattr(attention, name))
        setattr(block, attention_name, NoAttention(output, getattr(attention, output), layer_idx))


def narrow(model: nn.Module, config: PrunedConfig) -> None:
    """Make the blocks of a dense model as narrow as its configuration says."""
    (blocks,) = (
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers
    )
    for layer_idx, (block, sizes) in enumerate(zip(blocks, config.block_sizes, strict=True)):
        width = next(
            sizes[name] for name in ("intermediate_size", "ffn_dim", "n_inner") if name in sizes
        )
        narrow_block(
            block,
            config,
            layer_idx,
            width,
            sizes["num_attention_heads"],
            sizes["num_key_value_heads"],
        )
        if sizes.get("expert_widths"):
            narrow_experts(block.mlp, sizes["expert_widths"])


class PrunedModel(DenseModel):  # type: ignore[misc]
    """The dense model without a head, with narrower blocks."""

    config_class = PrunedConfig

    def __init__(self, config: PrunedConfig) -> None:
        super().__init__(config)
        narrow(self, config)
        self.post_init()


class PrunedForCausalLM(DenseForCausalLM):  # type: ignore[misc]
    """The dense model with narrower blocks."""

    config_class = PrunedConfig

    def __init__(self, config: PrunedConfig) -> None:
        super().__init__(config)
        narrow(self, config)
        self.post_init()
