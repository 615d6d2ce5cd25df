"""Families of models: where blocks are, what shares an input, what is coupled.

They are data, in families.yaml.

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

from ray_surgeon.models.attention import IN_PRODUCTS
from ray_surgeon.models.experts import Coupling, ExpertTensor, SparseLayer

_ATTENTION = Coupling("self_attn.o_proj", tuple(f"self_attn.{part}_proj" for part in "qkv"))
_FFN = Coupling("mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj"))
_NO_EXPERTS = SparseLayer()


@dataclass(frozen=True)
class LlamaCpp:
    """How llama.cpp calls a family, and what it wants otherwise than transformers has it."""

    name: str
    activation: str  # of its feed-forward layers, as transformers calls it
    # whether neighbouring entries of a head rotate together, not those of its halves
    pairs_rotary: bool = False
    has_free_heads: bool = True  # whether heads may fill less than the hidden size there
    # whether norms multiply by 1 + weight here, and by the weight there
    adds_one_to_norms: bool = False
    biases: tuple[str, ...] = ()  # fields of config.json with biases that it has, too
    # kinds of attention that its blocks have in turns, as our files say nothing else
    attention_kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One family; what it does not say is as in Llama."""

    base: str = "model"  # path of the module whose forward loops over the blocks
    blocks: str = "layers"  # name of the block list below `base`
    # below `base`, only for the first shard; a tied head shares the weight of the first
    embeddings: tuple[str, ...] = ("embed_tokens",)
    positions: tuple[str, ...] = ()  # of these, the ones whose output is added to hidden states
    final: tuple[str, ...] = ("norm",)  # below `base`, only for the last shard
    head: str = "lm_head"  # name of the output linear
    # what a KV group with its query heads is: rows of queries, keys and values
    attention: Coupling = _ATTENTION
    in_attention: tuple[str, ...] = ()  # its further linears, each with an input of its own
    prunes_heads: bool = True  # whether heads can be pruned
    # what a channel of the feed-forward layer is
    ffn: Coupling = _FFN
    sparse: SparseLayer = _NO_EXPERTS  # what a mixture of experts is
    stored: tuple[tuple[str, str], ...] = ()  # (part of a name here, the same in checkpoints)
    # how the names of tensors end that are float32 whatever the model's dtype is
    float32: tuple[str, ...] = ("e_score_correction_bias",)
    width_field: str = "intermediate_size"  # the feed-forward width in the configuration
    has_free_heads: bool = True  # whether heads may fill less than the hidden size
    has_any_heads: bool = True  # whether their number need not divide the hidden size
    norms_queries: bool = False  # whether queries and keys are normalised over a head's dimensions
    norms_outputs: bool = False  # whether what a layer adds to the stream passes a norm before
    transposed: bool = False  # whether linears are [inputs, outputs], GPT-2's Conv1D
    per_head: tuple[str, ...] = ()  # tensors of a block with one entry for every query head
    runs_attention: str = IN_PRODUCTS  # how transformers is to run attention
    has_free_heads_in_vllm: bool = True  # likewise, in vLLM's own class of the family
    llama_cpp: LlamaCpp | None = None  # None if llama.cpp does not know the family

    def couplings_in(self, names: Collection[str]) -> list[tuple[str, str, Coupling]]:
        """Return the coupled linears of a block that has modules of these names, and others.

        Each comes with the kind of groups that they have, and with what its names begin with.
        """
        sparse = self.sparse
        kinds = {name: "shared_experts" for name in names if name == sparse.shared}
        kinds |= {n: "expert_channels" for n in names if n.rpartition(".")[0] == sparse.experts}
        inside = [(kind, f"{name}.", sparse.linears) for name, kind in kinds.items()]
        return [("attention", "", self.attention), ("ffn", "", self.ffn), *inside]

    def shared_inputs_in(self, names: Collection[str]) -> Iterator[tuple[str, ...]]:
        """Yield linears of a block that read one input, and others that it has not."""
        for kind, inside, coupling in self.couplings_in(names):
            further = self.in_attention if kind == "attention" else ()
            for group in (coupling.producers, *((name,) for name in further), (coupling.consumer,)):
                yield tuple(inside + name for name in group)

    def part_of_stack(self, name: str) -> ExpertTensor | None:
        """Return what a tensor of an expert is if checkpoints stack experts, else None."""
        return self.sparse.tensor_of(name) if self.sparse.stacked else None

    def stored_in(self, name: str) -> str:
        """Return the name of the tensor of a checkpoint in which a tensor is."""
        part = self.part_of_stack(name)
        return name if part is None else part.whole

    def stored_name(self, name: str) -> str:
        """Return what checkpoints call a tensor."""
        if f".{self.sparse.layer}." in name:
            for name_in_model, name_in_files in self.stored:
                name = name.replace(name_in_model, name_in_files)
        return name

    def name_of_stored(self, key: str) -> str:
        """Return what the model calls a tensor of a checkpoint; `stored_name` is the way back."""
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
_OTHER_LOSS = {"final_logit_softcapping": "it caps its logits ({}), which the loss here does not"}
_OTHER_LOSS |= {"use_bidirectional_attention": "its tokens see later ones ({}), unlike the loss"}
"""Field of config.json -> what is wrong with a model that has it."""


def check_depth(document: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration of so many blocks that building them would not end.

    Raises:
        ValueError: names the field.
    """
    for name in {"num_hidden_layers", "n_layer"} & document.keys():
        if isinstance(value := document[name], int) and value > _MOST_BLOCKS:
            problem = f"{name} in config.json of {where} is {value}, expected 1 to {_MOST_BLOCKS}"
            raise ValueError(f"model.source: {problem}; fetch it again")


def check_not_quantised(document: Mapping[str, Any]) -> None:
    """Refuse quantised weights, of which the scales would not be read.

    MXFP4 of a family that keeps experts together is known.

    Raises:
        ValueError: names the way they are quantised.
    """
    quantization = document.get("quantization_config")
    family = FAMILIES.get(str(document.get("model_type")))
    way = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if way is not None and not (way == "mxfp4" and family is not None and family.sparse.stacked):
        problem = f"the weights are quantised ({str(way)[:40]})"
        remedy = "give them in bfloat16 or float32, and quantise the pruned model: output.quantize"
        raise ValueError(f"model.source: {problem}; {remedy}")


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
        remedy = "Choose a model of one of these"
        if inside in FAMILIES:
            remedy = f"Save its text part, a {inside}, as a model of its own"
        known = ", ".join(sorted(FAMILIES))
        problem = f"the model type is {family!r}, which is not supported; known families: {known}"
        raise ValueError(f"model.source: {problem}. {remedy}")


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a model.

    Raises:
        ValueError: the family is unknown, and names the known ones; or its head does more than
            multiply.
    """
    check_family(config.model_type)
    for name, problem in _OTHER_LOSS.items():
        if getattr(config, name, None):
            raise ValueError(f"model.source: {problem.format(name)}; choose another")
    return FAMILIES[config.model_type]
