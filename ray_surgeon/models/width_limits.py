"""Which widths pruning may leave of the blocks of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import kv_heads_left


@dataclass(frozen=True)
class WidthLimits:
    """What pruning may leave of the blocks."""

    # kind of groups that are pruned -> how many stay in every block; other kinds stay whole
    fewest: Mapping[str, int]
    multiple: int  # feed-forward widths are multiples of this in the end
    tensor_parallel: int  # devices over which engines will split heads and channels
    uniform: bool  # whether all blocks have the same widths, which a plain class must hold
    layers: tuple[str, ...] = ()  # kinds of layers that may go whole

    def channels(self, layout: ModelLayout) -> list[int]:
        """Return the widths that a feed-forward layer may have, in ascending order."""
        return self._left("ffn", layout.num_channels, range(0, layout.num_channels, self.multiple))

    def kv_heads(self, layout: ModelLayout) -> list[int]:
        """Return the numbers of KV heads that a block may have, in ascending order."""
        possible = kv_heads_left(layout, self.tensor_parallel, uniform=self.uniform)
        return self._left("attention", layout.heads.num_kv, possible)

    def inputs(self, layout: ModelLayout) -> dict[str, list[int]]:
        """Return consumer of coupled groups -> how many columns it may have."""
        possible = {}
        for groups in layout.group_sets:
            whole, each = groups.columns.shape
            left = self._left(groups.kind, whole, range(0, whole, self.multiple))
            if groups.kind == "attention":
                left = self.kv_heads(layout)
            possible[groups.consumer] = [number * each for number in left]
        return possible

    def _left(self, kind: str, whole: int, possible: Iterable[int]) -> list[int]:
        least = 0 if f"{kind}_layers" in self.layers else self.fewest.get(kind, whole)
        return sorted({*(n for n in possible if n >= least), whole})
