"""Families of models, as data: where blocks are, what shares an input, what is coupled.

A shard runs the family's own `forward` over its own blocks (see `shard.py`), so a family only has
to name modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from ray_surgeon.models.attention import IN_PRODUCTS


@dataclass(frozen=True)
class FfnCoupling:
    """Which linears of a feed-forward layer lose rows when columns of its last one are pruned."""

    consumer: str  # the linear whose columns decide, e.g. ``mlp.down_proj``
    # (linear, part, number of parts of a fused one), e.g. ("mlp.gate_up_proj", 1, 2)
    producers: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class AttentionCoupling:
    """Linears of an attention that lose rows with the query heads of a KV group.

    Their columns are pruned from its last linear.
    """

    consumer: str  # e.g. ``self_attn.o_proj``
    # linear that produces the query heads; if it is also that of keys and values, the three lie one
    # after the other
    query: str
    key: str  # linear that produces the key heads
    value: str  # linear that produces the value heads


@dataclass(frozen=True)
class ExpertTensor:
    """What the name of a tensor of one expert says."""

    experts: str  # all experts of the layer, e.g. ``model.layers.3.mlp.experts``
    number: int  # of the expert
    linear: str  # e.g. ``gate_proj``
    kind: str  # ``weight`` or ``bias``


@dataclass(frozen=True)
class SparseLayer:
    """Where the mixture of experts of a block lies, and how config.json calls its sizes.

    The experts are linears here, ``{experts}.{number}.{linear}``, as they are in checkpoints.
    """

    # fields with the number of experts; programs read one or the other
    num_experts: tuple[str, ...]
    width: str  # field with the width of an expert
    layer: str = "mlp"  # the whole layer
    router: str = (
        "mlp.gate"  # which experts a token goes to; its output is logits, weights, numbers
    )
    experts: str = "mlp.experts"
    producers: tuple[str, ...] = ("gate_proj", "up_proj")  # of one expert; they share their input
    consumer: str = "down_proj"  # of one expert
    shared: str | None = (
        # a feed-forward layer beside the experts, through which every token goes, e.g.
        # ``mlp.shared_expert``
        None
    )
    shared_width: str | None = (
        None  # field with its width; None if the width is a multiple of an expert's
    )
    num_groups: str | None = (
        None  # field with the number of groups of experts of which a router chooses some first
    )
    # whether weights are a softmax over all experts, so that they rise if one is removed, if not
    # normalised later
    has_softmax: bool = True
    # the producers of which a channel is zero if one is
    zeroing: tuple[str, ...] = ("gate_proj", "up_proj")
    # whether checkpoints keep all experts of a layer together, [num_experts, inputs, outputs],
    # producers in turns
    stacked: bool = False

    def tensor_of(self, name: str) -> ExpertTensor | None:
        """Take apart the name of a tensor of an expert, e.g.

        ``model.layers.3.mlp.experts.5.gate_proj.weight``; None for all others.
        """
        layer, inside, rest = name.partition(f".{self.experts}.")
        if not inside:
            return None
        number, linear, kind = rest.split(".")
        return ExpertTensor(layer + inside[:-1], int(number), linear, kind)


@dataclass(frozen=True)
class LlamaCpp:
    """How llama.cpp calls a family, and what it wants otherwise than transformers has it."""

    name: str
    activation: str  # of its feed-forward layers, as transformers calls it
    pairs_rotary: bool = (
        False  # whether neighbouring entries of a head rotate together, not those of its halves
    )
    has_free_heads: bool = True  # whether heads may fill less than the hidden size there
    adds_one_to_norms: bool = (
        False  # whether norms multiply by 1 + weight here, and by the weight there
    )


@dataclass(frozen=True)
class Family:
    """One family."""

    base: str  # path of the module whose forward loops over the blocks, e.g. ``model``
    blocks: str  # name of the block list below `base`, e.g. ``layers``
    embeddings: tuple[str, ...]  # below `base`, only for the first shard, e.g. ``embed_tokens``
    positions: tuple[str, ...]  # of these, the ones whose output is added to hidden states
    final: tuple[str, ...]  # below `base`, only for the last shard, e.g. ``norm``
    head: str  # path of the output linear
    token_embedding: str  # path of the embedding whose weight a tied head shares
    # of a block: linears that read the same input and share one A; a block may lack some
    shared_inputs: tuple[tuple[str, ...], ...]
    ffn: FfnCoupling  # what a channel of the feed-forward layer is
    # what a KV group with its query heads is; None if heads cannot be pruned
    attention: AttentionCoupling | None
    sparse: SparseLayer | None = None  # what a mixture of experts is
    stored: tuple[tuple[str, str], ...] = ()  # (part of a name here, the same in checkpoints)
    # how the names of tensors end that are float32 whatever the model's dtype is
    float32: tuple[str, ...] = ()
    width_field: str = "intermediate_size"  # the feed-forward width in the configuration
    has_free_heads: bool = True  # whether heads may fill less than the hidden size
    has_any_heads: bool = (
        False  # whether their number may be one that does not divide the hidden size
    )
    norms_queries: bool = False  # whether queries and keys are normalised over a head's dimensions
    transposed: bool = False  # whether linears are [inputs, outputs], GPT-2's Conv1D
    per_head: tuple[str, ...] = ()  # tensors of a block with one entry for every query head
    runs_attention: str = IN_PRODUCTS  # how transformers is to run attention
    has_free_heads_in_vllm: bool = True  # likewise, in vLLM's own class of the family
    llama_cpp: LlamaCpp | None = None  # None if llama.cpp does not know the family

    @property
    def stacks_experts(self) -> bool:
        """Whether checkpoints keep all experts of a layer together."""
        return self.sparse is not None and self.sparse.stacked

    def block_prefix(self, block: int) -> str:
        """Return the name of a block in the whole model, e.g. ``model.layers.3.``."""
        return f"{self.base}.{self.blocks}.{block}."


_LLAMA = Family(
    base="model",
    blocks="layers",
    embeddings=("embed_tokens",),
    positions=(),
    final=("norm",),
    head="lm_head",
    token_embedding="model.embed_tokens",
    shared_inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    ffn=FfnCoupling("mlp.down_proj", (("mlp.gate_proj", 0, 1), ("mlp.up_proj", 0, 1))),
    attention=AttentionCoupling(
        "self_attn.o_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
    ),
    llama_cpp=LlamaCpp("llama", "silu", pairs_rotary=True),
)

_MIXTRAL = replace(
    _LLAMA,
    has_any_heads=True,
    sparse=SparseLayer(("num_local_experts",), "intermediate_size"),
    stored=(
        (".mlp.", ".block_sparse_moe."),
        (".gate_proj.", ".w1."),
        (".up_proj.", ".w3."),
        (".down_proj.", ".w2."),
    ),
    llama_cpp=None,
)
_QWEN3_MOE = replace(
    _LLAMA,
    has_any_heads=True,
    norms_queries=True,
    sparse=SparseLayer(("num_experts", "num_local_experts"), "moe_intermediate_size"),
    llama_cpp=None,
)
_SHARED_OF_DEEPSEEK = SparseLayer(
    ("n_routed_experts", "num_local_experts"),
    "moe_intermediate_size",
    shared="mlp.shared_experts",
    num_groups="n_group",
    has_softmax=False,
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, has_any_heads=True),
    "qwen2": replace(
        _LLAMA,
        has_any_heads=True,
        has_free_heads_in_vllm=False,
        llama_cpp=LlamaCpp("qwen2", "silu", has_free_heads=False),
    ),
    "qwen3": replace(
        _LLAMA, has_any_heads=True, norms_queries=True, llama_cpp=LlamaCpp("qwen3", "silu")
    ),
    "gemma3_text": replace(
        _LLAMA,
        norms_queries=True,
        llama_cpp=LlamaCpp("gemma3", "gelu_pytorch_tanh", adds_one_to_norms=True),
    ),
    "phi3": replace(
        _LLAMA,
        shared_inputs=(
            ("self_attn.qkv_proj",),
            ("self_attn.o_proj",),
            ("mlp.gate_up_proj",),
            ("mlp.down_proj",),
        ),
        ffn=FfnCoupling("mlp.down_proj", (("mlp.gate_up_proj", 0, 2), ("mlp.gate_up_proj", 1, 2))),
        attention=AttentionCoupling(
            "self_attn.o_proj", "self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.qkv_proj"
        ),
        has_any_heads=True,
        llama_cpp=LlamaCpp("phi3", "silu"),
    ),
    "opt": Family(
        base="model.decoder",
        blocks="layers",
        embeddings=("embed_tokens", "embed_positions", "project_in"),
        positions=("embed_positions",),
        final=("final_layer_norm", "project_out"),
        head="lm_head",
        token_embedding="model.decoder.embed_tokens",
        shared_inputs=(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.out_proj",),
            ("fc1",),
            ("fc2",),
        ),
        ffn=FfnCoupling("fc2", (("fc1", 0, 1),)),
        attention=AttentionCoupling(
            "self_attn.out_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
        ),
        width_field="ffn_dim",
        has_free_heads=False,
    ),
    "gpt2": Family(
        base="transformer",
        blocks="h",
        embeddings=("wte", "wpe"),
        positions=("wpe",),
        final=("ln_f",),
        head="lm_head",
        token_embedding="transformer.wte",
        shared_inputs=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        ffn=FfnCoupling("mlp.c_proj", (("mlp.c_fc", 0, 1),)),
        attention=AttentionCoupling("attn.c_proj", "attn.c_attn", "attn.c_attn", "attn.c_attn"),
        width_field="n_inner",
        has_free_heads=False,
        transposed=True,
        llama_cpp=LlamaCpp("gpt2", "gelu_new"),
    ),
    "mixtral": _MIXTRAL,
    "olmoe": replace(
        _QWEN3_MOE, attention=None, sparse=SparseLayer(("num_experts",), "intermediate_size")
    ),
    "qwen2_moe": replace(
        _LLAMA,
        sparse=SparseLayer(
            ("num_experts",),
            "moe_intermediate_size",
            shared="mlp.shared_expert",
            shared_width="shared_expert_intermediate_size",
        ),
        has_free_heads=False,
        llama_cpp=None,
    ),
    "qwen3_moe": _QWEN3_MOE,
    "gpt_oss": replace(
        _LLAMA,
        sparse=SparseLayer(
            ("num_local_experts",),
            "intermediate_size",
            router="mlp.router",
            zeroing=("gate_proj",),
            stacked=True,
        ),
        has_any_heads=True,
        per_head=("self_attn.sinks",),
        runs_attention="eager",
        llama_cpp=None,
    ),
    "glm4_moe": replace(
        _LLAMA,
        has_any_heads=True,
        norms_queries=True,
        sparse=_SHARED_OF_DEEPSEEK,
        float32=("e_score_correction_bias",),
        llama_cpp=None,
    ),
    "deepseek_v3": replace(
        _LLAMA,
        shared_inputs=(
            ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
            ("self_attn.q_b_proj",),
            ("self_attn.kv_b_proj",),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ),
        attention=None,
        sparse=_SHARED_OF_DEEPSEEK,
        float32=("e_score_correction_bias",),
        llama_cpp=None,
    ),
}


_LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 2_000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "head_dim"), 100_000),
    **dict.fromkeys(("hidden_size", "n_embd", "word_embed_proj_dim"), 1_000_000),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "vocab_size"), 10_000_000),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 1_000_000_000),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 10_000),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 10_000_000),
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
            raise ValueError(
                f"model.source: {name} in config.json of {where} is {str(value)[:40]!r}, expected "
                f"1 to {most}; fetch it again"
            )


def check_not_quantised(document: Mapping[str, Any]) -> None:
    """Refuse quantised weights, of which the scales would not be read.

    MXFP4 of a family that keeps experts together is known.

    Raises:
        ValueError: names the way they are quantised.
    """
    quantization = document.get("quantization_config")
    family = FAMILIES.get(str(document.get("model_type")))
    way = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if way is not None and not (way == "mxfp4" and family is not None and family.stacks_experts):
        raise ValueError(
            f"model.source: the weights are quantised ({str(way)[:40]}), and updates need them as "
            "they were; give the checkpoint in bfloat16 or float32, and quantise the pruned model "
            "with output.quantize"
        )


def check_family(family: str, of_text: Any = None) -> None:
    """Refuse a family that is not in `FAMILIES`.

    Args:
        family: the model type.
        of_text: what config.json says of the model's text part, if it is of images, too.

    Raises:
        ValueError: names the known ones.
    """
    if family not in FAMILIES:
        inside = of_text.get("model_type") if isinstance(of_text, Mapping) else None
        remedy = (
            f"Save its text part, a {inside}, as a model of its own"
            if inside in FAMILIES
            else "Choose a model of one of these"
        )
        raise ValueError(
            f"model.source: the model type is {family!r}, which is not supported; known families: "
            f"{', '.join(sorted(FAMILIES))}. {remedy}"
        )


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a model.

    Raises:
        ValueError: the family is unknown, and names the known ones; or its head does more than
            multiply.
    """
    check_family(config.model_type)
    if getattr(config, "final_logit_softcapping", None):
        raise ValueError(
            "model.source: the model caps its logits (final_logit_softcapping), which the loss "
            "here does not; choose another"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise ValueError(
            "model.source: its tokens see later ones (use_bidirectional_attention), and the loss "
            "here is of the next one; choose another"
        )
    return FAMILIES[config.model_type]
