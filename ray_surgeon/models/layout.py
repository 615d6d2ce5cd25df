"""The layout of a model: blocks, linears, coupled groups and shapes, without weights.

`ModelLayout.of` builds the model once on the meta device; everything else follows from what it
reads there.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ray_surgeon.models.build import BlockRange, build_blocks, shared_inputs_of
from ray_surgeon.models.families import Family, family_of
from ray_surgeon.models.linears import as_linear, num_inputs, num_outputs

GROUP_KINDS = ("attention", "ffn", "shared_experts", "expert_channels", "experts")
"""Kinds of what may be pruned whole.

These are KV groups, channels of feed-forward layers, of shared experts and of experts, and experts.
"""


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
class GroupSet:
    """All coupled groups of one kind in one block (docs/method.md, section 8)."""

    kind: str  # one of `GROUP_KINDS` but experts
    block: int  # its number
    consumer: str  # global name of the linear whose columns decide
    columns: Tensor  # [num_groups, width] columns of the consumer
    # (global name of a linear, [num_groups, rows] its rows that are pruned with each group)
    producers: tuple[tuple[str, Tensor], ...]
    num_parameters: int  # of one group, biases included


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
            model = build_blocks(
                config,
                BlockRange(0, int(config.num_hidden_layers), int(config.num_hidden_layers)),
                torch.float32,
            )
        except Exception as error:  # the code of any family may raise anything
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"model.source: config.json of {where} describes no model that can be built: "
                f"{reason}; fetch it again"
            ) from error
        saved = set(model.state_dict())
        tensors = dict(model.named_parameters(remove_duplicate=False)) | {
            n: b for n, b in model.named_buffers() if n in saved
        }
        return ModelLayout(
            config,
            family,
            {name: tuple(t.shape) for name, t in tensors.items()},
            tuple(_linears(config, family, model)),
        )

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
        return str(
            next(
                value
                for value in (getattr(self.config, name, None) for name in names)
                if value is not None
            )
        )

    @functools.cached_property
    def group_sets(self) -> tuple[GroupSet, ...]:
        """Coupled groups of every block.

        These are of attention, of the feed-forward layer or the shared experts, and of every
        expert.
        """
        return tuple(
            groups for block in range(self.num_blocks) for groups in self._groups_of(block)
        )

    @functools.cached_property
    def expert_sets(self) -> tuple[ExpertSet, ...]:
        """The experts of every block that has some."""
        by_block: dict[int, dict[int, list[LinearShape]]] = {}
        for shape in self.linears:
            if shape.expert is not None:
                by_block.setdefault(shape.block, {}).setdefault(shape.expert, []).append(shape)
        return tuple(
            self._expert_set(block, list(experts.values())) for block, experts in by_block.items()
        )

    @functools.cached_property
    def _experts_by_block(self) -> dict[int, ExpertSet]:
        return {experts.block: experts for experts in self.expert_sets}

    def _expert_set(self, block: int, experts: list[list[LinearShape]]) -> ExpertSet:
        assert self.family.sparse is not None
        name = self.family.block_prefix(block) + self.family.sparse.experts
        sizes = {sum(s.size for s in expert) for expert in experts}
        assert len(sizes) == 1, "experts of one block have one size"
        return ExpertSet(
            block,
            name,
            tuple(tuple(shape.name for shape in expert) for expert in experts),
            sizes.pop(),
        )

    @functools.cached_property
    def num_active_experts(self) -> int:
        """Experts that every token goes to, in a block that has some."""
        return (
            int(getattr(self.config, "num_experts_per_tok", None) or 0) if self.family.sparse else 0
        )

    @functools.cached_property
    def num_experts(self) -> int:
        """Experts of a block that has some."""
        return max((len(experts.linears) for experts in self.expert_sets), default=0)

    @functools.cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of groups that this model has."""
        present = {groups.kind for groups in self.group_sets} | {
            experts.kind for experts in self.expert_sets
        }
        return tuple(kind for kind in GROUP_KINDS if kind in present)

    def _groups_of(self, block: int) -> Iterator[GroupSet]:
        prefix = self.family.block_prefix(block)
        ffn = self.family.ffn
        sparse = self.family.sparse
        if self.family.attention is not None:
            yield self._attention_groups(block, prefix)
        if prefix + ffn.consumer in self.shapes:
            yield self._channels(
                "ffn",
                block,
                prefix + ffn.consumer,
                [(prefix + name, part) for name, part, _ in ffn.producers],
            )
        if (
            sparse is not None
            and sparse.shared is not None
            and f"{prefix}{sparse.shared}.{sparse.consumer}" in self.shapes
        ):
            inside = f"{prefix}{sparse.shared}."
            yield self._channels(
                "shared_experts",
                block,
                inside + sparse.consumer,
                [(inside + name, 0) for name in sparse.producers],
            )
        experts = self._experts_by_block.get(block)
        if experts is not None:
            for *producers, consumer in experts.linears:
                yield self._channels(
                    "expert_channels", block, consumer, [(name, 0) for name in producers]
                )

    def _attention_groups(self, block: int, prefix: str) -> GroupSet:
        attention = self.family.attention
        heads = self.heads
        assert attention is not None
        queries = torch.arange(heads.num_query * heads.head_dim).view(
            heads.num_kv, heads.n_rep * heads.head_dim
        )
        keys = torch.arange(heads.num_kv * heads.head_dim).view(heads.num_kv, heads.head_dim)
        fused = attention.query == attention.key
        first_key = heads.num_query * heads.head_dim if fused else 0
        first_value = (heads.num_query + heads.num_kv) * heads.head_dim if fused else 0
        places = (
            (attention.query, queries),
            (attention.key, keys + first_key),
            (attention.value, keys + first_value),
        )
        producers = tuple((prefix + name, rows) for name, rows in places)
        return self._group_set("attention", block, prefix + attention.consumer, queries, producers)

    def _channels(
        self, kind: str, block: int, consumer: str, producers: list[tuple[str, int]]
    ) -> GroupSet:
        """Return channels as groups.

        The producers come with the part of a fused linear that they are.
        """
        num_channels = self.shapes[consumer].num_columns - self.shapes[consumer].has_bias
        rows = tuple((name, _places(part * num_channels, num_channels)) for name, part in producers)
        return self._group_set(kind, block, consumer, _places(0, num_channels), rows)

    def _group_set(
        self,
        kind: str,
        block: int,
        consumer: str,
        columns: Tensor,
        producers: tuple[tuple[str, Tensor], ...],
    ) -> GroupSet:
        size = columns.shape[1] * self.shapes[consumer].num_rows
        size += sum(rows.shape[1] * self.shapes[name].num_columns for name, rows in producers)
        return GroupSet(kind, block, consumer, columns, producers, size)


