"""Low-rank corrections beside the linears of a shard: y = W x + B A x.

They are trained and then absorbed, W <- W + B A.

Source: docs/method.md, section 7; The LLM Surgeon, section 3.5. Pruned weights stay exactly zero:
the pruned rows of B and columns of A are left out, and for elements B A itself is masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ray_surgeon.maths.masks import ElementMask, Mask
from ray_surgeon.models.build import LinearModule, num_inputs, num_outputs
from ray_surgeon.models.shard import ModelShard

RATE_OF_A = 24.0
"""How much faster A changes than B A, both relative to their sizes; found on SmolLM2."""
CLIP = 2.0
"""Times the mean norm of the gradients before, to which a gradient is clipped."""


class LowRank:
    """B A of one linear; B starts at zero, so that the model starts as it is."""

    def __init__(
        self, module: LinearModule, mask: Mask, rank: int, seed: int, device: torch.device
    ) -> None:
        """Draw A with a seed of the linear's own.

        It is the same on every replica and for any number of shards.
        """
        C = num_inputs(module)
        R = num_outputs(module)
        generator = torch.Generator().manual_seed(seed)
        start = (2 * torch.rand(rank, C, generator=generator) - 1) / C**0.5
        self.A = start.to(device).requires_grad_()
        self.B = torch.zeros(R, rank, device=device, requires_grad=True)
        self.by_element = isinstance(mask, ElementMask)
        if isinstance(mask, ElementMask):
            self.kept = mask.kept[:, :C].to(device)
        else:
            self.rows = mask.rows.to(device)[:, None]
            self.columns = mask.columns[:C].to(device)

    def added(self, x: Tensor) -> Tensor:
        """Return what is added to the outputs for inputs x [..., C]."""
        if self.by_element:
            added: Tensor = _ByElement.apply(x, self.A, self.B, self.kept)  # type: ignore[no-untyped-call]
        else:
            added = x @ (self.A * self.columns).T.to(x.dtype) @ (self.B * self.rows).T.to(x.dtype)
        return added

    def product(self) -> Tensor:
        """Return B A [R, C], zero where the mask is."""
        if self.by_element:
            return torch.mul(self.B @ self.A, self.kept)
        return torch.matmul(self.B * self.rows, self.A * self.columns)


class _ByElement(torch.autograd.Function):
    """x (B A * kept)^T.

    The product is as large as the weight; it is made again in the backward pass, so that none waits
    for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(x, A, B, kept)
        return x @ (B @ A).mul_(kept).T.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, A, B, kept = ctx.saved_tensors
        (g,) = gradients
        of_x = g @ (B @ A).mul_(kept).to(x.dtype) if ctx.needs_input_grad[0] else None
        of_product = (x.flatten(0, -2).T @ g.flatten(0, -2)).T.to(A.dtype) * kept
        return of_x, B.T @ of_product, of_product @ A.T, None


@dataclass(frozen=True)
class CorrectionState:
    """Everything that training changes."""

    parts: dict[str, tuple[Tensor, Tensor]]  # linear -> A, B
    moments: dict[int, dict[str, Any]]  # number of a parameter -> what Adam keeps of it
    mean_norms: dict[tuple[str, int], tuple[float, int]]


