"""Low-rank corrections beside the linears of a shard: y = W x + B A x.

They are trained and then absorbed, W <- W + B A.

Source: docs/method.md, section 7; The LLM Surgeon, section 3.5. Pruned weights stay exactly zero:
the pruned rows of B and columns of A are left out, and for elements B A itself is masked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ray_surgeon.maths.masks import ElementMask, Mask
from ray_surgeon.maths.products import product, times
from ray_surgeon.models.build import LinearModule, matrix
from ray_surgeon.models.optimizer import RelativeAdam, Trained
from ray_surgeon.models.shard import ModelShard

RATE_OF_A = 24.0
"""How much faster A changes than B A, both relative to their sizes; found on SmolLM2."""


class LowRank:
    """B A of one linear; B starts at zero, so that the model starts as it is."""

    def __init__(
        self, module: LinearModule, mask: Mask, rank: int, seed: int, device: torch.device
    ) -> None:
        """Draw A with a seed of the linear's own.

        It is the same on every replica and for any number of shards.
        """
        R, C = matrix(module).shape
        generator = torch.Generator().manual_seed(seed)
        start = (2 * torch.rand(rank, C, generator=generator) - 1) / C**0.5
        self.size = float(start.square().mean().sqrt())  # of an entry of A, the removed included
        self.kept: Tensor | None = None  # [R, C], of elements
        if isinstance(mask, ElementMask):
            self.kept = mask.kept[:, :C].to(device)
        else:
            self.rows = mask.rows.to(device)[:, None]
            self.columns = mask.columns[:C].to(device)
            start *= mask.columns[:C].to(start.device)
        self.A: Tensor = start.to(device).requires_grad_()
        self.B = torch.zeros(R, rank, device=device, requires_grad=True)

    def outputs(self, x: Tensor, W: Tensor) -> Tensor:
        """Return x (W + B A)^T [N, R] for inputs x [N, C]; W [R, C] has no gradient."""
        outputs: Tensor
        if self.kept is not None:
            outputs = _ByElement.apply(x, self.A, self.B, self.kept)  # type: ignore[no-untyped-call]
            return times(x, W.T) + outputs
        rows = torch.cat([x, x]) if len(x) == 1 else x  # see `times`
        outputs = _Corrected.apply(rows, W, self.A, self.B)  # type: ignore[no-untyped-call]
        return outputs[: len(x)]

    def keep_removed_(self, of_A: Tensor, of_B: Tensor) -> None:
        """Take removed columns from a gradient at A, and removed rows from one at B.

        So these stay zero, as they start, and no pass has to leave them out.
        """
        if self.kept is None:
            of_A.mul_(self.columns)
            of_B.mul_(self.rows)

    def product(self) -> Tensor:
        """Return B A [R, C], zero where the mask is."""
        if self.kept is None:
            return torch.matmul(self.B * self.rows, self.A * self.columns)
        return torch.mul(self.B @ self.A, self.kept)


class _Corrected(torch.autograd.Function):
    """x W^T + (x A^T) B^T, of which W has no gradient.

    What A and B add is summed in the products: outputs and gradients of a linear exist once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        inner = product(x, A.T.to(x.dtype))
        ctx.save_for_backward(x, W, A, B, inner)
        return product(x, W.T).addmm_(inner, B.T.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor]:
        x, W, A, B, inner = ctx.saved_tensors
        (g,) = gradients
        of_inner = product(g, B.to(g.dtype))
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = product(g, W).addmm_(of_inner, A.to(g.dtype))
        of_A = product(of_inner.T, x).to(A.dtype)
        return of_x, None, of_A, product(inner.T, g).T.to(B.dtype)


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


