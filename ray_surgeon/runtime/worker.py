"""One worker: a shard of blocks and its masks.

A plain class; Ray or a local cluster calls it, and it runs the steps it is given.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from ray_surgeon.maths.masks import Mask, StructuredMask
from ray_surgeon.memory.stores import Scratch
from ray_surgeon.memory.transfers import backend, compute_on
from ray_surgeon.models.groups import GroupSet
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.runner import BlockRunner
from ray_surgeon.models.shard import ModelShard
from ray_surgeon.runtime.collectives import ReplicaGroup, Sent, TensorPayload, decode, encode, send
from ray_surgeon.runtime.placement import Placement, WorkerIndex
from ray_surgeon.runtime.usage import Usage, bound_shapes, give_back, process_usage
from ray_surgeon.runtime.worker_state import WorkerState
from ray_surgeon.storage import tensor_files

P = ParamSpec("P")
T = TypeVar("T")
AnyMask = TypeVar("AnyMask", bound=Mask)


def collective(step: Callable[P, T]) -> Callable[P, T]:
    """Declare that replicas of a shard wait for each other inside a step."""
    step.is_collective = True  # type: ignore[attr-defined]
    return step


@dataclass(frozen=True)
class LinearSummary:
    """What is left of one linear after a shot."""

    name: str  # the linear
    num_rows: int  # rows in all
    num_columns: int  # columns in all, the bias included
    rows_kept: int  # rows of which something stays
    columns_kept: int  # columns of which something stays, the bias included
    num_kept: int  # entries that the mask keeps
    num_nonzero: int  # entries that are not exactly zero
    # loss increase of this shot's change by the quadratic model, in nats per token; None without
    # such a model
    predicted: float | None
    residual: float  # of the equations of the update, relative; 0 where they are solved directly

    @property
    def size(self) -> int:
        """Entries in all."""
        return self.num_rows * self.num_columns


class Worker:
    """Holds one shard of one replica.

    Each linear has one owner among the replicas, which computes its costs and updates it.
    """

    shard: ModelShard  # once it is loaded
    runner: BlockRunner  # likewise

    def __init__(
        self, layout: ModelLayout, placement: Placement, index: WorkerIndex, device: str
    ) -> None:
        """Prepare an empty worker.

        Args:
            layout: of the whole model.
            placement: where every block is.
            index: which worker this is.
            device: "cpu", or a GPU such as "cuda:0"; "cuda" if the worker is to take one by
                `take_gpu` before its first step that computes.
        """
        # a mixture's products have as many shapes as counts of tokens, and these come again
        if all(shape.sees_all_tokens for shape in layout.linears):
            bound_shapes()
        self.layout = layout
        self.placement = placement
        self.index = index
        self.device = torch.device(device)
        self.gpu: str | None = None  # its name, as in CUDA_VISIBLE_DEVICES, for other processes
        self.replicas = ReplicaGroup()
        self.scratch: Scratch | None = None  # once something is loaded
        self.masks: dict[str, Mask] = {}
        self.shot_reader = tensor_files.Reader()  # of the committed shot that the weights come from
        self.position = (0, 0)
        self.on_progress: Callable[[], None] | None = None
        self.state = WorkerState()
        self._busy_s = self._packing_s = 0.0

    def call(self, step: Step[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a step and count the time."""
        start = time.perf_counter()
        compute_on(self.device)  # whichever thread this is
        try:
            return step(self, *args, **kwargs)
        finally:
            self._busy_s += time.perf_counter() - start

    def ping(self) -> tuple[int, int]:
        """Return how many of how many linears the present step has done; shows that it lives."""
        return self.position

    def usage(self) -> Usage:
        """Return what this process has used so far; asked between steps."""
        usage = process_usage(self.device, self._busy_s, self._packing_s)
        give_back()
        return usage

    def take_gpu(self, name: str | None = None) -> None:
        """Compute on one of the GPUs that this process sees, before anything is loaded.

        Args:
            name: as in ``CUDA_VISIBLE_DEVICES``; the process's present GPU if not given.
        """
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = backend(self.device)
        names = visible.split(",") if visible else list(map(str, range(gpus.device_count())))
        number = gpus.current_device() if name is None else names.index(name)
        self.gpu = names[number].strip()
        self.device = torch.device(self.device.type, number)
        compute_on(self.device)

    # Tensors to and from other workers; packing them is what the object store costs a worker

    def pack(self, tensor: Tensor) -> TensorPayload:
        """Return a tensor as it travels."""
        start = time.perf_counter()
        payload = encode(tensor)
        self._packing_s += time.perf_counter() - start
        return payload

    def unpack(self, payload: TensorPayload) -> Tensor:
        """Return a tensor that came, on the device."""
        start = time.perf_counter()
        tensor = decode(payload, self.device)
        self._packing_s += time.perf_counter() - start
        return tensor

    # Weights and masks

    def owner(self, name: str) -> int:
        """Return the replica that computes the costs of a linear and updates it."""
        return self.placement.owners[self.layout.shapes[name].shared_input]

    def owns(self, name: str) -> bool:
        """Whether this replica is the owner of a linear."""
        return self.owner(name) == self.replicas.rank

    def owned(self) -> Iterator[str]:
        """Yield the names of the linears that this replica owns, and report progress."""
        return self.each([name for name in self.shard.linears if self.owns(name)])

    def each(self, names: list[str]) -> Iterator[str]:
        """Yield names, and let the coordinator see how many are done."""
        for number, name in enumerate(names):
            self._reach(number, len(names))
            yield name
        self._reach(len(names), len(names))

    def _reach(self, done: int, total: int) -> None:
        self.position = done, total
        if self.on_progress is not None:
            self.on_progress()

    def mask(self, name: str, kind: type[AnyMask]) -> AnyMask:
        """Return the mask of a linear, which is of the given class."""
        mask = self.masks[name]
        assert isinstance(mask, kind)
        return mask

    @cached_property
    def group_sets(self) -> list[GroupSet]:
        """Coupled groups of this shard's blocks."""
        return [groups for groups in self.layout.group_sets if groups.block in self.shard.blocks]

    def share_linears(self, names: Iterable[str]) -> None:
        """Send linears and their masks from their owners to the other replicas.

        All owners have done their own before.
        """
        names = list(names)
        self.share_weights({name: self.owner(name) for name in names})
        self.masks |= self.share_masks({name: self.masks[name] for name in names})

    def share_weights(self, owners: Mapping[str, int]) -> None:
        """Send linears, by name, from the replicas that have changed them to the others."""
        store = self.shard.weights
        names = ((f"{n}.{part}", owners[n]) for n in owners for part in ("weight", "bias"))
        slots = ((n, owner, store.slot_of[n]) for n, owner in names if n in store.slot_of)
        sent = (
            Sent(owner, slot.content, partial(store.on_device, name), partial(store.set, name))
            for name, owner, slot in slots
        )
        if self.placement.num_replicas > 1:
            send(self.replicas, sent, self.device, self.device)

    def share_masks(self, masks: dict[str, AnyMask]) -> dict[str, AnyMask]:
        """Return the owners' masks of linears; every replica calls this, for the same ones."""
        parts = {name: dict(vars(mask)) for name, mask in masks.items()}
        sent = (
            Sent(self.owner(n), kept, partial(of.__getitem__, part), partial(of.__setitem__, part))
            for n, of in parts.items()
            for part, kept in list(of.items())
        )
        if self.placement.num_replicas > 1:
            send(self.replicas, sent, self.device, torch.device("cpu"))
        return {name: type(masks[name])(**of) for name, of in parts.items()}

    def summary(self, name: str, predicted: float | None, residual: float) -> LinearSummary:
        """Return what is left of a linear."""
        mask = self.masks[name]
        if isinstance(mask, StructuredMask):
            sides = mask.rows, mask.columns
        else:
            sides = mask.kept.any(1), mask.kept.any(0)
        rows, columns = sides
        kept = int(rows.sum()), int(columns.sum()), mask.num_kept
        num_nonzero = int(self.shard.weight(name).count_nonzero())
        return LinearSummary(name, len(rows), len(columns), *kept, num_nonzero, predicted, residual)


Step = Callable[Concatenate[Worker, P], T]
"""What a worker does when it is asked to."""


def summaries(worker: Worker) -> tuple[LinearSummary, ...]:
    """Return what is left of the owned linears, where nothing was predicted."""
    return tuple(worker.summary(name, None, 0.0) for name in worker.owned())


def clean_up(worker: Worker) -> None:
    """Remove what a worker has on its disk."""
    if worker.scratch is not None:
        worker.scratch.close()


def sizes(worker: Worker) -> tuple[int, int]:
    """Return the entries of the owned linears, and how many of them earlier shots kept."""
    owned = [name for name in worker.masks if worker.owns(name)]
    size = sum(worker.layout.shapes[name].size for name in owned)
    return size, sum(worker.masks[name].num_kept for name in owned)
