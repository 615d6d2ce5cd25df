"""Budgets: the resources that a model of given widths needs, which a target limits.

Parameters, bytes and floating-point operations follow from shapes alone. Seconds are in a table of
measurements, see `ray_surgeon.pruning.seconds_table`.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ray_surgeon.models.layers import LAYER_KINDS, Layer, LayerKey, layers_of
from ray_surgeon.models.layout import GroupSet, LinearShape, ModelLayout, Wholes
from ray_surgeon.models.pruned_config import kv_heads_left


@dataclass(frozen=True)
class Budget:
    """The need of the whole model as a sum over its blocks."""

    unit: str  # e.g. ``parameters``
    fixed: float  # need of everything that belongs to no group
    # kind of groups -> need of one consumer with 0, 1, ... groups left; it never decreases
    by_left: Mapping[str, tuple[float, ...]]
    # kind of groups -> number of linears in the whole model that read them
    num_consumers: Mapping[str, int]
    wholes: Wholes = field(default_factory=dict)  # see `ModelLayout.wholes`
    # kind and block of each layer -> need that the dense model saves without it
    of_layers: Mapping[LayerKey, float] = field(default_factory=dict)

    def of(self, left: Iterable[tuple[str, int]]) -> float:
        """Return the need of a model.

        Args:
            left: (kind, number of groups that are left), one entry for each pruned consumer; all
                other consumers keep all of their groups.
        """
        pruned = list(left)
        num_intact = Counter(self.num_consumers)
        for kind, _ in pruned:
            num_intact[kind] -= 1
        intact = sum(num_intact[kind] * table[-1] for kind, table in self.by_left.items())
        smaller = sum(self.by_left[kind][number] for kind, number in pruned)
        return self.fixed + intact + smaller

    @property
    def dense(self) -> float:
        """Need of the dense model."""
        return self.of(())

    def least(self, fewest: Mapping[str, int]) -> float:
        """Return the need of the smallest model.

        Args:
            fewest: kind -> how many groups every consumer keeps, or, for a kind in `wholes`, how
                many of these every block keeps. All groups of other kinds stay.
        """
        sizes = dict(fewest)
        # kind -> number of consumers that are removed with all their groups
        num_removed = Counter[str]()
        for whole, (kind, num_in_block, _) in self.wholes.items():
            if whole not in sizes:
                continue
            num_blocks = self.num_consumers[kind] // num_in_block
            num_removed[kind] = num_blocks * (num_in_block - sizes.pop(whole))
            sizes[kind] = sizes.pop(kind, len(self.by_left[kind]) - 1)

        left = list[tuple[str, int]]()
        for kind, count in num_removed.items():
            left += [(kind, 0)] * count
        for kind, number in sizes.items():
            left += [(kind, number)] * (self.num_consumers[kind] - num_removed[kind])
        return self.of(left)

    def saved_without(self, removed: Collection[LayerKey]) -> float:
        """Return the need that the dense model saves without some layers.

        A layer inside a removed block saves nothing more.
        """
        counted = list[LayerKey]()
        removed_blocks = set[int]()
        for kind, block in removed:
            if kind == "blocks":
                counted.append((kind, block))
                removed_blocks.add(block)
        for kind, block in removed:
            if kind != "blocks" and block not in removed_blocks:
                counted.append((kind, block))
        return sum(self.of_layers[layer] for layer in counted)

    def most_saved(self, kinds: Collection[str], number: int | None) -> float:
        """Return the most that the removal of layers can save.

        Args:
            kinds: kinds of layers that may be removed.
            number: how many layers are removed; None for all but one of each kind.
        """
        savings = {kind: list[float]() for kind in kinds}
        for (kind, _), saved in self.of_layers.items():
            if kind in savings:
                savings[kind].append(saved)
        if number is None:
            return sum(sum(of_kind) - min(of_kind) for of_kind in savings.values())
        every = itertools.chain.from_iterable(savings.values())
        return sum(sorted(every, reverse=True)[:number])

    def size(self, kind: str) -> float:
        """Return the most that the removal of one group saves."""
        return max(more - less for less, more in itertools.pairwise(self.by_left[kind]))


def fewest_left(
    layout: ModelLayout,
    least: Mapping[str, int],
    tensor_parallel: int = 1,
    *,
    uniform: bool,
) -> dict[str, int]:
    """Return the smallest number of groups of each kind that may be left in every block.

    Args:
        layout: layout of the model.
        least: kind of groups that may be pruned -> how many should stay in every block.
        tensor_parallel: see `kv_heads_left`.
        uniform: whether plain classes must be able to hold the result.
    """
    num_groups = dict[str, int]()
    for groups in layout.group_sets:
        num_groups.setdefault(groups.kind, len(groups.columns))

    fewest = dict[str, int]()
    for kind, number in least.items():
        if kind in layout.wholes:
            _, _, fewest[kind] = layout.wholes[kind]
        else:
            fewest[kind] = min(number, num_groups.get(kind, 0))

    if "attention" in fewest:
        possible = kv_heads_left(layout, tensor_parallel, uniform=uniform)
        fewest["attention"] = min(k for k in possible if k >= fewest["attention"])
    return fewest


def linears_budget(layout: ModelLayout) -> Budget:
    """Return the parameters of the blocks' linears; sparsity is a fraction of these."""
    return _size_budget(
        layout,
        unit="parameters of the linears",
        num_parameters=layout.linear_size,
        includes_norms=False,
    )


