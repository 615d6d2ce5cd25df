"""What workers do in a recovery."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ray_surgeon.models.low_rank import LowRank, LowRankCorrections
from ray_surgeon.models.whole_weights import WholeWeights, block_parameters
from ray_surgeon.runtime.collectives import MESSAGE_BYTES, together
from ray_surgeon.runtime.weights import SavedFile, save_tensors
from ray_surgeon.runtime.worker import Worker, collective
from ray_surgeon.runtime.worker_state import TrainingState
from ray_surgeon.spec.recovery import RecoverySection
from ray_surgeon.storage import tensor_files

_PRESENT = "present "
_BEST = "best "
"""How the names of tensors of a state begin in files."""


class _Saved(UserDict[str, Any]):
    """Tensors of committed files by name, each of which is read when it is wanted."""

    def __init__(self, files: Sequence[SavedFile], prefix: str) -> None:
        """Know where those are whose names begin so, by the rest of their names."""
        keys = ((key, file.uri) for file in files for key in file.keys if key.startswith(prefix))
        super().__init__({key.removeprefix(prefix): uri for key, uri in keys})
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
    """Return the tensors of parts that a replica owns; other replicas have the same of some."""
    owned = dict[str, Tensor]()
    for name, tensor in tensors.items():
        part = name.partition(" ")[0]
        if part not in training.owners:
            part = part.rpartition(".")[0]
        if training.owners[part] == rank:
            owned[prefix + name] = tensor
    return owned


def _messages(training: TrainingState) -> Iterator[tuple[int, list[str]]]:
    """Yield an owner and parts of it that travel together."""
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
    """Start to train; see `LowRankCorrections` and `WholeWeights`."""
    shard = worker.shard
    if section.rank == "all":
        owners = _owners_of_parameters(worker)
        own = [name for name, owner in owners.items() if owner == worker.replicas.rank]
        worker.state.training = TrainingState(WholeWeights(shard, worker.masks, own), owners)
        return
    first = section.seed + 1_000_003 * shot
    parts = {}
    for name, module in shard.linears.items():
        seed = first + worker.layout.linear_numbers[name]
        parts[name] = LowRank(module, worker.masks[name], section.rank, seed, shard.device)
    owners = {name: worker.owner(name) for name in parts}
    owned = [name for name in parts if worker.owns(name)]
    worker.state.training = TrainingState(LowRankCorrections(shard, parts, owned), owners)


def _owners_of_parameters(worker: Worker) -> dict[str, int]:
    """Return the owners of all parameters of blocks.

    Those of a linear are its own, all others those of the first linear of their block.
    """
    owner_of = {name: worker.owner(name) for name in worker.shard.linears}
    first = dict[int | None, int]()
    for name, owner in owner_of.items():
        first.setdefault(worker.layout.block_of(name), owner)
    return {
        name: owner_of.get(name.rpartition(".")[0], first[worker.layout.block_of(name)])
        for name in block_parameters(worker.shard)
    }


@collective
def step(worker: Worker, num_tokens: int, rate: float) -> None:
    """Sum the gradients to the owners, which make a step and send the result back."""
    training = _training(worker)
    trainee = training.trainee
    for owner, names in _messages(training):
        gradients = [part for name in names for part in trainee.gradients(name, num_tokens)]
        together(worker.replicas.reduce, gradients, owner)
    trainee.step(rate)
    share(worker)


@collective
def share(worker: Worker) -> None:
    """Send what was trained from its owners to the other replicas."""
    training = _training(worker)
    for owner, names in _messages(training):
        tensors = [tensor for name in names for tensor in training.trainee.tensors(name)]
        together(worker.replicas.broadcast, tensors, owner)


def keep_best(worker: Worker) -> None:
    """Keep the present state as the best."""
    training = _training(worker)
    training.best = None  # not beside the new one
    training.best = training.trainee.best()


def take_best(worker: Worker) -> None:
    """Go back to the best state."""
    training = _training(worker)
    assert training.best is not None
    training.trainee.back_to(training.best)


def round_as_absorbed(worker: Worker) -> None:
    """Let outputs be those of the weights once they have absorbed the corrections."""
    _training(worker).trainee.rounds = True


def save(worker: Worker, folder: str, num_steps: int) -> tuple[SavedFile, ...]:
    """Write the present state and the best one after so many steps, each tensor by its owner."""
    training = _training(worker)
    rank = worker.replicas.rank
    tensors = _owned(training, training.trainee.state(), _PRESENT, rank)
    tensors.update(_owned(training, training.best or {}, _BEST, rank))
    name = f"training-{num_steps:08d}-{worker.index.shard + 1:04d}-{worker.index.replica + 1:04d}"
    return save_tensors(folder, name, tensors)


def go_on(worker: Worker, files: Sequence[SavedFile]) -> None:
    """Go back to what `save` has written on all workers, of which there may have been more."""
    training = _training(worker)
    if best := _Saved(files, _BEST):
        training.trainee.back_to(best)
        training.best = training.trainee.best()
    training.trainee.load_state(_Saved(files, _PRESENT))


def end(worker: Worker, absorbs: bool) -> tuple[float, float]:
    """Keep what was trained, or remove it without a trace.

    Returns how much of it arrived in the owned weights, see `Trainee.absorb`.
    """
    training = _training(worker)
    worker.state.training = None
    if not absorbs:
        training.trainee.remove()
        return 0.0, 0.0
    parts = training.trainee.absorb().items()
    own = [of_part for name, of_part in parts if training.owners[name] == worker.replicas.rank]
    return sum(arrived for arrived, _ in own), sum(wanted for _, wanted in own)
