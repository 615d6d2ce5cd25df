"""Budgets: what a model of given widths needs, of which a user may allow so much.

Additive ones are arithmetic on shapes. Seconds are in a table of measurements, see
`ray_surgeon.pruning.seconds_table`.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ray_surgeon.models.groups import GroupSet
from ray_surgeon.models.layers import LAYER_KINDS, Layer, LayerKey, layers_of
from ray_surgeon.models.layout import ModelLayout, Wholes
from ray_surgeon.models.pruned_config import kv_heads_left


@dataclass(frozen=True)
class Budget:
    """What the whole model needs as a sum over its blocks."""

    unit: str  # e.g. ``parameters``
    fixed: float  # need of what no group belongs to
    # kind of groups -> need of one consumer with 0, 1, ... of them left; it never falls
    by_left: Mapping[str, tuple[float, ...]]
    # kind of groups -> linears that read them in the whole model
    num_consumers: Mapping[str, int]
    wholes: Wholes = field(default_factory=dict)  # see `ModelLayout.wholes`
    # kind and block of each layer -> what the dense model saves without it
    of_layers: Mapping[LayerKey, float] = field(default_factory=dict)

    def of(self, left: Iterable[tuple[str, int]]) -> float:
        """Return the need of a model.

        Args:
            left: (kind, number of groups that are left), once a consumer; where one is missing, all
                of its groups are left.
        """
        left = list(left)
        rest = Counter(self.num_consumers)  # of which all groups are left
        rest.subtract(kind for kind, _ in left)
        whole = sum(rest[kind] * table[-1] for kind, table in self.by_left.items())
        return self.fixed + whole + sum(self.by_left[kind][number] for kind, number in left)

    @property
    def dense(self) -> float:
        """Need of the dense model."""
        return self.of(())

    def least(self, fewest: Mapping[str, int]) -> float:
        """Return the need if only so many groups of the named kinds stay.

        They stay at every consumer, and so many whole ones do.
        """
        sizes = dict(fewest)
        gone = Counter[str]()  # kind -> consumers that are gone whole
        for whole, (kind, of_block, _) in self.wholes.items():
            if whole in sizes:
                gone[kind] = self.num_consumers[kind] // of_block * (of_block - sizes.pop(whole))
                sizes[kind] = sizes.pop(kind, len(self.by_left[kind]) - 1)
        left = [(kind, 0) for kind in gone.elements()]
        for kind, number in sizes.items():
            left += [(kind, number)] * (self.num_consumers[kind] - gone[kind])
        return self.of(left)

    def saved_without(self, removed: Collection[LayerKey]) -> float:
        """Return what the dense model saves without some layers; those of one block count once."""
        inside = (layer for layer in removed if layer[0] != "blocks")
        whole = [layer for layer in removed if layer[0] == "blocks"]
        blocks = {block for _, block in whole}
        return sum(
            self.of_layers[layer]
            for layer in (*whole, *(layer for layer in inside if layer[1] not in blocks))
        )

    def most_saved(self, kinds: Collection[str], number: int | None) -> float:
        """Return the most that is saved without so many layers; None: all but one of each kind."""
        of_kind = {kind: [s for (k, _), s in self.of_layers.items() if k == kind] for kind in kinds}
        if number is None:
            return sum(sum(savings) - min(savings) for savings in of_kind.values())
        every = sorted(itertools.chain(*of_kind.values()), reverse=True)
        return sum(every[:number])

    def size(self, kind: str) -> float:
        """Return the most that one group saves."""
        return max(more - less for less, more in itertools.pairwise(self.by_left[kind]))


def fewest_left(
    layout: ModelLayout, least: Mapping[str, int], tensor_parallel: int = 1, *, uniform: bool
) -> dict[str, int]:
    """Return how few groups may be left in every block.

    Args:
        layout: of the model.
        least: kind of groups that may be pruned -> how many stay in every block.
        tensor_parallel: see `kv_heads_left`.
        uniform: whether plain classes must be able to hold the result.
    """
    in_all = {groups.kind: len(groups.columns) for groups in reversed(layout.group_sets)}
    needed = {kind: number for kind, (_, _, number) in layout.wholes.items()}
    fewest = {kind: min(number, in_all.get(kind, 0)) for kind, number in least.items()}
    fewest |= {kind: number for kind, number in needed.items() if kind in least}
    if "attention" in fewest:
        possible = kv_heads_left(layout, tensor_parallel, uniform=uniform)
        fewest["attention"] = min(k for k in possible if k >= fewest["attention"])
    return fewest


def linears_budget(layout: ModelLayout) -> Budget:
    """Return the parameters of the blocks' linears, of which sparsity is a fraction."""
    return _of_size(layout, "parameters of the linears", layout.linear_size, has_norms=False)


