"""The layout of a model: its blocks, linears, shared inputs, coupled groups, shapes and tied weights, without its weights.

`ModelLayout.of` builds the model once on the meta device; everything else follows from what it reads there.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ray_surgeon.models.families import Family, family_of
from ray_surgeon.models.linears import as_linear, num_inputs, num_outputs


class NoPositions(nn.Module):
    """Stands for a learned position embedding in shards whose hidden states already contain it."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Return a scalar zero, which adds nothing."""
        return torch.zeros(())


@dataclass(frozen=True)
class BlockRange:
    """Blocks `first` to `last` (exclusive) of `num_blocks`."""

    first: int
    last: int
    num_blocks: int

    @property
    def is_first(self) -> bool:
        """Whether this range starts with the embedding."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Whether this range ends with the norm, the head and the loss."""
        return self.last == self.num_blocks


@dataclass(frozen=True)
class LinearShape:
    """Shape of one linear as the method sees it: [num_rows, num_columns], the bias being the last column.

    `shared_input` numbers the shared-input groups of the model: linears of one group read the same input.
    """

    name: str
    num_rows: int
    num_columns: int
    has_bias: bool
    block: int
    shared_input: int

    @property
    def size(self) -> int:
        """Parameters, bias included."""
        return self.num_rows * self.num_columns


@dataclass(frozen=True)
class Heads:
    """Attention heads of every block."""

    num_query: int
    num_kv: int
    head_dim: int

    @property
    def n_rep(self) -> int:
        """Query heads of one KV head."""
        return self.num_query // self.num_kv


@dataclass(frozen=True)
class GroupSet:
    """All coupled groups of one kind in one block (docs/method.md, section 8)."""

    kind: str  # ``ffn`` or ``attention``
    block: int  # its number
    consumer: str  # global name of the linear whose columns decide
    columns: Tensor  # [num_groups, width] columns of the consumer
    producers: tuple[tuple[str, Tensor], ...]  # (global name of a linear, [num_groups, rows] its rows that are pruned with each group)
    num_parameters: int  # of one group, biases included


