"""Hooks that see what passes linears, and linears whose inputs and gradients are summed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ray_surgeon.maths.kronecker import PackedSymmetric, with_ones
from ray_surgeon.models.build import shared_inputs_of
from ray_surgeon.models.linears import LinearModule, as_linear, num_inputs

if TYPE_CHECKING:
    from ray_surgeon.models.shard import ModelShard


def inputs_of(module: LinearModule, inputs: Tensor) -> Tensor:
    """Return the inputs a [num_tokens, C] of a linear, with the bias's ones."""
    a = inputs.detach().flatten(0, -2)
    return a if module.bias is None else with_ones(a)


def see_gradient(output: Tensor, see: Callable[[Tensor], None]) -> None:
    """Call ``see(g)`` with the gradient g [N, d] at an output, if it has one."""
    if output.requires_grad:
        output.register_hook(lambda g: see(g.detach().flatten(0, -2)))  # type: ignore[no-untyped-call]


def watch_gradients(module: nn.Module, see: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``see(g)`` with the gradients g [N, d] at the outputs of a module."""
    return module.register_forward_hook(lambda _, inputs, output: see_gradient(output, see))


def watch_pairs(module: LinearModule, see: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
    """Call ``see(a, g)`` in the backward pass of a linear, float32.

    a [N, C] are its inputs, g [N, R] the gradients at its outputs.

    The inputs of micro-batches in flight are kept until then.
    """

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        see_gradient(output, lambda g: see(inputs_of(module, inputs[0]).float(), g.float()))

    return module.register_forward_hook(hook)


@dataclass
class SharedInput:
    """Linears that read the same input, and so share one A."""

    linears: Mapping[str, LinearModule]  # by their global names
    place: int  # of their block in the shard
    # under which their A, then every G, is stored -> the number of its rows
    sizes: Mapping[str, int]
    num_tokens: int = 0  # tokens in the sums

    @property
    def names(self) -> tuple[str, ...]:
        """Global names of the linears."""
        return tuple(self.linears)

    @property
    def key_of_A(self) -> str:
        """Under which their A is stored."""
        return f"{self.names[0]}.A"

    @staticmethod
    def key_of_G(name: str) -> str:
        """Under which the G of one of them is stored."""
        return f"{name}.G"

    def add_to(self, factors: Mapping[str, PackedSymmetric], wide: bool) -> list[RemovableHandle]:
        """Add inputs to A, and gradients to the G that are wanted, until the hooks are removed.

        Args:
            factors: A and some G by their keys.
            wide: see `ModelShard.gathering_in`.
        """
        first, *_ = self.linears.values()

        def add_inputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            a = inputs_of(first, inputs[0])
            factors[self.key_of_A].add(a.float() if wide else a)
            self.num_tokens += len(a)

        return [first.register_forward_pre_hook(add_inputs)] + [
            watch_gradients(module, factors[self.key_of_G(name)].add)
            for name, module in self.linears.items()
            if self.key_of_G(name) in factors
        ]


def linears_of(groups: Iterable[SharedInput]) -> dict[str, LinearModule]:
    """Return the linears of groups by their global names."""
    return {name: module for group in groups for name, module in group.linears.items()}


def shared_inputs_in(shard: ModelShard) -> Iterator[SharedInput]:
    """Yield the linears of a shard by shared input."""
    family = shard.layout.family
    shapes = shard.layout.shapes
    for place, block in enumerate(shard.block_modules):
        prefix = family.block_prefix(shard.blocks.first + place)
        for group in shared_inputs_of(family, block):
            linears = {prefix + name: as_linear(block.get_submodule(name)) for name in group}
            first = prefix + group[0]
            sizes = {f"{first}.A": shapes[first].num_columns}
            sizes |= {SharedInput.key_of_G(name): shapes[name].num_rows for name in linears}
            yield SharedInput(linears, place, sizes)


class LayerInputs:
    """Inputs of some layers, bfloat16 in the host's memory.

    The memory is reserved at the start and returned as soon as one is taken.
    """

    def __init__(self, layers: Mapping[str, tuple[int, LinearModule]], num_tokens: int) -> None:
        """Start with none.

        Args:
            layers: name of a layer's last linear -> place of its block in the shard, and a linear
                that reads the layer's inputs.
            num_tokens: that will pass.
        """
        self._layers = layers
        # name of a layer's last linear -> its inputs [N, d]
        self.kept = {
            name: torch.empty(num_tokens, num_inputs(module), dtype=torch.bfloat16)
            for name, (_, module) in layers.items()
        }
        self._num_kept = dict.fromkeys(layers, 0)

    def watch(self, place: int) -> list[RemovableHandle]:
        """Keep what the layers of a block read from now on, until the hooks are removed."""
        return [
            module.register_forward_pre_hook(partial(self._keep, name))
            for name, (at, module) in self._layers.items()
            if at == place
        ]

    def _keep(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2)
        first = self._num_kept[name]
        self.kept[name][first : first + len(x)] = x
        self._num_kept[name] += len(x)
