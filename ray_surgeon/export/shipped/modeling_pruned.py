"""Modeling code of this checkpoint, whose blocks differ in width.

Load it with ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.

``per_layer_config`` in config.json has, for every block, the width of its feed-forward layer, its
numbers of query and KV heads, and the widths of its experts; a block without heads has no
attention. Everything else is the dense family's own code. vLLM serves the checkpoint by its
transformers backend, if it has no experts, is no GPT-2, and every block has an attention.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.pytorch_utils import Conv1D

DENSE = "llama"
MIXERS = ("conv", "linear_attn", "mamba")
"""Modules that some blocks have in place of an attention; they are whole."""
DenseConfig: Any = CONFIG_MAPPING[DENSE]
DenseModel: Any = MODEL_MAPPING[DenseConfig]
DenseForCausalLM: Any = MODEL_FOR_CAUSAL_LM_MAPPING[DenseConfig]


class PrunedConfig(DenseConfig):  # type: ignore[misc]
    """The dense model's configuration, and ``per_layer_config``.

    Where transformers has a ``per_layer_config`` itself, it is used; ``block_sizes`` is a list of
    plain values in any case.
    """

    model_type = f"pruned_{DENSE}"

    def __init__(
        self, per_layer_config: dict[str, dict[str, Any]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        sizes_of_block = per_layer_config or {}
        blocks = sorted(sizes_of_block, key=int)
        self.block_sizes = [dict(sizes_of_block[block]) for block in blocks]
        self.tell_widths()

    def tell_widths(self) -> None:
        """Give transformers the widths of every block, if it has a field for them."""
        if hasattr(DenseConfig, "per_layer_config"):
            self.allow_global_per_layer_attribute_access = True
            # a width that equals the dense model's is written, too
            self.serialize_explicit_per_layer_config = True
            self.per_layer_config: Any = dict(enumerate(self.block_sizes))

    def forget_widths(self) -> None:
        """Hide the widths of the blocks, while the dense model is built with the dense widths.

        transformers warns when a width is read from a configuration with several.
        """
        if hasattr(DenseConfig, "per_layer_config"):
            self.per_layer_config = None

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json."""
        document: dict[str, Any] = super().to_dict()
        block_sizes = document.pop("block_sizes", [])
        document["per_layer_config"] = {
            str(block): sizes for block, sizes in enumerate(block_sizes)
        }
        return document


class NoInputs(nn.Module):
    """Replaces a linear that has no inputs, or no outputs, and keeps its bias."""

    def __init__(self, num_outputs: int, bias: bool) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self.bias = None
        if bias and num_outputs:
            self.bias = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the bias for every token, or zeros."""
        outputs = inputs.new_zeros(*inputs.shape[:-1], self.num_outputs)
        if self.bias is None:
            return outputs
        return outputs + self.bias


class NoAttention(nn.Module):
    """Replaces an attention whose heads are all pruned, and keeps the bias of its last linear."""

    def __init__(self, output_name: str, output: nn.Module, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.add_module(output_name, output)

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return the bias for every token, and tell the cache how many tokens there were.

        transformers names the cache ``cache`` or ``past_key_values``, depending on its version.
        """
        if cache is None:
            cache = past_key_values
        if cache is not None:
            num_sequences, num_tokens = hidden_states.shape[:2]
            nothing = hidden_states.new_zeros(num_sequences, 1, num_tokens, 1)
            cache.update(nothing, nothing, self.layer_idx)
        (output,) = self.children()
        return output(hidden_states), None


def new_linear(
    num_inputs: int, num_outputs: int, bias: bool, is_conv: bool = False
) -> nn.Module:
    """Return a linear, or a `NoInputs` if it has no inputs or no outputs.

    Args:
        num_inputs: number of inputs.
        num_outputs: number of outputs.
        bias: whether it has a bias.
        is_conv: whether it is a Conv1D, as in GPT-2.
    """
    if num_inputs == 0 or num_outputs == 0:
        return NoInputs(num_outputs, bias)
    if is_conv:
        return Conv1D(num_outputs, num_inputs)  # type: ignore[no-any-return]
    return nn.Linear(num_inputs, num_outputs, bias=bias)


