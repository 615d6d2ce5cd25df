"""Masks of rows and columns, and of elements. True = kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def places(*masks: Tensor) -> list[Tensor | None]:
    """Return the indices of what masks [n] of one device keep, None where that is all.

    The host waits once for all of them.
    """
    counts = torch.stack([mask.sum() for mask in masks]).tolist()
    return [
        None if count == len(mask) else mask.byte().argsort(descending=True, stable=True)[:count]
        for mask, count in zip(masks, counts, strict=True)
    ]


@dataclass(frozen=True)
class StructuredMask:
    """Kept rows and columns of one linear, or those on which its factors are inverted."""

    rows: Tensor  # [R] bool. A pruned row takes its bias with it
    # [C] bool. The bias, where there is one, is the last column, and is never pruned as a column
    columns: Tensor

    @staticmethod
    def full(num_rows: int, num_columns: int) -> StructuredMask:
        """Return the mask that keeps everything."""
        return StructuredMask(*(torch.ones(n, dtype=torch.bool) for n in (num_rows, num_columns)))

    def without(self, rows: Tensor, columns: Tensor) -> StructuredMask:
        """Return the mask with `rows` [R] and `columns` [C] (True = to prune) removed too."""
        return StructuredMask(self.rows & ~rows, self.columns & ~columns)

    @property
    def num_kept(self) -> int:
        """Entries that are kept: kept rows times kept columns.

        So the overlap of removals counts once.
        """
        return int(self.rows.sum()) * int(self.columns.sum())

    def apply_(self, W: Tensor) -> None:
        """Zero the removed rows and columns of W [R, C] in place."""
        W[~self.rows.to(W.device)] = 0
        W[:, ~self.columns.to(W.device)] = 0

    def of(self, whole: Tensor) -> Tensor:
        """Return the kept part of a matrix [R, C] on the mask's device, itself if that is all."""
        rows, columns = places(self.rows, self.columns)
        whole = whole if rows is None else whole[rows]
        return whole if columns is None else whole[:, columns]

    def put(self, part: Tensor, into: Tensor) -> Tensor:
        """Return a copy of a matrix [R, C] in which the kept part is replaced."""
        result = into.clone()
        rows, columns = places(self.rows, self.columns)
        whole = slice(None)
        if rows is not None and columns is not None:
            rows = rows[:, None]
        result[whole if rows is None else rows, whole if columns is None else columns] = part
        return result


@dataclass(frozen=True)
class ElementMask:
    """Kept elements of one linear."""

    kept: Tensor  # [R, C] bool. The bias, where there is one, is the last column and stays

    @staticmethod
    def full(num_rows: int, num_columns: int) -> ElementMask:
        """Return the mask that keeps everything."""
        return ElementMask(torch.ones(num_rows, num_columns, dtype=torch.bool))

    @property
    def num_kept(self) -> int:
        """Entries that are kept."""
        return int(self.kept.sum())


Mask = StructuredMask | ElementMask
"""What earlier shots have left of one linear."""