def parameters_budget(layout: ModelLayout) -> Budget:
    """Return the parameters of the whole model; tied ones count once."""
    return _size_budget(layout, unit="parameters", num_parameters=layout.num_parameters)


def bytes_budget(layout: ModelLayout, bytes_each: int) -> Budget:
    """Return the bytes of the whole model's weights."""
    return _size_budget(
        layout,
        unit="bytes",
        num_parameters=layout.num_parameters,
        need_each=bytes_each,
    )


def _size_budget(
    layout: ModelLayout,
    *,
    unit: str,
    num_parameters: int,
    need_each: int = 1,
    includes_norms: bool = True,
) -> Budget:
    """Return a budget that is proportional to the number of parameters.

    Args:
        layout: layout of the model.
        unit: unit of the budget.
        num_parameters: parameters of the dense model.
        need_each: need of one parameter.
        includes_norms: whether the removal of a block saves its norms and other parameters beside
            its linears, too.
    """
    size_of_block = Counter[int | None]()
    for name in layout.trained:
        shape = layout.parameters[name]
        size_of_block[layout.block_of(name)] += math.prod(shape)

    def of_group(groups: GroupSet) -> float:
        return need_each * groups.num_parameters

    def of_layer(layer: Layer) -> float:
        if layer.kind == "blocks" and includes_norms:
            return need_each * size_of_block[layer.block]
        return need_each * sum(layout.shapes[name].size for name in layer.linears)

    return _additive_budget(
        layout,
        unit=unit,
        dense=num_parameters * need_each,
        of_group=of_group,
        of_layer=of_layer,
    )


def flops_budget(layout: ModelLayout, prompt_length: int) -> Budget:
    """Return the floating-point operations for one token of a prompt.

    Each weight of the linears and the head takes two operations; attention to the earlier tokens
    comes on top.

    A linear that only some tokens pass counts as if the router spread tokens evenly, see
    `ModelLayout.part_of_tokens`. The removal of a whole expert saves nothing, because a token still
    goes to the same number of the remaining experts.

    Layers in place of an attention count two operations for each weight as well.

    Args:
        layout: layout of the model.
        prompt_length: tokens of a prompt; the budget is the mean over them. Sliding windows are not
            taken into account.
    """
    heads = layout.heads
    config = layout.config
    # q.k and the sum of values take a multiply-add for each dimension
    operations_each = 2 * (heads.query_dim + heads.value_dim)
    attention_scores = operations_each * heads.num_query * (prompt_length + 1) / 2

    def weights_in_use(shapes: Iterable[LinearShape]) -> float:
        return sum(shape.size * layout.part_of_tokens(shape) for shape in shapes)

    # OPT's embeddings may be narrower, with a linear before the blocks and one after them
    embedding_width = getattr(config, "word_embed_proj_dim", config.hidden_size)
    outer_weights = config.vocab_size * embedding_width
    if embedding_width != config.hidden_size:
        outer_weights += 2 * embedding_width * config.hidden_size
    dense = 2.0 * (weights_in_use(layout.linears) + outer_weights)
    dense += layout.num_attentions * attention_scores
    for name in layout.trained:
        block = layout.block_of(name)
        shape = layout.parameters[name]
        if (
            block in layout.mixers
            and f".{layout.mixers[block]}." in name
            and len(shape) > 1
        ):
            dense += 2.0 * math.prod(shape)

    def of_group(groups: GroupSet) -> float:
        part_of_tokens = layout.part_of_tokens(layout.shapes[groups.consumer])
        operations = 2 * part_of_tokens * groups.num_parameters
        if groups.kind == "attention":
            operations += attention_scores / heads.num_kv
        return operations

    def of_layer(layer: Layer) -> float:
        operations = 2 * weights_in_use(layout.shapes[name] for name in layer.linears)
        if layer.kind != "ffn_layers" and layer.block not in layout.mixers:
            operations += attention_scores
        return operations

    return _additive_budget(
        layout,
        unit="flops",
        dense=dense,
        of_group=of_group,
        of_layer=of_layer,
    )


def _additive_budget(
    layout: ModelLayout,
    *,
    unit: str,
    dense: float,
    of_group: Callable[[GroupSet], float],
    of_layer: Callable[[Layer], float],
) -> Budget:
    """Return a budget from the need of the dense model, of one group of each set, and of layers."""
    by_left = dict[str, tuple[float, ...]]()
    num_consumers = Counter[str]()
    for groups in layout.group_sets:
        num_consumers[groups.kind] += 1
        if groups.kind not in by_left:
            size = float(of_group(groups))
            numbers = range(len(groups.columns) + 1)
            by_left[groups.kind] = tuple(size * number for number in numbers)
    in_groups = sum(num_consumers[kind] * table[-1] for kind, table in by_left.items())

    of_layers = dict[LayerKey, float]()
    for layer in layers_of(layout, LAYER_KINDS):
        of_layers[layer.key] = float(of_layer(layer))
    return Budget(
        unit=unit,
        fixed=float(dense) - in_groups,
        by_left=by_left,
        num_consumers=num_consumers,
        wholes=layout.wholes,
        of_layers=of_layers,
    )