def parameters_budget(layout: ModelLayout) -> Budget:
    """Return the parameters of the whole model, tied ones once."""
    return _of_size(layout, "parameters", layout.num_parameters)


def bytes_budget(layout: ModelLayout, bytes_each: int) -> Budget:
    """Return the bytes of the whole model's weights."""
    return _of_size(layout, "bytes", layout.num_parameters, bytes_each)


def _of_size(
    layout: ModelLayout, unit: str, size: int, each: int = 1, *, has_norms: bool = True
) -> Budget:
    """Return a budget from the number of parameters, and the need of each.

    `has_norms` is whether what is in a block beside its linears goes with the block.
    """
    of_blocks = Counter[int | None]()
    for name, shape in layout.parameters.items():
        of_blocks[layout.block_of(name)] += math.prod(shape)

    def of_layer(layer: Layer) -> float:
        if layer.kind == "blocks" and has_norms:
            return each * of_blocks[layer.block]
        return each * sum(layout.shapes[name].size for name in layer.linears)

    need = size * each
    return _additive(layout, unit, need, lambda groups: each * groups.num_parameters, of_layer)


def flops_budget(layout: ModelLayout, prompt_length: int) -> Budget:
    """Return the floating-point operations for one token of a prompt.

    These are two a weight of linears and head, and the attention to what lies before.

    Of a linear that only some tokens pass so much counts as if all such had as many tokens; see
    `ModelLayout.part_of_tokens`. Whole ones save nothing, because a token goes to as many of those
    that are left.

    Args:
        layout: of the model.
        prompt_length: tokens of a prompt, over whose tokens this is the mean; a sliding window is
            not taken into account.
    """
    heads = layout.heads
    config = layout.config
    each = 2 * (heads.query_dim + heads.value_dim)  # q.k and the sum of values: a multiply-add each
    scores = each * heads.num_query * (prompt_length + 1) / 2
    weights = sum(shape.size * layout.part_of_tokens(shape) for shape in layout.linears)
    # OPT's embeddings may be, with a linear before and after
    narrow = getattr(config, "word_embed_proj_dim", config.hidden_size)
    between = 2 * narrow * config.hidden_size * (narrow != config.hidden_size)
    ends = config.vocab_size * narrow + between
    dense = 2.0 * (weights + ends) + layout.num_blocks * scores

    def of_group(groups: GroupSet) -> float:
        own = 2 * layout.part_of_tokens(layout.shapes[groups.consumer]) * groups.num_parameters
        return own + scores / heads.num_kv if groups.kind == "attention" else own

    def of_layer(layer: Layer) -> float:
        shapes = [layout.shapes[name] for name in layer.linears]
        own = 2 * sum(shape.size * layout.part_of_tokens(shape) for shape in shapes)
        return own + scores * (layer.kind != "ffn_layers")

    return _additive(layout, "flops", dense, of_group, of_layer)


def _additive(
    layout: ModelLayout,
    unit: str,
    dense: float,
    of_group: Callable[[GroupSet], float],
    of_layer: Callable[[Layer], float],
) -> Budget:
    """Return a budget from the need of the dense model, of one group of each set, and of layers."""
    by_left = dict[str, tuple[float, ...]]()
    num_consumers = Counter(groups.kind for groups in layout.group_sets)
    for groups in layout.group_sets:
        if groups.kind not in by_left:
            size = float(of_group(groups))
            by_left[groups.kind] = tuple(size * number for number in range(len(groups.columns) + 1))
    fixed = float(dense) - sum(num_consumers[kind] * table[-1] for kind, table in by_left.items())
    of_layers = {layer.key: float(of_layer(layer)) for layer in layers_of(layout, LAYER_KINDS)}
    return Budget(unit, fixed, by_left, num_consumers, layout.wholes, of_layers)
