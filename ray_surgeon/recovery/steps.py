"""Steps of a recovery on the workers."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ray_surgeon.config.sections import RecoverySection
from ray_surgeon.distributed.collectives import MESSAGE_BYTES, together
from ray_surgeon.distributed.weights import SavedFile, save_tensors
from ray_surgeon.distributed.worker import TrainingState, Worker, collective
from ray_surgeon.storage import tensor_files

_PRESENT = "present "
_BEST = "best "
"""Prefixes of the names of a state's tensors in files."""


class _Saved(UserDict[str, Any]):
    """Tensors of committed files by name, each read when it is accessed."""

    def __init__(self, files: Sequence[SavedFile], prefix: str) -> None:
        """Index the tensors whose names begin with a prefix, by the rest of their names."""
        uris = {}
        for file in files:
            for key in file.keys:
                if key.startswith(prefix):
                    uris[key.removeprefix(prefix)] = file.uri
        super().__init__(uris)
        self._prefix = prefix
        self._reader = tensor_files.Reader()

    def __getitem__(self, name: str) -> Tensor:
        return self._reader.read(self.data[name], self._prefix + name)


def _training(worker: Worker) -> TrainingState:
    assert worker.state.training is not None
    return worker.state.training


def _owned(
    training: TrainingState, tensors: Mapping[str, Tensor], prefix: str, rank: int
) -> dict[str, Tensor]:
    """Return the tensors of the parts owned by a replica."""
    owned = dict[str, Tensor]()
    for name, tensor in tensors.items():
        part = name.partition(" ")[0]
        if part not in training.owners:
            part = part.rpartition(".")[0]
        if training.owners[part] == rank:
            owned[prefix + name] = tensor
    return owned


def _messages(training: TrainingState) -> Iterator[tuple[int, list[str]]]:
    """Yield an owner and the names of its parts that are sent together."""
    for owner in sorted(set(training.owners.values())):
        names = list[str]()
        size = 0
        for name, rank in training.owners.items():
            if rank != owner:
                continue
            names.append(name)
            size += sum(tensor.nbytes for tensor in training.trainee.tensors(name))
            if size >= MESSAGE_BYTES:
                yield owner, names
                names = []
                size = 0
        if names:
            yield owner, names


def start(worker: Worker, section: RecoverySection, shot: int) -> None:
    """Start training; see `LowRankCorrections` and `WholeWeights`."""
    shard = worker.shard
    if section.rank == "all":
        from ray_surgeon.models.whole_weights import WholeWeights

        owners = _owners_of_parameters(worker)
        own = [name for name, owner in owners.items() if owner == worker.replicas.rank]
        worker.state.training = TrainingState(
            WholeWeights(shard, worker.masks, own),
            owners,
        )
        return
    from ray_surgeon.models.low_rank import LowRank, LowRankCorrections

    first = section.seed + 1_000_003 * shot
    parts = {}
    for name, module in shard.linears.items():
        seed = first + worker.layout.linear_numbers[name]
        parts[name] = LowRank(
            module,
            worker.masks[name],
            section.rank,
            seed,
            shard.device,
        )
    owners = {name: worker.owner(name) for name in parts}
    owned = [name for name in parts if worker.owns(name)]
    worker.state.training = TrainingState(LowRankCorrections(shard, parts, owned), owners)


def _owners_of_parameters(worker: Worker) -> dict[str, int]:
    """Return the owners of all parameters of blocks.

    A linear's parameters belong to the linear's owner, all others to the owner of the first linear
    of their block.
    """
    from ray_surgeon.models.whole_weights import block_parameters

    layout = worker.layout
    owner_of_linear = {}
    owner_of_block = dict[int | None, int]()
    for linear in worker.shard.linears:
        owner = worker.owner(linear)
        owner_of_linear[linear] = owner
        owner_of_block.setdefault(layout.block_of(linear), owner)
    owners = {}
    for name in block_parameters(worker.shard):
        of_block = owner_of_block[layout.block_of(name)]
        owners[name] = owner_of_linear.get(name.rpartition(".")[0], of_block)
    return owners


@collective
def step(worker: Worker, num_tokens: int, rate: float) -> None:
    """Reduce the gradients to their owners, which make a step and broadcast the result."""
    training = _training(worker)
    trainee = training.trainee
    for owner, names in _messages(training):
        gradients = list[Tensor]()
        for name in names:
            gradients.extend(trainee.gradients(name, num_tokens))
        together(worker.replicas.reduce, gradients, owner)
    trainee.step(rate)
    share(worker)


@collective
def share(worker: Worker) -> None:
    """Broadcast the trained tensors from their owners to the other replicas."""
    training = _training(worker)
    for owner, names in _messages(training):
        tensors = list[Tensor]()
        for name in names:
            tensors.extend(training.trainee.tensors(name))
        together(worker.replicas.broadcast, tensors, owner)


def keep_best(worker: Worker) -> None:
    """Keep the current state as the best."""
    training = _training(worker)
    training.best = None  # frees its memory before the new one is copied
    training.best = training.trainee.best()


def take_best(worker: Worker) -> None:
    """Restore the best state."""
    training = _training(worker)
    assert training.best is not None
    training.trainee.back_to(training.best)


def round_as_absorbed(worker: Worker) -> None:
    """Compute outputs as if the weights had absorbed the corrections."""
    _training(worker).trainee.rounds = True


def save(worker: Worker, folder: str, num_steps: int) -> tuple[SavedFile, ...]:
    """Write the current state and the best one; each tensor is written by its owner."""
    training = _training(worker)
    rank = worker.replicas.rank
    tensors = _owned(training, training.trainee.state(), _PRESENT, rank)
    tensors.update(_owned(training, training.best or {}, _BEST, rank))
    shard = worker.index.shard + 1
    replica = worker.index.replica + 1
    name = f"training-{num_steps:08d}-{shard:04d}-{replica:04d}"
    return save_tensors(folder, name, tensors)


def go_on(worker: Worker, files: Sequence[SavedFile]) -> None:
    """Restore the state that `save` wrote, possibly on another number of workers."""
    training = _training(worker)
    best = _Saved(files, _BEST)
    if best:
        training.trainee.back_to(best)
        training.best = training.trainee.best()
    training.trainee.load_state(_Saved(files, _PRESENT))


def end(worker: Worker, absorbs: bool) -> tuple[float, float]:
    """Absorb the training into the weights, or undo it.

    Returns:
        Sums over the owned weights of the two values of `Trainee.absorb`: the change that arrived,
        and the trained change.
    """
    training = _training(worker)
    worker.state.training = None
    if not absorbs:
        training.trainee.remove()
        return 0.0, 0.0
    arrived = []
    wanted = []
    for name, (arrived_part, wanted_part) in training.trainee.absorb().items():
        if training.owners[name] == worker.replicas.rank:
            arrived.append(arrived_part)
            wanted.append(wanted_part)
    return sum(arrived), sum(wanted)
