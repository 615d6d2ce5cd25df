"""Hooks that see the inputs, outputs and gradients of linears."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ray_surgeon.maths.products import PackedSymmetric, with_ones
from ray_surgeon.memory.transfers import transfers
from ray_surgeon.models.build import LinearModule, as_linear, num_inputs
from ray_surgeon.models.layout import LinearShape


def inputs_of(module: LinearModule, inputs: Tensor) -> Tensor:
    """Return the inputs a [num_tokens, C] of a linear, with the bias's ones."""
    a = inputs.detach().flatten(0, -2)
    if module.bias is None:
        return a
    return with_ones(a)


def see_gradient(output: Tensor, see: Callable[[Tensor], None]) -> None:
    """Call ``see(g)`` with the gradient g [N, d] at an output, if it has one."""
    if output.requires_grad:
        output.register_hook(lambda g: see(g.detach().flatten(0, -2)))  # type: ignore[no-untyped-call]


def watch_gradients(module: nn.Module, see: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``see(g)`` with the gradients g [N, d] at the outputs of a module."""
    return module.register_forward_hook(
        lambda _, inputs, output: see_gradient(output, see)
    )


def watch_pairs(
    module: LinearModule,
    see: Callable[[Tensor, Tensor], None],
) -> RemovableHandle:
    """Call ``see(a, g)`` in the backward pass of a linear, float32.

    a [N, C] are its inputs, g [N, R] the gradients at its outputs.

    The inputs of micro-batches in flight are kept until then.
    """

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        see_gradient(
            output, lambda g: see(inputs_of(module, inputs[0]).float(), g.float())
        )

    return module.register_forward_hook(hook)


class SharedInput:
    """Linears that read the same input, and so share one A.

    Attributes:
        linears: global name of each linear -> its module.
        place: position of their block in the shard.
        names: global names of the linears.
        roles: of the linears, see `LinearShape`.
        key_of_A: key under which their A is stored.
        keys_of_G: name of each linear -> key under which its G is stored.
        sizes: key of their A, then of every G -> number of its rows.
        num_tokens: tokens in the sums.
    """

    def __init__(
        self, place: int, linears: Sequence[tuple[LinearShape, nn.Module]]
    ) -> None:
        """Collect the linears.

        Args:
            place: position of their block in the shard.
            linears: shape and module of each.
        """
        first, _ = linears[0]
        self.place = place
        self.key_of_A = f"{first.name}.A"
        self.sizes = {self.key_of_A: first.num_columns}
        self.keys_of_G = dict[str, str]()
        self.linears = dict[str, LinearModule]()
        for shape, module in linears:
            key_of_G = f"{shape.name}.G"
            self.linears[shape.name] = as_linear(module)
            self.keys_of_G[shape.name] = key_of_G
            self.sizes[key_of_G] = shape.num_rows
        self.names = tuple(self.linears)
        self.roles = {shape.role for shape, _ in linears}
        self.num_tokens = 0

    def add_to(
        self,
        factors: Mapping[str, PackedSymmetric],
        wide: bool,
    ) -> list[RemovableHandle]:
        """Add inputs to A and gradients to the given G, until the hooks are removed.

        Args:
            factors: A and some G by their keys.
            wide: see `ModelShard.gathering_in`.

        Returns:
            The hooks.
        """
        first = self.linears[self.names[0]]

        def add_inputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            a = inputs_of(first, inputs[0])
            if wide:
                a = a.float()
            factors[self.key_of_A].add(a)
            self.num_tokens += len(a)

        hooks = list[RemovableHandle]()
        for name, key in self.keys_of_G.items():
            if key in factors:
                hooks.append(watch_gradients(self.linears[name], factors[key].add))
        return [first.register_forward_pre_hook(add_inputs), *hooks]


class LayerInputs:
    """Inputs of some layers, bfloat16 in the host's memory.

    Memory is reserved at the start; a layer's part is freed once its inputs are taken. Transfers
    from an accelerator run in the background.
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[int, LinearModule]],
        num_tokens: int,
        device: torch.device,
    ) -> None:
        """Reserve memory for the inputs.

        Args:
            layers: name of a layer's last linear -> position of its block in the shard, and a
                linear that reads the layer's inputs.
            num_tokens: number of tokens that will pass.
            device: device of the inputs.
        """
        self._layers = layers
        self._kept = dict[str, Tensor]()
        for name, (_, module) in layers.items():
            self._kept[name] = torch.empty(
                num_tokens, num_inputs(module), dtype=torch.bfloat16
            )
        self._num_kept = dict.fromkeys(layers, 0)
        self._device = device

    @property
    def kept(self) -> dict[str, Tensor]:
        """Name of a layer's last linear -> its layer's inputs [N, d], complete."""
        transfers(self._device).settle()
        return self._kept

    def watch(self, place: int) -> list[RemovableHandle]:
        """Keep the inputs of the layers of a block from now on, until the hooks are removed."""
        hooks = list[RemovableHandle]()
        for name, (place_of_layer, module) in self._layers.items():
            if place_of_layer == place:
                keep = partial(self._keep, name)
                hooks.append(module.register_forward_pre_hook(keep))
        return hooks

    def _keep(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2)
        first = self._num_kept[name]
        transfers(self._device).land(x, self._kept[name][first : first + len(x)])
        self._num_kept[name] += len(x)
