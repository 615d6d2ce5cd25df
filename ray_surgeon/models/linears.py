"""Linears as the method sees them, however a family stores the weight.

That is `nn.Linear` [R, C] or GPT-2's `Conv1D` [C, R].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ray_surgeon.maths.products import times_constant

LinearModule: TypeAlias = nn.Linear | Conv1D


@dataclass(frozen=True)
class Coupling:
    """Linears that lose rows when columns of the linear that reads their outputs are pruned."""

    consumer: str  # the linear whose columns decide, e.g. ``mlp.down_proj``
    # those of gate and up, or of queries, keys and values; they share their input
    producers: tuple[str, ...]
    num_parts: int = 1  # how many of these lie one after the other in each producer

    @property
    def parts(self) -> list[tuple[str, int]]:
        """Of what the consumer reads: the linear, and which part of its rows."""
        return [(name, part) for name in self.producers for part in range(self.num_parts)]


def as_linear(module: nn.Module) -> LinearModule:
    """Return a module that is a linear; a family that names another kind is wrong."""
    assert isinstance(module, nn.Linear | Conv1D), f"{type(module).__name__} is no linear"
    return module


def matrix(module: LinearModule) -> Tensor:
    """Return the weight as a view [R, inputs]; writing to it writes to the module."""
    weight: Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def cut(module: LinearModule, part: str, stored: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the ``weight`` or ``bias`` of a linear with its kept rows and columns.

    It is as it is stored; the rows [R] and input columns [C] are bool.
    """
    rows = rows.to(stored.device)
    columns = columns.to(stored.device)
    if part == "bias":
        return stored[rows]
    return stored[columns][:, rows] if isinstance(module, Conv1D) else stored[rows][:, columns]


def use_fast_products(module: LinearModule) -> None:
    """Let a linear whose weight needs no gradient make its products by `times_constant`."""

    def forward(x: Tensor) -> Tensor:
        y = times_constant(x, module.weight if isinstance(module, Conv1D) else module.weight.T)
        return y if module.bias is None else y + module.bias

    module.forward = forward  # type: ignore[method-assign]


def num_outputs(module: LinearModule) -> int:
    """Return R."""
    return int(matrix(module).shape[0])


def num_inputs(module: LinearModule) -> int:
    """Return C without the bias."""
    return int(matrix(module).shape[1])