class LowRankCorrections:
    """Corrections of all linears of a shard while they are trained.

    A step of Adam changes B by its rate, whatever the weight's size is, so rates are given relative
    to that: by a step of rate 1 the correction changes by the root mean square of the weight, and A
    by `RATE_OF_A` times its own.
    """

    def __init__(
        self, shard: ModelShard, parts: Mapping[str, LowRank], owned: Collection[str]
    ) -> None:
        """Add corrections to the outputs.

        Args:
            shard: with its weights.
            parts: linear -> its correction, as it starts.
            owned: linears whose optimizer lives here.
        """
        self._shard = shard
        self.parts = parts
        # whether outputs are those of weights that have absorbed the corrections, rounded to their
        # own dtype
        self.rounds = False
        trained = dict[str, Trained]()
        for name in filter(owned.__contains__, parts):
            A = parts[name].A
            of_A = parts[name].size
            of_W = float(shard.weight(name)[:, : A.shape[1]].square().mean().sqrt())
            trained[f"{name}.A"] = Trained(A, RATE_OF_A * of_A)
            trained[f"{name}.B"] = Trained(parts[name].B, of_W / (of_A * len(A) ** 0.5))
        self._optimizer = RelativeAdam(trained)
        self._forwards = {
            name: shard.linears[name].forward for name in parts
        }  # as they are without
        for name in parts:
            shard.linears[name].forward = partial(self._forward, name)  # type: ignore[method-assign]

    def tensors(self, name: str) -> list[Tensor]:
        """Return A and B of a linear, which its owner sends to the others."""
        return [self.parts[name].A.detach(), self.parts[name].B.detach()]

    def gradients(self, name: str, num_tokens: int) -> list[Tensor]:
        """Return the gradients of the mean loss at A and B of a linear, and keep them there.

        They are zero if nothing has passed.
        """
        part = self.parts[name]
        gradients = []
        for parameter in (part.A, part.B):
            passed = parameter.grad
            parameter.grad = torch.zeros_like(parameter) if passed is None else passed / num_tokens
            gradients.append(parameter.grad)
        part.keep_removed_(*gradients)
        return gradients

    def step(self, rate: float) -> None:
        """Make one step with the gradients of the owned linears, and forget all gradients.

        Args:
            rate: relative to the sizes of the weights, see above.
        """
        self._optimizer.step(rate)
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """Start the sums of gradients anew."""
        for part in self.parts.values():
            part.A.grad = part.B.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return everything that steps change, by name; not copied."""
        pairs = ((n, dict(zip("AB", self.tensors(n), strict=True))) for n in self.parts)
        tensors = {f"{name}.{part}": x for name, of_part in pairs for part, x in of_part.items()}
        return tensors | self._optimizer.state()

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to a state; its tensors stay untouched."""
        for name, part in self.parts.items():
            part.A.copy_(tensors[f"{name}.A"])
            part.B.copy_(tensors[f"{name}.B"])
        self._optimizer.load_state(tensors)
        self.forget_gradients()

    def best(self) -> dict[str, Tensor]:
        """Return a copy to which `back_to` goes back."""
        return {name: tensor.clone() for name, tensor in self.state().items()}

    def back_to(self, best: Mapping[str, Tensor]) -> None:
        """Go back to what `best` returned, which stays untouched."""
        self.load_state(best)

    def _forward(self, name: str, x: Tensor) -> Tensor:
        """Return the outputs [..., R] of a linear with its correction, for inputs [..., C]."""
        part = self.parts[name]
        module = self._shard.linears[name]
        if self.rounds:
            W = self._shard.weight(name)[:, : part.A.shape[1]]
            change = (W + part.product().detach()).to(x.dtype) - W.to(x.dtype)
            plain: Tensor = self._forwards[name](x)
            return plain + x @ change.T
        outputs = part.outputs(x.flatten(0, -2), matrix(module))
        outputs = outputs if module.bias is None else outputs + module.bias
        return outputs.view(*x.shape[:-1], outputs.shape[1])

    def remove(self) -> None:
        """Remove the corrections; the weights are as they were before the training."""
        for name, forward in self._forwards.items():
            self._shard.linears[name].forward = forward  # type: ignore[method-assign]

    @torch.no_grad()
    def absorb(self) -> dict[str, tuple[float, float]]:
        """Add every B A to its weight and remove the corrections.

        Returns:
            Name -> <change of W, B A> and |B A|^2. In a narrow dtype an entry of B A below half of
            a step of its weight changes nothing.
        """
        self.remove()
        arrived = dict[str, tuple[float, float]]()
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
