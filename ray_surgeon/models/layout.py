"""The layout of a model: blocks, linears, coupled groups and shapes, without weights.

`ModelLayout.of` builds the model once on the meta device; everything else follows from what it
reads there.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from ray_surgeon.models.build import BlockRange, build_blocks, shared_inputs_of
from ray_surgeon.models.families import Family, family_of
from ray_surgeon.models.groups import GroupSet, groups_of
from ray_surgeon.models.linears import as_linear, num_inputs, num_outputs

GROUP_KINDS = ("attention", "ffn", "shared_experts", "expert_channels", "experts")
"""Kinds of what may be pruned whole.

These are KV groups, channels of feed-forward layers, of shared experts and of experts, and experts.
"""
FEED_FORWARD_OF_ALL = frozenset({"ffn", "shared_experts"})
"""Those of feed-forward layers that every token passes."""


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
    expert: int | None = None  # its number, if it belongs to one

    @property
    def sees_all_tokens(self) -> bool:
        """Whether every token passes it, which is not so in the experts of a mixture."""
        return self.expert is None

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
    # of a query and a key, if they have another dimension than what `head_dim` says (multi-head
    # latent attention)
    query_dim: int
    value_dim: int  # of a value

    @property
    def n_rep(self) -> int:
        """Query heads of one KV head."""
        return self.num_query // self.num_kv


@dataclass(frozen=True)
class ExpertSet:
    """The experts of one block, each with all of its linears."""

    block: int  # its number
    name: str  # global name of the experts, e.g. ``model.layers.3.mlp.experts``
    # for every expert, the global names of its linears, the consumer last
    linears: tuple[tuple[str, ...], ...]
    num_parameters: int  # of one expert; its row of the router is not counted

    kind = "experts"


@dataclass(frozen=True)
class ModelLayout:
    """What is known of a model before its weights are read."""

    config: PretrainedConfig  # of the model
    family: Family  # of the model
    # global name -> shape of every parameter and saved buffer, a tied head included
    parameters: Mapping[str, tuple[int, ...]]
    linears: tuple[LinearShape, ...]  # every prunable linear, in order

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
        try:
            num_blocks = int(config.num_hidden_layers)
            model = build_blocks(config, BlockRange(0, num_blocks, num_blocks), torch.float32)
        except Exception as error:  # the code of any family may raise anything
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"model.source: config.json of {where} describes no model that can be built: "
                f"{reason}; fetch it again"
            ) from error
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return ModelLayout(config, family, shapes, tuple(_linears(family, model)))

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
        """Name -> number of every prunable linear, from 0.

        Seeds made of it do not depend on the shards.
        """
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
        return sum(
            math.prod(shape) for name, shape in self.parameters.items() if name not in self.tied
        )

    @functools.cached_property
    def linear_size(self) -> int:
        """Parameters of all prunable linears, of which sparsity is a fraction."""
        return sum(linear.size for linear in self.linears)

    def block_of(self, name: str) -> int | None:
        """Return the number of the block that a parameter belongs to; None outside of blocks."""
        inside = f"{self.family.base}.{self.family.blocks}."
        return int(name.removeprefix(inside).partition(".")[0]) if name.startswith(inside) else None

    def parameters_of(self, blocks: BlockRange) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of what a shard with these blocks holds.

        A tied head is there only where the embedding is not.
        """
        family = self.family
        first = tuple(f"{family.base}.{name}." for name in family.embeddings)
        parameters = {}
        for name, shape in self.parameters.items():
            if (block := self.block_of(name)) is not None:
                belongs = block in blocks
            elif name.startswith(first):
                belongs = blocks.is_first
            else:
                belongs = blocks.is_last and not (blocks.is_first and name in self.tied)
            if belongs:
                parameters[name] = shape
        return parameters

    @functools.cached_property
    def heads(self) -> Heads:
        """Attention heads of every block."""
        config = self.config
        heads = int(self.config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        query_dim, value_dim = (
            int(getattr(config, name, None) or head_dim) for name in ("qk_head_dim", "v_head_dim")
        )
        return Heads(heads, kv_heads, head_dim, query_dim, value_dim)

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

    @functools.cached_property
    def expert_sets(self) -> tuple[ExpertSet, ...]:
        """The experts of every block that has some."""
        sets = []
        shapes = (shape for shape in self.linears if shape.expert is not None)
        for block, of_block in itertools.groupby(shapes, key=lambda shape: shape.block):
            experts = [list(e) for _, e in itertools.groupby(of_block, key=lambda s: s.expert)]
            name = experts[0][0].name.rsplit(".", 2)[0]
            linears = tuple(tuple(shape.name for shape in expert) for expert in experts)
            size = sum(shape.size for shape in experts[0])  # as large as the others
            sets.append(ExpertSet(block, name, linears, size))
        return tuple(sets)

    @functools.cached_property
    def num_active_experts(self) -> int:
        """Experts that every token goes to, in a block that has some."""
        if self.family.sparse is None:
            return 0
        return int(getattr(self.config, "num_experts_per_tok", None) or 0)

    @functools.cached_property
    def num_experts(self) -> int:
        """Experts of a block that has some."""
        return max((len(experts.linears) for experts in self.expert_sets), default=0)

    @property
    def is_mixture(self) -> bool:
        """Whether some tokens pass one feed-forward layer and others another."""
        return self.num_experts > 0

    def part_of_tokens(self, shape: LinearShape) -> float:
        """Return which part of all tokens a linear sees, as if all experts had as many."""
        return 1.0 if shape.sees_all_tokens else self.num_active_experts / self.num_experts

    @functools.cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of groups that this model has."""
        present = {*(g.kind for g in self.group_sets), *(e.kind for e in self.expert_sets)}
        return tuple(kind for kind in GROUP_KINDS if kind in present)


def _linears(family: Family, model: nn.Module) -> Iterator[LinearShape]:
    shared_inputs = itertools.count()
    blocks = model.get_submodule(f"{family.base}.{family.blocks}")
    for block, module in enumerate(blocks.children()):
        for group in shared_inputs_of(family, module):
            shared_input = next(shared_inputs)
            for name in group:
                linear = as_linear(module.get_submodule(name))
                bias = linear.bias is not None
                number = re.search(r"\.(\d+)\.", name)
                yield LinearShape(
                    family.block_prefix(block) + name,
                    num_outputs(linear),
                    num_inputs(linear) + bias,
                    bias,
                    block,
                    shared_input,
                    re.sub(r"\.\d+\.", ".*.", name),
                    None if number is None else int(number[1]),
                )
