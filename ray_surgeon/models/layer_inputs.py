"""What feed-forward layers read in a pass over the calibration text, kept for a reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ray_surgeon.models.linears import LinearModule


class LayerInputs:
    """Inputs of some layers, bfloat16 in the host's memory."""

    def __init__(self, layers: Mapping[str, tuple[int, LinearModule]]) -> None:
        """Start with none.

        Args:
            layers: name of a layer's last linear -> place of its block in the shard, and a linear that reads the layer's inputs.
        """
        self._layers = dict(layers)
        self._parts: dict[str, list[Tensor]] = {name: [] for name in layers}

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' last linears."""
        return tuple(self._layers)

    def watch(self, place: int) -> list[RemovableHandle]:
        """Keep what the layers of a block read from now on, until the hooks are removed."""
        return [
            module.register_forward_pre_hook(_adding_to(self._parts[name])) for name, (at, module) in self._layers.items() if at == place
        ]

    def take(self, name: str) -> Tensor:
        """Return the inputs [N, d] of a layer, and keep them no longer."""
        parts, self._parts[name] = self._parts[name], []
        return torch.cat(parts)

    def put(self, name: str, inputs: Tensor) -> None:
        """Keep inputs [N, d] of a layer."""
        self._parts[name] = [inputs]


def _adding_to(parts: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        parts.append(inputs[0].detach().flatten(0, -2).to("cpu", torch.bfloat16, copy=True))

    return hook