@functools.cache
def _places(first: int, count: int) -> Tensor:
    """Return the numbers of channels, [count, 1].

    All experts, which are many, share one tensor, also where a layout travels.
    """
    return torch.arange(first, first + count, device="cpu")[:, None]


def _linears(config: PretrainedConfig, family: Family, model: nn.Module) -> list[LinearShape]:
    shapes: list[LinearShape] = []
    for block in range(int(config.num_hidden_layers)):
        module = model.get_submodule(family.block_prefix(block).rstrip("."))
        for group in shared_inputs_of(family, module):
            number = shapes[-1].shared_input + 1 if shapes else 0
            for linear in group:
                submodule = as_linear(module.get_submodule(linear))
                expert = _expert_of(family, linear)
                bias = submodule.bias is not None
                role = linear if expert is None else re.sub(r"\.\d+\.", ".*.", linear)
                sizes = num_outputs(submodule), num_inputs(submodule) + bias
                shapes.append(
                    LinearShape(
                        family.block_prefix(block) + linear,
                        *sizes,
                        bias,
                        block,
                        number,
                        role,
                        expert,
                    )
                )
    return shapes


def _expert_of(family: Family, linear: str) -> int | None:
    if family.sparse is None or not linear.startswith(f"{family.sparse.experts}."):
        return None
    return int(linear.removeprefix(f"{family.sparse.experts}.").partition(".")[0])
