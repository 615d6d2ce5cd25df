"""Adam with steps relative to the sizes of what it changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

CLIP = 2.0
"""Times the mean norm of the gradients before, to which a gradient is clipped."""


class Trained(NamedTuple):
    """A tensor that is trained."""

    parameter: Tensor  # float32
    size: float  # by how much it changes in a step of rate 1


class RelativeAdam:
    """Adam on tensors by name, whose rates are relative to their sizes.

    Each gradient is clipped to `CLIP` times the mean norm of those before, so that no sum over all
    tensors, of other workers too, is needed.
    """

    def __init__(self, trained: Mapping[str, Trained]) -> None:
        """Start without moments."""
        self._trained = trained
        self._history = dict.fromkeys(trained, (0.0, 0))  # mean norm, and of how many gradients
        # Adam wants a group at least
        groups: list[dict[str, Any]] = [{"params": [torch.empty(0)]}]
        groups += [{"params": [part.parameter], "name": name} for name, part in trained.items()]
        self._optimizer = torch.optim.Adam(groups, fused=True)

    def step(self, rate: float) -> None:
        """Make one step with the gradients that are there.

        Args:
            rate: relative to the sizes.
        """
        groups = self._optimizer.param_groups[1:]
        passed = [group for group in groups if group["params"][0].grad is not None]
        gradients = [group["params"][0].grad for group in passed]
        norms = torch.stack(torch._foreach_norm(gradients)).tolist() if passed else []
        for group, gradient, norm in zip(passed, gradients, norms, strict=True):
            name = group["name"]
            group["lr"] = rate * self._trained[name].size
            mean, count = self._history[name]
            if mean > 0 and norm > CLIP * mean:
                gradient.mul_(CLIP * mean / norm)
                norm = CLIP * mean
            self._history[name] = (mean * count + norm) / (count + 1), count + 1
        self._optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Return what steps change beside the tensors themselves, by name; not copied."""
        tensors = dict[str, Tensor]()
        for name, part in self._trained.items():
            tensors[f"{name} norms"] = torch.tensor(self._history[name], dtype=torch.float64)
            for what, moment in self._optimizer.state.get(part.parameter, {}).items():
                tensors[f"{name} {what}"] = moment
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to a state; its tensors stay untouched."""
        for name, part in self._trained.items():
            mean, count = tensors[f"{name} norms"].tolist()
            self._history[name] = mean, int(count)
            device = part.parameter.device
            kept = {
                what: tensors[f"{name} {what}"].to(device, copy=True)
                for what in ("step", "exp_avg", "exp_avg_sq")
                if f"{name} {what}" in tensors
            }
            self._optimizer.state.pop(part.parameter, None)
            if kept:
                self._optimizer.state[part.parameter] = kept
