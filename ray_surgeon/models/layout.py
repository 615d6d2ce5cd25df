"""The layout of a model: blocks, linears, coupled groups and shapes, without weights.

`ModelLayout.of` builds the model once on the meta device; everything else is derived from it.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ray_surgeon.errors import ConfigError
from ray_surgeon.maths.masks import Mask, StructuredMask
from ray_surgeon.models import build
from ray_surgeon.models.experts import Coupling
from ray_surgeon.models.families import Family, family_of

GROUP_KINDS = ("attention", "ffn", "shared_experts", "expert_channels", "experts")
"""Kinds of coupled groups.

They are, in this order: KV groups, channels of feed-forward layers, channels of shared experts,
channels of experts, and experts.
"""
FEED_FORWARD_OF_ALL = frozenset({"ffn", "shared_experts"})
"""Kinds of groups in the feed-forward layers that every token passes."""
Roles: TypeAlias = frozenset[str] | None
"""Roles of linears, see `LinearShape`; None means all roles."""


@dataclass(frozen=True)
class LinearShape:
    """Shape of one linear as the method sees it; its bias is the last column.

    `shared_input` is the number of the linear's shared-input group in the model: the linears of one
    group read the same input.
    """

    name: str
    num_rows: int
    num_columns: int
    has_bias: bool
    block: int
    shared_input: int
    # name in the block, with * in place of an expert's number, e.g. ``mlp.experts.*.down_proj``
    role: str

    @property
    def sees_all_tokens(self) -> bool:
        """Whether every token passes this linear; False for the experts of a mixture."""
        return "*" not in self.role

    @property
    def size(self) -> int:
        """Number of parameters, including the bias."""
        return self.num_rows * self.num_columns


@dataclass(frozen=True)
class Heads:
    """Attention heads of every block."""

    num_query: int
    num_kv: int
    n_rep: int  # query heads per KV head
    head_dim: int
    # dimension of a query and of a key; differs from `head_dim` in multi-head latent attention
    query_dim: int
    value_dim: int  # dimension of a value


@dataclass(frozen=True)
class ExpertSet:
    """The experts of one block and their linears."""

    block: int  # number of the block
    name: str  # global name of the experts, e.g. ``model.layers.3.mlp.experts``
    # for each expert, the global names of its linears, the consumer last
    linears: tuple[tuple[str, ...], ...]

    def removed(self, masks: Mapping[str, Mask]) -> Tensor:
        """Return which experts are removed, [num_experts] bool.

        An expert is removed if the mask of its last linear keeps no rows.
        """
        removed = []
        for linears in self.linears:
            mask = masks[linears[-1]]
            assert isinstance(mask, StructuredMask)
            removed.append(not mask.rows.any())
        return torch.tensor(removed)


@dataclass(frozen=True)
class GroupSet:
    """All coupled groups of one kind in one block (docs/method.md, section 8)."""

    kind: str  # one of `GROUP_KINDS`
    block: int  # its number
    consumer: str  # global name of the linear whose columns decide
    columns: Tensor  # [num_groups, width] columns of the consumer
    # (global name of a linear, [num_groups, rows] its rows that are pruned with each group)
    producers: tuple[tuple[str, Tensor], ...]
    num_parameters: int  # of one group, biases included


Linears = tuple[LinearShape, ...]
Wholes = Mapping[str, tuple[str, int, int]]
"""Kind of a structure that contains groups -> (kind of the groups in it, number of structures per
block, number of structures that a block needs).
"""
Shapes = Mapping[str, tuple[int, ...]]


class ModelLayout:
    """Everything that is known about a model before its weights are read.

    Attributes:
        config: configuration of the model.
        family: family of the model.
        parameters: global name -> shape of every parameter and saved buffer, including a tied head.
        linears: every prunable linear, in order.
        num_blocks: number of decoder blocks.
        shapes: name -> shape of every prunable linear.
        linear_numbers: name -> number of every prunable linear, from 0. Seeds are made from these
            numbers, so that they do not depend on the shards.
        tied: {head weight: embedding weight} if the configuration ties them, else empty.
        trained: names of the parameters; the other names in `parameters` are buffers.
        num_parameters: number of parameters of the whole model; tied ones count once.
        linear_size: parameters of all prunable linears; sparsity is a fraction of these.
        heads: attention heads of every block.
        expert_sets: the experts of every block that has experts.
        num_experts: largest number of experts in a block, 0 without experts.
        num_active_experts: experts that each token is routed to in such a block.
        is_mixture: whether the model has experts.
        wholes: structures that may be removed with all groups in them; see `Wholes`.
        residual_multiplier: factor of what a layer adds to the stream.
        logits_divisor: divisor of the head's outputs.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        family: Family,
        parameters: Shapes,
        linears: Linears,
        buffers: frozenset[str],
    ) -> None:
        self.config = config
        self.family = family
        self.parameters = parameters
        self.linears = linears
        self.num_blocks = int(config.num_hidden_layers)
        self.shapes = {linear.name: linear for linear in linears}
        self.linear_numbers = {name: number for number, name in enumerate(self.shapes)}
        self.tied: dict[str, str] = {}
        if getattr(config, "tie_word_embeddings", False):
            embedding = f"{family.base}.{family.embeddings[0]}"
            self.tied[f"{family.head}.weight"] = f"{embedding}.weight"
        self.trained = [name for name in parameters if name not in buffers]
        self.num_parameters = 0
        for name in self.trained:
            if name not in self.tied:
                self.num_parameters += math.prod(parameters[name])
        self.linear_size = sum(linear.size for linear in linears)
        self.heads = _heads(config)
        self.residual_multiplier = 1.0
        self.logits_divisor = 1.0
        if family.has_multipliers:
            self.residual_multiplier = float(config.residual_multiplier)
            self.logits_divisor = float(config.logits_scaling)
        self.expert_sets = tuple(_expert_sets(linears))
        counts = [len(experts.linears) for experts in self.expert_sets]
        self.num_experts = max(counts, default=0)
        self.is_mixture = self.num_experts > 0
        self.num_active_experts = 0
        self.wholes: Wholes = {}
        if self.is_mixture:
            num_active = getattr(config, "num_experts_per_tok", None)
            self.num_active_experts = int(num_active or 0)
            # a router with groups of experts takes the best two of each group
            has_groups = getattr(config, family.sparse.num_groups or "", None)
            least = 2 if has_groups else 1
            num_needed = max(self.num_active_experts, least)
            self.wholes = {"experts": ("expert_channels", self.num_experts, num_needed)}

    @staticmethod
    def of(
        config: PretrainedConfig, where: str = "the model", family: Family | None = None
    ) -> ModelLayout:
        """Return the layout of a model, which is built on the meta device to read it.

        Args:
            config: configuration of the model.
            where: how errors refer to the model.
            family: its family; if not given, the one that describes its type.

        Raises:
            ValueError: the family is unknown, or transformers cannot build a model of this
                configuration.
        """
        if family is None:
            family = family_of(config)
        num_blocks = int(config.num_hidden_layers)
        blocks = build.BlockRange(0, num_blocks, num_blocks)
        try:
            model = build.build_blocks(config, family, blocks, torch.float32)
        except Exception as error:  # a family's code may raise anything
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            raise ConfigError(
                field="model.source",
                found=f"config.json of {where} describes no model that can be built: {reason}",
                remedy="fetch it again",
            ) from error
        state = model.state_dict()
        return ModelLayout(
            config=config,
            family=family,
            parameters={name: tuple(tensor.shape) for name, tensor in state.items()},
            linears=tuple(_linears(family, model)),
            buffers=frozenset(name for name, _ in model.named_buffers()),
        )

    def block_of(self, name: str) -> int | None:
        """Return the number of the block that a parameter belongs to, or None if it is in none."""
        prefix = f"{self.family.base}.{self.family.blocks}."
        if not name.startswith(prefix):
            return None
        number, _, _ = name.removeprefix(prefix).partition(".")
        return int(number)

    def renumbered(self, name: str, blocks: Sequence[int]) -> str:
        """Return the name that a tensor has in a model with only these blocks."""
        block = self.block_of(name)
        if block is None:
            return name
        old_prefix = self.family.block_prefix(block)
        new_prefix = self.family.block_prefix(blocks.index(block))
        return new_prefix + name.removeprefix(old_prefix)

    def parameters_of(self, blocks: build.BlockRange) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of the parameters of a shard with these blocks.

        A tied head is included only in a shard that does not have the embedding.
        """
        shapes = {}
        for name, shape in self.parameters.items():
            if self._is_in_shard(name, blocks):
                shapes[name] = shape
        return shapes

    def _is_in_shard(self, name: str, blocks: build.BlockRange) -> bool:
        block = self.block_of(name)
        if block is not None:
            return block in blocks
        base = self.family.base
        if name.startswith(tuple(f"{base}.{part}." for part in self.family.embeddings)):
            return blocks.is_first
        if blocks.is_first and name in self.tied:
            return False
        return blocks.is_last

    @functools.cached_property
    def num_channels(self) -> int:
        """Number of channels of a feed-forward layer."""
        for shape in self.linears:
            if shape.role == self.family.ffn.consumer:
                return shape.num_columns - shape.has_bias
        width = getattr(self.config, self.family.width_field)
        return int(width or 4 * self.config.hidden_size)

    @property
    def activation(self) -> str:
        """Name of the feed-forward layers' activation in transformers."""
        for field in ("hidden_act", "hidden_activation", "activation_function"):
            value = getattr(self.config, field, None)
            if value is not None:
                return str(value)
        assert self.family.activation, f"{self.config.model_type} names no activation"
        return self.family.activation

    @functools.cached_property
    def mixers(self) -> dict[int, str]:
        """Block -> name of the module that it has in place of an attention."""
        found = dict[int, str]()
        for name in self.parameters:
            block = self.block_of(name)
            if block is None:
                continue
            inside = name.removeprefix(self.family.block_prefix(block))
            mixer, _, _ = inside.partition(".")
            if mixer in self.family.mixers:
                found[block] = mixer
        return found

    @functools.cached_property
    def left_whole(self) -> dict[str, list[int]]:
        """Name of a module in place of an attention -> the blocks that have it."""
        blocks_of = dict[str, list[int]]()
        for block, mixer in sorted(self.mixers.items()):
            blocks_of.setdefault(mixer, []).append(block)
        return blocks_of

    @functools.cached_property
    def num_attentions(self) -> int:
        """Number of blocks with an attention."""
        consumer = self.family.attention.consumer
        return sum(shape.role == consumer for shape in self.linears)

    @functools.cached_property
    def group_sets(self) -> tuple[GroupSet, ...]:
        """Coupled groups of every block: first those of attention, then of feed-forward layers."""
        sets: list[GroupSet] = []
        for block in range(self.num_blocks):
            sets.extend(groups_of(self, block))
        return tuple(sets)

    def part_of_tokens(self, shape: LinearShape) -> float:
        """Return the fraction of all tokens that pass a linear, with balanced experts assumed."""
        if shape.sees_all_tokens:
            return 1.0
        return self.num_active_experts / self.num_experts

    @functools.cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of groups in this model, in the order of `GROUP_KINDS`."""
        present = set(self.wholes)
        present.update(groups.kind for groups in self.group_sets)
        return tuple(kind for kind in GROUP_KINDS if kind in present)


def _heads(config: PretrainedConfig) -> Heads:
    num_query = int(config.num_attention_heads)
    num_kv = int(getattr(config, "num_key_value_heads", None) or num_query)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // num_query)
    return Heads(
        num_query=num_query,
        num_kv=num_kv,
        n_rep=num_query // num_kv,
        head_dim=head_dim,
        query_dim=int(getattr(config, "qk_head_dim", None) or head_dim),
        value_dim=int(getattr(config, "v_head_dim", None) or head_dim),
    )


def _expert_sets(linears: Linears) -> Iterator[ExpertSet]:
    of_experts = [shape for shape in linears if not shape.sees_all_tokens]
    for block, shapes in itertools.groupby(of_experts, key=lambda shape: shape.block):
        experts: list[tuple[str, ...]] = []
        names = [shape.name for shape in shapes]
        for _, expert in itertools.groupby(
            names, key=lambda name: name.rpartition(".")[0]
        ):
            experts.append(tuple(expert))
        parent = names[0].rsplit(".", 2)[0]
        yield ExpertSet(block, parent, tuple(experts))


def _linears(family: Family, model: nn.Module) -> Iterator[LinearShape]:
    numbers: dict[Any, int] = {}
    blocks = model.get_submodule(f"{family.base}.{family.blocks}")
    for block, module in enumerate(blocks.children()):
        modules = dict(module.named_modules())
        for group in family.shared_inputs_in(modules):
            for name in group:
                if name not in modules:
                    continue
                linear = build.as_linear(modules[name])
                num_rows, num_columns = build.matrix(linear).shape
                has_bias = linear.bias is not None
                if has_bias:
                    num_columns += 1
                # a bias is one more input, so linears with and without a bias share no A
                shared_input = numbers.setdefault((block, group, has_bias), len(numbers))
                yield LinearShape(
                    name=family.block_prefix(block) + name,
                    num_rows=num_rows,
                    num_columns=num_columns,
                    has_bias=has_bias,
                    block=block,
                    shared_input=shared_input,
                    role=re.sub(r"\.\d+\.", ".*.", name),
                )


def groups_of(layout: ModelLayout, block: int) -> Iterator[GroupSet]:
    """Yield the coupled groups of a block."""
    prefix = layout.family.block_prefix(block)
    modules = dict[str, None]()  # an ordered set
    for shape in layout.linears:
        if shape.block == block:
            module, _, _ = shape.name.removeprefix(prefix).rpartition(".")
            modules[module] = None

    for kind, inside, coupling in layout.family.couplings_in(modules):
        consumer = layout.shapes.get(prefix + inside + coupling.consumer)
        if consumer is None:
            continue
        if kind == "attention" and not layout.family.prunes_heads:
            continue
        if kind == "attention":
            columns, *rows = _rows_of_heads(
                layout.heads,
                is_fused=coupling.num_parts > 1,
                has_gates=layout.family.gates_heads,
            )
        else:
            columns, *rows = _rows_of_channels(consumer, coupling)

        producers = list[tuple[str, Tensor]]()
        num_parameters = columns.shape[1] * consumer.num_rows
        for (part_name, _), own_rows in zip(coupling.parts, rows, strict=True):
            name = prefix + inside + part_name
            producers.append((name, own_rows))
            num_parameters += own_rows.shape[1] * layout.shapes[name].num_columns
        yield GroupSet(
            kind=kind,
            block=block,
            consumer=consumer.name,
            columns=columns,
            producers=tuple(producers),
            num_parameters=num_parameters,
        )


def _rows_of_heads(
    heads: Heads,
    *,
    is_fused: bool,
    has_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the rows and columns of each KV group.

    Args:
        heads: of the model.
        is_fused: whether one linear has the rows of queries, keys and values, in this order.
        has_gates: see `Family.gates_heads`.

    Returns:
        Columns of the consumer, and rows of queries, keys and values, [num_kv, rows] each.
    """
    queries = torch.arange(heads.num_query * heads.head_dim).view(heads.num_kv, -1)
    keys = torch.arange(heads.num_kv * heads.head_dim).view(heads.num_kv, -1)
    if has_gates:
        with_gates = torch.arange(2 * queries.numel()).view(heads.num_kv, -1)
        return queries, with_gates, keys, keys
    if not is_fused:
        return queries, queries, keys, keys
    first_key = queries.numel()
    first_value = first_key + keys.numel()
    return queries, queries, keys + first_key, keys + first_value


def _rows_of_channels(consumer: LinearShape, coupling: Coupling) -> list[Tensor]:
    """Return columns of the consumer and rows of each producer's parts, [num_channels, 1] each."""
    num_channels = consumer.num_columns - consumer.has_bias
    rows = [_places(0, num_channels)]
    for _, part in coupling.parts:
        rows.append(_places(part * num_channels, num_channels))
    return rows


@functools.cache
def _places(first: int, count: int) -> Tensor:
    """Return the numbers of channels, [count, 1].

    All layers of one width share one tensor, which also saves bytes when a layout is sent.
    """
    return torch.arange(first, first + count, device="cpu")[:, None]
