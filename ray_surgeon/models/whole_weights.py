"""All weights of a shard's blocks while they are trained.

Linears with their biases, norms, routers and sinks are trained; embeddings, the last norm and the
head are not. Pruned weights stay exactly zero, because their gradients are taken as zero.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import groupby

import torch
from torch import Tensor, nn

from ray_surgeon.maths.masks import ElementMask, Mask
from ray_surgeon.models.build import LinearModule, num_inputs
from ray_surgeon.models.optimizer import RelativeAdam, Trained
from ray_surgeon.models.shard import ModelShard


def block_parameters(shard: ModelShard) -> dict[str, nn.Parameter]:
    """Return the parameters of a shard's blocks by their global names; not saved buffers.

    They stay where they are, on the device.
    """
    assert shard.stores.weights == "device"
    contents = ((name, slot.content) for name, slot in shard.weights.slot_of.items())
    return {name: content for name, content in contents if isinstance(content, nn.Parameter)}


class WholeWeights:
    """The training of all weights of the blocks.

    Gradients are summed in the weights' dtype. The replica that owns a weight has a float32 master
    of it and Adam's moments, where factors are kept: on the device, or else in the host's memory.
    Steps change masters, and weights are these, rounded.
    """

    rounds = True  # outputs are always those of the weights in their dtype

    def __init__(
        self, shard: ModelShard, masks: Mapping[str, Mask], owned: Collection[str]
    ) -> None:
        """Start with the weights as they are.

        Args:
            shard: with its weights, on the device.
            masks: of its linears.
            owned: parameters whose masters are here, see `block_parameters`.
        """
        self._shard = shard
        self._parameters = block_parameters(shard)
        where = shard.device if shard.stores.factors == "device" else torch.device("cpu")
        # a float32 weight there is its own master
        self._masters = {n: self._parameters[n].detach().to(where, torch.float32) for n in owned}
        self._sizes = {name: self._size(name) for name in owned}
        self._kept = dict[str, list[Tensor]]()  # of pruned ones, see `_kept`
        for name in owned:
            linear, _, part = name.rpartition(".")
            if linear in masks:
                factors = _kept(masks[linear], shard.linears[linear], part)
                self._kept[name] = [factor.to(where) for factor in factors]
        # one for each block, so that float32 gradients are those of one block at a time
        self._optimizers = list[tuple[list[str], RelativeAdam]]()
        self._start_optimizers()
        self._start = self._copied()
        self._copy: Mapping[str, Tensor] | None = self._start  # of the present weights, if any is
        for parameter in self._parameters.values():
            parameter.requires_grad_()

    def _size(self, name: str) -> float:
        """Return by how much a step of rate 1 changes a parameter.

        That is the root mean square of its entries, without those that are zero, as pruned ones
        are. A bias counts as a column of its weight, if it is smaller than that: many begin as
        zeros. What else is zero changes as what it might be: numbers around 1, or a weight that
        keeps the size of its inputs.
        """
        parameter = self._parameters[name]
        prefix, _, part = name.rpartition(".")
        size = _root_mean_square(parameter)
        if part == "bias" and f"{prefix}.weight" in self._parameters:
            size = max(size, _root_mean_square(self._parameters[f"{prefix}.weight"]))
        return size or math.prod(parameter.shape[1:]) ** -0.5

    def _start_optimizers(self) -> None:
        self._optimizers.clear()
        for _, of_block in groupby(self._masters, key=self._shard.layout.block_of):
            names = list(of_block)
            trained = {name: Trained(self._masters[name], self._sizes[name]) for name in names}
            self._optimizers.append((names, RelativeAdam(trained)))

    def _copied(self) -> dict[str, Tensor]:
        parameters = self._parameters.items()
        return {name: weight.detach().to("cpu", copy=True) for name, weight in parameters}

    def tensors(self, name: str) -> list[Tensor]:
        """Return a parameter, which its owner sends to the others."""
        return [self._parameters[name].detach()]

    def gradients(self, name: str, num_tokens: int) -> list[Tensor]:
        """Return the gradient of the mean loss at a parameter, and keep it there.

        It is zero if nothing has passed.
        """
        parameter = self._parameters[name]
        summed = parameter.grad
        parameter.grad = torch.zeros_like(parameter) if summed is None else summed.div_(num_tokens)
        return [parameter.grad]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Make one step with the gradients of the owned parameters, and forget all gradients.

        Args:
            rate: relative to the sizes of the weights, see `_size`.
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
        """Start the sums of gradients anew."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return masters and what Adam knows of them, by name; not copied."""
        tensors = dict(self._masters)
        for _, optimizer in self._optimizers:
            tensors |= optimizer.state()
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to a state; its tensors stay untouched.

        Weights that are not owned are the old ones until their owners have sent them.
        """
        for names, optimizer in self._optimizers:
            for name in names:
                self._masters[name].copy_(tensors[name])
                self._parameters[name].copy_(self._masters[name])
            optimizer.load_state(tensors)
        self._copy = None
        self.forget_gradients()

    def best(self) -> dict[str, Tensor]:
        """Return a copy of the weights in the host's memory, to which `back_to` goes back.

        It is not written to: it may be that of the start.
        """
        self._copy = self._copied() if self._copy is None else self._copy
        return dict(self._copy)

    @torch.no_grad()
    def back_to(self, best: Mapping[str, Tensor]) -> None:
        """Go back to what `best` returned, which stays untouched.

        Masters are those weights, and moments start anew: float32 copies of all of them would take
        six times the memory of a bfloat16 model.
        """
        for name, parameter in self._parameters.items():
            parameter.copy_(best[name])
        for name, master in self._masters.items():
            master.copy_(best[name])
        self._start_optimizers()
        self._copy = best
        self.forget_gradients()

    def remove(self) -> None:
        """End the training; the weights are as they were before it."""
        self.back_to(self._start)
        self._end()

    def absorb(self) -> dict[str, tuple[float, float]]:
        """End the training; the weights are the trained ones, and shots have all of them.

        Returns:
            Name of an owned parameter -> <change, change of its master> and |change of its
            master|^2. In a narrow dtype a change below half of a step of its weight is lost.
        """
        self._end()
        self._shard.changed.update(dict.fromkeys(self._parameters))
        arrived = dict[str, tuple[float, float]]()
        for name, master in self._masters.items():
            before = self._start[name].to(master)
            wanted = master - before
            change = self._parameters[name].detach().to(master) - before
            arrived[name] = float((change * wanted).sum()), float(wanted.square().sum())
        return arrived

    def _end(self) -> None:
        self.forget_gradients()
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)


def _root_mean_square(tensor: Tensor) -> float:
    """Return that of the entries that are not zero; 0 if there are none."""
    norm = float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32))
    return norm / math.sqrt(max(1, int(tensor.count_nonzero())))


def _kept(mask: Mask, module: LinearModule, part: str) -> list[Tensor]:
    """Return what a mask keeps of the ``weight`` or ``bias`` of a linear, as factors of it.

    Nothing where that is all.
    """
    C = num_inputs(module)
    if isinstance(mask, ElementMask):
        factors = [mask.kept[:, -1] if part == "bias" else mask.kept[:, :C]]
    else:
        factors = [mask.rows] if part == "bias" else [mask.rows[:, None], mask.columns[None, :C]]
    if part == "weight" and not isinstance(module, nn.Linear):  # GPT-2's lie the other way
        factors = [factor.T for factor in factors]
    return [factor for factor in factors if not factor.all()]
