"""Power iterations over a shard: the moments from which further Kronecker terms follow.

Source: docs/method.md, section 1. Each iteration is a forward and backward pass: one for A with G held, the next for G with A held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ray_surgeon.models.shard import ModelShard, watch_pairs
from ray_surgeon.surgery.extended.terms import quadratic_forms
from ray_surgeon.surgery.kronecker import add_second_moment, symmetrize

Side = Literal["g", "a"]


class PowerIteration:
    """The term that is being found, for every linear of a shard.

    Attributes:
        unit_G: name -> [R, R] of norm 1, and
        unit_A: name -> [C, C]: the present factors.
        moments: name -> the sum of the pass, of the side that is wanted.
        sigma: name -> the norm the last factor had, at its owner.
    """

    def __init__(self, shard: ModelShard) -> None:
        """Take a shard whose weights stay as they are."""
        self._shard = shard
        self.unit_G: dict[str, Tensor] = {}
        self.unit_A: dict[str, Tensor] = {}
        self.moments: dict[str, Tensor] = {}
        self.sigma: dict[str, float] = {}
        self._hooks: list[RemovableHandle] = []

    def start(self, side: Side) -> None:
        """Install the hooks of a pass: ``g`` sums (a^T A a) g g^T, ``a`` sums (g^T G g) a a^T."""
        assert not self._hooks
        other = self.unit_A if side == "g" else self.unit_G
        for name, module in self._shard.gathered.items():
            size = self._size(name, side)
            self.moments[name] = torch.zeros(size, size, device=self._shard.device)
            self._hooks.append(watch_pairs(module, _add_moment(self.moments[name], other[name], side)))

    def _size(self, name: str, side: Side) -> int:
        return self._shard.weight(name).shape[side == "a"]

    def stop(self) -> None:
        """Remove the hooks and complete the symmetric sums."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for total in self.moments.values():
            symmetrize(total)


def _add_moment(total: Tensor, other: Tensor, side: Side) -> Callable[[Tensor, Tensor], None]:
    def see(a: Tensor, g: Tensor) -> None:
        wanted, weighing = (g, a) if side == "g" else (a, g)
        add_second_moment(total, wanted, quadratic_forms(weighing, other))

    return see
