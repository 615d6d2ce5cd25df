"""Configurations of models whose blocks have lost whole channels and heads.

Configurations are the content of config.json, because an export may be of another family than its
source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PretrainedConfig

from ray_surgeon.models.groups import GroupSet
from ray_surgeon.models.layers import layers_of
from ray_surgeon.models.layout import ModelLayout

_OF_EACH_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Fields of configurations that say what each block is."""
Document = dict[str, Any]
"""Content of a config.json."""


@dataclass(frozen=True)
class BlockWidths:
    """What is left of one block that is not gone whole."""

    num_channels: int  # of the feed-forward layer, or of the shared experts
    num_kv_heads: int  # each with its query heads
    experts: tuple[int, ...] = ()  # channels of every expert that is left, if the block has some

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> BlockWidths:
        """Return what travelled as JSON."""
        return cls(**{**document, "experts": tuple(document["experts"])})

    @property
    def of_a_token(self) -> int:
        """Channels of one expert, or of the feed-forward layer of a block without experts."""
        return self.experts[0] if self.experts else self.num_channels


Widths = Sequence[BlockWidths]
"""Of every block."""


def in_llama_cpp(layout: ModelLayout, widths: Widths) -> dict[str, int]:
    """Return llama.cpp's words for the sizes of a mixture -> the sizes, the same in all blocks."""
    if not layout.is_mixture:
        return {}
    sizes = {"expert_count": len(widths[0].experts), "expert_used_count": layout.num_active_experts}
    return sizes | {"expert_feed_forward_length": widths[0].of_a_token}


def misread_of_mixtures(layout: ModelLayout, its: str, widths: Widths) -> Iterator[str]:
    """Yield what llama.cpp would misread of a mixture; `its` says whose the architecture is."""
    if len(set(widths)) > 1 or any(len(set(width.experts)) > 1 for width in widths):
        yield f"{its} has experts of one width; set pruning.allocation: uniform"
    if len(layout.expert_sets) < layout.num_blocks:
        yield f"{its} has experts in every block, the model has not"
    if not getattr(layout.config, "norm_topk_prob", True):
        yield f"{its} makes the weights of a token's experts sum to 1, the model does not"


def block_widths(layout: ModelLayout, rows_kept: Mapping[str, int]) -> list[BlockWidths]:
    """Return the widths of every block that is left after coupled groups were pruned.

    Args:
        layout: of the dense model.
        rows_kept: name of each linear -> rows that are left.
    """
    left = {(g.block, g.kind): _num_left(g, rows_kept) for g in layout.group_sets}
    attentions = layers_of(layout, ("attention_layers",))
    experts = {experts.block: experts.linears for experts in layout.expert_sets}
    widths = []
    for block in blocks_left(layout, rows_kept):
        num_channels = left.get((block, "ffn"), left.get((block, "shared_experts"), 0))
        num_kv_heads = left.get((block, "attention"), layout.heads.num_kv)
        inside = set(attentions[block].linears) - {attentions[block].consumer}
        if not any(rows_kept[name] for name in inside):
            num_kv_heads = 0
        present = [up for up, *_, down in experts.get(block, ()) if rows_kept[down]]
        widths.append(BlockWidths(num_channels, num_kv_heads, tuple(rows_kept[u] for u in present)))
    return widths


def blocks_left(layout: ModelLayout, rows_kept: Mapping[str, int]) -> list[int]:
    """Return the numbers of the blocks of which something is left; see `block_widths`."""
    blocks = {shape.block for shape in layout.linears if rows_kept[shape.name]}
    return sorted(blocks)


def shallower(layout: ModelLayout, document: Document, left: Sequence[int]) -> Document:
    """Return the config.json of a model that has lost whole blocks.

    Lists with an entry for every block are cut, and kinds of blocks that follow from their numbers
    are written out.

    Args:
        layout: of the dense model.
        document: its config.json.
        left: numbers of the blocks that stay.
    """
    count = layout.num_blocks
    if len(left) == count:
        return document
    config = layout.config
    field = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    cut = dict(document)
    # what follows from numbers of blocks unless it is said
    for name in _OF_EACH_BLOCK:
        if (values := getattr(config, name, None)) is not None:
            cut[name] = list(values)
    for name, values in cut.items():
        if isinstance(values, list) and len(values) == count:
            cut[name] = [values[block] for block in left]
    cut[field] = len(left)
    mixtures = {experts.block for experts in layout.expert_sets}
    without = [place for place, block in enumerate(left) if block not in mixtures]
    if "first_k_dense_replace" in cut:  # the blocks before are the ones without experts
        cut["first_k_dense_replace"] = len(without)
    if "mlp_only_layers" in cut or "decoder_sparse_step" in cut:
        cut |= {"mlp_only_layers": without, "decoder_sparse_step": 1}
    return cut


def left_out(layout: ModelLayout, widths: Mapping[int, BlockWidths]) -> list[str]:
    """Return names of tensors beside linears in layers of which nothing is left.

    Args:
        layout: of the dense model.
        widths: number of a block -> what is left of it.
    """
    sparse = layout.family.sparse
    mixtures = {experts.block for experts in layout.expert_sets}
    gone = set[str]()
    for block, width in widths.items():
        prefix = layout.family.block_prefix(block)
        if not width.num_kv_heads:
            gone.add(prefix + layout.family.attention.consumer.rpartition(".")[0])
        if block in mixtures and not (width.experts or width.num_channels):
            gone.add(prefix + sparse.layer)
    return [
        name
        for name in layout.parameters
        if name.startswith(tuple(f"{layer}." for layer in gone))
        and name.rpartition(".")[0] not in layout.shapes
    ]


