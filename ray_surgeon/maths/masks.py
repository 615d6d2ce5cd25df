"""Masks of rows and columns, and of elements. True = kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        is_all = self.rows.all() and self.columns.all()
        return whole if is_all else whole[self.rows][:, self.columns]

    def put(self, part: Tensor, into: Tensor) -> Tensor:
        """Return a copy of a matrix [R, C] in which the kept part is replaced."""
        result = into.clone()
        result[self.rows.nonzero(), self.columns.nonzero()[:, 0]] = part
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