class Experts(nn.Module):
    """Experts of different widths, each with separate linears.

    The family's own class has all experts in one tensor.
    """

    def __init__(self, whole: Any, widths: list[int]) -> None:
        super().__init__()
        bias = hasattr(whole, "down_proj_bias")
        # families with biases transpose their weights
        hidden_axis = 2 if bias else 1
        hidden = whole.down_proj.shape[hidden_axis]
        whole._parameters.clear()
        self.whole = [whole]  # in a list, so that it is not registered as a submodule
        for number, width in enumerate(widths):
            linears = {
                "gate_proj": new_linear(hidden, width, bias),
                "up_proj": new_linear(hidden, width, bias),
                "down_proj": new_linear(width, hidden, bias),
            }
            self.add_module(str(number), nn.ModuleDict(linears))

    def combine(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the channels [num_tokens, width] as the family computes them.

        Families with biases interleave gate and up.
        """
        (whole,) = self.whole
        if hasattr(whole, "act_fn"):
            return whole.act_fn(gate) * up  # type: ignore[no-any-return]
        interleaved = torch.stack([gate, up], dim=-1).flatten(-2)
        return whole._apply_gate(interleaved)  # type: ignore[no-any-return]

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Return the weighted sum of every token's experts.

        Args:
            hidden_states: [num_tokens, d] inputs.
            top_k_index: [num_tokens, k] numbers of each token's experts.
            top_k_weights: [num_tokens, k] their weights.

        Returns:
            [num_tokens, d] outputs.
        """
        total = torch.zeros_like(hidden_states)
        expert: Any
        for number, expert in enumerate(self.children()):
            token, place = torch.where(top_k_index == number)
            x = hidden_states[token]
            channels = self.combine(expert.gate_proj(x), expert.up_proj(x))
            output = expert.down_proj(channels)
            output = output * top_k_weights[token, place, None]
            total = total.index_add(0, token, output.to(total.dtype))
        return total


class NoMixture(nn.Module):
    """Replaces a mixture of experts that is pruned whole."""

    def __init__(self, gives_scores: bool) -> None:
        super().__init__()
        # whether the family's mixture also returns the scores of its router
        self.gives_scores = gives_scores

    def forward(self, hidden_states: Tensor) -> Any:
        """Return zeros."""
        nothing = torch.zeros_like(hidden_states)
        if self.gives_scores:
            return nothing, None
        return nothing


def narrow_experts(layer: Any, widths: list[int]) -> None:
    """Replace the experts of a mixture by experts of given widths.

    The router keeps the rows of as many experts.

    Args:
        layer: the mixture.
        widths: widths of every expert that is left.
    """
    num_experts = len(widths)
    layer.experts = Experts(layer.experts, widths)
    router = layer.gate if hasattr(layer, "gate") else layer.router
    router.num_experts = num_experts
    router.top_k = min(router.top_k, num_experts)
    for name, parameter in router.named_parameters(recurse=False):
        setattr(router, name, nn.Parameter(parameter[:num_experts]))
    for name, buffer in router.named_buffers(recurse=False):
        setattr(router, name, buffer[:num_experts].clone())


def outputs_of_linears(
    sizes: dict[str, Any], width: int, head_dim: int, query_dim: int
) -> dict[str, int]:
    """Return the number of outputs of each linear that produces channels or heads.

    Args:
        sizes: sizes of the block.
        width: width of its feed-forward layer.
        head_dim: head dimension of its attention.
        query_dim: number of outputs for a head's query, and its gate if it has one.
    """
    queries = sizes["num_attention_heads"] * query_dim
    keys = sizes["num_key_value_heads"] * head_dim
    fused = queries + 2 * keys
    return {
        "gate_proj": width,
        "up_proj": width,
        "w1": width,
        "w3": width,
        "fc1": width,
        "c_fc": width,
        "gate_up_proj": 2 * width,
        "q_proj": queries,
        "k_proj": keys,
        "v_proj": keys,
        "qkv_proj": fused,
        "c_attn": fused,
    }


def narrow_block(block: nn.Module, config: Any, sizes: dict[str, Any]) -> None:
    """Replace the linears of a dense block by narrower ones of given sizes.

    Args:
        block: block of the dense model.
        config: configuration of the model.
        sizes: sizes of the block, from ``per_layer_config``.
    """
    (width_field,) = {"intermediate_size", "ffn_dim", "n_inner"} & sizes.keys()
    width = sizes[width_field]
    num_heads = sizes["num_attention_heads"]
    names: dict[str, Any] = dict(block.named_modules())
    attention_name = "self_attn" if "self_attn" in names else "attn"
    attention: Any = names.get(attention_name)
    head_dim = getattr(attention, "head_dim", 0)
    # an attention that is not pruned may be of any kind
    is_whole = attention is None or num_heads == config.num_attention_heads
    query_dim = head_dim
    if getattr(attention, "q_proj", None) is not None:
        query_dim = len(attention.q_proj.weight) // config.num_attention_heads
    num_outputs = outputs_of_linears(sizes, width, head_dim, query_dim)
    for name, module in names.items():
        owner, _, last = name.rpartition(".")
        if name.startswith(MIXERS):
            continue
        is_attention = owner == attention_name
        if not isinstance(module, (nn.Linear, Conv1D)) or last == "shared_expert_gate":
            continue
        if is_attention and is_whole:
            continue
        is_conv = isinstance(module, Conv1D)
        if is_conv:
            inputs, outputs = module.weight.shape
        else:
            outputs, inputs = module.weight.shape
        if last in num_outputs:
            outputs = num_outputs[last]
        elif is_attention:
            inputs = num_heads * head_dim
        else:
            inputs = width
        linear = new_linear(inputs, outputs, module.bias is not None, is_conv)
        setattr(names[owner], last, linear)
    if not is_whole:
        narrow_attention(block, attention_name, copy.copy(config), sizes)


def narrow_attention(
    block: nn.Module, name: str, config: Any, sizes: dict[str, Any]
) -> None:
    """Set the number of heads of an attention whose linears are narrow already.

    An attention without heads is replaced by a `NoAttention`.

    Args:
        block: that has the attention.
        name: name of the attention in the block.
        config: a copy of the model's configuration, which this attention alone uses from now on.
        sizes: sizes of the block, from ``per_layer_config``.
    """
    num_heads = sizes["num_attention_heads"]
    attention: Any = block.get_submodule(name)
    attention.config = config
    if hasattr(attention, "sinks"):
        attention.sinks = nn.Parameter(attention.sinks[:num_heads])
    counts = {
        "num_attention_heads": num_heads,
        "num_heads": num_heads,
        "num_key_value_heads": sizes["num_key_value_heads"],
        "split_size": num_heads * attention.head_dim,
    }
    for field, value in counts.items():
        for place in (attention, config):
            if field in vars(place):
                setattr(place, field, value)
    if num_heads == 0:
        outputs = ("o_proj", "out_proj", "c_proj")
        last = next(linear for linear in outputs if hasattr(attention, linear))
        replacement = NoAttention(last, getattr(attention, last), attention.layer_idx)
        setattr(block, name, replacement)


class Narrow(nn.Module):
    """Mixin that narrows the blocks of a dense model to the sizes in its configuration."""

    config_class = PrunedConfig

    def __init__(self, config: PrunedConfig) -> None:
        config.forget_widths()
        super().__init__(config)
        lists = [module for module in self.modules() if isinstance(module, nn.ModuleList)]
        num_blocks = config.num_hidden_layers
        (blocks,) = (modules for modules in lists if len(modules) == num_blocks)
        for block, sizes in zip(blocks, config.block_sizes, strict=True):
            narrow_block(block, config, sizes)
            if sizes.get("expert_widths"):
                narrow_experts(block.mlp, sizes["expert_widths"])
            elif hasattr(getattr(block, "mlp", None), "experts"):
                block.mlp = NoMixture(gives_scores=hasattr(block.mlp, "router"))
        self.post_init()  # type: ignore[operator]
        config.tell_widths()


class PrunedModel(Narrow, DenseModel):  # type: ignore[misc]
    """The dense model without a head, with narrower blocks."""


class PrunedForCausalLM(Narrow, DenseForCausalLM):  # type: ignore[misc]
    """The dense model with narrower blocks."""
