"""Low-rank first-order corrections beside the linears of a shard: y = W x + B A x, trained and then absorbed, W <- W + B A.

Source: docs/method.md, section 7; The LLM Surgeon, section 3.5. Pruned weights stay exactly zero: the pruned rows of B and columns of A
are left out, and for elements B A itself is masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ray_surgeon.models.linears import LinearModule, num_inputs, num_outputs
from ray_surgeon.models.shard import ModelShard
from ray_surgeon.surgery.masks import ElementMask, Mask


class LowRank:
    """B A of one linear; B starts at zero, so that the model starts as it is."""

    def __init__(self, module: LinearModule, mask: Mask, rank: int, seed: int, device: torch.device) -> None:
        """Draw A with a seed of the linear's own, the same on every replica and for any number of shards."""
        C, R = num_inputs(module), num_outputs(module)
        generator = torch.Generator().manual_seed(seed)
        start = (2 * torch.rand(rank, C, generator=generator) - 1) / C**0.5
        self.A = start.to(device).requires_grad_()
        self.B = torch.zeros(R, rank, device=device, requires_grad=True)
        self.by_element = isinstance(mask, ElementMask)
        if isinstance(mask, ElementMask):
            self.kept = mask.kept[:, :C].to(device)
        else:
            self.rows, self.columns = mask.rows.to(device)[:, None], mask.columns[:C].to(device)

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
    """x (B A * kept)^T. The product is as large as the weight; it is made again in the backward pass, so that none waits for it."""

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


class LowRankCorrections:
    """Corrections of all linears of a shard while they are trained."""

    def __init__(
        self,
        shard: ModelShard,
        masks: Mapping[str, Mask],
        owned: set[str],
        *,
        rank: int,
        learning_rate: float,
        seed_of: Mapping[str, int],
    ) -> None:
        """Add zero corrections to the outputs.

        Args:
            shard: with its weights.
            masks: of its linears.
            owned: linears whose optimizer lives here.
            rank: of B A.
            learning_rate: of Adam.
            seed_of: name -> seed of A.
        """
        self._shard = shard
        linears = shard.linears
        self.parts = {name: LowRank(linears[name], masks[name], rank, seed_of[name], shard.device) for name in linears}
        parameters = [parameter for name in owned for parameter in (self.parts[name].A, self.parts[name].B)]
        self._optimizer = torch.optim.Adam(parameters, lr=learning_rate) if parameters else None
        self._hooks: list[RemovableHandle] = [module.register_forward_hook(adding(self.parts[n])) for n, module in linears.items()]

    def gradients(self, name: str, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return the gradients of the mean loss with respect to A and B of a linear, zero if nothing has passed, and keep them there."""
        part = self.parts[name]
        for parameter in (part.A, part.B):
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / num_tokens
        assert part.A.grad is not None
        assert part.B.grad is not None
        return part.A.grad, part.B.grad

    def step(self) -> None:
        """Make one step with the gradients of the owned linears, and forget all gradients."""
        if self._optimizer is not None:
            self._optimizer.step()
        for part in self.parts.values():
            part.A.grad = part.B.grad = None

    @torch.no_grad()
    def absorb(self) -> dict[str, tuple[float, float]]:
        """Add every B A to its weight and remove the corrections.

        Returns:
            Name -> <change of W, B A> and |B A|^2. In a narrow dtype an entry of B A below half of a step of its weight changes nothing.
        """
        for hook in self._hooks:
            hook.remove()
        arrived: dict[str, tuple[float, float]] = {}
        for name, part in self.parts.items():
            W, added = self._shard.weight(name), part.product()
            inputs = W[:, : part.A.shape[1]]
            before = inputs.to(self._shard.dtype, copy=True)  # which is what they are
            inputs += added
            self._shard.set_weight(name, W)
            del W, inputs
            change = self._shard.weight(name)[:, : part.A.shape[1]].sub_(before)
            arrived[name] = float(torch.linalg.vecdot(change, added).sum()), float(torch.linalg.vecdot(added, added).sum())
        return arrived


def adding(part: LowRank) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Return the forward hook that adds B A x to the outputs of a linear."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + part.added(inputs[0])

    return hook
