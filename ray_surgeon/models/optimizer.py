"""Adam with steps relative to the sizes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

CLIP = 2.0
"""A gradient is clipped to this multiple of the mean norm of the earlier gradients."""


class Trained(NamedTuple):
    """A trained tensor."""

    parameter: Tensor  # float32
    size: float  # change of an entry in a step of rate 1


class RelativeAdam:
    """Adam on named tensors, with rates relative to their sizes.

    Each gradient is clipped to `CLIP` times the mean norm of the earlier ones, which needs no sum
    over all tensors of all workers.
    """

    def __init__(self, trained: Mapping[str, Trained]) -> None:
        """Start without moments."""
        self._trained = trained
        # (mean norm of the gradients, number of gradients)
        self._history: dict[str, tuple[float, int]] = dict.fromkeys(trained, (0.0, 0))
        # Adam needs at least one group
        groups: list[dict[str, Any]] = [{"params": [torch.empty(0)]}]
        for name, part in trained.items():
            groups.append({"params": [part.parameter], "name": name})
        self._optimizer = torch.optim.Adam(groups, fused=True)

    def step(self, rate: float) -> None:
        """Make one step with the present gradients.

        Args:
            rate: learning rate, relative to the sizes.
        """
        groups = []
        gradients = []
        for group in self._optimizer.param_groups[1:]:
            gradient = group["params"][0].grad
            if gradient is not None:
                groups.append(group)
                gradients.append(gradient)
        norms: list[float] = []
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients)).tolist()
        for group, gradient, norm in zip(groups, gradients, norms, strict=True):
            name = group["name"]
            group["lr"] = rate * self._trained[name].size
            mean, count = self._history[name]
            if mean > 0 and norm > CLIP * mean:
                gradient.mul_(CLIP * mean / norm)
                norm = CLIP * mean
            self._history[name] = ((mean * count + norm) / (count + 1), count + 1)
        self._optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Return the moments and gradient norms by name, not copied."""
        tensors: dict[str, Tensor] = {}
        for name, part in self._trained.items():
            history = torch.tensor(self._history[name], dtype=torch.float64)
            tensors[f"{name} norms"] = history
            for key, moment in self._optimizer.state.get(part.parameter, {}).items():
                tensors[f"{name} {key}"] = moment
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore a state; its tensors are copied."""
        for name, part in self._trained.items():
            mean, count = tensors[f"{name} norms"].tolist()
            self._history[name] = (mean, int(count))
            device = part.parameter.device
            moments: dict[str, Tensor] = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{name} {key}" in tensors:
                    moments[key] = tensors[f"{name} {key}"].to(device, copy=True)
            self._optimizer.state.pop(part.parameter, None)
            if moments:
                self._optimizer.state[part.parameter] = moments
