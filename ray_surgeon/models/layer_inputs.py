"""What feed-forward layers read in a pass over the calibration text, kept for a reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ray_surgeon.models.linears import LinearModule, num_inputs


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
        self._layers = dict(layers)
        self._kept = {
            n: torch.empty(num_tokens, num_inputs(module), dtype=torch.bfloat16)
            for n, (_, module) in layers.items()
        }
        self._num_kept = dict.fromkeys(layers, 0)

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' last linears."""
        return tuple(self._layers)

    def watch(self, place: int) -> list[RemovableHandle]:
        """Keep what the layers of a block read from now on, until the hooks are removed."""
        return [
            module.register_forward_pre_hook(self._adding_to(name))
            for name, (at, module) in self._layers.items()
            if at == place
        ]

    def _adding_to(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2)
            first = self._num_kept[name]
            self._kept[name][first : first + len(x)] = x
            self._num_kept[name] += len(x)

        return hook

    def look_at(self, name: str) -> Tensor:
        """Return the inputs [N, d] of a layer, which stay here, too."""
        return self._kept[name]

    def take(self, name: str) -> Tensor:
        """Return the inputs [N, d] of a layer, and keep them no longer."""
        return self._kept.pop(name)

    def put(self, name: str, inputs: Tensor) -> None:
        """Keep inputs [N, d] of a layer."""
        self._kept[name] = inputs
