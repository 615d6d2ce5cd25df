"""What workers do while low-rank corrections are trained."""

from __future__ import annotations

from ray_surgeon.models.low_rank import CorrectionState, LowRank, LowRankCorrections
from ray_surgeon.runtime.collectives import together
from ray_surgeon.runtime.worker import Worker, collective
from ray_surgeon.stages.correction.section import CorrectionSection


def start(worker: Worker, section: CorrectionSection, shot: int) -> None:
    """Put B A beside every linear of a worker; see `LowRankCorrections`."""
    shard = worker.shard
    first = section.seed + 1_000_003 * shot
    parts = {}
    for name, module in shard.linears.items():
        seed = first + worker.layout.linear_numbers[name]
        parts[name] = LowRank(module, worker.masks[name], section.lora_rank, seed, shard.device)
    owned = {name for name in shard.linears if worker.owns(name)}
    worker.keep(LowRankCorrections(shard, parts, owned))


@collective
def step(worker: Worker, num_tokens: int, rate: float) -> None:
    """Sum the gradients to the owners, which make a step and send the result back."""
    corrections = worker.kept(LowRankCorrections)
    owned: dict[int, list[str]] = {}
    for name in worker.shard.linears:
        owned.setdefault(worker.owner(name), []).append(name)
    for owner, names in sorted(owned.items()):
        gradients = [part for name in names for part in corrections.gradients(name, num_tokens)]
        together(worker.replicas.reduce, gradients, owner)
    corrections.step(rate)
    for owner, names in sorted(owned.items()):
        parts = [corrections.parts[name] for name in names]
        tensors = [x.detach() for part in parts for x in (part.A, part.B)]
        together(worker.replicas.broadcast, tensors, owner)


def keep_state(worker: Worker) -> None:
    """Keep the present state as the best."""
    worker.keep(worker.kept(LowRankCorrections).state())


def take_state(worker: Worker) -> None:
    """Go back to the best state."""
    worker.kept(LowRankCorrections).restore(worker.kept(CorrectionState))


def round_as_absorbed(worker: Worker) -> None:
    """Let outputs be those of the weights once they have absorbed the corrections."""
    worker.kept(LowRankCorrections).rounds = True


def end(worker: Worker, absorbs: bool) -> tuple[float, float]:
    """Add every B A to its weight, or remove the corrections without a trace.

    Returns how much of it arrived in the owned weights, see `LowRankCorrections.absorb`.
    """
    if worker.has(CorrectionState):
        worker.drop(CorrectionState)
    corrections = worker.drop(LowRankCorrections)
    if not absorbs:
        corrections.remove()
        return 0.0, 0.0
    parts = corrections.absorb().items()
    owned = [of_linear for name, of_linear in parts if worker.owns(name)]
    return sum(arrived for arrived, _ in owned), sum(wanted for _, wanted in owned)
