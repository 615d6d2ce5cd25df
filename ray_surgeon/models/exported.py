"""The tensors of a shard in the form in which checkpoints hold them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from ray_surgeon.maths.masks import Mask, StructuredMask
from ray_surgeon.models.build import cut, num_inputs
from ray_surgeon.models.checkpoint import Stored
from ray_surgeon.models.layout import GroupSet, ModelLayout
from ray_surgeon.models.shard import ModelShard


class ExportedTensors:
    """Cuts pruned rows, columns, heads and experts out of the tensors of a shard."""

    def __init__(
        self,
        shard: ModelShard,
        masks: Mapping[str, Mask],
        group_sets: Sequence[GroupSet],
        *,
        blocks: Sequence[int],
        left_out: Collection[str],
        stored: bool,
    ) -> None:
        """Find the remaining heads and experts.

        Args:
            shard: with its weights.
            masks: of its linears; if empty, nothing is cut out.
            group_sets: coupled groups of its blocks.
            blocks: numbers of the model's blocks to write, which are renumbered in this order.
            left_out: names of other tensors that are not written.
            stored: whether tensors have the names of the family's checkpoints, or those used here.
        """
        self._blocks = blocks
        self._left_out = left_out
        self._shard = shard
        self._masks = masks
        layout = shard.layout
        self._stored = Stored(layout, shard.blocks, masks, stored=stored)
        # name of a tensor or module with one entry per head or expert -> which entries remain
        self._entries = dict(self._stored.entries)
        if masks and layout.family.per_head:
            self._entries.update(_heads_left(layout, masks, group_sets))

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors without the parts that are cut out; see `Stored.whole`.

        Tensors that become empty are left out.
        """
        layout = self._shard.layout
        written = {None, *self._blocks}
        for name in names:
            if name not in self._left_out and layout.block_of(name) in written:
                stored = layout.renumbered(self._stored.name(name), self._blocks)
                tensor = self._stored.whole(name, self._cut(name))
                if tensor.numel():
                    yield stored, tensor

    def _cut(self, name: str) -> Tensor:
        tensor = self._shard.tensor(name)
        linear, _, part = name.rpartition(".")
        entries = self._entries.get(name, self._entries.get(linear))
        if entries is not None:
            return tensor[entries.to(tensor.device)]
        mask = self._masks.get(linear)
        if mask is None:
            return tensor
        assert isinstance(mask, StructuredMask)
        module = self._shard.linears[linear]
        return cut(module, part, tensor, mask.rows, mask.columns[: num_inputs(module)])


def _heads_left(
    layout: ModelLayout, masks: Mapping[str, Mask], group_sets: Sequence[GroupSet]
) -> dict[str, Tensor]:
    """Return name of a tensor with one entry per query head -> which entries remain."""
    entries: dict[str, Tensor] = {}
    for groups in group_sets:
        if groups.kind != "attention":
            continue
        mask = masks[groups.consumer]
        assert isinstance(mask, StructuredMask)
        columns = mask.columns[groups.columns.flatten()].view(-1, layout.heads.head_dim)
        remaining = columns.any(dim=1)
        prefix = layout.family.block_prefix(groups.block)
        for name in layout.family.per_head:
            entries[prefix + name] = remaining
    return entries
