"""Widths that pruning may leave in the blocks of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import kv_heads_left


@dataclass(frozen=True)
class WidthLimits:
    """Limits on the widths that pruning may leave in the blocks."""

    # kind of pruned groups -> least number that every block keeps; other kinds are not pruned
    fewest: Mapping[str, int]
    multiple: int  # final feed-forward widths are multiples of this
    tensor_parallel: int  # devices over which engines will split heads and channels
    # whether all blocks have the same widths, as a class of transformers needs
    uniform: bool
    layers: tuple[str, ...] = ()  # kinds of layers that may be removed whole

    def channels(self, layout: ModelLayout) -> list[int]:
        """Return the possible widths of a feed-forward layer, ascending."""
        possible = range(0, layout.num_channels, self.multiple)
        return self._left("ffn", layout.num_channels, possible)

    def kv_heads(self, layout: ModelLayout) -> list[int]:
        """Return the possible numbers of KV heads of a block, ascending."""
        possible = kv_heads_left(layout, self.tensor_parallel, uniform=self.uniform)
        return self._left("attention", layout.heads.num_kv, possible)

    def inputs(self, layout: ModelLayout) -> dict[str, list[int]]:
        """Return consumer of coupled groups -> its possible numbers of columns, ascending."""
        possible = {}
        for groups in layout.group_sets:
            num_groups, width = groups.columns.shape
            if groups.kind == "attention":
                left = self.kv_heads(layout)
            else:
                numbers = range(0, num_groups, self.multiple)
                left = self._left(groups.kind, num_groups, numbers)
            possible[groups.consumer] = [number * width for number in left]
        return possible

    def _left(self, kind: str, whole: int, possible: Iterable[int]) -> list[int]:
        """Return the possible numbers of groups that a block may keep, and all `whole` of them."""
        least = self.fewest.get(kind, whole)
        if f"{kind}_layers" in self.layers:
            least = 0
        allowed = {number for number in possible if number >= least}
        allowed.add(whole)
        return sorted(allowed)
