"""Low-rank corrections beside the linears of a shard: y = W x + B A x.

They are trained by `RelativeAdam` and then absorbed, W <- W + B A.

Source: docs/method.md, section 7; The LLM Surgeon, section 3.5. Pruned weights stay exactly zero:
pruned rows of B and pruned columns of A stay zero, and B A is masked where single elements are
pruned.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ray_surgeon.maths.masks import ElementMask, Mask
from ray_surgeon.maths.products import product, times
from ray_surgeon.models.build import LinearModule, matrix
from ray_surgeon.models.shard import ModelShard

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


RATE_OF_A = 24.0
"""Rate of A over the rate of B A, both relative to their sizes; tuned on SmolLM2."""


class LowRank:
    """B A of one linear; B starts at zero, so the model is unchanged at first."""

    def __init__(
        self,
        module: LinearModule,
        mask: Mask,
        rank: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """Draw A and start with B = 0.

        Args:
            module: the linear.
            mask: mask of the linear.
            rank: rank of B A.
            seed: seed of A, one per linear. A is the same on every replica and for any number of
                shards.
            device: device of A and B.
        """
        R, C = matrix(module).shape
        generator = torch.Generator().manual_seed(seed)
        start = (2 * torch.rand(rank, C, generator=generator) - 1) / C**0.5
        # root mean square of the entries of A, including removed ones
        self.size = float(start.square().mean().sqrt())
        self.kept: Tensor | None = None  # [R, C] bool, if single elements are pruned
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
        rows = x
        if len(x) == 1:  # see `times`
            rows = torch.cat([x, x])
        outputs = _Corrected.apply(rows, W, self.A, self.B)  # type: ignore[no-untyped-call]
        return outputs[: len(x)]

    def keep_removed_(self, of_A: Tensor, of_B: Tensor) -> None:
        """Zero removed columns in a gradient at A and removed rows in a gradient at B, in place.

        These entries of A and B start at zero and stay zero, so no pass has to mask them. Where
        single elements are pruned, B A is masked instead and the gradients do not change.
        """
        if self.kept is None:
            of_A.mul_(self.columns)
            of_B.mul_(self.rows)

    def product(self) -> Tensor:
        """Return B A [R, C], zero where the weight is pruned."""
        if self.kept is None:
            return torch.matmul(self.B * self.rows, self.A * self.columns)
        return torch.mul(self.B @ self.A, self.kept)


class _Corrected(torch.autograd.Function):
    """x W^T + (x A^T) B^T, where W has no gradient.

    The products with A and B are added in place, so outputs and gradients are stored once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        inner = product(x, A.T.to(x.dtype))
        ctx.save_for_backward(x, W, A, B, inner)
        return product(x, W.T).addmm_(inner, B.T.to(x.dtype))

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, None, Tensor, Tensor]:
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

    The product B A is as large as the weight, so it is not saved but computed again in the backward
    pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(x, A, B, kept)
        return x @ (B @ A).mul_(kept).T.to(x.dtype)

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, A, B, kept = ctx.saved_tensors
        (g,) = gradients
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = g @ (B @ A).mul_(kept).to(x.dtype)
        of_product = (x.flatten(0, -2).T @ g.flatten(0, -2)).T.to(A.dtype) * kept
        return of_x, B.T @ of_product, of_product @ A.T, None


