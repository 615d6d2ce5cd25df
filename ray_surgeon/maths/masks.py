"""Masks of rows and columns, and of elements. True = kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def places(*masks: Tensor) -> list[Tensor | None]:
    """Return the indices that each mask [n] keeps, or None for a mask that keeps everything.

    The masks are on one device, for which the host waits only once.
    """
    counts = torch.stack([mask.sum() for mask in masks]).tolist()
    kept: list[Tensor | None] = []
    for count, mask in zip(counts, masks, strict=True):
        if count == len(mask):
            kept.append(None)
        else:
            kept.append(mask.byte().argsort(descending=True, stable=True)[:count])
    return kept


@dataclass(frozen=True)
class StructuredMask:
    """Kept rows and columns of one linear, or those on which its factors are inverted."""

    rows: Tensor  # [R] bool. The bias of a pruned row is pruned, too
    # [C] bool. The bias, if there is one, is the last column, and is never pruned as a column
    columns: Tensor

    @staticmethod
    def full(num_rows: int, num_columns: int) -> StructuredMask:
        """Return the mask that keeps everything."""
        return StructuredMask(
            rows=torch.ones(num_rows, dtype=torch.bool),
            columns=torch.ones(num_columns, dtype=torch.bool),
        )

    def without(self, rows: Tensor, columns: Tensor) -> StructuredMask:
        """Return the mask without `rows` [R] and `columns` [C] (True = to prune) either."""
        return StructuredMask(self.rows & ~rows, self.columns & ~columns)

    @property
    def num_kept(self) -> int:
        """Number of kept entries: kept rows times kept columns."""
        return int(self.rows.sum()) * int(self.columns.sum())

    def apply_(self, W: Tensor) -> None:
        """Zero the removed rows and columns of W [R, C] in place."""
        W[~self.rows.to(W.device)] = 0
        W[:, ~self.columns.to(W.device)] = 0

    def of(self, whole: Tensor) -> Tensor:
        """Return the kept part of a matrix [R, C] on the mask's device.

        If the mask keeps everything, it is the matrix itself, not a copy.
        """
        rows, columns = places(self.rows, self.columns)
        part = whole
        if rows is not None:
            part = part[rows]
        if columns is not None:
            part = part[:, columns]
        return part

    def put(self, part: Tensor, into: Tensor) -> Tensor:
        """Return a copy of a matrix [R, C] with the kept part replaced."""
        result = into.clone()
        rows, columns = places(self.rows, self.columns)
        if rows is not None and columns is not None:
            result[rows[:, None], columns] = part
        elif rows is not None:
            result[rows] = part
        elif columns is not None:
            result[:, columns] = part
        else:
            result[:] = part
        return result


@dataclass(frozen=True)
class ElementMask:
    """Kept elements of one linear."""

    kept: Tensor  # [R, C] bool. The bias, if there is one, is the last column and is kept

    @staticmethod
    def full(num_rows: int, num_columns: int) -> ElementMask:
        """Return the mask that keeps everything."""
        return ElementMask(torch.ones(num_rows, num_columns, dtype=torch.bool))

    @property
    def num_kept(self) -> int:
        """Number of kept entries."""
        return int(self.kept.sum())


Mask = StructuredMask | ElementMask
"""The part of one linear that earlier shots kept."""
