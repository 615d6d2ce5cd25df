"""Budgets: what a model of given widths needs, of which a user may allow so much.

Additive ones are arithmetic on shapes. Latency is a table of measurements, see `export.latency`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ray_surgeon.models.groups import GroupSet
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import kv_heads_left


@dataclass(frozen=True)
class Budget:
    """What the whole model needs as a sum over its blocks."""

    unit: str  # e.g. ``parameters``
    fixed: float  # need of what no group belongs to
    # kind of groups -> need of one consumer with 0, 1, ... of them left; it never falls
    by_left: Mapping[str, tuple[float, ...]]
    # kind of groups -> linears that read them in the whole model, one a block or one an expert
    num_consumers: Mapping[str, int]
    num_experts: int = 0  # of a block

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

        They stay in every block and expert, and so many experts do.
        """
        sizes = dict(fewest)
        gone = 0  # experts of the whole model
        if "experts" in sizes:
            num_left = sizes.pop("experts")
            of_block = self.num_consumers["expert_channels"] // self.num_experts
            gone = of_block * (self.num_experts - num_left)
            all_channels = len(self.by_left["expert_channels"]) - 1
            sizes["expert_channels"] = sizes.pop("expert_channels", all_channels)
        left = [("expert_channels", 0)] * gone
        for kind, number in sizes.items():
            num_gone = gone if kind == "expert_channels" else 0
            left += [(kind, number)] * (self.num_consumers[kind] - num_gone)
        return self.of(left)

    def size(self, kind: str) -> float:
        """Return the most that one group saves."""
        return max(more - less for less, more in itertools.pairwise(self.by_left[kind]))


def fewest_left(
    layout: ModelLayout,
    kinds: Sequence[str],
    least: Mapping[str, int],
    tensor_parallel: int = 1,
    *,
    uniform: bool,
) -> dict[str, int]:
    """Return how few groups may be left in every block.

    Args:
        layout: of the model.
        kinds: of groups that may be pruned.
        least: kind -> groups that stay in every block.
        tensor_parallel: see `kv_heads_left`.
        uniform: whether plain classes must be able to hold the result.
    """
    in_all = {groups.kind: len(groups.columns) for groups in reversed(layout.group_sets)}
    has_groups = getattr(layout.config, layout.family.sparse.num_groups or "", None)
    # a router with groups takes the best two of a group
    num_chosen = max(layout.num_active_experts, 2 if has_groups else 1)
    fewest = {
        kind: num_chosen if kind == "experts" else min(least[kind], in_all[kind]) for kind in kinds
    }
    if "attention" in fewest:
        possible = kv_heads_left(layout, tensor_parallel, uniform=uniform)
        fewest["attention"] = min(k for k in possible if k >= fewest["attention"])
    return fewest


def linears_budget(layout: ModelLayout) -> Budget:
    """Return the parameters of the blocks' linears, of which sparsity is a fraction."""
    return _of_size(layout, "parameters of the linears", layout.linear_size)


def parameters_budget(layout: ModelLayout) -> Budget:
    """Return the parameters of the whole model, tied ones once."""
    return _of_size(layout, "parameters", layout.num_parameters)


def bytes_budget(layout: ModelLayout, bytes_each: int) -> Budget:
    """Return the bytes of the whole model's weights."""
    return _of_size(layout, "bytes", layout.num_parameters, bytes_each)


def _of_size(layout: ModelLayout, unit: str, size: int, each: int = 1) -> Budget:
    """Return a budget from the number of parameters, and the need of each."""
    return _additive(layout, unit, size * each, lambda groups: each * groups.num_parameters)


def flops_budget(layout: ModelLayout, prompt_length: int) -> Budget:
    """Return the floating-point operations for one token of a prompt.

    These are two a weight of linears and head, and the attention to what lies before.

    Of the experts only those count that a token goes to: so much of every expert as if all had as
    many tokens. Whole experts save nothing, because a token goes to as many of those that are left.

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
    ends = config.vocab_size * narrow
    if narrow != config.hidden_size:
        ends += 2 * narrow * config.hidden_size
    dense = 2.0 * (weights + ends) + layout.num_blocks * scores

    def of_group(groups: GroupSet) -> float:
        seen = layout.part_of_tokens(layout.shapes[groups.consumer])
        own = 2 * seen * groups.num_parameters
        return own + scores / heads.num_kv if groups.kind == "attention" else own

    return _additive(layout, "flops", dense, of_group)


def _additive(
    layout: ModelLayout, unit: str, dense: float, of_group: Callable[[GroupSet], float]
) -> Budget:
    """Return a budget from the need of the dense model, and of one group of each set."""
    by_left = dict[str, tuple[float, ...]]()
    num_consumers = Counter(groups.kind for groups in layout.group_sets)
    for groups in layout.group_sets:
        if groups.kind not in by_left:
            size = float(of_group(groups))
            by_left[groups.kind] = tuple(size * number for number in range(len(groups.columns) + 1))
    fixed = float(dense) - sum(num_consumers[kind] * table[-1] for kind, table in by_left.items())
    return Budget(unit, fixed, by_left, num_consumers, layout.num_experts)