@dataclass(frozen=True)
class ModelLayout:
    """What is known of a model before its weights are read."""

    config: PretrainedConfig  # of the model
    family: Family  # of the model
    parameters: Mapping[str, tuple[int, ...]]  # global name -> shape of every parameter and saved buffer, a tied head included
    linears: tuple[LinearShape, ...]  # every prunable linear, in order

    @staticmethod
    def of(config: PretrainedConfig, where: str = "the model") -> ModelLayout:
        """Read the layout off a model that is built on the meta device.

        Args:
            config: of the model.
            where: the model, for errors.

        Raises:
            ValueError: the family is unknown, or transformers cannot build a model of this configuration.
        """
        family = family_of(config)
        try:
            model = build_blocks(config, BlockRange(0, int(config.num_hidden_layers), int(config.num_hidden_layers)), torch.float32)
        except Exception as error:  # the code of any family may raise anything
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"model.source: config.json of {where} describes no model that can be built: {reason}; fetch it again"
            ) from error
        saved = set(model.state_dict())
        tensors = dict(model.named_parameters(remove_duplicate=False)) | {n: b for n, b in model.named_buffers() if n in saved}
        return ModelLayout(config, family, {name: tuple(t.shape) for name, t in tensors.items()}, tuple(_linears(config, family, model)))

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""
        return int(self.config.num_hidden_layers)

    @functools.cached_property
    def shapes(self) -> dict[str, LinearShape]:
        """Name -> shape of every prunable linear."""
        return {linear.name: linear for linear in self.linears}

    @functools.cached_property
    def linear_numbers(self) -> dict[str, int]:
        """Name -> number of every prunable linear, from 0, for seeds that do not depend on the shards."""
        return {linear.name: number for number, linear in enumerate(self.linears)}

    @property
    def tied(self) -> dict[str, str]:
        """{head weight: embedding weight} if the configuration ties them."""
        if not getattr(self.config, "tie_word_embeddings", False):
            return {}
        return {f"{self.family.head}.weight": f"{self.family.token_embedding}.weight"}

    @functools.cached_property
    def num_parameters(self) -> int:
        """Parameters of the whole model, tied ones once."""
        return sum(math.prod(shape) for name, shape in self.parameters.items() if name not in self.tied)

    @functools.cached_property
    def linear_size(self) -> int:
        """Parameters of all prunable linears, of which sparsity is a fraction."""
        return sum(linear.size for linear in self.linears)

    def block_of(self, name: str) -> int | None:
        """Return the number of the block that a parameter belongs to; None if it lies outside of the blocks."""
        inside = f"{self.family.base}.{self.family.blocks}."
        return int(name.removeprefix(inside).partition(".")[0]) if name.startswith(inside) else None

    def parameters_of(self, blocks: BlockRange) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of what a shard with these blocks holds, a tied head only where the embedding is not."""
        family = self.family
        first = tuple(f"{family.base}.{name}." for name in family.embeddings)
        found = {}
        for name, shape in self.parameters.items():
            if (block := self.block_of(name)) is not None:
                here = blocks.first <= block < blocks.last
            elif name.startswith(first):
                here = blocks.is_first
            else:
                here = blocks.is_last and not (blocks.is_first and name in self.tied)
            if here:
                found[name] = shape
        return found

    @functools.cached_property
    def heads(self) -> Heads:
        """Attention heads of every block."""
        config, heads = self.config, int(self.config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        return Heads(heads, kv_heads, int(getattr(config, "head_dim", None) or config.hidden_size // heads))

    @functools.cached_property
    def num_channels(self) -> int:
        """Channels of every feed-forward layer."""
        return int(getattr(self.config, self.family.width_field) or 4 * self.config.hidden_size)

    @functools.cached_property
    def group_sets(self) -> tuple[GroupSet, ...]:
        """Coupled groups of every block: first those of attention, then those of the feed-forward layer."""
        return tuple(groups for block in range(self.num_blocks) for groups in self._groups_of(block))

    def _groups_of(self, block: int) -> tuple[GroupSet, GroupSet]:
        prefix, attention, ffn = self.family.block_prefix(block), self.family.attention, self.family.ffn
        heads = self.heads
        queries = torch.arange(heads.num_query * heads.head_dim).view(heads.num_kv, heads.n_rep * heads.head_dim)
        keys = torch.arange(heads.num_kv * heads.head_dim).view(heads.num_kv, heads.head_dim)
        fused = attention.query == attention.key
        first_key = heads.num_query * heads.head_dim if fused else 0
        first_value = (heads.num_query + heads.num_kv) * heads.head_dim if fused else 0
        places = ((attention.query, queries), (attention.key, keys + first_key), (attention.value, keys + first_value))
        in_attention = tuple((prefix + name, rows) for name, rows in places)
        consumer = self.shapes[prefix + ffn.consumer]
        num_channels = consumer.num_columns - consumer.has_bias
        channels = torch.arange(num_channels)[:, None]
        in_ffn = tuple((prefix + name, channels + part * num_channels) for name, part, _ in ffn.producers)
        return (
            self._group_set("attention", block, prefix + attention.consumer, queries, in_attention),
            self._group_set("ffn", block, prefix + ffn.consumer, channels, in_ffn),
        )

    def _group_set(self, kind: str, block: int, consumer: str, columns: Tensor, producers: tuple[tuple[str, Tensor], ...]) -> GroupSet:
        size = columns.shape[1] * self.shapes[consumer].num_rows
        size += sum(rows.shape[1] * self.shapes[name].num_columns for name, rows in producers)
        return GroupSet(kind, block, consumer, columns, producers, size)

    def check_checkpoint(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Compare a checkpoint's tensors with what the configuration needs, before anything is loaded.

        Args:
            shapes: key -> shape of every tensor in the checkpoint.
            where: the checkpoint, for the error.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        missing, wrong = [], []
        for name, shape in self.parameters.items():
            key = self.checkpoint_key(name, shapes)
            if name in self.tied:
                continue
            if key is None:
                missing.append(name)
            elif shapes[key] != shape:
                wrong.append(f"{key} is {shapes[key]}, expected {shape}")
        if missing or wrong:
            details = [f"{len(missing)} missing ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''})"] if missing else []
            details += [f"{len(wrong)} of another shape ({'; '.join(wrong[:3])})"] if wrong else []
            raise ValueError(f"model.source: {where} does not fit its config.json: {'; '.join(details)}. Give a complete checkpoint")

    def checkpoint_key(self, name: str, keys: Mapping[str, object]) -> str | None:
        """Return the key under which a checkpoint stores a parameter, or None.

        Some checkpoints leave out the leading ``model.`` or ``transformer.``, and tied heads are usually stored once.
        """
        candidates = [name, self.tied.get(name, name)]
        candidates += [c.removeprefix("model.").removeprefix("transformer.") for c in candidates]
        return next((c for c in candidates if c in keys), None)


def _linears(config: PretrainedConfig, family: Family, model: nn.Module) -> list[LinearShape]:
    shapes = []
    for block in range(int(config.num_hidden_layers)):
        for number, group in enumerate(family.shared_inputs):
            for linear in group:
                name = family.block_prefix(block) + linear
                module = as_linear(model.get_submodule(name))
                bias = module.bias is not None
                shared_input = block * len(family.shared_inputs) + number
                shapes.append(LinearShape(name, num_outputs(module), num_inputs(module) + bias, bias, block, shared_input))
    return shapes


def build_blocks(config: PretrainedConfig, blocks: BlockRange, dtype: torch.dtype) -> nn.Module:
    """Build the causal LM on the meta device and keep only what the given blocks need.

    The family's own forward stays in charge of masks and positions: it sees a shorter block list, and at a cut the modules
    of the missing end are replaced by ones that do nothing.
    """
    family = family_of(config)
    with init_empty_weights(include_buffers=False):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    base = model.get_submodule(family.base)
    all_blocks = base.get_submodule(family.blocks)
    assert isinstance(all_blocks, nn.ModuleList)
    setattr(base, family.blocks, nn.ModuleList(list(all_blocks)[blocks.first : blocks.last]))
    if getattr(config, "layer_types", None):  # forward looks kinds of attention up by the place in the list it has
        base.config = copy.copy(config)
        base.config.layer_types = config.layer_types[blocks.first : blocks.last]  # type: ignore[union-attr]
    if not blocks.is_first:
        for name in family.embeddings:
            if getattr(base, name, None) is not None:
                setattr(base, name, NoPositions() if name in family.positions else nn.Identity())
    if not blocks.is_last:
        for name in (*family.final, family.head.rpartition(".")[2]):
            owner = model if name == family.head else base
            if getattr(owner, name, None) is not None:
                setattr(owner, name, nn.Identity())
    return model


def global_name(family: Family, local: str, first_block: int) -> str:
    """Return the name in the whole model of a parameter or module of a shard."""
    prefix = f"{family.base}.{family.blocks}."
    if not local.startswith(prefix):
        return local
    index, dot, rest = local.removeprefix(prefix).partition(".")
    return f"{prefix}{int(index) + first_block}{dot}{rest}"
