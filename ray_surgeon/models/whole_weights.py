"""Training of all weights of a shard's blocks.

Linears with their biases, norms, routers and sinks are trained; embeddings, the last norm and the
head are not. Pruned weights stay exactly zero, because their gradients are set to zero.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import groupby

import torch
from torch import Tensor, nn

from ray_surgeon.maths.masks import ElementMask, Mask
from ray_surgeon.models.build import LinearModule, num_inputs
from ray_surgeon.models.low_rank import RelativeAdam, Trained
from ray_surgeon.models.shard import ModelShard


def block_parameters(shard: ModelShard) -> dict[str, nn.Parameter]:
    """Return the parameters of a shard's blocks by their global names, without saved buffers.

    The weights must be on the device; they are not copied.
    """
    assert shard.stores.weights == "device"
    parameters: dict[str, nn.Parameter] = {}
    for name, slot in shard.weights.slot_of.items():
        content = slot.content
        if isinstance(content, nn.Parameter):
            parameters[name] = content
    return parameters


class WholeWeights:
    """Trains all weights of a shard's blocks.

    Gradients are summed in the weights' dtype. The replica that owns a weight keeps a float32
    master copy and Adam's moments where the factors are stored: on the device, or else in the
    host's memory. Steps change the masters; the weights are the rounded masters.
    """

    rounds = True  # outputs are always those of the weights in their own dtype

    def __init__(
        self, shard: ModelShard, masks: Mapping[str, Mask], owned: Collection[str]
    ) -> None:
        """Start with the present weights.

        Args:
            shard: shard with its weights, on the device.
            masks: masks of its linears.
            owned: parameters whose masters are on this replica, see `block_parameters`.
        """
        self._shard = shard
        self._parameters = block_parameters(shard)
        where = torch.device("cpu")
        if shard.stores.factors == "device":
            where = shard.device
        self._masters: dict[str, Tensor] = {}
        for name in owned:
            # not a copy if the weight is float32 and on this device
            self._masters[name] = self._parameters[name].detach().to(where, torch.float32)
        self._sizes = {name: self._size(name) for name in owned}
        # owned parameter of a linear -> bool factors that zero its pruned entries, see `_kept`
        self._kept: dict[str, list[Tensor]] = {}
        for name in owned:
            linear, _, part = name.rpartition(".")
            if linear in masks:
                factors = _kept(masks[linear], shard.linears[linear], part)
                self._kept[name] = [factor.to(where) for factor in factors]
        # one optimizer per block, so that only one block at a time has float32 gradients
        self._optimizers: list[tuple[list[str], RelativeAdam]] = []
        self._start_optimizers()
        self._start = self._copied()
        # copy of the present weights, if there is one
        self._copy: Mapping[str, Tensor] | None = self._start
        for parameter in self._parameters.values():
            parameter.requires_grad_()

    def _size(self, name: str) -> float:
        """Return the change of a parameter's entries in a step of rate 1.

        This is the root mean square of its nonzero entries, because pruned entries are zero. A bias
        takes the size of its weight if that is larger, because many biases start at zero. The size
        of any other parameter that is all zeros is a guess: 1 for a vector, and for a matrix the
        size that preserves the norm of its inputs.
        """
        parameter = self._parameters[name]
        prefix, _, part = name.rpartition(".")
        size = _root_mean_square(parameter)
        weight = self._parameters.get(f"{prefix}.weight")
        if part == "bias" and weight is not None:
            size = max(size, _root_mean_square(weight))
        if size == 0:
            return float(math.prod(parameter.shape[1:]) ** -0.5)
        return size

    def _start_optimizers(self) -> None:
        self._optimizers.clear()
        for _, of_block in groupby(self._masters, key=self._shard.layout.block_of):
            trained: dict[str, Trained] = {}
            for name in of_block:
                trained[name] = Trained(self._masters[name], self._sizes[name])
            self._optimizers.append((list(trained), RelativeAdam(trained)))

    def _copied(self) -> dict[str, Tensor]:
        copies: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            copies[name] = parameter.detach().to("cpu", copy=True)
        return copies

    def tensors(self, name: str) -> list[Tensor]:
        """Return a parameter, which its owner sends to the other replicas."""
        return [self._parameters[name].detach()]

    def gradients(self, name: str, num_tokens: int) -> list[Tensor]:
        """Set a parameter's gradient to that of the mean loss, and return it.

        It is zero if no tokens have passed the parameter.
        """
        parameter = self._parameters[name]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        else:
            parameter.grad.div_(num_tokens)
        return [parameter.grad]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Make one step with the gradients of the owned parameters, and drop all gradients.

        Args:
            rate: learning rate, relative to the sizes of the weights, see `_size`.
        """
        for names, optimizer in self._optimizers:
            for name in names:
                gradient = self._parameters[name].grad
                assert gradient is not None
                gradient = gradient.to(self._masters[name])
                for kept in self._kept.get(name, ()):
                    gradient.mul_(kept)
                self._masters[name].grad = gradient
            optimizer.step(rate)
            for name in names:
                self._masters[name].grad = None
                self._parameters[name].copy_(self._masters[name])
        self._copy = None
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """Drop the summed gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return the masters and Adam's state by name, not copied."""
        tensors = dict(self._masters)
        for _, optimizer in self._optimizers:
            tensors.update(optimizer.state())
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore a state; its tensors are copied.

        Weights that are not owned change only when their owners have sent them.
        """
        for names, optimizer in self._optimizers:
            for name in names:
                self._masters[name].copy_(tensors[name])
                self._parameters[name].copy_(self._masters[name])
            optimizer.load_state(tensors)
        self._copy = None
        self.forget_gradients()

    def best(self) -> dict[str, Tensor]:
        """Return a copy of the weights in the host's memory for `back_to`.

        It must not be written to, because it may be the copy from the start.
        """
        if self._copy is None:
            self._copy = self._copied()
        return dict(self._copy)

    @torch.no_grad()
    def back_to(self, best: Mapping[str, Tensor]) -> None:
        """Restore the weights from `best`, whose tensors are copied.

        Masters are set to these weights, and the moments start at zero: float32 copies of masters
        and moments would take six times the memory of a bfloat16 model.
        """
        for name, parameter in self._parameters.items():
            parameter.copy_(best[name])
        for name, master in self._masters.items():
            master.copy_(best[name])
        self._start_optimizers()
        self._copy = best
        self.forget_gradients()

    def remove(self) -> None:
        """End the training; the weights are those before it."""
        self.back_to(self._start)
        self._end()

    def absorb(self) -> dict[str, tuple[float, float]]:
        """End the training and keep the trained weights; shots save all of them from now on.

        Returns:
            Name of an owned parameter -> (<change, change of its master>, |change of its
            master|^2). In a narrow dtype a change is lost if it is below half of the spacing of
            numbers at its weight.
        """
        self._end()
        self._shard.changed.update(dict.fromkeys(self._parameters))
        arrived: dict[str, tuple[float, float]] = {}
        for name, master in self._masters.items():
            before = self._start[name].to(master)
            wanted = master - before
            change = self._parameters[name].detach().to(master) - before
            arrived[name] = (float((change * wanted).sum()), float(wanted.square().sum()))
        return arrived

    def _end(self) -> None:
        self.forget_gradients()
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)


def _root_mean_square(tensor: Tensor) -> float:
    """Return the root mean square of the entries that are not zero; 0 if there are none."""
    norm = float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32))
    return norm / math.sqrt(max(1, int(tensor.count_nonzero())))


def _kept(mask: Mask, module: LinearModule, part: str) -> list[Tensor]:
    """Return bool factors that zero the pruned entries of a linear's ``weight`` or ``bias``.

    Factors that keep everything are left out.
    """
    C = num_inputs(module)
    if isinstance(mask, ElementMask) and part == "bias":
        factors = [mask.kept[:, -1]]
    elif isinstance(mask, ElementMask):
        factors = [mask.kept[:, :C]]
    elif part == "bias":
        factors = [mask.rows]
    else:
        factors = [mask.rows[:, None], mask.columns[None, :C]]
    # GPT-2's weights are transposed
    if part == "weight" and not isinstance(module, nn.Linear):
        factors = [factor.T for factor in factors]
    return [factor for factor in factors if not factor.all()]
