"""Tiny copies of configurations: few blocks, few heads and channels, a small vocabulary.

A copy computes by the same code as the model itself, so what is proved on it holds for the model.
The dimensions of heads are those of the model, because rotary embeddings depend on them in ways
that differ from family to family.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from ray_surgeon.models.build import empty_model

Document = dict[str, Any]
"""Content of a config.json."""

_VOCABULARY = 96
_MOST_HEADS = 4
"""Query heads; a copy has at most half as many KV heads, so that one can be pruned."""
_MOST_EXPERTS = 8
_WINDOW = 8
"""Tokens that sliding attention sees, fewer than the tokens of a proof."""
_MOST_ENTRIES = 30_000_000
"""Most parameters of a copy, 240 MB in float64: two copies exist at a time."""

_WIDTHS = re.compile(r"intermediate_size|ffn_dim|ffn_hidden_size|n_inner")
"""Fields of widths of feed-forward layers and experts."""
_SMALLEST_WIDTH = 40
"""Larger than any number of heads, and every further width is larger by 8."""
_NUMBERS_OF_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)
_NUMBERS_OF_TWO = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k",
    "moe_topk",
    "moe_k",
    "n_group",
    "num_expert_group",
    "n_shared_experts",
    "num_shared_experts",
    "num_memory_blocks",
)
"""Numeric fields that are at most two in a copy."""
_RANKS = (
    "q_lora_rank",
    "kv_lora_rank",
    "mamba_dt_rank",
    "time_step_rank",
    "adapter_rank",
)
_LARGEST_RANK = 32
_LIKE_HIDDEN = (
    "mamba_n_heads",
    "mamba_num_heads",
    "mamba_d_ssm",
    "lru_width",
    "conv_dim",
    "conv_dim_out",
    "attention_hidden_size",
    "word_embed_proj_dim",
    "hidden_size_per_layer_input",
)
"""Fields of sizes that must shrink by the same factor as the hidden size."""
_LINEAR_HEADS = ("linear_num_key_heads", "linear_num_value_heads")
_OF_DEPTH = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
"""Fields of numbers of further blocks, for predicting several tokens, which are not loaded."""


class NoTinyCopyError(ValueError):
    """No tiny copy of a configuration can be built; the message says why."""


@dataclass(frozen=True)
class TinyCopy:
    """A tiny copy of a model's configuration."""

    config: PretrainedConfig
    blocks: tuple[int, ...]  # numbers in the model of the blocks that the copy has


def tiny_copy(config: PretrainedConfig) -> TinyCopy:
    """Return a tiny copy that has a block of every kind.

    Two blocks are of one kind if their modules have the same names, classes, shapes and settings.

    Args:
        config: configuration of a causal language model.

    Raises:
        NoTinyCopyError: transformers builds none of the copies that are tried.
    """
    reasons = []
    for narrow in (_narrow, _less_narrow):
        try:
            return _shortened(narrow(config))
        except Exception as error:  # a family's code may raise anything
            reason = " ".join(str(error).split())[:300]
            reasons.append(reason or type(error).__name__)
    raise NoTinyCopyError("; ".join(dict.fromkeys(reasons)))


def field_of(config: PretrainedConfig, name: str) -> str:
    """Return the name that a family has for a field, e.g. ``n_embd`` for ``hidden_size``."""
    return str(config.attribute_map.get(name, name))


