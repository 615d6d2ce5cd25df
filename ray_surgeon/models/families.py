"""Families of models: names of their modules, and which linears share an input or are coupled.

The families themselves are data, in families.yaml.

A shard runs the family's own `forward` over its own blocks (see `shard.py`), so a family only has
to name modules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter
from transformers import PretrainedConfig

from ray_surgeon.errors import ConfigError
from ray_surgeon.models.attention import IN_PRODUCTS
from ray_surgeon.models.experts import Coupling, ExpertTensor, SparseLayer

_ATTENTION = Coupling(
    consumer="self_attn.o_proj",
    producers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)
NO_ATTENTION = Coupling(consumer="none is described", producers=())
"""Stands for the attention of a family that is not described; it stays whole."""
_FFN = Coupling(consumer="mlp.down_proj", producers=("mlp.gate_proj", "mlp.up_proj"))
_NO_EXPERTS = SparseLayer()


@dataclass(frozen=True)
class LlamaCpp:
    """Name of a family in llama.cpp, and its differences from transformers."""

    name: str
    activation: str  # of feed-forward layers, by its name in transformers
    # whether neighbouring dimensions of a head rotate together, instead of dimensions of its halves
    pairs_rotary: bool = False
    # whether heads may fill less than the hidden size in llama.cpp
    has_free_heads: bool = True
    # whether norms multiply by 1 + weight in transformers, and by the weight in llama.cpp
    adds_one_to_norms: bool = False
    # fields of config.json for biases that llama.cpp supports
    biases: tuple[str, ...] = ()
    # repeating pattern of attention kinds that llama.cpp assumes; GGUF files do not contain it
    attention_kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One family of models; the defaults are those of Llama."""

    base: str = "model"  # path of the module whose forward loops over the blocks
    blocks: str = "layers"  # name of the block list below `base`
    # modules below `base` that only the first shard has; a tied head shares the weight of the first
    # of them
    embeddings: tuple[str, ...] = ("embed_tokens",)
    # those of `embeddings` whose output is added to the hidden states
    positions: tuple[str, ...] = ()
    # modules below `base` that only the last shard has
    final: tuple[str, ...] = ("norm",)
    head: str = "lm_head"  # name of the output linear
    # linears of attention; a group is a KV group with its query heads
    attention: Coupling = _ATTENTION
    # further linears of attention, each with its own input
    in_attention: tuple[str, ...] = ()
    prunes_heads: bool = True  # whether heads can be pruned
    # modules that some blocks have in place of an attention; they are never pruned
    mixers: tuple[str, ...] = ()
    ffn: Coupling = _FFN  # linears of the feed-forward layer; a group is a channel
    sparse: SparseLayer = _NO_EXPERTS  # the mixture of experts
    # (part of a tensor's name in the model, the same part in checkpoints)
    stored: tuple[tuple[str, str], ...] = ()
    # suffixes of the tensors that are float32 in models of any dtype
    float32: tuple[str, ...] = ("e_score_correction_bias",)
    # field of config.json for the feed-forward width
    width_field: str = "intermediate_size"
    # field of config.json that makes the class choose another width than this; False in exports
    adjusts_width: str = ""
    # activation of feed-forward layers, for configurations that name none
    activation: str = ""
    has_free_heads: bool = True  # whether heads may fill less than the hidden size
    # whether the number of heads need not divide the hidden size
    has_any_heads: bool = True
    # whether queries and keys are normalised over a head's dimensions
    norms_queries: bool = False
    # whether the linear of queries also has the rows of a gate of the head's outputs, after those
    # of each head's query
    gates_heads: bool = False
    # whether a layer's output passes a norm before it is added to the stream
    norms_outputs: bool = False
    # whether config.json has Granite's multipliers: of embeddings, of what layers add to the
    # stream, and the divisor of logits
    has_multipliers: bool = False
    transposed: bool = False  # whether linears are [inputs, outputs], as GPT-2's Conv1D
    # tensors of a block with one entry for every query head
    per_head: tuple[str, ...] = ()
    runs_attention: str = IN_PRODUCTS  # attention implementation for transformers
    has_free_heads_in_vllm: bool = True  # `has_free_heads` of vLLM's class for the family
    llama_cpp: LlamaCpp | None = None  # None if llama.cpp does not support the family
    # number of items in the tuple that a block returns; 0 if it returns a tensor
    tuple_size: int = 0

    @property
    def has_attention(self) -> bool:
        """Whether the linears of attention are known; a probed family's are not."""
        return self.attention != NO_ATTENTION

    def couplings_in(self, names: Collection[str]) -> list[tuple[str, str, Coupling]]:
        """Return the coupled linears of a block.

        Args:
            names: of the block's modules. Couplings of attention and of the feed-forward layer are
                returned even if their modules are missing.

        Returns:
            Kind of the groups, prefix of the linears' names, and the coupling, for each of them.
        """
        sparse = self.sparse
        couplings = [("attention", "", self.attention), ("ffn", "", self.ffn)]
        experts = list[tuple[str, str, Coupling]]()
        for name in names:
            if name == sparse.shared:
                couplings.append(("shared_experts", f"{name}.", sparse.linears))
            elif name.rpartition(".")[0] == sparse.experts:
                experts.append(("expert_channels", f"{name}.", sparse.linears))
        return couplings + experts

    def shared_inputs_in(self, names: Collection[str]) -> Iterator[tuple[str, ...]]:
        """Yield groups of linears that read the same input.

        Args:
            names: of a block's modules. Linears that are not among them may be yielded, too.
        """
        for kind, inside, coupling in self.couplings_in(names):
            yield tuple(inside + name for name in coupling.producers)
            if kind == "attention":
                for name in self.in_attention:
                    yield (inside + name,)
            yield (inside + coupling.consumer,)

    def part_of_stack(self, name: str) -> ExpertTensor | None:
        """Parse the name of an expert's tensor; None if checkpoints do not stack experts."""
        if not self.sparse.stacked:
            return None
        return self.sparse.tensor_of(name)

    def stored_in(self, name: str) -> str:
        """Return the name of the checkpoint's tensor that contains a tensor of the model."""
        part = self.part_of_stack(name)
        if part is None:
            return name
        return part.whole

    def stored_name(self, name: str) -> str:
        """Return the name of a tensor in checkpoints."""
        if f".{self.sparse.layer}." in name:
            for name_in_model, name_in_files in self.stored:
                name = name.replace(name_in_model, name_in_files)
        return name

    def name_of_stored(self, key: str) -> str:
        """Return the name in the model of a checkpoint's tensor; the inverse of `stored_name`."""
        for name_in_model, name_in_files in self.stored:
            key = key.replace(name_in_files, name_in_model)
        return key

    def block_prefix(self, block: int) -> str:
        """Return the name of a block in the whole model, e.g. ``model.layers.3.``."""
        return f"{self.base}.{self.blocks}.{block}."


