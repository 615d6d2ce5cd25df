"""Budgets: what a model of given widths needs, of which a user may allow so much.

Additive ones are arithmetic on shapes; latency is a table of measurements, see `export.latency`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from ray_surgeon.models.couplings import group_sets, head_layout
from ray_surgeon.models.narrow import plain_kv_heads
from ray_surgeon.models.skeleton import linear_shapes, num_parameters


@dataclass(frozen=True)
class Budget:
    """What the whole model needs as a sum over its blocks.

    Attributes:
        unit: e.g. ``parameters``.
        fixed: need of what no group belongs to.
        by_left: kind of groups -> need of one block with 0, 1, ... of them left; it never falls.
        num_blocks: blocks of the model.
    """

    unit: str
    fixed: float
    by_left: Mapping[str, tuple[float, ...]]
    num_blocks: int

    def of(self, left: Iterable[tuple[str, int]]) -> float:
        """Return the need of a model.

        Args:
            left: (kind, number of groups that are left), once a block and kind; where a kind is missing, all are left.
        """
        left = list(left)
        seen = Counter(kind for kind, _ in left)
        whole = sum((self.num_blocks - seen[kind]) * table[-1] for kind, table in self.by_left.items())
        return self.fixed + whole + sum(self.by_left[kind][number] for kind, number in left)

    @property
    def dense(self) -> float:
        """Need of the dense model."""
        return self.of(())

    def least(self, fewest: Mapping[str, int]) -> float:
        """Return the need if of the named kinds only so many groups stay in every block."""
        return self.of((kind, number) for kind, number in fewest.items() for _ in range(self.num_blocks))

    def size(self, kind: str) -> float:
        """Return the most that one group saves."""
        return max(more - less for less, more in itertools.pairwise(self.by_left[kind]))


def fewest_left(config: PretrainedConfig, kinds: Sequence[str], least: Mapping[str, int], *, uniform: bool) -> dict[str, int]:
    """Return how few groups may be left in every block.

    Args:
        config: of the model.
        kinds: of groups that may go.
        least: kind -> groups that stay in every block.
        uniform: whether plain classes must be able to hold the result.
    """
    in_all = _group_numbers(config)
    found = {kind: min(least[kind], in_all[kind]) for kind in kinds}
    if uniform and "attention" in found:
        found["attention"] = min(plain_kv_heads(config))
    return found


def linears_budget(config: PretrainedConfig) -> Budget:
    """Return the parameters of the blocks' linears, of which sparsity is a fraction."""
    return _additive(config, "parameters of the linears", float(sum(s.num_rows * s.num_columns for s in linear_shapes(config))), {})


def parameters_budget(config: PretrainedConfig) -> Budget:
    """Return the parameters of the whole model, tied ones once."""
    return _additive(config, "parameters", float(num_parameters(config)), {})


def bytes_budget(config: PretrainedConfig, bytes_each: int) -> Budget:
    """Return the bytes of the whole model's weights."""
    return _additive(config, "bytes", float(num_parameters(config)) * bytes_each, {}, per_parameter=bytes_each)


def flops_budget(config: PretrainedConfig, prompt_length: int) -> Budget:
    """Return the floating-point operations for one token: two a weight of linears and head, and the attention to what lies before.

    Args:
        config: of the model.
        prompt_length: tokens of a prompt, over whose tokens this is the mean; a sliding window is not taken into account.
    """
    layout = head_layout(config)
    scores = 4 * layout.head_dim * layout.num_query_heads * (prompt_length + 1) / 2  # q.k and the sum of values: a multiply-add each
    linears = sum(s.num_rows * s.num_columns for s in linear_shapes(config))
    dense = 2.0 * (linears + config.vocab_size * config.hidden_size) + config.num_hidden_layers * scores
    return _additive(config, "flops", dense, {"attention": scores / layout.num_kv_heads}, per_parameter=2)


def _group_numbers(config: PretrainedConfig) -> dict[str, int]:
    return {groups.kind: len(groups.columns) for groups in group_sets(config, linear_shapes(config)) if groups.block == 0}


def _additive(config: PretrainedConfig, unit: str, dense: float, besides: Mapping[str, float], per_parameter: float = 1) -> Budget:
    """Every group needs `per_parameter` for each of its parameters, and something `besides` by its kind."""
    by_left = {}
    for groups in group_sets(config, linear_shapes(config)):
        if groups.block == 0:
            size = per_parameter * groups.num_parameters + besides.get(groups.kind, 0.0)
            by_left[groups.kind] = tuple(size * number for number in range(len(groups.columns) + 1))
    num_blocks = int(config.num_hidden_layers)
    return Budget(unit, dense - num_blocks * sum(table[-1] for table in by_left.values()), by_left, num_blocks)