class LowRankCorrections:
    """Corrections of all linears of a shard during training.

    A step of Adam changes B by the rate, whatever the size of the weight is. Rates are therefore
    relative to sizes: a step of rate 1 changes B A by the root mean square of the weight, and A by
    `RATE_OF_A` times the root mean square of A.
    """

    def __init__(
        self, shard: ModelShard, parts: Mapping[str, LowRank], owned: Collection[str]
    ) -> None:
        """Add the corrections to the outputs of the linears.

        Args:
            shard: shard with its weights.
            parts: linear -> its correction at the start.
            owned: linears whose optimizer is on this replica.
        """
        self._shard = shard
        self.parts = parts
        # whether outputs are those of weights that have absorbed the corrections, rounded to their
        # dtype
        self.rounds = False
        trained: dict[str, Trained] = {}
        for name, part in parts.items():
            if name not in owned:
                continue
            A = part.A
            size_of_W = float(shard.weight(name)[:, : A.shape[1]].square().mean().sqrt())
            trained[f"{name}.A"] = Trained(A, RATE_OF_A * part.size)
            size_of_B = size_of_W / (part.size * len(A) ** 0.5)
            trained[f"{name}.B"] = Trained(part.B, size_of_B)
        self._optimizer = RelativeAdam(trained)
        # forward methods of the linears without corrections
        self._forwards = {name: shard.linears[name].forward for name in parts}
        for name in parts:
            shard.linears[name].forward = partial(self._forward, name)  # type: ignore[method-assign]

    def tensors(self, name: str) -> list[Tensor]:
        """Return A and B of a linear, which its owner sends to the other replicas."""
        return [self.parts[name].A.detach(), self.parts[name].B.detach()]

    def gradients(self, name: str, num_tokens: int) -> list[Tensor]:
        """Set the gradients at A and B of a linear to those of the mean loss, and return them.

        They are zero if no tokens have passed the linear.
        """
        part = self.parts[name]
        for parameter in (part.A, part.B):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad = parameter.grad / num_tokens
        of_A = part.A.grad
        of_B = part.B.grad
        assert of_A is not None
        assert of_B is not None
        part.keep_removed_(of_A, of_B)
        return [of_A, of_B]

    def step(self, rate: float) -> None:
        """Make one step with the gradients of the owned linears, and drop all gradients.

        Args:
            rate: learning rate, relative to the sizes of the weights, see the class.
        """
        self._optimizer.step(rate)
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """Drop the summed gradients."""
        for part in self.parts.values():
            part.A.grad = None
            part.B.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that steps change, by name, not copied."""
        tensors: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            tensors[f"{name}.A"] = part.A.detach()
            tensors[f"{name}.B"] = part.B.detach()
        tensors.update(self._optimizer.state())
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore a state; its tensors are copied."""
        for name, part in self.parts.items():
            part.A.copy_(tensors[f"{name}.A"])
            part.B.copy_(tensors[f"{name}.B"])
        self._optimizer.load_state(tensors)
        self.forget_gradients()

    def best(self) -> dict[str, Tensor]:
        """Return a copy of the state for `back_to`."""
        return {name: tensor.clone() for name, tensor in self.state().items()}

    def back_to(self, best: Mapping[str, Tensor]) -> None:
        """Restore a state from `best`; its tensors are copied."""
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
        if module.bias is not None:
            outputs = outputs + module.bias
        return outputs.view(*x.shape[:-1], outputs.shape[1])

    def remove(self) -> None:
        """Remove the corrections; the weights are those before the training."""
        for name, forward in self._forwards.items():
            self._shard.linears[name].forward = forward  # type: ignore[method-assign]

    @torch.no_grad()
    def absorb(self) -> dict[str, tuple[float, float]]:
        """Add every B A to its weight and remove the corrections.

        Returns:
            Name -> (<change of W, B A>, |B A|^2). In a narrow dtype an entry of B A changes nothing
            if it is below half of the spacing of numbers at its weight.
        """
        self.remove()
        arrived: dict[str, tuple[float, float]] = {}
        for name, part in self.parts.items():
            W = self._shard.weight(name)
            added = part.product()
            inputs = W[:, : part.A.shape[1]]
            # exact: it is the weights' dtype
            before = inputs.to(self._shard.dtype, copy=True)
            inputs += added
            self._shard.set_weight(name, W)
            del W, inputs
            change = self._shard.weight(name)[:, : part.A.shape[1]].sub_(before)
            wanted = float(torch.linalg.vecdot(added, added).sum())
            changed = float(torch.linalg.vecdot(change, added).sum())
            arrived[name] = (changed, wanted)
        return arrived