_DOCUMENT = Path(__file__).with_name("families.yaml").read_text(encoding="utf-8")
_CHECK = TypeAdapter(dict[str, Family], config=ConfigDict(extra="forbid"))
FAMILIES = _CHECK.validate_python(yaml.safe_load(_DOCUMENT))
"""Type of a model -> its family."""

_MOST_BLOCKS = 2_000
"""Far more than any model has; building more would take hours."""


def check_depth(document: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration whose blocks are too many to be built in reasonable time.

    Raises:
        ValueError: names the field.
    """
    for name in {"num_hidden_layers", "n_layer"} & document.keys():
        value = document[name]
        if isinstance(value, int) and value > _MOST_BLOCKS:
            raise ConfigError(
                field="model.source",
                found=(
                    f"{name} in config.json of {where} is {value}, expected 1 to {_MOST_BLOCKS}"
                ),
                remedy="fetch it again",
            )


def check_not_quantised(document: Mapping[str, Any]) -> None:
    """Refuse quantised weights, whose scales would not be read.

    MXFP4 is supported in families that store all experts of a layer together.

    Raises:
        ValueError: names the quantisation method.
    """
    method = document.get("quantization_config")
    if isinstance(method, Mapping):
        method = method.get("quant_method")
    if method is None:
        return
    family = FAMILIES.get(str(document.get("model_type")))
    is_stacked = family is not None and family.sparse.stacked
    if method == "mxfp4" and is_stacked:
        return
    raise ConfigError(
        field="model.source",
        found=f"the weights are quantised ({str(method)[:40]})",
        remedy="give them in bfloat16 or float32, and quantise the pruned model: output.quantize",
    )


def check_family(family: str) -> None:
    """Refuse a family that is not in `FAMILIES`.

    Args:
        family: the model type.

    Raises:
        ValueError: names the supported families.
    """
    if family in FAMILIES:
        return
    known = ", ".join(sorted(FAMILIES))
    raise ConfigError(
        field="model.source",
        found=f"the model type is {family!r}, which is not supported",
        remedy=f"known families: {known}. Choose a model of one of these",
    )


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a model that families.yaml describes.

    Raises:
        ValueError: the family is unknown, or the model's logits or attention are not supported.
    """
    check_family(config.model_type)
    if getattr(config, "final_logit_softcapping", None):
        raise ConfigError(
            field="model.source",
            found="it caps its logits (final_logit_softcapping), which the loss here does not",
            remedy="choose another",
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise ConfigError(
            field="model.source",
            found="its tokens see later ones (use_bidirectional_attention), unlike the loss",
            remedy="choose another",
        )
    return FAMILIES[config.model_type]