def _num_left(groups: GroupSet, rows_kept: Mapping[str, int]) -> int:
    name, _ = groups.producers[-1]
    each = sum(rows.shape[1] for producer, rows in groups.producers if producer == name)
    return rows_kept[name] // each


def kv_heads_left(layout: ModelLayout, tensor_parallel: int, *, uniform: bool) -> tuple[int, ...]:
    """Return the numbers of KV heads that may be left in a block.

    Args:
        layout: of the dense model.
        tensor_parallel: devices over which an engine will split them; it splits query heads evenly,
            and KV heads evenly or copies them.
        uniform: whether a plain class must hold them in every block; else 0 is allowed, too.
    """
    heads = layout.heads
    possible = (k for k in range(heads.num_kv + 1) if not uniform or _holds_heads(layout, k))
    even = (k for k in possible if k * heads.n_rep % tensor_parallel == 0)
    return tuple(k for k in even if k % tensor_parallel == 0 or (k and tensor_parallel % k == 0))


def _holds_heads(layout: ModelLayout, num_kv_heads: int) -> bool:
    """Whether a plain class can hold so many KV heads, as it can those of the model.

    Some classes tie the number of heads to the hidden size. Llama does, but without biases a
    Mistral computes the same.
    """
    config = layout.config
    num_query_heads = num_kv_heads * layout.heads.n_rep
    if num_kv_heads in (0, layout.heads.num_kv):
        return num_kv_heads > 0
    if not layout.family.has_free_heads or not _fits_factors(config, num_query_heads):
        return False
    # with biases no Mistral computes the same as a Llama
    as_mistral = config.model_type == "llama" and not config.attention_bias and not config.mlp_bias
    return config.hidden_size % num_query_heads == 0 or layout.family.has_any_heads or as_mistral


def _fits_factors(config: PretrainedConfig, num_query_heads: int) -> bool:
    """Whether a Phi-3 has a factor for every pair: of hidden size over heads, not of head_dim."""
    parameters = config.rope_parameters if config.model_type == "phi3" else {}
    width = config.hidden_size // num_query_heads
    rotated = int(width * parameters.get("partial_rotary_factor", 1.0))
    lists = [parameters.get(name) for name in ("short_factor", "long_factor")]
    return all(len(factors) == rotated // 2 for factors in lists if factors is not None)


def uniform_document(layout: ModelLayout, document: Document, widths: Widths) -> Document:
    """Return the config.json of a model with the same widths in every block.

    Args:
        layout: of the dense model.
        document: its config.json.
        widths: of every block, the same in all that have experts and in all others.
    """
    config = layout.config
    heads = layout.heads
    sparse = layout.family.sparse
    num_kv_heads = widths[0].num_kv_heads
    narrow = dict(document)
    for width in widths:
        if not width.experts:
            narrow[layout.family.width_field] = width.num_channels
            continue
        names = [name for name in sparse.num_experts if name in document] or sparse.num_experts[:1]
        narrow |= dict.fromkeys(names, len(width.experts)) | {sparse.width: width.experts[0]}
        if sparse.shared_width is not None:
            narrow[sparse.shared_width] = width.num_channels
    if num_kv_heads == heads.num_kv:
        return narrow
    narrow |= _numbers_of_heads(layout, num_kv_heads) | {"head_dim": heads.head_dim}
    if config.model_type == "llama" and config.hidden_size % narrow["num_attention_heads"]:
        return _as_mistral(config, narrow)
    return narrow


def _numbers_of_heads(layout: ModelLayout, num_kv: int) -> Document:
    return {"num_attention_heads": num_kv * layout.heads.n_rep, "num_key_value_heads": num_kv}


def _as_mistral(config: PretrainedConfig, document: Document) -> Document:
    """Return the config.json of a Mistral that computes what a Llama without biases does."""
    mistral = document | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    # of a Mistral from before version 5 it doubts the tokenizer
    mistral |= {"sliding_window": None, "transformers_version": transformers.__version__}
    for name in ("attention_bias", "mlp_bias", "pretraining_tp"):
        mistral.pop(name, None)
    # a Mistral's default is another one
    mistral.setdefault("max_position_embeddings", config.max_position_embeddings)
    return mistral


def check_uniform(layout: ModelLayout, kinds: Sequence[str]) -> None:
    """Refuse groups whose removal no plain class can hold, although it is the same in every block.

    Raises:
        ValueError: says why.
    """
    sparse = layout.family.sparse
    changes_width = not {"expert_channels", "shared_experts"}.isdisjoint(kinds)
    if sparse.shared and sparse.shared_width is None and changes_width:
        problem = f"in {layout.config.model_type} shared experts are n_shared_experts others wide"
        remedy = "export per_block, or prune experts"
        raise ValueError(f"output.exports: {problem}, so neither narrows alone; {remedy}")


def per_block_document(layout: ModelLayout, document: Document, widths: Widths) -> Document:
    """Return the config.json of a model whose widths differ, for the shipped classes.

    Args:
        layout: of the dense model.
        document: its config.json.
        widths: of every block.
    """
    layers = {}
    for block, width in enumerate(widths):
        layer = {layout.family.width_field: width.num_channels}
        layer |= _numbers_of_heads(layout, width.num_kv_heads)
        experts = {"expert_widths": list(width.experts)} if layout.num_experts else {}
        layers[str(block)] = layer | experts
    classes = {"AutoConfig": "PrunedConfig", "AutoModel": "PrunedModel"}
    classes["AutoModelForCausalLM"] = "PrunedForCausalLM"
    kind = {"model_type": f"pruned_{layout.config.model_type}"}
    names = {auto: f"modeling_pruned.{name}" for auto, name in classes.items()}
    code = {"architectures": ["PrunedForCausalLM"], "auto_map": names}
    sizes = {"head_dim": layout.heads.head_dim, "per_layer_config": layers}
    return document | kind | code | sizes