class LowRankCorrections:
    """Corrections of all linears of a shard while they are trained.

    A step of Adam changes B by its rate, whatever the weight's size is, so rates are given relative
    to that: by a step of rate 1 the correction changes by the root mean square of the weight, and A
    by `RATE_OF_A` times its own. Each gradient is clipped to `CLIP` times the mean norm of those
    before.
    """

    def __init__(
        self,
        shard: ModelShard,
        masks: Mapping[str, Mask],
        owned: set[str],
        *,
        rank: int,
        seed_of: Mapping[str, int],
    ) -> None:
        """Add zero corrections to the outputs.

        Args:
            shard: with its weights.
            masks: of its linears.
            owned: linears whose optimizer lives here.
            rank: of B A.
            seed_of: name -> seed of A.
        """
        self._shard = shard
        self._rounds = False
        linears = shard.linears
        self.parts = {
            name: LowRank(linears[name], masks[name], rank, seed_of[name], shard.device)
            for name in linears
        }
        self._owned = {name: part for name, part in self.parts.items() if name in owned}
        # `size`: by how much A or B changes in a step of rate 1; Adam wants a group at least
        groups: list[dict[str, Any]] = [{"params": [torch.empty(0)], "size": 0.0}]
        for name, part in self._owned.items():
            of_A = float(part.A.detach().square().mean().sqrt())
            of_W = float(shard.weight(name)[:, : part.A.shape[1]].square().mean().sqrt())
            groups.append({"params": [part.A], "size": RATE_OF_A * of_A})
            groups.append({"params": [part.B], "size": of_W / (of_A * rank**0.5)})
        self._optimizer = torch.optim.Adam(groups)
        # linear and 0 for A or 1 for B -> mean norm, number of steps
        self._mean_norms = dict[tuple[str, int], tuple[float, int]]()
        self._hooks: list[RemovableHandle] = [
            m.register_forward_hook(self._adding(name)) for name, m in linears.items()
        ]

    def gradients(self, name: str, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return the gradients of the mean loss at A and B of a linear, and keep them there.

        They are zero if nothing has passed.
        """
        part = self.parts[name]
        of_A, of_B = (
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / num_tokens
            for parameter in (part.A, part.B)
        )
        part.A.grad = of_A
        part.B.grad = of_B
        return of_A, of_B

    def step(self, rate: float) -> None:
        """Make one step with the gradients of the owned linears, and forget all gradients.

        Args:
            rate: relative to the sizes of the weights, see above.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["size"]
        self._clip()
        self._optimizer.step()
        self.forget_gradients()

    def _clip(self) -> None:
        for name, part in self._owned.items():
            for number, parameter in enumerate((part.A, part.B)):
                gradient = parameter.grad
                if gradient is None:  # nothing has passed
                    continue
                norm = float(gradient.norm())
                mean, count = self._mean_norms.get((name, number), (norm, 0))
                if mean > 0 and norm > CLIP * mean:
                    gradient.mul_(CLIP * mean / norm)
                    norm = CLIP * mean
                self._mean_norms[name, number] = (mean * count + norm) / (count + 1), count + 1

    def forget_gradients(self) -> None:
        """Start the sums of gradients anew."""
        for part in self.parts.values():
            part.A.grad = part.B.grad = None

    def state(self) -> CorrectionState:
        """Return a copy of everything that steps change."""
        parts = {
            name: (part.A.detach().clone(), part.B.detach().clone())
            for name, part in self.parts.items()
        }
        moments = _copied(self._optimizer.state_dict()["state"])
        return CorrectionState(parts, moments, dict(self._mean_norms))

    @torch.no_grad()
    def restore(self, state: CorrectionState) -> None:
        """Go back to a state; what it holds stays untouched."""
        for name, (A, B) in state.parts.items():
            self.parts[name].A.copy_(A)
            self.parts[name].B.copy_(B)
        groups = self._optimizer.state_dict()["param_groups"]
        moments = _copied(state.moments)
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self._mean_norms = dict(state.mean_norms)
        self.forget_gradients()

    def round_as_absorbed(self, rounds: bool) -> None:
        """Let outputs be those of the weights once they have absorbed the corrections, or not.

        Weights are rounded to their own dtype.
        """
        self._rounds = rounds

    def _adding(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        """Return the forward hook that adds B A x to the outputs of a linear."""
        part = self.parts[name]

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            if not self._rounds:
                return output + part.added(x)
            W = self._shard.weight(name)[:, : part.A.shape[1]]
            change = (W + part.product().detach()).to(x.dtype) - W.to(x.dtype)
            return output + x @ change.T

        return hook

    def remove(self) -> None:
        """Remove the corrections; the weights are as they were."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def absorb(self) -> dict[str, tuple[float, float]]:
        """Add every B A to its weight and remove the corrections.

        Returns:
            Name -> <change of W, B A> and |B A|^2. In a narrow dtype an entry of B A below half of
            a step of its weight changes nothing.
        """
        self.remove()
        arrived: dict[str, tuple[float, float]] = {}
        for name, part in self.parts.items():
            W = self._shard.weight(name)
            added = part.product()
            inputs = W[:, : part.A.shape[1]]
            before = inputs.to(self._shard.dtype, copy=True)  # which is what they are
            inputs += added
            self._shard.set_weight(name, W)
            del W, inputs
            change = self._shard.weight(name)[:, : part.A.shape[1]].sub_(before)
            wanted = float(torch.linalg.vecdot(added, added).sum())
            arrived[name] = float(torch.linalg.vecdot(change, added).sum()), wanted
        return arrived


def _copied(moments: Mapping[int, Mapping[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """Copy the state of an optimizer: tensors of some devices cannot be deep-copied."""
    return {
        number: {name: value.clone() for name, value in of_tensor.items()}
        for number, of_tensor in moments.items()
    }
