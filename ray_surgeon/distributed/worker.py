"""A worker: holds a shard of blocks and its masks, and runs steps on them.

`Worker` is a plain class that Ray or a local cluster calls.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.nn.utils.rnn import pad_sequence

from ray_surgeon.distributed.collectives import (
    ReplicaGroup,
    Sent,
    TensorPayload,
    decode,
    encode,
    send,
)
from ray_surgeon.distributed.placement import Placement, WorkerIndex
from ray_surgeon.distributed.processes import (
    Usage,
    bound_shapes,
    give_back,
    process_usage,
)
from ray_surgeon.maths.group_batch import GroupResult, KeptFactors
from ray_surgeon.maths.kronecker import PackedFactors, RaisedDamping
from ray_surgeon.maths.masks import Mask, StructuredMask
from ray_surgeon.memory.stores import Scratch
from ray_surgeon.memory.transfers import backend, compute_on
from ray_surgeon.models.hooks import LayerInputs
from ray_surgeon.models.layout import GroupSet, ModelLayout
from ray_surgeon.models.loss import next_tokens
from ray_surgeon.models.runner import BlockRunner, Call
from ray_surgeon.models.shard import ModelShard
from ray_surgeon.storage import tensor_files


class Teacher(NamedTuple):
    """A second model beside the worker's own."""

    shard: ModelShard
    runner: BlockRunner
    scratch: Scratch


