"""The layout of a model: blocks, linears, coupled groups and shapes, without weights.

`ModelLayout.of` builds the model once on the meta device; everything else follows from what it
reads there.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ray_surgeon.maths.masks import Mask
from ray_surgeon.models import build
from ray_surgeon.models.families import Family, family_of
from ray_surgeon.models.groups import GroupSet, groups_of

GROUP_KINDS = ("attention", "ffn", "shared_experts", "expert_channels", "experts")
"""Kinds of what may be pruned whole.

These are KV groups, channels of feed-forward layers, of shared experts and of experts, and experts.
"""
FEED_FORWARD_OF_ALL = frozenset({"ffn", "shared_experts"})
"""Those of feed-forward layers that every token passes."""
Roles: TypeAlias = frozenset[str] | None
"""Of linears, see `LinearShape`; None for all."""


@dataclass(frozen=True)
class LinearShape:
    """Shape of one linear as the method sees it, the bias being the last column.

    `shared_input` numbers the shared-input groups of the model: linears of one group read the same
    input.
    """

    name: str
    num_rows: int
    num_columns: int
    has_bias: bool
    block: int
    shared_input: int
    # its name in the block, with * for the number of an expert, e.g. ``mlp.experts.*.down_proj``
    role: str

    @property
    def sees_all_tokens(self) -> bool:
        """Whether every token passes it, which is not so in the experts of a mixture."""
        return "*" not in self.role

    @property
    def size(self) -> int:
        """Parameters, bias included."""
        return self.num_rows * self.num_columns


@dataclass(frozen=True)
class Heads:
    """Attention heads of every block."""

    num_query: int
    num_kv: int
    n_rep: int  # query heads of one KV head
    head_dim: int
    # of a query and a key, if they have another dimension than what `head_dim` says (multi-head
    # latent attention)
    query_dim: int
    value_dim: int  # of a value


@dataclass(frozen=True)
class ExpertSet:
    """The experts of one block, each with all of its linears."""

    block: int  # its number
    name: str  # global name of the experts, e.g. ``model.layers.3.mlp.experts``
    # for every expert, the global names of its linears, the consumer last
    linears: tuple[tuple[str, ...], ...]

    def removed(self, masks: Mapping[str, Mask]) -> Tensor:
        """Return which experts are removed, [num_experts] bool.

        Nothing of their last linears is kept, not even rows.
        """
        of_consumers = [masks[linears[-1]] for linears in self.linears]
        return torch.tensor([not vars(mask)["rows"].any() for mask in of_consumers])


Linears = tuple[LinearShape, ...]
Wholes = Mapping[str, tuple[str, int, int]]
"""Kind of what is removed whole -> kind of the groups in it, and how many of it a block has and
needs.
"""
Shapes = Mapping[str, tuple[int, ...]]


class ModelLayout:
    """What is known of a model before its weights are read.

    Attributes:
        config: of the model.
        family: of the model.
        parameters: global name -> shape of every parameter and saved buffer, a tied head included.
        linears: every prunable linear, in order.
        num_blocks: decoder blocks.
        shapes: name -> shape of every prunable linear.
        linear_numbers: name -> number of every prunable linear, from 0; seeds made of it do not
            depend on the shards.
        tied: {head weight: embedding weight} if the configuration ties them.
        num_parameters: of the whole model, tied ones once.
        linear_size: parameters of all prunable linears, of which sparsity is a fraction.
        heads: attention heads of every block.
        expert_sets: the experts of every block that has some.
        num_experts: of a block that has some.
        num_active_experts: that every token goes to, in such a block.
        is_mixture: whether some tokens pass one feed-forward layer and others another.
        wholes: what may be removed with all groups in it; see `Wholes`.
    """

    def __init__(
        self, config: PretrainedConfig, family: Family, parameters: Shapes, linears: Linears
    ) -> None:
        self.config = config
        self.family = family
        self.parameters = parameters
        self.linears = linears
        self.num_blocks = int(config.num_hidden_layers)
        self.shapes = {linear.name: linear for linear in linears}
        self.linear_numbers = {linear.name: number for number, linear in enumerate(linears)}
        tied = {f"{family.head}.weight": f"{family.base}.{family.embeddings[0]}.weight"}
        self.tied = tied if getattr(config, "tie_word_embeddings", False) else {}
        shapes = (shape for name, shape in parameters.items() if name not in self.tied)
        self.num_parameters = sum(map(math.prod, shapes))
        self.linear_size = sum(linear.size for linear in linears)
        self.heads = _heads(config)
        self.expert_sets = tuple(_expert_sets(linears))
        self.num_experts = max((len(experts.linears) for experts in self.expert_sets), default=0)
        num_active = getattr(config, "num_experts_per_tok", None) or 0
        self.num_active_experts = int(num_active) if self.num_experts else 0
        self.is_mixture = self.num_experts > 0
        # a router with groups takes the best two of a group
        has_groups = getattr(config, family.sparse.num_groups or "", None)
        needed = max(self.num_active_experts, 2 if has_groups else 1)
        whole = {"experts": ("expert_channels", self.num_experts, needed)}
        self.wholes: Wholes = whole if self.is_mixture else {}

    @staticmethod
    def of(config: PretrainedConfig, where: str = "the model") -> ModelLayout:
        """Read the layout off a model that is built on the meta device.

        Args:
            config: of the model.
            where: the model, for errors.

        Raises:
            ValueError: the family is unknown, or transformers cannot build a model of this
                configuration.
        """
        family = family_of(config)
        num_blocks = int(config.num_hidden_layers)
        blocks = build.BlockRange(0, num_blocks, num_blocks)
        try:
            model = build.build_blocks(config, blocks, torch.float32)
        except Exception as error:  # the code of any family may raise it
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            raise ValueError(
                f"model.source: config.json of {where} describes no model that can be built: "
                f"{reason}; fetch it again"
            ) from error
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return ModelLayout(config, family, shapes, tuple(_linears(family, model)))

    def block_of(self, name: str) -> int | None:
        """Return the number of the block that a parameter belongs to; None outside of blocks."""
        inside = f"{self.family.base}.{self.family.blocks}."
        return int(name.removeprefix(inside).partition(".")[0]) if name.startswith(inside) else None

    def renumbered(self, name: str, blocks: Sequence[int]) -> str:
        """Return the name of a tensor in a model of which only these blocks are left."""
        if (block := self.block_of(name)) is None:
            return name
        prefix = self.family.block_prefix
        return prefix(blocks.index(block)) + name.removeprefix(prefix(block))

    def parameters_of(self, blocks: build.BlockRange) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of what a shard with these blocks holds.

        A tied head is there only where the embedding is not.
        """
        first = tuple(f"{self.family.base}.{name}." for name in self.family.embeddings)

        def belongs(name: str) -> bool:
            if (block := self.block_of(name)) is not None:
                return block in blocks
            if name.startswith(first):
                return blocks.is_first
            return blocks.is_last and not (blocks.is_first and name in self.tied)

        return {name: shape for name, shape in self.parameters.items() if belongs(name)}

    @functools.cached_property
    def num_channels(self) -> int:
        """Channels of every feed-forward layer."""
        return int(getattr(self.config, self.family.width_field) or 4 * self.config.hidden_size)

    @property
    def activation(self) -> str:
        """The activation of feed-forward layers, as transformers calls it."""
        names = ("hidden_act", "hidden_activation", "activation_function")
        values = (getattr(self.config, name, None) for name in names)
        return str(next(value for value in values if value is not None))

    @functools.cached_property
    def group_sets(self) -> tuple[GroupSet, ...]:
        """Coupled groups of every block: those of attention, then of feed-forward layers."""
        return tuple(g for block in range(self.num_blocks) for g in groups_of(self, block))

    def part_of_tokens(self, shape: LinearShape) -> float:
        """Return which part of all tokens a linear sees, as if all experts had as many."""
        return 1.0 if shape.sees_all_tokens else self.num_active_experts / self.num_experts

    @functools.cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of groups that this model has."""
        present = {groups.kind for groups in self.group_sets} | self.wholes.keys()
        return tuple(kind for kind in GROUP_KINDS if kind in present)


def _heads(config: PretrainedConfig) -> Heads:
    num_query = int(config.num_attention_heads)
    num_kv = int(getattr(config, "num_key_value_heads", None) or num_query)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // num_query)
    query_dim = int(getattr(config, "qk_head_dim", None) or head_dim)
    value_dim = int(getattr(config, "v_head_dim", None) or head_dim)
    return Heads(num_query, num_kv, num_query // num_kv, head_dim, query_dim, value_dim)


def _expert_sets(linears: Linears) -> Iterator[ExpertSet]:
    shapes = (shape for shape in linears if not shape.sees_all_tokens)
    for block, of_block in itertools.groupby(shapes, key=lambda shape: shape.block):
        by_expert = itertools.groupby(of_block, key=lambda shape: shape.name.rpartition(".")[0])
        experts = [list(expert) for _, expert in by_expert]
        name = experts[0][0].name.rsplit(".", 2)[0]
        yield ExpertSet(block, name, tuple(tuple(s.name for s in expert) for expert in experts))


def _linears(family: Family, model: nn.Module) -> Iterator[LinearShape]:
    # a bias is one more input, so linears with a bias and linears without have no A in common
    shared_inputs = defaultdict[Any, int](itertools.count().__next__)
    blocks = model.get_submodule(f"{family.base}.{family.blocks}")
    for block, module in enumerate(blocks.children()):
        modules = dict(module.named_modules())
        for group in family.shared_inputs_in(modules):
            for name in filter(modules.__contains__, group):
                linear = build.as_linear(modules[name])
                R, C = build.matrix(linear).shape
                bias = linear.bias is not None
                full_name = family.block_prefix(block) + name
                shared_input = shared_inputs[block, group, bias]
                role = re.sub(r"\.\d+\.", ".*.", name)
                yield LinearShape(full_name, R, C + bias, bias, block, shared_input, role)