def rebuilt(config: PretrainedConfig, document: Mapping[str, Any]) -> PretrainedConfig:
    """Return a configuration of the same class with the given content."""
    made: PretrainedConfig = type(config).from_dict(copy.deepcopy(dict(document)))
    return made


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of a model's blocks: the longest list of modules.

    Lists inside of other lists are skipped.

    Raises:
        NoTinyCopyError: there is no list.
    """
    found: tuple[str, nn.ModuleList] | None = None
    for name, modules in _outer_lists(model, ""):
        if found is None or len(modules) > len(found[1]):
            found = (name, modules)
    if found is None:
        raise NoTinyCopyError("it has no list of blocks")
    return found


def _outer_lists(module: nn.Module, name: str) -> Iterator[tuple[str, nn.ModuleList]]:
    for child_name, child in module.named_children():
        full_name = f"{name}.{child_name}".lstrip(".")
        if isinstance(child, nn.ModuleList):
            yield full_name, child
        else:
            yield from _outer_lists(child, full_name)


def width_fields(config: PretrainedConfig) -> list[str]:
    """Return the fields of a configuration that hold widths of feed-forward layers."""
    fields = []
    for name, width in config.to_dict().items():
        if _WIDTHS.search(name) and _is_number(width):
            fields.append(name)
    return fields


def _narrow(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy with all blocks, whose sizes are tiny."""
    document = _with_few_experts(config)
    heads_field = field_of(config, "num_attention_heads")
    hidden_field = field_of(config, "hidden_size")
    num_query = int(document[heads_field])
    hidden = int(document[hidden_field])
    head_dim = int(document.get("head_dim") or hidden // num_query)
    kv_field = field_of(config, "num_key_value_heads")
    num_kv = int(document.get(kv_field) or num_query)
    num_tiny_kv = min(num_kv, _MOST_HEADS // 2)
    num_tiny = num_tiny_kv * min(num_query // num_kv, 2)
    document[heads_field] = num_tiny
    if document.get(kv_field) is not None:
        document[kv_field] = num_tiny_kv
    document[hidden_field] = min(hidden, num_tiny * head_dim)
    for name in _LIKE_HIDDEN:
        size = document.get(name)
        if isinstance(size, int):
            document[name] = _in_proportion(size, int(document[hidden_field]), hidden)
    num_keys, num_values = (document.get(name) for name in _LINEAR_HEADS)
    if num_keys and num_values:
        few = min(num_keys, 2)
        document[_LINEAR_HEADS[0]] = few
        document[_LINEAR_HEADS[1]] = few * (num_values // num_keys)
    for name in _RANKS:
        if isinstance(document.get(name), int):
            document[name] = min(document[name], _LARGEST_RANK)
    return rebuilt(config, document)


def _less_narrow(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy with all blocks that keeps the heads and the hidden size."""
    return rebuilt(config, _with_few_experts(config))


def _with_few_experts(config: PretrainedConfig) -> Document:
    """Return a configuration with few experts and channels, and a small vocabulary."""
    document: Document = config.to_dict()
    document.pop("quantization_config", None)
    vocabulary = field_of(config, "vocab_size")
    document[vocabulary] = min(int(document[vocabulary]), _VOCABULARY)
    limits = {
        **dict.fromkeys(_NUMBERS_OF_EXPERTS, _MOST_EXPERTS),
        **dict.fromkeys(_NUMBERS_OF_TWO, 2),
        **dict.fromkeys(_OF_DEPTH, 0),
        "sliding_window": _WINDOW,
    }
    for name, limit in limits.items():
        name = field_of(config, name)
        if _is_number(document.get(name)):
            document[name] = min(document[name], limit)
    # a group of two experts is chosen by both, so only one of two groups may be chosen
    if document.get("topk_group"):
        document["topk_group"] = 1
    for name, value in document.items():
        if name.endswith("token_id"):
            document[name] = _in_vocabulary(value, document[vocabulary])
    _narrow_widths(document)
    return document


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _narrow_widths(document: Document) -> None:
    """Make the widths of feed-forward layers small; different widths stay different."""
    taken = {value for value in document.values() if _is_number(value)}
    tiny_of: dict[int, int] = {}
    for name, width in document.items():
        if not (_WIDTHS.search(name) and _is_number(width)):
            continue
        if width not in tiny_of:
            tiny = _SMALLEST_WIDTH
            while tiny in taken or tiny in tiny_of.values():
                tiny += 8
            tiny_of[width] = min(width, tiny)
        document[name] = tiny_of[width]


def _in_vocabulary(tokens: Any, size: int) -> Any:
    """Return special tokens, with 0 in place of those that are not in a small vocabulary."""
    if isinstance(tokens, list):
        return [_in_vocabulary(token, size) for token in tokens]
    if _is_number(tokens) and tokens >= size:
        return 0
    return tokens


def _in_proportion(size: int, tiny_hidden: int, hidden: int) -> int:
    """Return a size that shrinks with the hidden size.

    Raises:
        ValueError: the result is not a whole number.
    """
    tiny, rest = divmod(size * tiny_hidden, hidden)
    if rest:
        raise ValueError(f"{size} does not shrink with {hidden} to {tiny_hidden}")
    return tiny


def _shortened(config: PretrainedConfig) -> TinyCopy:
    """Return a copy that has at least two blocks, and one of every kind.

    Raises:
        NoTinyCopyError: the copy is still too large.
    """
    kinds = _kinds_of_blocks(config)
    every = tuple(range(len(kinds)))
    first_of_kind: dict[object, int] = {}
    for block, kind in enumerate(kinds):
        first_of_kind.setdefault(kind, block)
    firsts = set(first_of_kind.values())
    for block in every:
        if len(firsts) < 2:
            firsts.add(block)
    chosen = tuple(sorted(firsts))
    # most families list the kinds of their blocks; others compute them from the blocks' numbers
    for blocks in (chosen, every[: chosen[-1] + 1]):
        shorter = _with_blocks(config, blocks)
        if shorter is not None and _has_kinds(
            shorter, [kinds[block] for block in blocks]
        ):
            return _checked(shorter, blocks)
    return _checked(config, every)


def _has_kinds(config: PretrainedConfig, kinds: Sequence[object]) -> bool:
    """Return whether a model of a configuration has blocks of these kinds, in this order."""
    try:
        return _kinds_of_blocks(config) == list(kinds)
    except Exception:  # a family's code may raise anything
        return False


def _with_blocks(
    config: PretrainedConfig, blocks: Sequence[int]
) -> PretrainedConfig | None:
    """Return a configuration with the given blocks only; lists of a kind per block are cut.

    None if its class refuses the shorter lists.
    """
    document = config.to_dict()
    name = field_of(config, "num_hidden_layers")
    num_blocks = int(config.num_hidden_layers)
    for key, values in document.items():
        if isinstance(values, list | tuple) and len(values) == num_blocks:
            document[key] = [values[block] for block in blocks]
    if name in document:
        document[name] = len(blocks)
    try:
        return rebuilt(config, document)
    except Exception:  # a family's code may raise anything
        return None


def _checked(config: PretrainedConfig, blocks: tuple[int, ...]) -> TinyCopy:
    num_entries = _num_entries(empty_model(config).parameters())
    if num_entries > _MOST_ENTRIES:
        raise NoTinyCopyError(
            f"the smallest copy has {num_entries} parameters, expected at most {_MOST_ENTRIES}"
        )
    return TinyCopy(config, blocks)


def _num_entries(parameters: Iterable[nn.Parameter]) -> int:
    return sum(math.prod(parameter.shape) for parameter in parameters)


def _kinds_of_blocks(config: PretrainedConfig) -> list[object]:
    """Return a description of every block; blocks of one kind have equal descriptions."""
    _, blocks = block_list(empty_model(config))
    return [_description(block) for block in blocks]


def _description(block: nn.Module) -> object:
    parts: list[object] = []
    for name, module in block.named_modules():
        settings = {}
        for key, value in vars(module).items():
            is_number_of_block = "idx" in key or "layer_id" in key
            is_simple = value is None or isinstance(value, str | bool | int)
            if is_simple and not is_number_of_block:
                settings[key] = value
        shapes = {}
        for key, parameter in module.named_parameters(recurse=False):
            shapes[key] = tuple(parameter.shape)
        parts.append((name, type(module), tuple(settings.items()), tuple(shapes.items())))
    return tuple(parts)