class TextBatch:
    """Texts that are being written together, a row each."""

    def __init__(
        self,
        shard: ModelShard,
        runner: BlockRunner,
        prompts: Sequence[Sequence[int]],
        chances: Sequence[Tensor],
        temperature: float,
    ) -> None:
        """Begin texts.

        Args:
            shard: that writes.
            runner: of its blocks.
            prompts: tokens of each text's prompt.
            chances: for each text [num_tokens] in [0, 1), by which its tokens are drawn.
            temperature: of the distribution that tokens are drawn from; 0 takes the likeliest.
        """
        self.cache = runner.new_cache()  # keys and values of all tokens so far
        self.num_tokens = 0  # so far, prompts included
        if not shard.blocks.is_last:
            return
        # what the last shard needs to choose the next tokens: [m, longest prompt] int64, zeros
        # after shorter ones; [m] int64; and [m, num_tokens]
        tokens = [torch.tensor(prompt) for prompt in prompts]
        self._prompts = pad_sequence(tokens, batch_first=True).to(shard.device)
        self._lengths = torch.tensor(
            [len(prompt) for prompt in tokens], device=shard.device
        )
        self._chances = torch.stack(list(chances)).to(shard.device)
        self._temperature = temperature

    def keep_rows(self, shard: ModelShard, runner: BlockRunner, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.cache.batch_select_indices(rows)
        kept = runner.new_cache()  # one that has no room set aside for the rows before
        kept.layers = self.cache.layers
        self.cache = kept
        if shard.blocks.is_last:
            self._prompts = self._prompts[rows]
            self._lengths = self._lengths[rows]
            self._chances = self._chances[rows]

    def choose(self, shard: ModelShard, hidden: Tensor) -> Tensor:
        """Return the tokens [m] that follow, after the last hidden states [m, d] before them."""
        position = self.num_tokens
        own = (position - self._lengths).clamp(0, self._chances.shape[1] - 1)
        chances = self._chances.gather(1, own[:, None])[:, 0]
        drawn = next_tokens(hidden, shard.head_weight, chances, self._temperature)
        if position >= self._prompts.shape[1]:
            return drawn
        return torch.where(position < self._lengths, self._prompts[:, position], drawn)


class DenseStates(dict[str, dict[int, Tensor]]):
    """Last hidden states of the dense model, in the memory of the last shard's host.

    Text -> number of a sequence -> [1, T, d].
    """

    head: Tensor | None = None
    """Weight [vocabulary, d] of its head, on the device, if it is not that of the pruned one."""


class LinearFit:
    """Sums over tokens by which a linear learns what a removed layer added.

    See `ray_surgeon.maths.folding.folded`.
    """

    def __init__(self, num_rows: int, num_columns: int, device: torch.device) -> None:
        """Begin with zeros."""
        self.A = torch.zeros(num_columns, num_columns, device=device)
        self.D = torch.zeros(num_rows, num_columns, device=device)
        self.inputs = dict[
            int, Tensor
        ]()  # number of a sequence -> [T, C], until it is summed
        self.before: Tensor | None = None  # the linear [R, C] before it learned


class Trainee(Protocol):
    """The trained parts on a worker by name, each of which has an owner among the replicas."""

    rounds: bool  # whether outputs are those of the weights after the training, in their dtype

    def tensors(self, name: str) -> list[Tensor]:
        """Return the tensors of a part, which its owner sends to the others after a step."""

    def gradients(self, name: str, num_tokens: int) -> list[Tensor]:
        """Return the gradients of the mean loss at a part, and keep them for the step."""

    def step(self, rate: float) -> None:
        """Make a step with the gradients of the owned parts, and forget all gradients."""

    def state(self) -> dict[str, Tensor]:
        """Return everything that steps change here, by name; not copied.

        A name is that of the part, or begins with it and a dot or space, as in ``part.A moment``.
        """

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to a state, maybe of another worker with these parts, from which steps go on.

        The tensors stay untouched.
        """

    def best(self) -> dict[str, Tensor]:
        """Return a copy of what is needed to go back to the present weights, by such names."""

    def back_to(self, best: Mapping[str, Tensor]) -> None:
        """Go back to the weights of what `best` returned."""

    def remove(self) -> None:
        """End the training; the weights are as they were before it."""

    def absorb(self) -> dict[str, tuple[float, float]]:
        """End the training; the weights are the trained ones.

        Returns:
            Name -> <change, wanted change> and |wanted change|^2.
        """


@dataclass
class TrainingState:
    """The training on a worker."""

    trainee: Trainee
    owners: Mapping[str, int]  # part -> the replica that owns it
    best: dict[str, Tensor] | None = None  # what `Trainee.best` returned


@dataclass
class WorkerState:
    """The state that the steps of a worker leave for its later steps.

    Steps free what nobody reads any more.
    """

    meeting: TCPStore | None = None
    """Where all workers meet, on the one that has opened it"""
    dense_states: DenseStates = field(default_factory=DenseStates)
    """States that later weights are compared with, on workers with the last shard"""
    teacher: Teacher | None = None
    """The model to train towards, where it is beside the worker's own"""
    writing: dict[int, TextBatch] = field(default_factory=dict)
    """Number -> batch of texts that the model writes"""
    waiting: dict[int, Tensor] = field(default_factory=dict)
    """Number -> micro-batch [n, T, d] that passes the shard block by block, all of one shape"""
    calls: list[Call] = field(default_factory=list)
    """Of the blocks, with the micro-batches that wait"""

    # Of a shot
    held_factors: dict[str, PackedFactors] = field(default_factory=dict)
    """Linear -> its factors of the windows held aside"""
    further_terms: Any = None
    """State of further curvature passes that an experimental `CurvatureKind` makes, until the
    update
    """
    candidates: dict[str, Any] = field(default_factory=dict)
    """Owned linear -> `Candidates` of rows and columns or `ElementCandidates`, until the update"""
    group_costs: dict[str, GroupResult] = field(default_factory=dict)
    """Owned consumer -> its basis and the marginal costs of its groups, until the update"""
    factors: KeptFactors | None = None
    """Factorised A of owned consumers, while their greedy paths are followed"""
    raised_damping: list[RaisedDamping] = field(default_factory=list)
    """Of owned linears that are pruned block after block"""
    layer_inputs: list[LayerInputs] = field(default_factory=list)
    """Of the layers that are reconstructed: of the windows they are trained on, then of those held
    aside, if there are any; from the curvature pass until they are trained
    """
    layer_errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Consumer of a reconstructed layer -> mean loss held aside before and after"""
    influences: dict[int, float] = field(default_factory=dict)
    """Block -> sum over tokens of 1 minus the cosine between its inputs and outputs"""
    fit: LinearFit | None = None
    """Of the linear that takes over from a removed layer"""
    training: TrainingState | None = None

    # Of exports, for owned linears
    rounded_scales: dict[str, Tensor] = field(default_factory=dict)
    """Linear -> [R, groups] scales of the rounded weights that are left"""
    mean_squares: dict[str, Tensor] = field(default_factory=dict)
    """Linear -> [C] mean squares of the inputs that are left"""


P = ParamSpec("P")
T = TypeVar("T")
AnyMask = TypeVar("AnyMask", bound=Mask)


def collective(step: Callable[P, T]) -> Callable[P, T]:
    """Declare that the replicas of a shard wait for each other inside a step."""
    step.is_collective = True  # type: ignore[attr-defined]
    return step


@dataclass(frozen=True)
class LinearSummary:
    """Sizes of one linear after a shot."""

    name: str  # the linear
    num_rows: int  # all rows
    num_columns: int  # all columns, the bias included
    rows_kept: int  # rows with at least one kept entry
    columns_kept: int  # columns with at least one kept entry, the bias included
    num_kept: int  # entries that the mask keeps
    num_nonzero: int  # entries that are not exactly zero
    # loss increase of this shot's change by the quadratic model, in nats per token; None without
    # such a model
    predicted: float | None
    # relative residual of the equations of the update; 0 if they are solved directly
    residual: float

    @property
    def size(self) -> int:
        """Number of all entries."""
        return self.num_rows * self.num_columns


class Worker:
    """Holds one shard of one replica.

    Each linear has one owner among the replicas, which computes its costs and updates it.
    """

    shard: ModelShard  # exists once weights are loaded
    runner: BlockRunner  # exists once weights are loaded

    def __init__(
        self, layout: ModelLayout, placement: Placement, index: WorkerIndex, device: str
    ) -> None:
        """Prepare an empty worker.

        Args:
            layout: layout of the whole model.
            placement: where every block is.
            index: which worker this is.
            device: "cpu", or a GPU such as "cuda:0". "cuda" needs `take_gpu` before the first step
                that computes.
        """
        # products of a mixture have a shape for every count of tokens, and counts recur
        if all(shape.sees_all_tokens for shape in layout.linears):
            bound_shapes()
        self.layout = layout
        self.placement = placement
        self.index = index
        self.device = torch.device(device)
        # name of the GPU for other processes, as in CUDA_VISIBLE_DEVICES
        self.gpu: str | None = None
        self.replicas = ReplicaGroup()
        self.scratch: Scratch | None = None  # exists once weights are loaded
        self.masks: dict[str, Mask] = {}
        # reads the committed shot that the weights come from
        self.shot_reader = tensor_files.Reader()
        self.position = (0, 0)  # linears that the present step has done, of how many
        self.on_progress: Callable[[], None] | None = None
        self.state = WorkerState()
        self._busy_s = 0.0
        self._packing_s = 0.0

    def call(self, step: Step[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a step and add its time to the busy time."""
        start = time.perf_counter()
        compute_on(self.device)  # the device is set per thread
        try:
            return step(self, *args, **kwargs)
        finally:
            self._busy_s += time.perf_counter() - start

    def ping(self) -> tuple[int, int]:
        """Return how many linears the present step has done, and how many it has.

        The reply shows that the worker is alive.
        """
        return self.position

    def usage(self) -> Usage:
        """Return the resources that this process has used so far; called between steps."""
        usage = process_usage(self.device, self._busy_s, self._packing_s)
        give_back()
        return usage

    def take_gpu(self, name: str | None = None) -> None:
        """Compute on one of the GPUs that this process sees, before anything is loaded.

        Args:
            name: name as in ``CUDA_VISIBLE_DEVICES``; None for the process's present GPU.
        """
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = backend(self.device)
        if visible:
            names = visible.split(",")
        else:
            names = [str(number) for number in range(gpus.device_count())]
        number = gpus.current_device() if name is None else names.index(name)
        self.gpu = names[number].strip()
        self.device = torch.device(self.device.type, number)
        compute_on(self.device)

    # Tensors to and from other workers; the time to pack them is the cost of the object store

    def pack(self, tensor: Tensor) -> TensorPayload:
        """Return a tensor in the form in which it travels."""
        start = time.perf_counter()
        payload = encode(tensor)
        self._packing_s += time.perf_counter() - start
        return payload

    def unpack(self, payload: TensorPayload) -> Tensor:
        """Return a received tensor on the device."""
        start = time.perf_counter()
        tensor = decode(payload, self.device)
        self._packing_s += time.perf_counter() - start
        return tensor

    # Weights and masks

    def owner(self, name: str) -> int:
        """Return the rank of the replica that computes the costs of a linear and updates it."""
        return self.placement.owners[self.layout.shapes[name].shared_input]

    def owns(self, name: str) -> bool:
        """Whether this replica is the owner of a linear."""
        return self.owner(name) == self.replicas.rank

    def owned(self) -> Iterator[str]:
        """Yield the names of the linears that this replica owns, and report progress."""
        return self.each([name for name in self.shard.linears if self.owns(name)])

    def each(self, names: list[str]) -> Iterator[str]:
        """Yield names, and report to the coordinator how many are done."""
        for number, name in enumerate(names):
            self._reach(number, len(names))
            yield name
        self._reach(len(names), len(names))

    def _reach(self, done: int, total: int) -> None:
        self.position = done, total
        if self.on_progress is not None:
            self.on_progress()

    def mask(self, name: str, kind: type[AnyMask]) -> AnyMask:
        """Return the mask of a linear, which must be of the given class."""
        mask = self.masks[name]
        assert isinstance(mask, kind)
        return mask

    @cached_property
    def group_sets(self) -> list[GroupSet]:
        """Coupled groups in the blocks of this shard."""
        return [
            groups
            for groups in self.layout.group_sets
            if groups.block in self.shard.blocks
        ]

    def share_linears(self, names: Iterable[str]) -> None:
        """Send linears and their masks from their owners to the other replicas.

        Every owner must have changed its linears before.
        """
        names = list(names)
        self.share_weights({name: self.owner(name) for name in names})
        self.masks.update(self.share_masks({name: self.masks[name] for name in names}))

    def share_weights(self, owners: Mapping[str, int]) -> None:
        """Send linears to the other replicas.

        Args:
            owners: linear -> replica that has changed it.
        """
        if self.placement.num_replicas == 1:
            return
        store = self.shard.weights
        sent: list[Sent] = []
        for linear, owner in owners.items():
            for name in (f"{linear}.weight", f"{linear}.bias"):
                if name in store.slot_of:
                    sent.append(
                        Sent(
                            owner=owner,
                            like=store.slot_of[name].content,
                            get=partial(store.on_device, name),
                            put=partial(store.set, name),
                        )
                    )
        send(self.replicas, sent, self.device, self.device)

    def share_masks(self, masks: dict[str, AnyMask]) -> dict[str, AnyMask]:
        """Return the owners' masks of linears; every replica calls this for the same linears."""
        parts_of = {name: dict(vars(mask)) for name, mask in masks.items()}
        if self.placement.num_replicas > 1:
            sent: list[Sent] = []
            for name, parts in parts_of.items():
                for part, tensor in parts.items():
                    sent.append(
                        Sent(
                            owner=self.owner(name),
                            like=tensor,
                            get=partial(parts.__getitem__, part),
                            put=partial(parts.__setitem__, part),
                        )
                    )
            send(self.replicas, sent, self.device, torch.device("cpu"))
        return {name: type(masks[name])(**parts) for name, parts in parts_of.items()}

    def summary(
        self, name: str, predicted: float | None, residual: float
    ) -> LinearSummary:
        """Return the sizes of a linear after a shot."""
        mask = self.masks[name]
        if isinstance(mask, StructuredMask):
            rows, columns = mask.rows, mask.columns
        else:
            rows, columns = mask.kept.any(1), mask.kept.any(0)
        return LinearSummary(
            name=name,
            num_rows=len(rows),
            num_columns=len(columns),
            rows_kept=int(rows.sum()),
            columns_kept=int(columns.sum()),
            num_kept=mask.num_kept,
            num_nonzero=int(self.shard.weight(name).count_nonzero()),
            predicted=predicted,
            residual=residual,
        )


Step = Callable[Concatenate[Worker, P], T]
"""A function that runs on a worker, whose first argument is the worker."""


def summaries(worker: Worker) -> tuple[LinearSummary, ...]:
    """Return the sizes of the owned linears, without predictions."""
    return tuple(worker.summary(name, None, 0.0) for name in worker.owned())


def clean_up(worker: Worker) -> None:
    """Remove the files of a worker on its local disk."""
    if worker.scratch is not None:
        worker.scratch.close()


def sizes(worker: Worker) -> tuple[int, int]:
    """Return the entries of the owned linears, and how many of them earlier shots kept."""
    num_entries = 0
    num_kept = 0
    for name, mask in worker.masks.items():
        if worker.owns(name):
            num_entries += worker.layout.shapes[name].size
            num_kept += mask.num_kept
    return num_entries, num_kept
